"""GPU sampling against a stand-in NVML: figures missing, MIG, no permission, no driver; and the host's own memory."""

from __future__ import annotations

import json
import os
import threading
import types
from argparse import Namespace

import pynvml
import pytest
from rich.console import Console

from surgvqa.cli import main
from surgvqa.machine import doctor, gpu, gpus


def unsupported(*_):
    raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)


def forbidden(*_):
    raise pynvml.NVMLError(pynvml.NVML_ERROR_NO_PERMISSION)


@pytest.fixture
def nvml(monkeypatch):
    """Two cards that answer everything; a test takes away what it wants to be missing."""
    space = types.SimpleNamespace
    calls = {"init": 0}

    def init():
        calls["init"] += 1

    answers = {
        "nvmlInit": init,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: f"card{index}",
        "nvmlDeviceGetMigMode": unsupported,
        "nvmlDeviceGetMemoryInfo": lambda device: space(used=30_200_000_000, total=85_000_000_000),
        "nvmlDeviceGetUtilizationRates": lambda device: space(gpu=0, memory=7),
        "nvmlDeviceGetPowerUsage": lambda device: 412_500,
        "nvmlDeviceGetEnforcedPowerLimit": lambda device: 700_000,
        "nvmlDeviceGetName": lambda device: f"NVIDIA {device}",
        "nvmlDeviceGetUUID": lambda device: f"GPU-{device}-uuid",
        "nvmlDeviceGetTemperature": lambda device, sensor: 58,
        "nvmlDeviceGetComputeRunningProcesses": lambda device: [
            space(pid=os.getpid(), usedGpuMemory=29_000_000_000),
            space(pid=2**22 + 7, usedGpuMemory=None),  # another container's: no name, no size
        ],
        "nvmlDeviceGetGraphicsRunningProcesses": lambda device: [],
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)
    monkeypatch.setattr(gpu, "_initialised", False)
    return calls


def test_a_card_that_answers_everything(nvml):
    first, second = gpu.sample_devices()
    assert first == {
        "index": 0,
        "state": "ok",
        "name": "NVIDIA card0",
        "uuid": "GPU-card0-uuid",
        "memory_used_bytes": 30_200_000_000,
        "memory_total_bytes": 85_000_000_000,
        "utilization_percent": 0,
        "power_w": 412.5,
        "power_limit_w": 700.0,
        "temperature_c": 58,
        "processes": [
            {"pid": os.getpid(), "used_bytes": 29_000_000_000, "name": first["processes"][0]["name"]},
            {"pid": 2**22 + 7},
        ],
    }
    assert second["index"] == 1
    assert json.loads(json.dumps(first)) == first


def test_a_machine_has_a_gpu_or_not(nvml, monkeypatch):
    assert gpu.any_gpu()
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 0)
    assert not gpu.any_gpu()


def test_nvml_is_initialised_once(nvml):
    for _ in range(5):
        gpu.sample_devices()
        gpu.sample_process(0)
    assert nvml["init"] == 1


def test_every_figure_may_be_missing(nvml, monkeypatch):
    for name in dir(pynvml):
        if name.startswith("nvmlDeviceGet") and name not in ("nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex"):
            monkeypatch.setattr(pynvml, name, unsupported)
    assert gpu.sample_devices() == [{"index": 0, "state": "ok"}, {"index": 1, "state": "ok"}]
    assert gpu.sample_process(1) == {"device": 1, "backend": "cuda", "other_gpus": [{"index": "0", "state": "ok"}]}


def test_processes_that_this_user_may_not_see_are_absent_not_empty(nvml, monkeypatch):
    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", forbidden)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetGraphicsRunningProcesses", forbidden)
    assert "processes" not in gpu.sample_devices()[0]
    assert "process_bytes" not in gpu.sample_process(0)


def test_a_card_that_fell_off_the_bus_is_lost_and_leaves_the_other(nvml, monkeypatch, capsys):
    def handle(index):
        if index == 0:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return f"card{index}"

    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", handle)
    lost, other = gpu.sample_devices()
    assert (lost["index"], lost["state"]) == (0, "lost") and "lost" in lost["problem"].lower()
    assert (other["index"], other["state"]) == (1, "ok") and gpu.any_gpu()
    assert gpu.sample_process(0)["problem"] == lost["problem"], "the run's own card"
    assert gpu.sample_process(0, uuid="GPU-gone")["other_gpus"][0]["state"] == "lost"
    (beside,) = gpu.sample_process(1)["other_gpus"]
    assert (beside["index"], beside["state"]) == ("0", "lost")
    assert main.main(["gpus"]) == 0
    drawn = capsys.readouterr().out
    assert "GPU 0" in drawn and "lost: " in drawn and "30.2 of 85.0 GB" in drawn


def test_a_card_whose_handle_is_still_there_is_lost_too(nvml, monkeypatch):
    def lost(device):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lost)
    assert [device["state"] for device in gpu.sample_devices()] == ["lost", "lost"]
    assert not gpu.any_gpu(), "no training can use them"


@pytest.mark.parametrize("figure", ["Name", "UUID", "UtilizationRates", "PowerUsage", "Temperature"])
def test_a_card_that_is_lost_while_some_figures_still_come_is_lost(nvml, monkeypatch, figure):
    def lost(*_):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    monkeypatch.setattr(pynvml, f"nvmlDeviceGet{figure}", lost)
    assert [device["state"] for device in gpu.sample_devices()] == ["lost", "lost"] and not gpu.any_gpu()


