"""A small server on this machine that speaks enough of the Hub's HTTP interface to take an upload."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """What was created and uploaded.

    Args:
        repos: Visibility of each repository ("private" or "public").
        files: Content of each file, by repository and path.
    """

    def __init__(self) -> None:
        self.repos: dict[str, str] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.blobs: dict[str, bytes] = {}
        self.tokens: set[str] = set()
        self.unknown: list[str] = []


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *args: object) -> None: ...

    def _answer(self, content: object, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_POST(self) -> None:
        self.hub.tokens.add(self.headers.get("Authorization", ""))
        body, path = self._body(), self.path.partition("?")[0]
        host = f"http://{self.headers['Host']}"
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'somebody'}/{wanted['name']}"
            private = wanted.get("private") or wanted.get("visibility") == "private"
            self.hub.repos[name] = "private" if private else "public"
            self._answer({"url": f"{host}/{name}", "name": name, "id": name})
        elif path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            large = (".safetensors", ".onnx", ".data")
            modes = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(large) else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for f in files
            ]
            self._answer({"files": modes})
        elif path.endswith("/info/lfs/objects/batch"):
            asked = json.loads(body)["objects"]
            objects = [
                {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{host}/lfs/{o['oid']}"}}}
                for o in asked
            ]
            self._answer({"transfer": "basic", "objects": objects})
        elif "/commit/main" in path:
            name = path.removeprefix("/api/models/").partition("/commit/")[0]
            held = self.hub.files.setdefault(name, {})
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    held[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                elif entry["key"] == "lfsFile":
                    held[entry["value"]["path"]] = self.hub.blobs[entry["value"]["oid"]]
            self._answer({"commitUrl": f"{host}/{name}/commit/1", "commitOid": "1" * 40, "hookOutput": ""})
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        else:
            self.hub.unknown.append(f"POST {self.path}")
            self._answer({"error": "unknown"}, 404)

    def do_PUT(self) -> None:
        content = self._body()
        assert hashlib.sha256(content).hexdigest() == self.path.removeprefix("/lfs/")
        self.hub.blobs[self.path.removeprefix("/lfs/")] = content
        self._answer({})

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/"):
            name = "/".join(self.path.removeprefix("/api/models/").split("/")[:2]).partition("?")[0]
            if name in self.hub.repos:
                self._answer({"id": name, "sha": "0" * 40, "siblings": [], "private": True})
                return
        self.hub.unknown.append(f"GET {self.path}")
        self._answer({"error": "unknown"}, 404)

    do_HEAD = do_GET


@contextmanager
def stand_in() -> Iterator[tuple[str, Hub]]:
    """The server's address and what it holds."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", hub
    finally:
        server.shutdown()
        thread.join()
