"""Where work is done: the dialog that chooses a host, and the one that shows an unknown host's key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import OptionList, Static

from remote.ssh.host_keys import UnknownHostKey
from remote.ssh.hosts import HostEntry, read_hosts_files, ssh_config_names
from surgvqa.errors import SurgvqaError, UsageError
from tui import keys, words
from tui.dialogs.keys_line import KeysLine
from tui.session import Session
from tui.widgets.filtered import FilteredList

NAME = 20
RENT = "rent a machine…"
"""In place of a host's name; no host can be called so."""
NO_HOSTS = (
    "No hosts: neither ~/.ssh/config nor hosts.toml names one.\n"
    "Put one into ~/.ssh/config and press h again:\n\n"
    "    Host gpuhost\n        HostName 132.145.138.210\n        User ubuntu"
)


Row = tuple[str, HostEntry]


class HostList(FilteredList[Row]):
    """Hosts, and RENT, which stays below all of them."""

    orders: ClassVar[dict[str, Callable[[Row], Any]]] = {
        "as listed": lambda row: 0,
        "name": lambda row: (row[0] == RENT, row[0].lower()),
        "price": lambda row: (row[0] == RENT, row[1].price_per_hour or 0.0),
    }

    def __init__(self, session: Session) -> None:
        super().__init__(id="hosts")
        self.session = session

    def key(self, item: Row) -> str:
        return item[0]

    def row(self, item: Row) -> Content:
        name, entry = item
        if name == RENT:
            return Content(RENT)
        if name == self.session.here.name:
            return Content.assemble((f"{name:<{NAME}}", "bold"))
        host = self.session.hosts.get(name)
        price = None if entry.price_per_hour is None else words.price(entry.price_per_hour, "/h")
        about = "  ".join(part for part in (entry.gpus, price) if part)
        if host is None:
            return Content.assemble(f"{words.clip(name, NAME - 1):<{NAME}}", (about, "$muted"))
        state = words.connection("", host.connection)
        return Content.assemble((f"{words.clip(name, NAME - 1):<{NAME - 1}}", "bold"), state, (f"  {about}", "$muted"))

    def text(self, item: Row) -> str:
        return f"{item[0]} {self.row(item).plain}"


class HostPicker(ModalScreen[str | None]):
    """This machine, what hosts.toml and ~/.ssh/config name, and RENT. Hosts chosen before show their state."""

    BINDINGS: ClassVar[list[BindingType]] = keys.bindings("host_list")

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session
        self.known: dict[str, HostEntry] = {}
        self.problem = ""

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog wide"):
            yield Static("Where is work done?", classes="question", markup=False)
            hosts = HostList(self.session)
            yield hosts
            yield hosts.search
            yield Static("", id="hosts-detail", classes="detail", markup=False)
            yield KeysLine(first=(("Enter", "chooses"),))

    def on_mount(self) -> None:
        entries: dict[str, HostEntry] = {}
        try:
            wrong: dict[str, UsageError] = {}
            entries = read_hosts_files(self.session.here.workspace.root, wrong)
            self.problem = str(next(iter(wrong.values()), ""))
        except SurgvqaError as error:
            self.problem = str(error)
        names = dict.fromkeys([*self.session.hosts, *entries, *ssh_config_names()])
        self.known = {name: entries.get(name, HostEntry()) for name in names}
        self.show_hosts()
        self.query_one(HostList).focus()
        self.set_interval(1.0, self.show_hosts)

    def show_hosts(self) -> None:
        """The list with the connection states as they are now."""
        rows = [(self.session.here.name, HostEntry()), *self.known.items(), (RENT, HostEntry())]
        self.query_one(HostList).show(rows, self.session.target.name)
        none = "" if self.known else NO_HOSTS
        self.query_one("#hosts-detail", Static).update(Content(self.problem or none))

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(event.option.id)

    def action_leave(self) -> None:
        self.dismiss(None)


class HostKey(ModalScreen[bool]):
    """An unknown host's fingerprint; only y accepts it."""

    BINDINGS: ClassVar[list[BindingType]] = keys.bindings("host_key")

    def __init__(self, key: UnknownHostKey) -> None:
        super().__init__()
        self.key = key

    def compose(self) -> ComposeResult:
        host = self.key.host
        with Vertical(classes="dialog wide"):
            yield Static(f"{host.name}: unknown host key", classes="question", markup=False)
            where = f"{host.user}@{host.hostname}:{host.port} shows this {self.key.key.get_name()} key:"
            what = "Compare it with the one that the provider's console shows. Accepted, it goes to known_hosts."
            yield Static(
                Content.assemble(where, "\n\n  ", (self.key.fingerprint, "bold $accent"), "\n\n", what),
                classes="detail",
            )
            yield KeysLine()

    def action_answer(self, yes: bool) -> None:
        self.dismiss(yes)
