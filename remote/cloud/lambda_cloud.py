"""Lambda Cloud's public API, version 1 (https://docs.lambda.ai/public-cloud/cloud-api/).

One request a second, one launch in 12 seconds, as its documentation asks. Errors are told apart by `error.code`,
never by their text. Tried against a fake of ours only, never against the real service.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from remote.cloud.api_key import ApiKey
from remote.cloud.pace import Pace
from remote.cloud.provider import AnswerLost, Clock, CloudError, Machine, NoCapacity, Offer, SystemClock, Unanswered
from surgvqa.errors import UsageError
from surgvqa.untrusted import is_kind, json_kind, one_line, parse_object

if TYPE_CHECKING:
    import httpx

URL = "https://cloud.lambda.ai/api/v1"
URL_VARIABLE = "SURGVQA_LAMBDA_URL"
"""Another address of the API, for tests."""
REQUEST_EVERY_S = 1.0
LAUNCH_EVERY_S = 12.0
SETTLES_S = 900.0
"""Far longer than a machine that was asked for takes to be listed; a guess."""
TRIES = 6
LONGEST_WAIT_S = 60.0
TIMEOUT_S = 30.0
LARGEST_ANSWER = 4 << 20
"""Bytes; the price list is some ten thousand."""
STATES = ("booting", "active", "unhealthy", "terminating", "terminated")
LAUNCH = "instance-operations/launch"
INSUFFICIENT = f"{LAUNCH}/insufficient-capacity"
NOT_THERE = "global/object-does-not-exist"


class LambdaCloud:
    """A `Provider`. Closes its connections with `close`, or as a context manager."""

    name = "lambda"
    user = "ubuntu"
    settles_s = SETTLES_S

    def __init__(
        self,
        key: ApiKey,
        clock: Clock | None = None,
        transport: httpx.BaseTransport | None = None,
        pace_file: Path | None = None,
    ):
        """`pace_file` is where processes that share the account agree on the pace; without one this object does."""
        import httpx

        self._key, self._clock = key, clock or SystemClock()
        self._client = httpx.Client(
            transport=transport,
            timeout=TIMEOUT_S,
            follow_redirects=False,  # the key goes to nobody else
            headers={"Accept-Encoding": "identity", "User-Agent": "surgvqa-remote"},
        )
        self._url = base_url()
        self._pace = Pace(self._clock, pace_file)

    def __enter__(self) -> LambdaCloud:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def for_the_machine(self) -> dict[str, str]:
        """What a machine needs to end itself: the API's address, and the key as a header. It is a secret."""
        return {"url": self._url, "authorization": self._key.header()}

    def close(self) -> None:
        self._client.close()

    def offers(self) -> list[Offer]:
        data = self._ask("GET", "instance-types")
        return [_offer(row) for row in _checked(data, "an object", "instance-types").values()]

    def machines(self) -> list[Machine]:
        rows = _checked(self._ask("GET", "instances"), "a list", "instances")
        return [found for found in map(_machine, rows) if found.state != "terminated"]

    def machine(self, machine_id: str) -> Machine | None:
        try:
            return _machine(self._ask("GET", f"instances/{quote(machine_id, safe='')}"))
        except CloudError as error:
            if error.code == NOT_THERE:
                return None
            raise

    def add_key(self, name: str, public_key: str) -> str:
        words = public_key.split()[:2]
        for row in _checked(self._ask("GET", "ssh-keys"), "a list", "ssh-keys"):
            if str(_get(row, "public_key", "text", "ssh-keys")).split()[:2] == words:
                return str(_get(row, "name", "text", "ssh-keys"))
        added = self._ask("POST", "ssh-keys", {"name": name, "public_key": public_key.strip()})
        return str(_get(added, "name", "text", "ssh-keys"))

    def file_systems(self) -> list[str]:
        """Names of the account's persistent file systems."""
        rows = _checked(self._ask("GET", "file-systems"), "a list", "file-systems")
        return [str(_get(row, "name", "text", "file-systems")) for row in rows]

    def launch(self, offer: str, region: str, name: str, key: str) -> str:
        body = {"region_name": region, "instance_type_name": offer, "ssh_key_names": [key], "name": name}
        data = self._ask("POST", LAUNCH, body)
        try:
            ids = _get(data, "instance_ids", "a list", LAUNCH)
            if len(ids) != 1 or not is_kind(ids[0], "text") or not ids[0]:
                raise CloudError(f"lambda: {LAUNCH}: {len(ids)} machines instead of one")
        except CloudError as error:  # it was accepted: what it started has to be found
            raise AnswerLost(str(error)) from None
        return str(ids[0])

    def restart(self, machine_id: str) -> None:
        self._ask("POST", "instance-operations/restart", {"instance_ids": [machine_id]})

    def terminate(self, machine_id: str) -> None:
        self._ask("POST", "instance-operations/terminate", {"instance_ids": [machine_id]})

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The answer's `data`. Asks again after 429, and after 5xx and lost answers of whatever may be asked twice."""
        import httpx

        launches = path == LAUNCH
        problem, code, wait = "", "", 0.0
        for attempt in range(TRIES):
            every = {"request": REQUEST_EVERY_S} | ({"launch": LAUNCH_EVERY_S} if launches else {})
            self._pace.wait(every, min(wait, LONGEST_WAIT_S))
            try:
                status, header, content = self._send(method, path, body)
            except httpx.ConnectError as error:  # nothing was sent
                problem, wait = f"not reachable: {error}", 2.0**attempt
                continue
            except (httpx.HTTPError, OSError) as error:
                problem, wait = f"no answer: {type(error).__name__} {error}", 2.0**attempt
                if launches:
                    raise AnswerLost(_said(path, problem)) from None
                continue
            if status == 200:
                try:
                    return _data(path, content)
                except CloudError as error:
                    raise (AnswerLost(str(error)) if launches else error) from None
            code, text = _error(content)
            problem = f"HTTP {status} {code}: {text}"
            if code == INSUFFICIENT:
                raise NoCapacity(_said(path, problem), code)
            if status != 429 and launches and not 400 <= status < 500:
                raise AnswerLost(_said(path, problem), code)
            if status != 429 and status < 500:
                raise CloudError(_said(path, problem), code)
            wait = _retry_after(header, 2.0**attempt)
        raise Unanswered(_said(path, f"gave up after {TRIES} tries; {problem}"), code)

    def _send(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, str, bytes]:
        """Status, Retry-After and body, which is bounded."""
        headers = {"Authorization": self._key.header()}
        with self._client.stream(method, f"{self._url}/{path}", json=body, headers=headers) as answer:
            content = bytearray()
            for block in answer.iter_bytes():
                content += block
                if len(content) > LARGEST_ANSWER:
                    raise OSError(f"an answer of more than {LARGEST_ANSWER >> 20} MiB")
            return answer.status_code, answer.headers.get("retry-after", ""), bytes(content)


