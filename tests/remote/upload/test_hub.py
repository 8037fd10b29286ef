"""Stage 1 from the hub to the host: a hub of one repository on 127.0.0.1, a real sshd, the real client."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_kit import write_file, write_folder
from hub_server import COMMIT, Hub
from sshd import laptop  # noqa: F401

from remote.upload import hub as hub_room
from surgvqa.errors import UsageError

pytestmark = [pytest.mark.slow, pytest.mark.model]  # merging needs torch

ID = "someone/stage-1"
WAY = ("--stage1_hub_id", ID, "--stage2_adapter_path", "stage2", "--output_path", "merged")


@pytest.fixture
def hub(laptop):  # noqa: F811
    """A workspace with Stage 1 and an adapter, the same Stage 1 on the hub, and a host that knows where the hub is."""
    pytest.importorskip("huggingface_hub")
    shards = [{f"model.layers.{n}.self_attn.q_proj.weight": ("BF16", (64, 32))} for n in range(3)]
    write_folder(laptop.workspace / "stage1", shards)
    adapter = laptop.workspace / "stage2"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    factors = {}
    for n in range(3):
        at = f"base_model.model.model.layers.{n}.self_attn.q_proj"
        factors |= {f"{at}.lora_A.weight": ("BF16", (2, 32)), f"{at}.lora_B.weight": ("BF16", (64, 2))}
    write_file(adapter / "adapter_model.safetensors", factors)
    one = Hub(laptop.workspace / "stage1", ID)
    know(laptop, one)
    yield one
    one.close()


def know(laptop, one: Hub, **more: str) -> None:  # noqa: F811
    laptop.host(venv=sys.prefix, python=sys.executable)
    environment = {"HF_ENDPOINT": one.url, "HF_HOME": str(laptop.root / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1", **more}
    with open(laptop.workspace / "hosts.toml", "a") as file:
        file.write("[gpuhost.environment]\n" + "".join(f'{k} = "{v}"\n' for k, v in environment.items()))


def slow_uplink(laptop) -> None:  # noqa: F811
    """The last upload to this host went at 1 kB/s."""
    file = Path(laptop.root / "laptop_home/.cache/surgvqa/rates.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text('{"gpuhost": 1000}')


def shards_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


def test_the_hub_is_the_cheapest_way_and_gives_the_same_merge(laptop, hub):  # noqa: F811
    slow_uplink(laptop)
    planned = laptop.json("upload", "gpuhost", "--stage1_model_path", "stage1", *WAY, "--dry-run")
    ways = {way["name"]: way for way in planned["ways"]}
    assert planned["chosen"] == "hub" and ways["hub"]["send_bytes"] < ways["adapter"]["send_bytes"]
    assert ways["hub"]["download_bytes"] > 3 * 64 * 32 * 2 and hub.got == 0  # planning downloads nothing
    hub.break_once.add("model-00002-of-00003.safetensors")
    sent = laptop.json("upload", "gpuhost", "--stage1_model_path", "stage1", *WAY)
    assert sent["merged_on_host"]["state"] == "finished" and hub.got > 0
    assert sent["sent_bytes"] <= ways["hub"]["send_bytes"]
    assert shards_of(laptop.there / "stage1") == shards_of(laptop.workspace / "stage1")
    words = ["--stage1_model_path", "stage1", "--stage2_adapter_path", "stage2", "--output_path", "merged"]
    subprocess.run([sys.executable, "-m", "surgvqa", "merge", *words], cwd=laptop.workspace, check=True)
    assert shards_of(laptop.there / "merged") == shards_of(laptop.workspace / "merged")
    before = hub.got
    again = laptop.json("upload", "gpuhost", "--stage1_model_path", "stage1", *WAY)
    assert again["sent_bytes"] == 0 and hub.got == before  # recognised by hash


def test_without_a_copy_here_the_hubs_is_taken(laptop, hub):  # noqa: F811
    (laptop.workspace / "surgvqa.toml").write_text(f'[host]\nstage1_hub_id = "{ID}@{COMMIT}"\n')
    sent = laptop.json("upload", "gpuhost", "--stage2_adapter_path", "stage2", "--output_path", "merged")
    assert sent["chosen"] == "hub" and sent["merged_on_host"]["state"] == "finished"
    stands = laptop.there / hub_room.folder_of(f"{ID}@{COMMIT}")
    assert shards_of(stands) == shards_of(laptop.workspace / "stage1")
    # With the hub away, the cache on the host is enough.
    hub.close()
    know(laptop, hub, HF_HUB_OFFLINE="1")
    again = laptop.json("upload", "gpuhost", "--stage2_adapter_path", "stage2", "--output_path", "merged")
    assert again["merged_on_host"]["state"] == "finished"


def test_another_model_of_that_name_is_refused(laptop, hub):  # noqa: F811
    theirs = laptop.root / "theirs"
    write_folder(theirs, [{"model.layers.0.self_attn.q_proj.weight": ("BF16", (64, 32))}])
    hub.folder = theirs
    stage1 = ("--stage1_model_path", "stage1")
    failed = laptop.command("upload", "gpuhost", "--what", "hub", *stage1, *WAY, check=1)
    assert "is another there than in" in failed.stderr.splitlines()[-1]
    planned = laptop.json("upload", "gpuhost", *stage1, *WAY, "--dry-run")  # the other way is still open
    assert planned["chosen"] == "adapter" and "name its revision" in planned["hub_problem"]


def test_a_host_that_cannot_get_it_says_why(laptop, hub):  # noqa: F811
    other = ("--stage1_hub_id", "someone/else", *WAY[2:])
    failed = laptop.command("upload", "gpuhost", "--what", "hub", *other, check=1)
    assert "no such repository, or it is private" in failed.stderr.splitlines()[-1]
    know(laptop, hub, HF_HUB_OFFLINE="1")
    failed = laptop.command("upload", "gpuhost", "--what", "hub", *WAY, check=1)
    assert "cannot reach the hub" in failed.stderr.splitlines()[-1]
    laptop.host(python=sys.executable)  # no venv there yet
    failed = laptop.command("upload", "gpuhost", "--what", "hub", *WAY, check=1)
    assert "surgvqa-remote setup gpuhost" in failed.stderr.splitlines()[-1]


@pytest.mark.parametrize("wrong", ["stage-1", "../x", "a/b/c", "-a/b", "a/b@", "a/$(id)", "a/b c"])
def test_an_id_is_one(wrong):
    with pytest.raises(UsageError, match="expected USER/NAME"):
        hub_room.check_id(wrong)


def test_what_was_merged_there_is_not_merged_again(laptop, hub):  # noqa: F811
    """Only while both inputs and the output are as they were."""
    ways = ("--what", "adapter", "--stage1_model_path", "stage1", *WAY[2:])

    def upload() -> dict:
        answer = laptop.json("upload", "gpuhost", *ways)
        assert answer["merged_on_host"]["state"] == "finished"
        return answer

    def merges() -> int:
        return len(list((laptop.there / "runs").glob("*-merge-*")))

    assert "already_there" not in upload()["merged_on_host"] and merges() == 1
    planned = laptop.json("upload", "gpuhost", *ways, "--dry-run")
    assert planned["ways"][0]["seconds"] == 0
    again = upload()
    assert again["merged_on_host"]["already_there"] and again["sent_bytes"] == 0 and merges() == 1
    said = laptop.command("upload", "gpuhost", *ways).stdout + laptop.command("upload", "gpuhost", *ways).stderr
    assert "merged there before from the same folders" in said and merges() == 1
    shard = sorted((laptop.there / "merged").glob("*.safetensors"))[0]
    before = shards_of(laptop.there / "merged")
    os.utime(shard, ns=(1, 1))  # somebody was at the output
    assert upload() and merges() == 2  # merge itself looks again, and hashes it
    settings = laptop.workspace / "stage2" / "adapter_config.json"
    settings.write_text(settings.read_text().replace('"lora_alpha": 4', '"lora_alpha": 64'))
    shutil.rmtree(laptop.there / "merged")  # merge itself refuses to replace what was made from other inputs
    assert "already_there" not in upload()["merged_on_host"] and merges() == 3
    assert shards_of(laptop.there / "merged") != before
