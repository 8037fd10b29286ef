"""Setting a host up, against a real sshd."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from sshd import (
    laptop,  # noqa: F401
    one_line,
    venv_there,
)

from remote import setup as setup_room
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.runs.folder import Run

pytestmark = pytest.mark.slow


def test_setup_installs_our_wheel_and_notices_skew(laptop):  # noqa: F811
    """The venv sees this interpreter's packages, so that nothing is downloaded; our own wheel is installed for real."""
    site = venv_there(laptop, without=("torch", "transformers"))  # importing them is not what is tested here
    first = laptop.here("setup", "gpuhost", "--extra", "")
    assert (
        first["changed"]
        and (site / "surgvqa" / "runs" / "supervisor.py").is_file()
        and (site / "remote" / "agent").is_dir()
    )
    with laptop.connect() as remote:
        again = setup_room.setup(remote, Run.create(laptop.workspace / "runs", "setup"), extra="")
        installed = remote.call("probe", venv="venv")["installed"]
    assert not again["changed"] and setup_room.skew(installed) is None
    record = laptop.there / ".surgvqa" / "installed.json"
    record.write_text(json.dumps({**installed, "version": "0.0.1", "code": "old"}))  # an old version of us
    refused = laptop.command("launch", "gpuhost", "train", check=1).stderr
    assert "version 0.0.1, here" in refused and "surgvqa-remote setup gpuhost" in refused


@pytest.fixture
def no_wheel(monkeypatch):
    """Setup that builds none: what is installed is not what is tested."""

    def build(folder):
        (folder / "surgvqa-0-py3-none-any.whl").write_bytes(b"wheel")
        return folder / "surgvqa-0-py3-none-any.whl"

    monkeypatch.setattr(setup_room, "build_wheel", build)


@pytest.mark.parametrize("whole", [True, False])
def test_setup_leaves_an_environment_that_is_there_as_it_is(laptop, monkeypatch, no_wheel, whole):  # noqa: F811
    """The user's own, with the host's torch: made again, it would lose that. One without pip is not whole."""
    python = laptop.root / "own" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\nexit {0 if whole else 1}\n")
    python.chmod(0o755)
    laptop.host(python=sys.executable, venv=str(laptop.root / "own"))
    ran: list[list[str]] = []
    monkeypatch.setattr(setup_room, "execute", lambda remote, argv, *_: ran.append(argv))
    with laptop.connect() as remote:
        done = setup_room.setup(remote, Run.create(laptop.workspace / "runs", "setup"), extra="")
    assert done["changed"]
    installs = [argv for argv in ran if "install" in argv]
    assert installs and all(argv[argv.index("--constraint") + 1].startswith(str(laptop.there)) for argv in installs)
    versions = (laptop.there / ".surgvqa/wheels/constraints.txt").read_text()
    assert "\nparamiko==" in versions and "\ntorch==" not in versions  # the one that is there stays
    assert [argv[1:] for argv in ran if "venv" in argv] == ([] if whole else [["-m", "venv", str(laptop.root / "own")]])


def test_setup_wants_a_python_that_is_new_enough(laptop, monkeypatch):  # noqa: F811
    monkeypatch.setattr(setup_room, "MINIMUM", (9, 9))
    with laptop.connect() as remote, pytest.raises(UsageError, match=r"3\.11 or newer.*hosts\.toml"):
        setup_room.setup(remote, Run.create(laptop.workspace / "runs", "setup"))


def test_setup_on_a_full_disk_says_so(laptop, no_wheel):  # noqa: F811
    small = laptop.root / "small"
    small.mkdir()
    if os.getuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)]).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        laptop.host(workspace=str(small / "ws"), python=sys.executable)
        with laptop.connect() as remote, pytest.raises(SurgvqaError) as failed:
            setup_room.setup(remote, Run.create(laptop.workspace / "runs", "setup"), extra="")
        said = one_line(failed.value)
        assert "making the virtual environment failed: disk full" in said and "apt-get" not in said
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)
