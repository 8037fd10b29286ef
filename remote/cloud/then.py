"""Carries out a plan: the job, its evaluation, its results at home, and the machine's end.

Every step is recorded before the next begins. Carried out again after whatever ended it, a plan goes on: a launch is
known on the machine by its token, a fetch by the hashes of what is here, an end by the ledger.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from remote.agent.protocol import IDLE_PERCENT, IDLE_S
from remote.cloud.ledger import Ledger, Record
from remote.cloud.plan import Plan, Plans
from remote.cloud.provider import Clock, CloudError, Provider
from remote.cloud.renting import ENDING, end, machine_state
from remote.cloud.steps import STEPS
from remote.ssh.errors import Unreachable
from surgvqa.errors import SurgvqaError
from surgvqa.runs.reporter import Reporter
from surgvqa.terminal.figures import human_seconds

TICK_S = 60.0
"""The longest time between two looks that counts as silence of the run: this computer may have slept."""
ASK_PROVIDER_EVERY_S = 60.0
"""While the machine does not answer."""
LOOK_AGAIN_S = 30.0
"""At other runs of the machine that are not over yet."""
SCORES = ("samples", "keyword_accuracy", "label_accuracy", "majority_accuracy")


class MachineGone(SurgvqaError):
    """The machine was ended by the provider or by somebody else."""


@dataclass(frozen=True)
class Ended:
    """How a run on the machine ended."""

    state: str
    good: bool
    """Whether its work was done; a run that was stopped or ended with an error is not."""
    result: dict[str, Any]


class OnMachine(Protocol):
    """A plan's operations on the machine. Each method waits while the network is lost and calls the guard meanwhile."""

    def launch(self, words: list[str], needs: list[str], token: str, share: bool) -> str:
        """Starts the job once, however often it is asked with this token; returns its run id."""
        ...

    def watch(self, run: str, guard: Guard) -> Ended:
        """Follows a run until it ends, and stops it if the guard says so."""
        ...

    def check_end(self, plan: Plan) -> None:
        """Raises SurgvqaError if the machine could not do what follows the job."""
        ...

    def hand_over(self, plan: Plan, limit_s: float | None) -> None:
        """Makes the machine do what follows the job, within `limit_s` seconds."""
        ...

    def handed(self) -> str:
        """What is wrong with what the machine does for its own end; ""."""
        ...

    def going(self, discard: list[str]) -> list[str]:
        """Runs that have not ended."""
        ...

    def gpu_works(self) -> bool:
        """Whether a GPU there is at work, or it cannot be told."""
        ...

    def bring_home(self, discard: list[str], fetched: list[str]) -> list[str]:
        """Fetches every run, verified, and adds it to `fetched`; returns what could not be fetched, and why."""
        ...


