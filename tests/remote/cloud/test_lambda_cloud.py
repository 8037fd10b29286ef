import logging
import pickle
from itertools import pairwise

import httpx
import pytest
from lambda_fake import KEY, FakeLambda, VirtualClock

from remote.cloud.api_key import ApiKey, read_key
from remote.cloud.lambda_cloud import LambdaCloud, base_url
from remote.cloud.provider import AnswerLost, CloudError, NoCapacity
from surgvqa.errors import UsageError


@pytest.fixture
def fake():
    return FakeLambda(VirtualClock())


@pytest.fixture
def cloud(fake):
    with LambdaCloud(ApiKey(KEY), fake.clock, fake.transport()) as one:
        one.add_key("laptop", "ssh-ed25519 AAAA me")
        yield one


def launch(cloud, name="a"):
    return cloud.launch("gpu_1x_a10", "us-east-1", name, "laptop")


def test_offers_name_card_price_and_where_one_is_free(cloud):
    a10, h100 = cloud.offers()
    assert (a10.type, a10.gpu_memory_gb, a10.price_per_hour) == ("gpu_1x_a10", 24.0, 0.75)
    assert a10.regions == ("us-east-1", "us-west-1") and h100.regions == ()


def test_a_machine_boots_and_ends(cloud, fake):
    made = launch(cloud)
    assert cloud.machine(made).state == "booting"
    fake.clock.sleep(200)
    assert (cloud.machine(made).state, cloud.machine(made).address) == ("active", "192.0.2.7")
    cloud.terminate(made)
    assert cloud.machine(made).state == "terminating" and cloud.machines()
    fake.clock.sleep(60)
    assert cloud.machine(made).state == "terminated" and cloud.machines() == []
    assert cloud.machine("no-such") is None


def test_a_key_is_added_once_whatever_its_comment(cloud, fake):
    assert cloud.add_key("other", "ssh-ed25519 AAAA somebody-else") == "laptop"
    assert len(fake.keys) == 1


def test_requests_are_a_second_apart_and_launches_twelve(cloud, fake):
    for name in "abc":
        launch(cloud, name)
        cloud.machines()
    times = [at for at, _ in fake.asked]
    assert min(b - a for a, b in pairwise(times)) >= 1
    launches = [at for at, what in fake.asked if what == "launch"]
    assert min(b - a for a, b in pairwise(launches)) >= 12


@pytest.mark.parametrize("fault", ["429", "500", "dropped"])
def test_what_may_be_asked_twice_is_asked_again(cloud, fake, fault):
    fake.faults = [("instances", fault)] * 3
    assert cloud.machines() == []


def test_it_gives_up_in_the_end(cloud, fake):
    fake.faults = [("instances", "500")] * 50
    with pytest.raises(CloudError, match="gave up after 6 tries; HTTP 500 global/unknown"):
        cloud.machines()


def test_a_launch_is_sent_again_only_when_it_cannot_have_worked(cloud, fake):
    fake.faults = [("launch", "429")]
    launch(cloud)
    assert len(fake.machines) == 1
    for fault in ("lost", "dropped", "500", "garbage"):
        fake.faults, before = [("launch", fault)], len([1 for _, what in fake.asked if what == "launch"])
        with pytest.raises(AnswerLost):
            launch(cloud)
        assert len([1 for _, what in fake.asked if what == "launch"]) == before + 1


def test_capacity_is_told_by_its_code(cloud, fake):
    fake.faults = [("launch", "capacity")]
    with pytest.raises(NoCapacity):
        launch(cloud)


@pytest.mark.parametrize(
    "body", [b"[]", b"{}", b'{"data": 3}', b'{"data": [{"id": 1}]}', b'{"data": [{"id": "a", "status": null}]}',
             b"\xff", b'{"data": ' + b"[" * 90 + b"]" * 90 + b"}"],
)  # fmt: skip
def test_an_answer_of_another_shape_is_one_clear_error(body):
    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=body))
    with pytest.raises(CloudError, match="lambda: instances"):
        LambdaCloud(ApiKey(KEY), VirtualClock(), transport).machines()


def test_an_endless_answer_is_not_read_to_its_end():
    read = []

    def endless():
        while True:
            read.append(1)
            yield b"x" * (1 << 20)

    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=endless()))
    with pytest.raises(CloudError, match="more than 4 MiB"):
        LambdaCloud(ApiKey(KEY), VirtualClock(), transport).machines()
    assert len(read) <= 60


def test_a_redirect_is_not_followed():
    seen = []

    def handle(request):
        seen.append(request.url.host)
        return httpx.Response(302, headers={"Location": "https://elsewhere.example/"})

    with pytest.raises(CloudError):
        LambdaCloud(ApiKey(KEY), VirtualClock(), httpx.MockTransport(handle)).machines()
    assert set(seen) == {"cloud.lambda.ai"}


def test_the_key_is_in_no_repr_error_log_or_pickle(cloud, fake, caplog):
    caplog.set_level(logging.DEBUG)
    fake.faults = [("*", "500")] * 20
    with pytest.raises(CloudError) as error:
        cloud.machines()
    key = ApiKey(KEY)
    assert KEY not in f"{error.value!r}{key!r}{key}{caplog.text}{vars(cloud)!r}"
    with pytest.raises(TypeError):
        pickle.dumps(key)


def test_the_key_comes_from_a_private_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LAMBDA_API_KEY", raising=False)
    with pytest.raises(UsageError, match="no API key: set LAMBDA_API_KEY"):
        read_key()
    file = tmp_path / ".config/surgvqa/lambda_api_key"
    file.parent.mkdir(parents=True)
    file.write_text(KEY + "\n")
    file.chmod(0o644)
    with pytest.raises(UsageError, match="others may read it"):
        read_key()
    file.chmod(0o600)
    assert read_key().header() == f"Bearer {KEY}"


@pytest.mark.parametrize("bad", ["short", "with blank 123", "schlüssel-123", "line\nbreak-123"])
def test_a_malformed_key_is_refused_and_not_shown(bad):
    with pytest.raises(UsageError) as error:
        ApiKey(bad)
    assert bad not in str(error.value)


def test_the_key_goes_only_to_https_or_this_machine(monkeypatch):
    monkeypatch.setenv("SURGVQA_LAMBDA_URL", "http://example.com/api/v1")
    with pytest.raises(UsageError, match="expected an https address"):
        base_url()
