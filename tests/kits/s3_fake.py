"""S3 as far as rclone needs it to copy, read back and delete small files: one bucket, by path, no signature checked."""

from __future__ import annotations

import hashlib
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from local_server import LocalServer


class FakeS3(LocalServer):
    """`objects`: bucket/key -> content. `damages`: other bytes are stored under the ETag of those sent."""

    def __init__(self, bucket: str = "bucket"):
        super().__init__()
        self.bucket, self.damages = bucket, False
        self.objects: dict[str, bytes] = {}
        self.headers: dict[str, dict[str, str]] = {}
        self.claimed: dict[str, str] = {}
        """The ETags of damaged objects."""
        self.asked: list[str] = []

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(request.path)
        name, query = unquote(parts.path).lstrip("/"), parse_qs(parts.query)
        content = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        self.asked.append(f"{request.command} {request.path} {request.headers}")
        bucket, _, key = name.partition("/")
        if bucket != self.bucket:
            return self._send(request, 404, b"<Error><Code>NoSuchBucket</Code><Message>none</Message></Error>")
        if request.command == "PUT":
            self.objects[name] = b"?" * len(content) if self.damages else content
            self.claimed[name] = hashlib.md5(content).hexdigest() if self.damages else ""
            self.headers[name] = {k: v for k, v in request.headers.items() if k.lower().startswith("x-amz-meta-")}
            return self._send(request, 200, b"", ETag=f'"{hashlib.md5(content).hexdigest()}"')  # what it was sent
        if request.command == "DELETE":
            self.objects.pop(name, None)
            return self._send(request, 204, b"")
        if not key:
            return self._send(request, 200, self._listed(query).encode())
        if name not in self.objects:
            return self._send(request, 404, b"<Error><Code>NoSuchKey</Code><Message>none</Message></Error>")
        found = self.objects[name]
        return self._send(request, 200, found, ETag=f'"{self._etag(name)}"', **self.headers[name])

    def _etag(self, name: str) -> str:
        return self.claimed.get(name) or hashlib.md5(self.objects[name]).hexdigest()

    def _listed(self, query: dict[str, list[str]]) -> str:
        prefix, slash = query.get("prefix", [""])[0], query.get("delimiter", [""])[0]
        keys = [k[len(self.bucket) + 1 :] for k in sorted(self.objects) if k.startswith(f"{self.bucket}/{prefix}")]
        below = {k for k in keys if slash and slash in k[len(prefix) :]}
        folders = sorted({prefix + k[len(prefix) :].partition(slash)[0] + slash for k in below})
        rows = "".join(
            f"<Contents><Key>{escape(k)}</Key><LastModified>2026-11-27T00:00:00.000Z</LastModified>"
            f"<ETag>&quot;{self._etag(self.bucket + '/' + k)}&quot;</ETag>"
            f"<Size>{len(self.objects[self.bucket + '/' + k])}</Size><StorageClass>STANDARD</StorageClass></Contents>"
            for k in keys
            if k not in below
        )
        rows += "".join(f"<CommonPrefixes><Prefix>{escape(f)}</Prefix></CommonPrefixes>" for f in folders)
        about = f"<Name>{self.bucket}</Name><Prefix>{escape(prefix)}</Prefix><IsTruncated>false</IsTruncated>"
        return f'<?xml version="1.0"?><ListBucketResult>{about}{rows}</ListBucketResult>'

    def _send(self, request: BaseHTTPRequestHandler, status: int, content: bytes, **headers: Any) -> None:
        request.send_response(status)
        for key, value in {"Content-Length": len(content), "Last-Modified": formatdate(usegmt=True), **headers}.items():
            request.send_header(key, str(value))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content)
