"""Renting a machine from the panel: offers, one confirmation with the price, all stages to Monitor, and its end."""

from __future__ import annotations

import time
from functools import partial

from textual import on, work
from textual.app import App

from tui import words
from tui.dialogs.confirm import Confirm, when_yes
from tui.dialogs.offers import Offers, Wanted
from tui.follow.notices import RunNotice
from tui.screens.base import JobHere, PanelScreen, RunStarted
from tui.screens.upload import UploadScreen
from tui.session import Session
from tui.settings.settings import Settings
from tui.targets.target import ACTIVE, newest_running

IDLE_TOLD_S = 300.0
"""A rented machine that does nothing for so long is told of, beside the head that shows it at once."""


class Renting(App[None]):
    """What the panel does about rented machines. The work is `surgvqa-remote rent` and `end`, in jobs of their own."""

    session: Session
    _idle_since: float | None = None
    _told_late: frozenset[str] | set[str] = frozenset()
    """Machines that were told to be idle after their jobs."""
    _whole_way = True
    """Whether a job follows on the machine that is being rented."""

    @property
    def front(self) -> PanelScreen | None:
        """The screen that is shown."""
        raise NotImplementedError

    def tell(self, told: RunNotice) -> None:
        """Tells the user, wherever they are."""
        raise NotImplementedError

    async def choose(self, name: str | None) -> None:
        """Makes a host, or this machine, the target."""
        raise NotImplementedError

    async def look_at_rented(self) -> None:
        """Tells of a machine that is idle, and leaves one that has ended."""
        host, ended = self.session.host, self.session.take_ended()
        for one in ended:
            self.session.renting = "" if one.name == self.session.renting else self.session.renting
            self.tell(RunNotice(f"{one.name} has ended; {words.price(one.cost)} by our clock", "success"))
        if host and host.name in [one.name for one in ended] and self.front:
            await self.choose(self.session.here.name)
        late = [one for one in self.session.rented if one.idle_s]
        for one in late:
            if one.name not in self._told_late:
                price = words.price(one.price_per_hour, " an hour")
                text = f"{one.name} is idle for {words.seconds(one.idle_s)} after its job, for {price}"
                self.tell(RunNotice(f"{text}: its results are not home yet", "error"))
        self._told_late = {one.name for one in late}
        if not self.session.idle():
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = time.monotonic()
        elif time.monotonic() - self._idle_since > IDLE_TOLD_S and (idle := self.session.rented_host()):
            self._idle_since = float("inf")
            price = words.price(idle.price_per_hour, " an hour")
            self.tell(
                RunNotice(f"{idle.name} is rented and does nothing, for {price}: x on Monitor ends it", "warning")
            )

    @work(group="offers", exclusive=True, exit_on_error=False)
    async def ask_for_offers(self) -> None:
        """The price list; what cannot be asked is said in it."""
        if self.front:
            self.front.say("asking for the price list …")
        answer = await self.session.here.command("offers", module="remote")
        offers = answer.data.get("offers")
        if self.front:
            self.front.say("")
            self.push_screen(Offers(offers if isinstance(offers, list) else [], answer.error), self._confirm_rent)

    def _confirm_rent(self, wanted: Wanted | None) -> None:
        if wanted is None:
            return
        price = words.price(wanted.price_per_hour, " an hour")
        detail = f"{wanted.type} in {wanted.region}: {price} from now until it is ended, whatever it does."
        if wanted.whole_way:
            detail += (
                "\nThen, by itself: set up, upload, train as Train has it, evaluate, bring everything home, verify, "
                "end it. This computer has to be awake for its end: until then it costs money."
            )
        else:
            detail += "\nNothing ends it by itself: x does."
        self.push_screen(Confirm(f"Rent it for {price}?", detail, "rent it"), when_yes(lambda: self._rent(wanted)))

    @work(group="launch", exit_on_error=False)
    async def _rent(self, wanted: Wanted) -> None:
        front, name = self.front, wanted.type.lower().replace("_", "-")[:40]
        if front is None:
            return
        words_of_it = ["rent", wanted.type, "--name", name]
        if wanted.whole_way:
            train = Settings("train", self.session.here.workspace, self.session.edited.get("train", {}))
            argv = train.argv(self.session.preset, everything=True)
            words_of_it += [*argv, "--then", "evaluate,fetch,terminate", "--sync"]
        run_id = await front.start(partial(self.session.here.launch, *words_of_it, module="remote"), "renting …")
        if run_id:
            self.session.renting, self._whole_way = name, wanted.whole_way
            await self._show_job(JobHere(run_id))

    @on(JobHere)
    async def _show_job(self, started: JobHere) -> None:
        """On Upload."""
        await self.switch_mode("upload")
        if isinstance(self.screen, UploadScreen):
            self.screen.follow_job(started.run_id)

    async def go_on_renting(self) -> None:
        """The machine that was rented becomes the host, and Monitor follows its job as soon as there is one."""
        name, session = self.session.renting, self.session
        if not name or not self.front:
            return
        if session.host is None or session.host.name != name:
            made = next((run for run in session.listed_here if run.command == "rent"), None)
            if made is not None and made.state == "finished":
                session.renting = name if self._whole_way else ""
                await self.choose(name)
            elif made is not None and made.state not in ACTIVE:
                session.renting = ""
        elif job := newest_running(session.listed):
            session.renting = ""
            self.front.post_message(RunStarted(job.id))
