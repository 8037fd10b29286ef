"""A hub on 127.0.0.1 that takes uploads, as far as huggingface_hub asks: create, preupload, LFS batch, commit."""

from __future__ import annotations

import base64
import json
from http.server import BaseHTTPRequestHandler
from typing import Any

from local_server import LocalServer


class UploadHub(LocalServer):
    """`files`: what was committed; `asked`: every request's method and path; `tokens`: what it was shown."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.tokens: set[str | None] = set()
        self.created: dict[str, Any] = {}
        self.private: bool | None = None
        self.refuse = False
        self._large: dict[str, bytes] = {}
        super().__init__()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        length = request.headers.get("Content-Length")
        body = request.rfile.read(int(length)) if length else self._chunks(request)
        self.asked.append(f"{request.command} {path}")
        self.tokens.add(request.headers.get("Authorization"))
        status, found = 200, {}
        if self.refuse:
            status, found = 403, {"error": "you may not"}
        elif path == "/api/repos/create":
            self.created = json.loads(body)
            self.private = self.created.get("private", self.created.get("visibility") == "private")  # old, new form
            found = {"url": f"{self.url}/{self.created.get('organization', 'someone')}/{self.created['name']}"}
        elif path == "/api/validate-yaml":
            found = {"errors": [], "warnings": []}
        elif "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            found = {"files": [{"path": n, "uploadMode": "lfs" if n.endswith(".safetensors") else "regular",
                                "shouldIgnore": False} for n in names]}  # fmt: skip
        elif path.endswith("/info/lfs/objects/batch"):
            found = {"transfer": "basic", "objects": [
                {**o, "actions": {"upload": {"href": f"{self.url}/large/{o['oid']}", "header": {}}}}
                for o in json.loads(body)["objects"]]}  # fmt: skip
        elif path.startswith("/large/"):
            self._large[path.removeprefix("/large/")] = body
        elif "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.files[value["path"]] = self._large[value["oid"]]
            repo = path.removeprefix("/api/models/").partition("/commit/")[0]
            found = {"commitUrl": f"{self.url}/{repo}/commit/{'0' * 40}", "commitOid": "0" * 40, "hookOutput": ""}
        else:
            status = 404
        data = json.dumps(found).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(data)

    @staticmethod
    def _chunks(request: BaseHTTPRequestHandler) -> bytes:
        if request.headers.get("Transfer-Encoding") != "chunked":
            return b""
        body = b""
        while size := int(request.rfile.readline(), 16):
            body += request.rfile.read(size)
            request.rfile.readline()
        request.rfile.readline()
        return body
