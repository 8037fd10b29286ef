"""Plans: what is to happen after a job on a rented machine, and how far it has come. One file for each machine.

A plan lies beside the ledger, so that it goes on whatever becomes of the process that carries it out.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from remote.cloud.documents import read_as
from remote.cloud.ledger import Ledger, Record
from remote.cloud.steps import STEPS
from surgvqa.errors import UsageError
from surgvqa.files import fsync_folder, write_json_atomic

STAGES = ("check", "launch", "job", *STEPS, "handed", "done")
"""check: whether the machine can end itself; handed: it carries out the remaining steps."""
KINDS = {"name": "text", "label": "text", "workspace": "text", "job": "a list", "needs": "a list", "then": "a list",
         "token": "text", "stage": "text", "run": "text", "state": "text", "evaluation": "text",
         "evaluation_state": "text", "cut": "text", "discard": "a list", "fetched": "a list", "max_cost": "a number",
         "max_hours": "a number", "busy_at": "a time", "idle": "text",
         "scores": "an object", "end_from": "text", "results": "text"}  # fmt: skip


@dataclass
class Plan:
    """A job and the steps that follow it."""

    name: str
    """The machine's name in the ledger."""
    label: str
    """Of the very machine: a later one of the same name is another."""
    workspace: str
    """The local folder that results are fetched into."""
    job: list[str]
    """The command and its options, with paths on the machine."""
    needs: list[str]
    """Inputs that must exist on the machine before the job starts."""
    then: list[str]
    token: str
    """Token of the launches, by which the machine recognises what it has already started."""
    share: bool = False
    sync: bool = False
    discard: list[str] = field(default_factory=list)
    """Runs that may be lost with the machine."""
    max_cost: float | None = None
    """Limit in US dollars for the machine since it was rented."""
    max_hours: float | None = None
    """Since the machine was rented."""
    end_from: str = "laptop"
    """Who carries out the steps after the job: laptop (this computer) or host (the machine itself)."""
    results: str = ""
    """Where the machine copies its results before it ends itself: as in remote/agent/results.py."""
    stage: str = "launch"
    """The next step: one of STAGES."""
    run: str = ""
    state: str = ""
    """How the job ended."""
    evaluation: str = ""
    """The evaluation's run id."""
    evaluation_state: str = ""
    cut: str = ""
    """Why the job or the evaluation was ended early, or ""."""
    busy_at: float | None = None
    """When the job ended, or when the GPU was last seen at work after it."""
    idle: str = ""
    """What was told of an idle machine after the job, or ""."""
    fetched: list[str] = field(default_factory=list)
    scores: dict[str, Any] = field(default_factory=dict)
    """The evaluation's result."""
    told: bool = False
    """Whether the user was told how it ended."""

    @property
    def going(self) -> bool:
        return self.stage != "done"

    def idle_s(self, now: float) -> float:
        """Seconds for which the machine has done nothing since its job, while a step is not done; else 0."""
        return max(0.0, now - self.busy_at) if self.busy_at is not None and self.stage in STEPS else 0.0


class Plans:
    """The plans beside a ledger. `locked` of its `lock` keeps two processes from carrying out one plan."""

    def __init__(self, ledger: Ledger):
        self.folder = ledger.folder / "plans"
        self.lock = Ledger(self.folder)

    def write(self, plan: Plan) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_json_atomic(self.folder / f"{plan.name}.json", asdict(plan))
        fsync_folder(self.folder)

    def remove(self, plan: Plan) -> None:
        (self.folder / f"{plan.name}.json").unlink(missing_ok=True)

    def of(self, record: Record) -> Plan | None:
        """The plan for exactly this machine, or None. Raises UsageError if its file is damaged."""
        file = self.folder / f"{record.name}.json"
        if not file.exists():
            return None
        plan, wrong = read_as(Plan, file, KINDS)
        if plan and not wrong and (plan.stage not in STAGES or not plan.job or not set(plan.then) <= set(STEPS)):
            wrong = f"stage {plan.stage!r}, then {plan.then!r}"
        if wrong or not plan:
            raise UsageError(f"{file}: {wrong}; end the machine with surgvqa-remote end, then remove the file")
        return plan if plan.label == record.label else None