class Guard:
    """Says when enough was spent, when the machine is idle after its job, and when it is gone."""

    def __init__(self, plan: Plan, record: Record, provider: Provider, ledger: Ledger, clock: Clock, report: Reporter):
        self._plan, self.record, self._provider, self._ledger = plan, record, provider, ledger
        self._plans, self._clock, self._report = Plans(ledger), clock, report
        self._idle_since: float | None = None
        self._idle_s = self._silent_s = 0.0
        """By the times of the run's events, and without any event; of the run that is followed."""
        self._ticked, self._told = clock.time(), 0.0
        self._asked = -ASK_PROVIDER_EVERY_S
        self.watches_idle = False
        """Whether to stop the run that is followed, if the GPU is idle."""

    def left_s(self) -> float | None:
        """Seconds until a limit is reached, or None without a limit."""
        plan, record, now = self._plan, self.record, self._clock.time()
        limits = []
        if plan.max_hours is not None:
            limits.append(record.asked + 3600 * plan.max_hours - now)
        if plan.max_cost is not None and record.price_per_hour:
            limits.append((plan.max_cost - record.cost(now)) / record.price_per_hour * 3600)
        return max(0.0, min(limits)) if limits else None

    def cost(self) -> float:
        return self.record.cost(self._clock.time())

    def see(self, event: dict[str, Any]) -> None:
        """An event of the run that is followed."""
        self._silent_s = 0.0
        busy, at = event.get("utilization_percent"), event.get("t")
        if event.get("kind") != "gpu" or not isinstance(busy, (int, float)) or not isinstance(at, (int, float)):
            return
        if busy >= IDLE_PERCENT:
            self._idle_since, self._idle_s = None, 0.0
            self.works()
        else:
            self._idle_since = at if self._idle_since is None else self._idle_since
            self._idle_s = at - self._idle_since

    def reason(self) -> str:
        """Why the current run must be stopped, or ""."""
        cost, hours = self.cost(), (self._clock.time() - self.record.asked) / 3600
        if self._plan.max_cost is not None and cost >= self._plan.max_cost:
            return f"it has cost ${cost:.2f}, --max_cost {self._plan.max_cost:g}"
        if self._plan.max_hours is not None and hours >= self._plan.max_hours:
            return f"rented for {hours:.1f} hours, --max_hours {self._plan.max_hours:g}"
        if self.watches_idle and self._idle_s >= IDLE_S:
            return f"its GPU was under {IDLE_PERCENT:g} % for {IDLE_S / 60:g} minutes"
        if self.watches_idle and self._silent_s >= IDLE_S:
            return f"it said nothing for {IDLE_S / 60:g} minutes"
        return ""

    def follows(self) -> None:
        """Another run is followed from now on."""
        self._idle_since, self._idle_s, self._silent_s = None, 0.0, 0.0

    def works(self) -> None:
        """The job has ended just now, or the GPU was seen at work after it."""
        plan, now = self._plan, self._clock.time()
        if plan.stage in STEPS and (plan.busy_at is None or now - plan.busy_at > TICK_S):
            plan.busy_at = now
            self._plans.write(plan)

    def tick(self) -> None:
        """To be called again and again while anything is waited for: warns of a machine that is idle after its job."""
        now = self._clock.time()
        self._silent_s += min(TICK_S, max(0.0, now - self._ticked))
        self._ticked = now
        if (idle_s := self._plan.idle_s(now)) >= IDLE_S and now - self._told >= IDLE_S:
            self._told = now
            price = f" for ${self.record.price_per_hour:.2f} an hour"
            self._plan.idle = f"idle for {human_seconds(idle_s)} after its job"
            self._plans.write(self._plan)
            self._report.warning(
                f"{self._plan.name} is {self._plan.idle}{price}, ${self.cost():.2f} so far, and its step "
                f"{self._plan.stage} is not done; to lose what is not fetched: surgvqa-remote end {self._plan.name} "
                "--discard all"
            )

    def away(self, text: str) -> None:
        """The machine does not answer. Says what it costs meanwhile; MachineGone when it has ended."""
        self._silent_s = 0.0  # nothing can be heard
        self.tick()
        record = self._ledger.read(self._plan.name)
        if record is None or record.label != self._plan.label or not record.open:
            raise MachineGone(f"{self._plan.name}: ended meanwhile by another command")
        if self._clock.time() - self._asked < ASK_PROVIDER_EVERY_S:
            return
        self._asked = self._clock.time()
        try:
            if machine_state(self._provider, self.record) in ENDING:
                raise MachineGone(f"{self._plan.name}: the provider has ended it")
        except CloudError:
            pass  # no network at all: nothing is known
        price = self.record.price_per_hour
        paid = f"; it costs ${price:.2f} an hour meanwhile, ${self.cost():.2f} so far" if price else ""
        over = f", and is over its limit ({reason})" if (reason := self.reason()) else ""
        self._report.warning(f"{text}; trying again{paid}{over}")


def carry_out(
    plan: Plan,
    plans: Plans,
    provider: Provider,
    ledger: Ledger,
    clock: Clock,
    on_machine: Callable[[Guard], OnMachine],
    report: Reporter,
) -> Record:
    """Does what is left of `plan`; returns the machine's record, closed when the plan ends it.

    Raises SurgvqaError when it cannot go on; the plan then stands where it was. CloudError when the provider does not
    end the machine. MachineGone when it ended before all was home: the plan is done then.
    """
    with plans.lock.locked(plan.name):
        record = ledger.read(plan.name)
        current = plans.of(record) if record else None
        if record is None or current is None:
            raise SurgvqaError(f"{plan.name}: its plan was taken back meanwhile")
        plan.__dict__.update(current.__dict__ | _limits(plan))  # another process may have gone on with it
        guard = Guard(plan, record, provider, ledger, clock, report)
        try:
            if not record.open and plan.going:
                raise MachineGone(f"{plan.name}: {record.state} already")
            _carry_out(plan, plans, guard, on_machine(guard), provider, ledger, clock, report)
        except MachineGone as gone:
            record = end(provider, ledger, clock, plan.name, lambda: [plan.run or "the job"])  # refused if it lives
            all_home, plan.stage = plan.stage in ("terminate", "handed", "done"), "done"
            plan.told = not all_home
            plans.write(plan)
            if not all_home:
                lost = f"{gone}; lost is what was not fetched of {plan.run or 'its job'}"
                raise MachineGone(f"{lost}; ${record.cost(clock.time()):.2f}") from None
        return ledger.read(plan.name) or record


def _limits(plan: Plan) -> dict[str, Any]:
    """The settings that may be changed while a plan runs."""
    return {"max_cost": plan.max_cost, "max_hours": plan.max_hours, "discard": plan.discard, "sync": plan.sync}


