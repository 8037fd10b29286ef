"""Where work is done: the dialog that chooses a host, and the one that shows an unknown host's key."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from remote.ssh.host_keys import UnknownHostKey
from remote.ssh.hosts import HostEntry, read_hosts_files, ssh_config_names
from surgvqa.errors import SurgvqaError
from tui import words
from tui.session import Session

NAME = 20
NO_HOSTS = (
    "No hosts: neither ~/.ssh/config nor hosts.toml names one.\n"
    "Put one into ~/.ssh/config and press h again:\n\n"
    "    Host gpuhost\n        HostName 132.145.138.210\n        User ubuntu"
)


class HostPicker(ModalScreen[str | None]):
    """This machine, then what hosts.toml and ~/.ssh/config name. Hosts chosen before show their connection state."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,h,q", "leave", "leave")]

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session
        self.known: dict[str, HostEntry] = {}
        self.problem = ""

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog wide"):
            yield Static("Where is work done?", classes="question", markup=False)
            yield OptionList(id="hosts", markup=False)
            yield Static("", id="hosts-detail", classes="detail", markup=False)
            keys: list[str | tuple[str, str]] = [
                ("Enter", "$footer-key-foreground"),
                " chooses   ",
                ("Esc", "$footer-key-foreground"),
                " leaves it",
            ]
            yield Static(Content.assemble(*keys), classes="keys")

    def on_mount(self) -> None:
        entries: dict[str, HostEntry] = {}
        try:
            entries = read_hosts_files(self.session.here.workspace.root)
        except SurgvqaError as error:
            self.problem = str(error)
        names = dict.fromkeys([*self.session.hosts, *entries, *ssh_config_names()])
        self.known = {name: entries.get(name, HostEntry()) for name in names}
        self.show_hosts()
        self.set_interval(1.0, self.show_hosts)

    def show_hosts(self) -> None:
        """The list with the connection states as they are now."""
        listed = self.query_one(OptionList)
        rows = {self.session.here.name: Content.assemble((f"{self.session.here.name:<{NAME}}", "bold"))}
        rows |= {name: self._row(name, entry) for name, entry in self.known.items()}
        if not listed.option_count:
            listed.add_options([Option(row, id=name) for name, row in rows.items()])
            listed.highlighted = listed.get_option_index(self.session.target.name)
            listed.focus()
        else:
            for name, row in rows.items():
                listed.replace_option_prompt(name, row)
        none = "" if self.known else NO_HOSTS
        self.query_one("#hosts-detail", Static).update(Content(self.problem or none))

    def _row(self, name: str, entry: HostEntry) -> Content:
        host = self.session.hosts.get(name)
        price = None if entry.price_per_hour is None else f"{entry.price_per_hour:.2f}/h"
        about = "  ".join(part for part in (entry.gpus, price) if part)
        if host is None:
            return Content.assemble(f"{words.clip(name, NAME - 1):<{NAME}}", (about, "$muted"))
        state = words.connection("", host.connection)
        return Content.assemble((f"{words.clip(name, NAME - 1):<{NAME - 1}}", "bold"), state, (f"  {about}", "$muted"))

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(event.option.id)

    def action_leave(self) -> None:
        self.dismiss(None)


class HostKey(ModalScreen[bool]):
    """An unknown host's fingerprint; only y accepts it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "answer(True)", "accept"),
        Binding("n,escape,q", "answer(False)", "refuse"),
    ]

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
            keys: list[str | tuple[str, str]] = [
                ("y", "$footer-key-foreground"),
                " it is the same: accept   ",
                ("n", "$footer-key-foreground"),
            ]
            yield Static(Content.assemble(*keys, " refuse"), classes="keys")

    def action_answer(self, yes: bool) -> None:
        self.dismiss(yes)
