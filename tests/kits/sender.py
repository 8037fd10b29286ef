"""Sends single items to a real sshd."""

from __future__ import annotations

from pathlib import Path

from remote.ssh.process import Reserve
from remote.upload.hashes import Hashes, Item
from remote.upload.link import Link
from remote.upload.plan import folder_sources
from remote.upload.send import send_item
from surgvqa.runs.folder import Run


def wire(item: Item) -> dict:
    """An item as the agent has it."""
    return {**item.offer, "files": item.rows}


class Sender:
    """Sends folders over one connection, as `upload` does."""

    def __init__(self, laptop):
        self.laptop = laptop
        self.connect()
        self.facts = self.remote.ask("probe", venv="venv")
        self.run = Run.create(laptop.workspace / "runs", "upload")

    def connect(self) -> None:
        """By the ssh_config as it is now."""
        self.remote = self.laptop.connect()
        self.reserve, self.link = Reserve(self.remote.host, None), Link(self.remote.host)

    def item(self, folder: Path, name: str = "merged") -> Item:
        return Item(name, "folder", Hashes().entries(folder_sources(folder)))

    def send(self, item: Item, **options) -> dict:
        return send_item(self.remote, item, self.run, Hashes(), self.facts, self.reserve, self.link, **options)
