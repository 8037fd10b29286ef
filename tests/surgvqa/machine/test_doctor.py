"""The doctor on machines that it has never seen: what torch, NVML and the disk say is put in its mouth."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from surgvqa.cli import main
from surgvqa.config import workspace
from surgvqa.machine import doctor, gpu

ROOMY = SimpleNamespace(free=500_000_000_000, total=1_000_000_000_000)
HEALTHY = {
    "torch": {
        "version": "2.11.0+cu130",
        "built_for": "13.0",
        "cuda": True,
        "gpus": [{"name": "NVIDIA H100", "capability": [9, 0], "memory": 85_000_000_000}],
        "architectures": ["sm_80", "sm_90"],
        "bf16": True,
    },
    "transformers": {"version": "5.17.0"},
    "peft": {"version": "0.21.0"},
    "soundfile": {"version": "0.13.1"},
    "flash_attn": {"version": None},
    "wandb": {"version": None},
    "attention": {"name": "sdpa", "why": "sdpa (torch's own flash kernel on a GPU): flash-attn cannot be imported."},
    "bitsandbytes": {"version": "0.50.2"},
}
VERSIONS = dict.fromkeys(doctor.TRAIN_PACKAGES, "99.0") | {"torch": "2.11.0+cu130", "torchvision": "0.26.0"}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A healthy GPU host; the function changes parts of it and returns {name: finding}."""

    def examine(probed=None, versions=None, devices=None, problem=None, disk=ROOMY):
        facts = {**HEALTHY, **(probed or {})} if "crash" not in (probed or {}) else probed
        installed = {**VERSIONS, **(versions or {})}
        card = {"index": 0, "name": "NVIDIA H100", "memory_total_bytes": 85 * 10**9, "memory_used_bytes": 10**8}
        monkeypatch.setattr(doctor, "probe", lambda: facts)
        monkeypatch.setattr(doctor, "version", installed.get)
        monkeypatch.setattr(gpu, "driver_problem", lambda: problem)
        monkeypatch.setattr(gpu, "sample_devices", lambda: [card] if devices is None else devices)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: disk)
        found = {f.name: f for f in doctor.examine(workspace.load_workspace(tmp_path))}
        assert all(f.mend for f in found.values() if f.status in ("warn", "bad")), "every fault has a way to mend it"
        return found

    return examine


def bad(found):
    return [name for name, finding in found.items() if finding.status == "bad"]


def test_a_healthy_host_has_nothing_to_mend(machine):
    found = machine()
    assert bad(found) == []
    assert {"torch", "cuda", "attention", "bitsandbytes", "disk", "gpu 0"} <= found.keys()
    assert not [f for f in found.values() if f.status == "warn"]


def test_a_laptop_without_torch_is_not_broken(machine):
    found = machine(
        versions=dict.fromkeys(VERSIONS), devices=[], problem="no NVIDIA driver (libnvidia-ml.so.1 not found)"
    )
    assert bad(found) == []
    assert "pip install 'surgvqa[train]'" in found["train"].text


def test_half_of_the_training_packages(machine):
    found = machine(versions={"peft": None})
    assert bad(found) == ["train"]
    assert "peft" in found["train"].text


@pytest.mark.parametrize(
    ("probed", "name"),
    [
        ({"crash": "exit code -11: Segmentation fault"}, "torch"),
        ({"torch": {"error": "OSError: libcudart.so.13: cannot open shared object file"}}, "torch"),
        ({"torch": {**HEALTHY["torch"], "cuda": False}}, "torch"),
        ({"torch": {**HEALTHY["torch"], "architectures": ["sm_70", "sm_80"]}}, "cuda"),
        ({"transformers": {"error": "ImportError: cannot import name x"}}, "transformers"),
    ],
)
def test_what_stops_training_is_bad(machine, probed, name):
    assert bad(machine(probed)) == [name]


def test_what_only_costs_is_a_warning(machine):
    old = {**HEALTHY["torch"], "gpus": [{"name": "Tesla T4", "capability": [7, 5], "memory": 16 * 10**9}]}
    old["architectures"] = ["sm_75"]
    found = machine({"torch": old, "bitsandbytes": {"error": "RuntimeError: no CUDA setup"}})
    assert bad(found) == []
    assert found["cuda"].status == found["bitsandbytes"].status == "warn"


