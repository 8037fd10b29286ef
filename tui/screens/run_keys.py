"""What can be done with the run that is followed: stop, continue, evaluate, fetch."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

from textual import work

from surgvqa.errors import SurgvqaError
from tui import words
from tui.dialogs.confirm import Confirm, when_yes
from tui.follow.follower import Follower
from tui.screens.base import PanelScreen, RunStarted
from tui.session import Session
from tui.targets.threads import watched


class RunKeys(PanelScreen):
    """The keys that act on a job. `follower` is the run that they mean."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.follower: Follower | None = None

    def resumable(self) -> bool:
        """Whether a training ended early and left a checkpoint."""
        follower = self.follower
        return bool(
            follower
            and follower.model.command == "train"
            and follower.state in ("stopped", "failed", "died")
            and follower.model.checkpoints
        )

    def way_on(self) -> tuple[str, list[str]] | None:
        """What to go on with after an out-of-memory error that ended the training."""
        follower = self.follower
        ended = follower and follower.model.command == "train" and follower.state in ("failed", "died")
        return follower.model.way_on if follower and ended else None

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        follower = self.follower
        recorded = follower is not None and follower.recording
        if action == "stop":
            return follower is not None and follower.active and not recorded
        if action == "resume":
            return self.resumable() and not recorded
        if action == "way_on":
            return self.way_on() is not None
        if action == "fetch":
            return bool(follower and not follower.active and self.session.host)
        if action == "evaluate":
            ended = follower and follower.model.command == "train" and follower.state in ("finished", "stopped")
            return bool(ended) and not recorded
        return super().check_action(action, parameters)

    def action_stop(self) -> None:
        """Asks first."""
        follower = self.follower
        if follower is None:
            return
        detail = f"{follower.run_id}\nIt saves what it has and ends; after 30 s it is ended by force."
        self.app.push_screen(
            Confirm("Stop this run?", detail, "stop it"), when_yes(lambda: self._stop(follower.run_id))
        )

    @work(group="stop", exit_on_error=False)
    async def _stop(self, run_id: str) -> None:
        self.say("stopping: waiting for its checkpoint …")
        state = await self.stop_run(run_id)
        if state:
            self.say(f"{run_id}: {state}", "success" if state in ("stopped", "finished") else "warning")

    def action_resume(self) -> None:
        self._resume("Continue this training")

    def action_way_on(self) -> None:
        """Applies what the out-of-memory error proposed."""
        way_on = self.way_on()
        assert way_on
        self._resume("Go on with this training", *way_on[1])

    def _resume(self, what: str, *changes: str) -> None:
        assert self.follower
        target, run_id = self.session.target, self.follower.run_id
        self.ask_beside(what, lambda share: self._launch(partial(target.resume, run_id, *changes, share=share)))

    def action_evaluate(self) -> None:
        assert self.follower
        launch = partial(self.session.target.launch, "evaluate", "--checkpoint", self.follower.run_id)
        self.ask_beside("Evaluate", lambda share: self._launch(partial(launch, share=share)))

    @work(group="launch", exit_on_error=False)
    async def _launch(self, launch: Callable[[], Awaitable[str]]) -> None:
        run_id = await self.start(launch)
        if run_id:
            self.post_message(RunStarted(run_id))

    @work(group="fetch", exclusive=True, exit_on_error=False)
    async def action_fetch(self) -> None:
        """Brings the run home; what has arrived stays when the panel is closed, and the next fetch goes on there."""
        host, follower = self.session.host, self.follower
        assert host and follower
        try:
            done = await watched(partial(host.fetch, follower.run_id), self.say)
        except (SurgvqaError, OSError) as error:
            self.say(str(error), "error")
            return
        folders = ", ".join(words.short_path(folder, self.workspace_root) for folder in done["folders"])
        self.say(f"fetched {done['files']} files, verified: {folders}", "success")
