"""`surgvqa probe`: compares answers to original and altered samples, to see whether the model listens and looks.

Light to import; answering is in ask_all.py.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from surgvqa.config.options import ProbeOptions
from surgvqa.data.clusters import clusters_of
from surgvqa.data.draw import draw_evenly
from surgvqa.data.lookup import check_samples
from surgvqa.data.samples import read_samples
from surgvqa.errors import UsageError
from surgvqa.evaluation.command import prediction_of, write_lines
from surgvqa.evaluation.model_folders import require_model
from surgvqa.files import write_json_atomic
from surgvqa.outcome import Outcome
from surgvqa.probe.conditions import AS_IT_IS, CONDITIONS, Case, Pool, cases_of
from surgvqa.probe.summary import Answered, Types, conclude, condition_row
from surgvqa.runs.folder import Run
from surgvqa.runs.history import find_run, start_of

REQUIRED = ("checkpoint", "eval_data_path", "frames_dir", "audio_dir")


def check(options: ProbeOptions) -> None:
    """Raises UsageError for what would stop the run later: options, checkpoint, samples, frames, spoken questions."""
    given = {name: getattr(options, name) for name in REQUIRED}
    given["audio_dir"] = options.eval_audio_dir or options.audio_dir
    if options.input_mode == "text_only":
        del given["audio_dir"]
    if missing := [f"--{name}" for name in given if not given[name]]:
        raise UsageError(f"missing {', '.join(missing)}")
    asked = _conditions(options)
    if not asked:
        needs = ", ".join(f"{name} ({' or '.join(CONDITIONS[name].needs)})" for name in options.conditions or ())
        raise UsageError(f"conditions: none applies to input_mode {options.input_mode}: {needs}")
    if options.train_data_path:
        read_samples(options.train_data_path)
    require_model(options)
    check_samples(given["eval_data_path"], given["frames_dir"], given.get("audio_dir"))


def run(options: ProbeOptions, run: Run) -> Outcome:
    """Asks the cases without an answer and draws conclusions. Writes report.json into the run folder."""
    from surgvqa.probe.ask_all import ask_all, wordings

    began = time.monotonic()
    # not in `check`, which does not know the workspace
    places = [run.folder.parent]
    earlier = find_run(options.resume, places, "probe", start_of(run.id, places)) if options.resume else None
    samples = read_samples(str(options.eval_data_path))
    pool = Pool([*samples, *wordings(options)], clusters_of(samples))
    probed = draw_evenly(samples, options.max_samples, options.probe_seed)
    planned = {AS_IT_IS: [Case(AS_IT_IS, index) for index in probed]}
    for name in _conditions(options):
        planned[name] = cases_of(name, probed, pool, options.probe_seed)
    lacking = [name for name, cases in planned.items() if not cases]
    if lacking:
        run.warning(f"{', '.join(lacking)}: left out, because no sample can provide what is needed")
    cases = [case for group in planned.values() for case in group]
    answers, facts = ask_all(options, pool, cases, earlier, run)

    as_it_is = {case.index: answer for case, answer in zip(cases, answers) if case.condition == AS_IT_IS}
    answered: dict[str, list[Answered]] = {name: [] for name in planned if name not in lacking}
    for case, answer in zip(cases, answers):
        answered[case.condition].append(Answered(case, answer, as_it_is[case.index]))
    types = Types(pool.samples)
    rows = {name: condition_row(group, pool, types) for name, group in answered.items()}
    base = rows.pop(AS_IT_IS)
    verdicts, conclusion = conclude(rows)
    data = {
        "run": run.id,
        "samples": len(probed),
        "clusters": len({pool.clusters[index] for index in probed}),
        "input_mode": options.input_mode,
        "accuracy": base["accuracy"],
        "conditions": rows,
        "verdicts": verdicts,
        "conclusion": conclusion,
        **facts,
        "seconds": time.monotonic() - began,
    }
    # in the format of an evaluation, for `surgvqa report`
    write_lines(run.folder / "predictions.jsonl", [prediction_of(samples[i], as_it_is[i]) for i in probed])
    write_json_atomic(run.folder / "report.json", data)
    return Outcome(data, show=lambda console: draw(console, data))


def _conditions(options: ProbeOptions) -> list[str]:
    """The requested conditions that alter an input of the model, in the order of CONDITIONS."""
    asked = options.conditions or CONDITIONS
    return [name for name, c in CONDITIONS.items() if name in asked and options.input_mode in c.needs]


def draw(console: Any, report: Mapping[str, Any]) -> None:
    """Draws a table of the conditions with a bar of their influence, and the conclusions."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from surgvqa.terminal.drawing import bar

    wide = console.width >= 100
    table = Table(box=box.SIMPLE, show_edge=False)
    table.add_column("instead" if wide else "condition")
    for heading in ("n", "influence"):
        table.add_column(heading, justify="right", no_wrap=True)
    if wide:
        table.add_column(no_wrap=True)
    for heading in ("accuracy", "difference"):
        table.add_column(heading, justify="right", no_wrap=True)
    modality = None
    for name, row in report["conditions"].items():
        if modality not in (None, CONDITIONS[name].modality):
            table.add_section()
        modality = CONDITIONS[name].modality
        bars = [bar(row["influence"], width=16, alarm=False)] if wide else []
        (low, high), (worse, better) = row["influence_interval"], row["interval"]
        table.add_row(
            Text(CONDITIONS[name].text if wide else name),
            str(row["samples"]),
            f"{100 * row['influence']:.0f} [{100 * low:.0f}, {100 * high:.0f}]",
            *bars,
            f"{100 * row['accuracy']:.1f}",
            f"{100 * row['difference']:+.1f} [{100 * worse:+.1f}, {100 * better:+.1f}]",
        )
    console.print(table)
    for sentence in report["conclusion"]:
        console.print(Text(sentence))
    console.print(
        f"{report['samples']} samples in {report['clusters']} clusters; label accuracy unaltered: "
        f"{100 * report['accuracy']:.1f} %. influence: answers that change, in %; accuracy: against the sample's own "
        "label; difference: to the unaltered samples, in points; [95 % interval, clustered]",
        style="dim",
    )
