"""`surgvqa-remote offers` and `rented` against the fake of Lambda's API."""

import json

import pytest
from lambda_fake import KEY, FakeLambda, VirtualClock

from remote.cli import cloud, main
from remote.cloud.api_key import ApiKey
from remote.cloud.lambda_cloud import LambdaCloud
from remote.cloud.ledger import Ledger, this_laptop
from remote.cloud.local import LocalMachines
from remote.cloud.renting import rent


@pytest.fixture
def lambda_cloud(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    clock = VirtualClock()
    fake = FakeLambda(clock)
    provider = LambdaCloud(ApiKey(KEY), clock, fake.transport())
    provider.add_key("laptop", "ssh-ed25519 AAAA me")
    monkeypatch.setenv("LAMBDA_API_KEY", KEY)
    local = LocalMachines()
    monkeypatch.setattr(cloud, "provider_of", lambda name="lambda": local if name == "local" else provider)
    return provider, clock


def answered(capsys, *words):
    code = main.main([*words, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_offers_come_cheapest_first_with_what_fits(lambda_cloud, tmp_path, capsys):
    code, found = answered(capsys, "offers")
    prices = [offer["price_per_hour"] for offer in found["offers"]]
    assert code == 0 and prices == sorted(prices) and len(prices) == 2
    fits = {offer["type"]: offer["fits"] for offer in found["offers"]}
    assert fits == {"gpu_1x_a10": True, "gpu_1x_h100_pcie": True} and 15 < found["predicted_reserved_gb"] < 24
    (tmp_path / "surgvqa.toml").write_text("per_device_train_batch_size = 4\n")
    _, found = answered(capsys, "offers")
    assert [offer["fits"] for offer in found["offers"]] == [False, True] and found["predicted_reserved_gb"] > 24
    assert main.main(["offers"]) == 0
    shown = capsys.readouterr().out
    assert "nowhere" in shown and "us-east-1" in shown and "on one card" in shown
    assert "takes, costs: not known; " in shown and {offer["cost"] for offer in found["offers"]} == {None}


def test_offers_say_what_the_training_would_take_and_cost(lambda_cloud, tmp_path, capsys):
    line = {"video_id": "v", "frames": ["v_1"], "question": "Which?", "question_type": "t", "answer": "It is.",
            "short_answer": "is"}  # fmt: skip
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line | {"id": f"q{n}"}) + "\n" for n in range(400)))
    data = 'train_data_path = "train.jsonl"\nframes_dir = "f"\naudio_dir = "a"\nmodel_name_or_path = "m"\n'
    (tmp_path / "surgvqa.toml").write_text(f"{data}num_train_epochs = 10\n")
    _, found = answered(capsys, "offers")
    a10, h100 = found["offers"]
    assert h100["seconds"] == pytest.approx(400 * 10 * 3880 * 70e-6 * 989 / 756, rel=0.2)
    assert a10["seconds"] > 5 * h100["seconds"] and h100["cost"] == pytest.approx(
        h100["seconds"] * 2.49 / 3600, abs=0.01
    )
    assert main.main(["offers"]) == 0
    assert f"${h100['cost']:.2f}" in capsys.readouterr().out


def test_rented_shows_what_runs_and_fails_on_a_machine_that_nobody_knows(lambda_cloud, capsys):
    provider, clock = lambda_cloud
    assert answered(capsys, "rented") == (0, {"rented": [], "orphans": [], "others": [], "damaged": []})
    offer = next(offer for offer in provider.offers() if offer.regions)
    rent(provider, Ledger(), clock, offer, offer.regions[0], "a", "laptop")
    code, found = answered(capsys, "rented")
    (row,) = found["rented"]
    assert code == 0 and (row["name"], row["type"], row["state"]) == ("a", offer.type, "booting") and row["cost"] > 0
    provider.launch(offer.type, offer.regions[0], f"surgvqa-{this_laptop()}-b-0000", "laptop")
    provider.launch(offer.type, offer.regions[0], "surgvqa-ffffff-c-0000", "laptop")
    code, found = answered(capsys, "rented")
    assert code == 1 and [orphan["name"] for orphan in found["orphans"]] == [f"surgvqa-{this_laptop()}-b-0000"]
    assert [other["name"] for other in found["others"]] == ["surgvqa-ffffff-c-0000"]
    assert main.main(["rented"]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert f"NO RECORD KNOWS IT: surgvqa-{this_laptop()}-b-0000" in shown
    assert "from another laptop: surgvqa-ffffff-c-0000" in shown


def test_a_machine_that_the_provider_does_not_list_is_said(lambda_cloud, capsys):
    provider, clock = lambda_cloud
    offer = next(offer for offer in provider.offers() if offer.regions)
    record = rent(provider, Ledger(), clock, offer, offer.regions[0], "a", "laptop")
    provider.terminate(record.machine_id)
    clock.sleep(600)
    code, found = answered(capsys, "rented")
    assert code == 1 and found["rented"][0]["state"] == cloud.MISSING


def test_without_a_key_one_line_says_where_it_goes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LAMBDA_API_KEY", raising=False)
    assert main.main(["offers"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("surgvqa-remote offers: no API key: set LAMBDA_API_KEY") and "chmod 600" in line
