"""Asks a model all cases of a probe. Encoders run once for all conditions, and equal cases are asked once."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from surgvqa.config.options import ProbeOptions
from surgvqa.data.dataset import ClipDataset, make_room_for_sockets
from surgvqa.data.lookup import AudioIndex
from surgvqa.data.processors import Processors, load_processors
from surgvqa.data.samples import Sample, read_samples
from surgvqa.errors import UsageError
from surgvqa.evaluation.answerer import load_answerer
from surgvqa.evaluation.answers import settings_of_answers
from surgvqa.evaluation.generate import answer_all
from surgvqa.evaluation.known import Lines, answer_keys, context_key, read_lines
from surgvqa.evaluation.model_folders import model_folders, required
from surgvqa.probe.alter import Alterations
from surgvqa.probe.conditions import Case, Pool
from surgvqa.provenance.hashes import Hashes
from surgvqa.runs.folder import Run

FILE = "answers.jsonl"


def wordings(options: ProbeOptions) -> list[Sample]:
    """Training samples with a recording, which provide other wordings; one sample for each recording and wording."""
    if not options.train_data_path:
        return []
    samples, found = read_samples(options.train_data_path), []
    if options.input_mode == "text_only":
        return samples
    audio = AudioIndex(required(options, "audio_dir"), samples)
    for sample in samples:
        with suppress(UsageError):  # the training's files may be missing
            audio.find(sample)
            found.append(sample)
    return found


def ask_all(
    options: ProbeOptions, pool: Pool, cases: Sequence[Case], earlier: Path | None, run: Run
) -> tuple[list[str], dict[str, Any]]:
    """(an answer to each case, in order; facts for the result).

    `earlier` is the run folder of a probe to resume. Each answer is written to answers.jsonl at once. Raises UsageError
    when the earlier run has no answers.
    """
    hashes = Hashes(run.workspace / "cache")
    context = context_key(settings_of_answers(options, hashes))
    hashes.save()
    make_room_for_sockets()
    with tempfile.TemporaryDirectory(prefix="altered-", dir=run.folder) as made:
        run.phase("alter", f"{len(cases)} cases")
        processors = load_processors(model_folders(options)[0])
        whole = Alterations(_pool_dataset(options, pool, processors, run), Path(made)).dataset(cases)
        heard = whole.audio_paths if whole.spoken else [None] * len(whole)
        questions = [None if options.input_mode == "audio_only" else sample.question for sample in whole.samples]
        key_of = answer_keys(
            context, whole.frame_paths, heard, questions, Hashes()
        )  # no stored hashes, because generated files are temporary
        with closing(Lines(run.folder / FILE)) as lines:
            known: dict[str, str] = {}
            for record in _earlier_answers(earlier) if earlier else ():
                known[record["key"]] = record["predicted_answer"]
                lines.add(record)
            first = {key: index for index, key in reversed(list(enumerate(key_of))) if key not in known}
            facts: dict[str, Any] = {"answers": len(key_of), "asked": len(first), "taken_over": len(known)}
            asked = sorted(first.values())
            if asked:
                run.phase("load model", str(options.checkpoint))
                coming = iter(asked)

                def keep(text: str, milliseconds: float) -> None:
                    index = next(coming)
                    known[key_of[index]] = text
                    case, sample = cases[index], pool.samples[cases[index].index]
                    about = {"condition": case.condition, "question_id": sample.id, "video_id": sample.video_id}
                    answer = {"predicted_answer": text, "inference_time_ms": milliseconds}
                    lines.add({"key": key_of[index], **about, **answer})

                facts |= answer_all(load_answerer(options), _reduce_to(whole, asked), options, run, keep)
        return [known[key] for key in key_of], facts


def _earlier_answers(folder: Path) -> Iterator[dict[str, Any]]:
    if not (folder / FILE).is_file():
        raise UsageError(f"resume: no {FILE} in {folder}, expected a run of `surgvqa probe`")
    return read_lines(folder / FILE)


def _pool_dataset(options: ProbeOptions, pool: Pool, processors: Processors, run: Run) -> ClipDataset:
    """The pool's samples with their files; training samples have only recordings."""
    evaluation = [pool.samples[index] for index in pool.evaluation]
    audio_dir = str(options.eval_audio_dir or options.audio_dir)
    frames_dir = required(options, "frames_dir")
    dataset = ClipDataset(evaluation, frames_dir, audio_dir, processors, options, with_answer=False)
    for text in dataset.warnings:
        run.warning(text)
    lent = list(pool.samples[len(evaluation) :])
    if lent:
        audio = AudioIndex(required(options, "audio_dir"), lent) if dataset.spoken else None
        dataset.samples += lent
        dataset.audio_paths += [str(audio.find(sample)) if audio else "" for sample in lent]
        dataset.frame_paths += [[] for _ in lent]
    return dataset


def _reduce_to(dataset: ClipDataset, indices: Sequence[int]) -> ClipDataset:
    """Reduces the dataset to these samples and returns it."""
    dataset.samples = [dataset.samples[i] for i in indices]
    dataset.frame_paths = [dataset.frame_paths[i] for i in indices]
    dataset.audio_paths = [dataset.audio_paths[i] for i in indices]
    return dataset