@pytest.mark.parametrize("code", ["UNKNOWN", "TIMEOUT", "IRQ_ISSUE", "OPERATING_SYSTEM", "NOT_READY"])
def test_a_card_whose_memory_cannot_be_read_has_failed(nvml, monkeypatch, code):
    def broken(device):
        raise pynvml.NVMLError(getattr(pynvml, f"NVML_ERROR_{code}"))

    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", broken)
    first, _ = gpu.sample_devices()
    assert first["state"] == "failed" and first["problem"] and not gpu.any_gpu()


def test_a_driver_that_was_reloaded_is_asked_anew(nvml, monkeypatch):
    def count():
        if nvml["init"] == 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)
        return 2

    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", count)
    assert gpu.driver_problem() and gpu.driver_problem() is None and len(gpu.sample_devices()) == 2


def test_a_driver_that_blocks_is_not_waited_for(nvml, monkeypatch, capsys):
    release = threading.Event()
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: release.wait(60))
    monkeypatch.setattr(gpus, "ANSWER_S", 0.2)
    try:
        assert main.main(["gpus"]) == 1
        assert "fallen off the bus" in capsys.readouterr().err
        (finding,) = doctor._gpus()
        assert finding.status == "bad" and "does not answer" in finding.text
    finally:
        release.set()


def test_a_card_that_cannot_be_opened_says_why(nvml, monkeypatch):
    def handle(index):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_INSUFFICIENT_POWER)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", handle)
    assert [(device["state"], bool(device["problem"])) for device in gpu.sample_devices()] == [("failed", True)] * 2


def test_a_driver_that_cannot_count_its_cards_is_a_problem(nvml, monkeypatch, capsys):
    def count():
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", count)
    assert main.main(["gpus"]) == 0
    assert "the NVIDIA driver does not answer" in capsys.readouterr().out


def test_mig_instances_are_devices_of_their_own(nvml, monkeypatch):
    def instance(card, number):
        if number > 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return f"{card}-mig{number}"

    def memory(device):
        if "mig" not in device:
            forbidden()
        return types.SimpleNamespace(used=1, total=20_000_000_000)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 1)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMigMode", lambda card: (1, 1))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMaxMigDeviceCount", lambda card: 7)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMigDeviceHandleByIndex", instance)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", memory)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", unsupported)
    devices = gpu.sample_devices()
    assert [(d["index"], d["mig_index"], d["memory_total_bytes"]) for d in devices] == [
        (0, 0, 20_000_000_000),
        (0, 1, 20_000_000_000),
    ]
    assert all("utilization_percent" not in d for d in devices)


def test_the_process_is_found_by_uuid_when_cuda_renumbers_the_cards(nvml):
    sample = gpu.sample_process(0, uuid="card1-uuid")
    assert sample["device"] == 1
    assert sample["process_bytes"] == 29_000_000_000
    assert sample["others"] == [{"pid": 2**22 + 7}]


def test_the_other_gpus_of_the_machine_and_who_holds_them(nvml, monkeypatch):
    sample = gpu.sample_process(0)
    assert [p["pid"] for p in sample["others"]] == [2**22 + 7]
    (other,) = sample["other_gpus"]
    assert (other["index"], other["used_bytes"], other["total_bytes"]) == ("1", 30_200_000_000, 85_000_000_000)
    assert len(other["processes"]) == 2
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 1)
    assert "other_gpus" not in gpu.sample_process(0)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, "no NVIDIA driver"),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "does not answer"),
    ],
)
def test_no_driver_is_an_answer(monkeypatch, capsys, code, words):
    def init():
        raise pynvml.NVMLError(code)

    monkeypatch.setattr(pynvml, "nvmlInit", init)
    monkeypatch.setattr(gpu, "_initialised", False)
    assert main.main(["gpus", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["gpus"] == []
    assert words in document["note"]
    assert main.main(["gpus"]) == 0
    assert words in capsys.readouterr().out
    assert gpu.sample_process(0)["backend"] == "host"


def test_the_drawing_names_processes_and_survives_missing_figures(nvml, capsys):
    outcome = gpus.run(Namespace(json=False), None)
    outcome.show(Console(width=100))
    drawn = capsys.readouterr().out
    assert "30.2 of 85.0 GB" in drawn
    assert "412 of 700 W" in drawn
    assert f"pid {os.getpid()}" in drawn
    assert "outside this container" in drawn
    Console(width=100).print(gpus.draw([{"index": 0}]))


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "1e9"])
def test_a_silly_interval_is_refused(seconds, capsys):
    assert main.main(["gpus", "--watch", seconds]) == 2
    assert "--watch" in capsys.readouterr().err


def test_host_sample_counts_this_process():
    block = bytearray(64_000_000)
    block[::4096] = b"x" * len(block[::4096])
    sample = gpu.sample_process(None)
    assert sample["backend"] == "host"
    assert 64_000_000 < sample["process_bytes"] < sample["total_bytes"]
    assert 0 < sample["used_bytes"] <= sample["total_bytes"]


def test_a_container_limit_is_the_machine(tmp_path, monkeypatch):
    group = tmp_path / "job"
    group.mkdir()
    (group / "memory.max").write_text("1000000\n")
    (group / "memory.current").write_text("700000\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 200000\n")
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5\n")
    monkeypatch.setattr(
        gpu,
        "_cgroup_folders",
        lambda: iter((folder, "memory.max", "memory.current", "inactive_file") for folder in (group, tmp_path)),
    )
    assert gpu.host_memory() == (500_000, 1_000_000)
