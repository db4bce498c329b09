"""A stand-in for the hub's API on loopback: what `push_to_hub` asks of it, and what it was sent."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "x" * 34


class Hub:
    """What the stand-in holds.

    Attributes:
        endpoint: its address.
        repositories: name → file → bytes.
        private: names of private ones.
        refuse: path of a request → status it is refused with.
    """

    def __init__(self) -> None:
        self.endpoint = ""
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.refuse: dict[str, int] = {}

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        """Returns status and JSON of a request."""
        if path in self.refuse:
            return self.refuse[path], {"error": "refused"}
        parts = path.strip("/").split("/")
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": "me", "orgs": []}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        name = "/".join(parts[2:4])
        if parts[:2] != ["api", "models"] or name not in self.repositories:
            return 404, {"error": "Repository not found"}
        if len(parts) == 4 or parts[4] == "revision":
            return 200, {"id": name, "modelId": name, "sha": "0" * 40, "siblings": [], "tags": []}
        if parts[4] == "preupload":
            files = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
            ]
            return 200, {"files": modes}
        if parts[4] == "commit":
            return self._commit(name, body)
        return 404, {"error": path}

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        self.repositories[name] = {}
        if asked.get("private") or asked.get("visibility") == "private":
            self.private.add(name)
        return 200, {"url": f"{self.endpoint}/{name}", "name": name}

    def _commit(self, name: str, body: bytes) -> tuple[int, Any]:
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.repositories[name][line["value"]["path"]] = content
        oid = "1" * 40
        return 200, {
            "success": True,
            "commitOid": oid,
            "commitUrl": f"{self.endpoint}/{name}/commit/{oid}",
        }


@contextmanager
def served() -> Iterator[Hub]:
    """Serves a hub without repositories for the length of the block."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def _any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.split("?")[0]
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                status, told = 401, {"error": "Invalid credentials"}
            else:
                status, told = hub.answer(path, body)
            data = json.dumps(told).encode()
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_HEAD = _any

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