def base_url() -> str:
    """Of the API; another one only over https, or on this machine: the key goes there."""
    url = os.environ.get(URL_VARIABLE, URL).rstrip("/")
    parts = urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in ("127.0.0.1", "::1", "localhost")):
        raise UsageError(f"{URL_VARIABLE}: expected an https address, or one of this machine")
    return url


def _said(path: str, problem: str) -> str:
    return f"lambda: {path}: {one_line(problem)[:400]}"


def _retry_after(header: str, default: float) -> float:
    return min(float(header), LONGEST_WAIT_S) if re.fullmatch(r"\d{1,6}", header) else min(default, LONGEST_WAIT_S)


def _data(path: str, content: bytes) -> Any:
    try:
        return parse_object(content)["data"]
    except (ValueError, KeyError) as error:
        raise CloudError(_said(path, f"an answer that is not understood: {error}")) from None


def _error(content: bytes) -> tuple[str, str]:
    """`error.code` and `error.message` of a failed answer; "" for what is not there."""
    try:
        error = parse_object(content).get("error")
    except ValueError:
        return "", "no reason given"
    error = error if isinstance(error, dict) else {}
    code, text = error.get("code"), error.get("message")
    return code[:100] if isinstance(code, str) else "", text[:300] if isinstance(text, str) else "no reason given"


def _checked(value: Any, kind: str, where: str) -> Any:
    if not is_kind(value, kind):
        raise CloudError(f"lambda: {where}: found {json_kind(value)}, expected {kind}")
    return value


def _get(row: Any, name: str, kind: str, where: str) -> Any:
    return _checked(_checked(row, "an object", where).get(name), kind, f"{where}: {name}")


def _price(kind: Any, where: str) -> float:
    cents = float(_get(kind, "price_cents_per_hour", "a number", where))
    if cents < 0:
        raise CloudError(f"lambda: {where}: price_cents_per_hour is {cents:g}, expected 0 or more")
    return cents / 100


def _offer(row: Any) -> Offer:
    where = "instance-types"
    kind = _get(row, "instance_type", "an object", where)
    regions = _get(row, "regions_with_capacity_available", "a list", where)
    gpu = kind.get("gpu_description") or kind.get("description")
    gpu = gpu[:200] if isinstance(gpu, str) else ""
    specs = kind.get("specs")
    gpus = specs.get("gpus") if isinstance(specs, dict) else None
    memory = re.search(r"(\d{1,4}) ?GB", gpu)
    return Offer(
        type=str(_get(kind, "name", "text", where)),
        gpu=gpu,
        gpus=gpus if isinstance(gpus, int) and is_kind(gpus, "a whole number") else 1,
        gpu_memory_gb=float(memory[1]) if memory else None,
        price_per_hour=_price(kind, where),
        regions=tuple(str(_get(region, "name", "text", where)) for region in regions),
    )


def _machine(row: Any) -> Machine:
    where = "instances"
    status = _get(row, "status", "text", where)
    kind, region = row.get("instance_type"), row.get("region")
    texts = {key: row[key] if isinstance(row.get(key), str) else "" for key in ("name", "ip")}
    return Machine(
        id=str(_get(row, "id", "text", where)),
        name=texts["name"],
        state=status if status in STATES else "unknown",
        address=texts["ip"],
        type=str(_get(kind, "name", "text", where)) if isinstance(kind, dict) else "",
        region=str(_get(region, "name", "text", where)) if isinstance(region, dict) else "",
        price_per_hour=_price(kind, where) if isinstance(kind, dict) else None,
    )