def _carry_out(
    plan: Plan,
    plans: Plans,
    guard: Guard,
    there: OnMachine,
    provider: Provider,
    ledger: Ledger,
    clock: Clock,
    report: Reporter,
) -> None:
    def done(stage: str) -> None:
        plan.stage = stage
        plans.write(plan)

    if plan.stage == "check":
        report.phase("check", f"whether {plan.name} can end itself")
        try:
            there.check_end(plan)
        except (Unreachable, MachineGone):
            raise
        except SurgvqaError:
            plans.remove(plan)
            raise
        done("launch")
    if plan.stage == "launch":
        report.phase("launch", " ".join(plan.job[:1]))
        try:
            plan.run = there.launch(plan.job, plan.needs, plan.token, plan.share)
        except (Unreachable, MachineGone):
            raise
        except SurgvqaError:  # refused: nothing has started, and nothing is left to do
            plans.remove(plan)
            raise
        done("job")
    if plan.stage == "job" and plan.end_from == "host":
        report.phase("hand over", f"the end of {plan.name} to itself")
        there.hand_over(plan, guard.left_s())
        done("handed")
    if plan.stage == "handed":
        if machine_state(provider, guard.record) in ENDING:
            end(provider, ledger, clock, plan.name, lambda: [plan.run])
            done("done")
        elif problem := there.handed():
            raise SurgvqaError(f"{plan.name}: NOT ENDED: {problem}")
        return
    if plan.stage == "job":
        report.phase(plan.job[0], plan.run)
        job = there.watch(plan.run, guard)
        plan.state, plan.cut = _how(job), "" if job.good else guard.reason()
        done("evaluate")
        guard.works()
    if plan.stage == "evaluate":
        if "evaluate" in plan.then:
            _evaluate(plan, plans, guard, there, report)
        done("fetch")
    if plan.stage in ("fetch", "terminate"):

        def unfetched() -> list[str]:
            report.phase("fetch")
            plan.fetched.clear()  # what is here may have been removed since
            left = there.bring_home(plan.discard, plan.fetched)
            if not left:
                done("terminate")
                if "terminate" in plan.then:
                    report.phase("terminate", plan.name)
            return left

        if "terminate" in plan.then:
            _wait_for_others(plan, guard, there, clock, report)
            end(provider, ledger, clock, plan.name, unfetched)
        elif "fetch" in plan.then and plan.stage == "fetch" and (left := unfetched()):
            raise SurgvqaError(f"{plan.name}: not fetched: {', '.join(left)}")
        done("done")


def _how(ended: Ended) -> str:
    return "failed" if ended.state == "finished" and not ended.good else ended.state


def _evaluate(plan: Plan, plans: Plans, guard: Guard, there: OnMachine, report: Reporter) -> None:
    """A failure here does not stop the plan, because the checkpoint is fetched and can be evaluated again."""
    why = plan.cut or guard.reason()
    if why and not plan.evaluation:
        plan.evaluation_state = "not started"
        report.warning(f"{plan.run} is not evaluated: {why}")
        return
    guard.follows()
    guard.watches_idle = True
    report.phase("evaluate", plan.run)
    try:
        if not plan.evaluation:
            plan.evaluation = there.launch(evaluation_of(plan), [], f"{plan.token}e", plan.share)
            plans.write(plan)
        ended = there.watch(plan.evaluation, guard)
    except (Unreachable, MachineGone):
        raise
    except SurgvqaError as error:
        plan.evaluation_state = "failed"
        report.warning(f"{plan.run} is not evaluated: {error}")
    else:
        plan.evaluation_state = _how(ended)
        plan.cut = plan.cut or ("" if ended.good else guard.reason())
        plan.scores = {name: ended.result[name] for name in SCORES if isinstance(ended.result.get(name), (int, float))}
    guard.watches_idle = False


def evaluation_of(plan: Plan) -> list[str]:
    """The arguments of the command that evaluates the plan's run."""
    return ["evaluate", "--checkpoint", plan.run, *of_the_data(plan.job)]


DATA = ("eval_data_path", "frames_dir", "audio_dir", "eval_audio_dir")


def of_the_data(job: list[str]) -> list[str]:
    """The options of the job that say where the samples of an evaluation are."""
    kept: list[str] = []
    for word, after in zip(job, [*job[1:], ""]):
        name, equals, _ = word.partition("=")
        if name.removeprefix("--") in DATA and name != word.lstrip("-"):
            kept += [word] if equals else [word, after]
    return kept


def _wait_for_others(plan: Plan, guard: Guard, there: OnMachine, clock: Clock, report: Reporter) -> None:
    """Waits until no other run is active on the machine. Raises SurgvqaError if a limit is reached first."""
    said: list[str] = []
    while going := there.going(plan.discard):
        if there.gpu_works():
            guard.works()
        guard.tick()
        if reason := guard.reason():
            raise SurgvqaError(f"{plan.name}: NOT ENDED: {', '.join(going)} still at work there; {reason}")
        if going != said:
            report.warning(f"{plan.name} ends when {', '.join(going)} is over")
            said = going
        clock.sleep(LOOK_AGAIN_S)
