"""What is read of a host's GPUs."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console
from sshd import (
    laptop,  # noqa: F401
)

from remote.agent.machine import parse_smi, smi_gpus
from remote.cli import commands
from surgvqa.errors import UsageError

pytestmark = pytest.mark.slow


def test_gpus_of_a_host_without_a_driver(laptop):  # noqa: F811
    answer = laptop.here("gpus", "gpuhost")
    assert answer["gpus"] == [] or "memory_total_bytes" in answer["gpus"][0]


def test_gpus_fall_back_to_nvidia_smi(laptop):  # noqa: F811
    """A host without our package: nvidia-smi's rows, once and as a stream."""
    laptop.host(python=sys.executable)
    tools = laptop.server.home / "bin"
    tools.mkdir()
    smi = tools / "nvidia-smi"
    smi.write_text('#!/bin/sh\necho "0, NVIDIA A100-SXM4-40GB, GPU-1, 1234, 40960, 87, 250.11, [N/A]"\n')
    smi.chmod(0o755)
    laptop.server.stop()
    laptop.server.environment = f"PATH={tools}:/usr/bin:/bin"
    laptop.server.start()
    with laptop.connect() as remote:
        gpu = remote.call("gpus", venv="venv", watch=None)["gpus"][0]
        stream = remote.stream("gpus", venv="venv", watch=0.1)
        assert [next(stream)["gpus"][0]["index"] for _ in range(3)] == [0, 0, 0]
        stream.close()
    assert gpu["memory_used_bytes"] == 1234 * 2**20 and gpu["utilization_percent"] == 87
    assert "temperature_c" not in gpu


LOST = "Unable to determine the device handle for GPU0000:82:00.0: GPU is lost.  Reboot the system to recover this GPU"
ROW = "0, H100, GPU-1, 1, 2, 3, 4, 5"


@pytest.mark.parametrize(
    ("out", "code", "states", "note"),
    [
        (ROW, 0, [None], None),
        (f"{ROW}\n{LOST}", 15, [None, "lost"], None),
        (LOST, 15, ["lost"], None),
        (f"{ROW}\n1, [GPU is lost], [GPU is lost], " + ", ".join(["[GPU is lost]"] * 5), 0, [None, "lost"], None),
        (f"1, H100, GPU-2{', [Unknown Error]' * 5}", 0, ["failed"], None),
        (
            "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.",
            9,
            [],
            "couldn't communicate",
        ),
        ("", 3, [], "exit code 3"),
    ],
)
def test_nvidia_smi_on_a_broken_machine(tmp_path, monkeypatch, out, code, states, note):
    (tmp_path / "said").write_text(out)
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n/bin/cat {tmp_path}/said\nexit {code}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    answer = smi_gpus()
    assert [gpu.get("state") for gpu in answer["gpus"]] == states
    assert all(gpu["problem"] for gpu in answer["gpus"] if "state" in gpu)
    assert (note or "") in answer.get("note", "") and ("note" in answer) == bool(note)


def test_nvidia_smi_rows_are_read():
    row = ["1", "H100", "GPU-2", "1", "2", "[N/A]", "[Not Supported]", "40"]
    assert parse_smi(row) == {
        "index": 1, "name": "H100", "uuid": "GPU-2", "memory_used_bytes": 2**20, "memory_total_bytes": 2**21,
        "temperature_c": 40,
    }  # fmt: skip


def test_gpus_of_several_hosts_stand_below_their_names():
    def host(name, answer):
        entry = SimpleNamespace(venv="venv")
        return SimpleNamespace(host=SimpleNamespace(name=name, entry=entry), call=lambda op, **asked: answer)

    card = {"index": 0, "name": "H100", "memory_used_bytes": 1e9, "memory_total_bytes": 80e9}
    remotes = [host("one", {"gpus": [card]}), host("two", {"gpus": [], "note": "no NVIDIA driver"})]
    found = commands._gpus_of_all(remotes, None)
    assert found.data["gpus"] == [{**card, "host": "one"}] and found.data["notes"]["two"] == "no NVIDIA driver"
    console = Console(file=io.StringIO(), width=100)
    found.show(console)
    shown = console.file.getvalue()
    assert shown.index("one") < shown.index("H100") < shown.index("two") < shown.index("no NVIDIA driver")
    with pytest.raises(UsageError, match="--watch"):
        commands._gpus_of_all(remotes, 1.0)
