"""A Lambda Cloud of our own, made from the public documentation: machines boot and end by a virtual clock; faults."""

from __future__ import annotations

import json

import httpx

KEY = "secret_test_0123456789abcdef"
BOOT_S, END_S = 120.0, 30.0


class VirtualClock:
    def __init__(self, now: float = 1_700_000_000.0):
        self.now = now

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now += seconds


class FakeLambda:
    """`faults`: what the next requests meet, in order, each as (operation, fault); an operation is the last part of the
    path (launch, terminate, instances, …) or "*". Faults: 429, 500, lost (done, but no answer), dropped (not done, no
    answer), garbage, capacity, unhealthy, late_ip, deaf (terminate answers and does nothing), unknown (a machine that
    is there is answered with 404). `other_account`: the key is one of an account that has no machines."""

    def __init__(self, clock: VirtualClock, skew_s: float = 0.0):
        self.clock, self.skew_s = clock, skew_s
        self.faults: list[tuple[str, str]] = []
        self.machines: dict[str, dict] = {}
        self.keys: list[dict] = []
        self.capacity = {"gpu_1x_a10": ["us-east-1", "us-west-1"], "gpu_1x_h100_pcie": []}
        self.asked: list[tuple[float, str]] = []
        self.other_account = False

    def transport(self) -> httpx.MockTransport:
        return httpx.MockTransport(self.handle)

    def alive(self) -> list[dict]:
        return [m for m in self.machines.values() if self._status(m) != "terminated"]

    def _fault(self, operation: str) -> str:
        for i, (where, fault) in enumerate(self.faults):
            if where in ("*", operation):
                del self.faults[i]
                return fault
        return ""

    def handle(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path.removeprefix("/api/v1/")
        operation = path.split("/")[0] if request.method == "GET" else path.split("/")[-1]
        self.asked.append((self.clock.now, operation))
        if request.headers.get("authorization") != f"Bearer {KEY}":
            return self._error(401, "global/invalid-api-key")
        fault = self._fault(operation)
        if fault == "429":
            return self._error(429, "global/quota-exceeded", {"Retry-After": "3"})
        if fault == "500":
            return self._error(500, "global/unknown")
        if fault == "garbage":
            return httpx.Response(200, content=b"<html>")
        if fault == "dropped":
            raise httpx.ReadTimeout("no answer", request=request)
        answer = self._do(request.method, path, json.loads(request.content or b"null"), fault)
        if fault == "lost":
            raise httpx.ReadTimeout("no answer", request=request)
        return answer

    def _do(self, method: str, path: str, body: dict | None, fault: str) -> httpx.Response:
        if path == "instance-types":
            return self._ok({name: self._type(name) for name in self.capacity})
        if path == "instances":
            return self._ok([] if self.other_account else [self._shown(m) for m in self.alive()])
        if path.startswith("instances/"):
            found = None if fault == "unknown" or self.other_account else self.machines.get(path.split("/")[1])
            return self._ok(self._shown(found)) if found else self._error(404, "global/object-does-not-exist")
        if path == "ssh-keys" and method == "GET":
            return self._ok(self.keys)
        if path == "ssh-keys":
            self.keys.append({"id": f"k{len(self.keys)}", **body})
            return self._ok(self.keys[-1])
        if path == "file-systems":
            return self._ok([])
        if path == "instance-operations/launch":
            return self._launch(body, fault)
        if path == "instance-operations/terminate":
            for name in body["instance_ids"]:
                if name not in self.machines:
                    return self._error(404, "global/object-does-not-exist")
                if fault != "deaf":
                    self.machines[name].setdefault("ends", self.clock.now + END_S)
            return self._ok({"terminated_instances": [self._shown(self.machines[i]) for i in body["instance_ids"]]})
        return self._error(404, "global/object-does-not-exist")

    def _launch(self, body: dict, fault: str) -> httpx.Response:
        if fault == "capacity" or body["region_name"] not in self.capacity.get(body["instance_type_name"], []):
            return self._error(400, "instance-operations/launch/insufficient-capacity")
        if [k for k in body["ssh_key_names"] if k not in [one["name"] for one in self.keys]]:
            return self._error(404, "global/object-does-not-exist")
        made = {"id": f"i{len(self.machines):04d}", "boots": self.clock.now + BOOT_S, "fault": fault, **body}
        self.machines[made["id"]] = made
        return self._ok({"instance_ids": [made["id"]]})

    def _status(self, m: dict) -> str:
        if "ends" in m:
            return "terminated" if self.clock.now >= m["ends"] else "terminating"
        if self.clock.now < m["boots"]:
            return "booting"
        return "unhealthy" if m["fault"] == "unhealthy" else "active"

    def _shown(self, m: dict) -> dict:
        late = 60.0 if m["fault"] == "late_ip" else -60.0
        shown = {"id": m["id"], "name": m["name"], "status": self._status(m), "region": {"name": m["region_name"]}}
        shown |= {"instance_type": self._type(m["instance_type_name"])["instance_type"]}
        shown |= {"ip": "192.0.2.7"} if self.clock.now >= m["boots"] + late else {}
        return shown

    def _type(self, name: str) -> dict:
        card = "A10 (24 GB PCIe)" if "a10" in name else "H100 (80 GB PCIe)"
        specs = {"vcpus": 30, "memory_gib": 200, "storage_gib": 1400, "gpus": 1}
        kind = {"name": name, "description": f"1x {card}", "gpu_description": card, "specs": specs}
        kind["price_cents_per_hour"] = 75 if "a10" in name else 249
        regions = [{"name": r, "description": r} for r in self.capacity[name]]
        return {"instance_type": kind, "regions_with_capacity_available": regions}

    def _ok(self, data: object) -> httpx.Response:
        return httpx.Response(200, json={"data": data}, headers=self._headers())

    def _error(self, status: int, code: str, headers: dict | None = None) -> httpx.Response:
        error = {"code": code, "message": "subject to change"}
        return httpx.Response(status, json={"error": error}, headers={**self._headers(), **(headers or {})})

    def _headers(self) -> dict[str, str]:
        return {"X-Now": str(self.clock.now + self.skew_s)}
