"""A hub of one repository on 127.0.0.1, as far as huggingface_hub asks one: model info, HEAD and GET of files."""

from __future__ import annotations

import hashlib
import json
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from local_server import LocalServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(LocalServer):
    """Serves the files of `folder` as the model `hub_id`, safetensors as large files; `got` counts their GETs."""

    def __init__(self, folder: Path, hub_id: str = "someone/stage-1"):
        self.folder, self.hub_id, self.got = folder, hub_id, 0
        self.break_once: set[str] = set()
        """Files whose next download ends half-way."""
        super().__init__()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        body = request.command != "HEAD"
        path = request.path.partition("?")[0]
        if path in (f"/api/models/{self.hub_id}", f"/api/models/{self.hub_id}/revision/{COMMIT}"):
            self._send(request, json.dumps(self._info()).encode(), {"Content-Type": "application/json"}, body)
            return
        path = path.replace("/resolve/main/", f"/resolve/{COMMIT}/")
        start = f"/{self.hub_id}/resolve/{COMMIT}/"
        file = self.folder / path.removeprefix(start)
        if not path.startswith(start) or not file.is_file():
            self._send(request, b"{}", {"X-Error-Code": "RepoNotFound"}, body, 404)
            return
        data = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        status, asked = 200, request.headers.get("Range")
        if asked and body:
            first = int(asked.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            data, status = data[first:], 206
        if body:
            self.got += 1
        if body and file.name in self.break_once:
            self.break_once.discard(file.name)
            request.close_connection = True
            headers["Content-Length"] = str(len(data))
            data = data[: len(data) // 2]
        self._send(request, data, headers, body, status)

    def _info(self) -> dict[str, Any]:
        siblings = []
        for file in sorted(self.folder.iterdir()):
            entry: dict[str, Any] = {"rfilename": file.name, "size": file.stat().st_size, "blobId": "0" * 40}
            if file.suffix == ".safetensors":
                sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
                entry["lfs"] = {"sha256": sha256, "size": file.stat().st_size, "pointerSize": 130}
            siblings.append(entry)
        return {"id": self.hub_id, "modelId": self.hub_id, "sha": COMMIT, "siblings": siblings, "tags": [],
                "downloads": 0, "likes": 0, "private": False}  # fmt: skip

    @staticmethod
    def _send(
        request: BaseHTTPRequestHandler, data: bytes, headers: dict[str, str], body: bool, status: int = 200
    ) -> None:
        request.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            request.send_header(name, value)
        request.end_headers()
        if body:
            request.wfile.write(data)