@pytest.mark.parametrize(
    ("built_for", "said", "mend"),
    [
        ("13.0", "driver 550.1 runs CUDA up to 12.4 only", "install torch for CUDA 12.4"),
        ("12.4", "CUDA_VISIBLE_DEVICES is ''", "unset CUDA_VISIBLE_DEVICES"),
        (None, "was built without CUDA", "whl/cu124"),
    ],
)
def test_why_torch_sees_no_gpu_is_told(machine, monkeypatch, built_for, said, mend):
    monkeypatch.setattr(gpu, "driver_version", lambda: ("550.1", "12.4"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = machine(probed={"torch": {**HEALTHY["torch"], "cuda": False, "built_for": built_for}})
    assert found["torch"].status == "bad" and said in found["torch"].text and mend in found["torch"].mend


def test_a_flash_attn_of_another_torch_and_a_mig_instance_are_named(machine):
    broken = {"error": "ImportError: undefined symbol: _ZN3c104cuda", "culprit": None}
    card = {"index": 0, "mig_index": 1, "name": "H100 MIG 1g.10gb", "uuid": "MIG-7"}
    found = machine(probed={"flash_attn": broken}, devices=[card])
    assert found["flash-attn"].status == "warn" and "built for one torch" in found["flash-attn"].text
    assert "--force-reinstall" in found["flash-attn"].mend
    assert "CUDA_VISIBLE_DEVICES=MIG-7" in found["gpu 0.1"].text


def test_versions_are_held_against_our_own_metadata(machine):
    assert doctor.lower_bounds()["transformers"] == "5.17"
    found = machine(versions={"transformers": "4.57.1", "peft": "0.9.0"})
    assert sorted(bad(found)) == ["peft", "transformers"]
    assert "4.57.1" in found["transformers"].text
    assert (
        bad(machine(versions={"transformers": "5.17.0", "peft": "0.21.0", "torch": "2.6.0", "torchvision": None})) == []
    )


def test_a_torchvision_of_another_torch(machine):
    assert machine(versions={"torchvision": "0.21.0"})["torchvision"].status == "warn"
    assert "torchvision" not in machine(versions={"torchvision": None})


def test_a_taken_card_names_who_takes_it(machine):
    card = {
        "index": 0,
        "name": "A100",
        "memory_total_bytes": 40 * 10**9,
        "memory_used_bytes": 30 * 10**9,
        "processes": [{"pid": 4242, "name": "python", "used_bytes": 29 * 10**9}],
    }
    finding = machine(devices=[card])["gpu 0"]
    assert finding.status == "warn"
    assert "4242" in finding.text


def test_a_card_that_is_lost_is_bad(machine):
    found = machine(devices=[{"index": 1, "state": "lost", "problem": "GPU is lost"}])
    assert bad(found) == ["gpu 1"] and "GPU is lost" in found["gpu 1"].text and "restart" in found["gpu 1"].mend


@pytest.mark.parametrize(("free", "status"), [(10**8, "bad"), (20 * 10**9, "warn"), (10**12, "ok")])
def test_disk(machine, free, status):
    assert machine(disk=SimpleNamespace(free=free, total=10**12))["disk"].status == status


def test_the_key_of_wandb_is_never_shown(machine, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "very-secret-0123")
    found = machine()
    doctor._show(Console(), list(found.values()))
    assert found["W&B"].status == "ok"
    assert "very-secret" not in capsys.readouterr().out + json.dumps([f.__dict__ for f in found.values()])


def test_the_netrc_that_wandb_would_read_is_the_one_that_counts(machine, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    file = tmp_path / "elsewhere"
    file.write_text("machine api.wandb.ai login user password very-secret-0123\n")
    monkeypatch.setenv("NETRC", str(file))
    assert machine()["W&B"].text == f"a key is in {file}"
    file.write_text("machine elsewhere.org login user password x\n")
    assert machine()["W&B"].status == "info"
    file.write_bytes(b"\xff\xfe machine")
    assert machine()["W&B"].status == "info"
    monkeypatch.setenv("NETRC", str(tmp_path / "missing"))
    assert machine()["W&B"].status == "info"


def test_a_probe_that_crashes_is_reported_not_raised(monkeypatch):
    monkeypatch.setattr(doctor, "PROBE", "import os; os.abort()")
    assert "crash" in doctor.probe()
    monkeypatch.setattr(doctor, "PROBE", "import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "PROBE_TIMEOUT_S", 0.5)
    assert "no answer" in doctor.probe()["crash"]


def test_a_library_that_ends_the_process_is_the_one_that_is_named(monkeypatch, machine):
    start = doctor.PROBE.index('look("torch"')
    looks = "look('torch', dict)\nlook('bitsandbytes', lambda: __import__('os').abort())\n"
    monkeypatch.setattr(doctor, "PROBE", doctor.PROBE[:start] + looks)
    crashed = doctor.probe()
    assert crashed["in"] == "bitsandbytes"
    found = machine(crashed)
    assert bad(found) == ["bitsandbytes"] and "pip uninstall bitsandbytes" in found["bitsandbytes"].mend


def test_a_library_whose_import_raises_is_named_with_its_reason(monkeypatch, machine, tmp_path):
    """PEFT imports bitsandbytes: the fault and the way to mend it are bitsandbytes'."""
    (tmp_path / "bitsandbytes").mkdir()
    reason = "raise RuntimeError('\\n   setup failed: no CUDA library found\\n')\n"
    (tmp_path / "bitsandbytes/__init__.py").write_text(reason)
    (tmp_path / "peft.py").write_text(
        "try:\n    import bitsandbytes\nexcept Exception as e:\n    raise ImportError('x') from e\n"
    )
    for name, attributes in (("torch", "cuda = None"), ("transformers", "__version__ = '5.17.0'")):
        (tmp_path / f"{name}.py").write_text(attributes)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    probed = doctor.probe()
    assert probed["peft"]["culprit"] == probed["bitsandbytes"]["culprit"] == "bitsandbytes"
    assert probed["bitsandbytes"]["error"] == "RuntimeError: setup failed: no CUDA library found"
    found = machine({"bitsandbytes": probed["bitsandbytes"], "peft": {**probed["bitsandbytes"]}})
    assert bad(found) == ["bitsandbytes"] and "peft" not in found
    assert "setup failed: no CUDA library found" in found["bitsandbytes"].text
    assert "pip uninstall bitsandbytes" in found["bitsandbytes"].mend


@pytest.mark.parametrize("broken", ["soundfile", "soxr"])
def test_a_broken_decoder_of_recordings_is_bad_and_a_broken_wandb_a_warning(monkeypatch, machine, tmp_path, broken):
    for name in (broken, "wandb"):
        (tmp_path / f"{name}.py").write_text("raise AttributeError('no bool8 in numpy')\n")
    start = doctor.PROBE.index('look("torch"')
    looks = 'look("soundfile", sound)\nlook("wandb", lambda: optional("wandb"))\n'
    rest = "".join(f'look("{name}", dict)\n' for name in doctor.PROBED if name not in ("soundfile", "wandb"))
    monkeypatch.setattr(doctor, "PROBE", doctor.PROBE[:start] + looks + rest)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    probed = doctor.probe()
    found = machine({name: probed[name] for name in ("soundfile", "wandb")})
    assert bad(found) == [broken] and "no bool8 in numpy" in found[broken].text
    assert found["wandb"].status == "warn" and "--report_to wandb" in found["wandb"].text


def test_the_probe_is_python_and_survives_missing_packages():
    compile(doctor.PROBE, "probe", "exec")
    empty = "import sys; sys.modules.update(dict.fromkeys(('torch','transformers','peft','bitsandbytes')))\n"
    done = subprocess.run([sys.executable, "-c", empty + doctor.PROBE], capture_output=True, text=True, timeout=60)
    found = {}
    for line in filter(None, done.stdout.splitlines()):
        found |= json.loads(line)
    assert all("error" in found[name] for name in ("torch", "transformers", "peft", "attention", "bitsandbytes"))


@pytest.mark.model
def test_this_machine(capsys):
    code = main.main(["doctor", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] == (code == 0)
    assert {"python", "torch", "attention", "disk"} <= {f["name"] for f in document["findings"]}
