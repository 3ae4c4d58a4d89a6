"""A stand-in for the Hugging Face hub on 127.0.0.1: repositories are made, files come by LFS or within a commit."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlparse


class HubServer:
    """What came: repositories by name with their settings and files, the tokens, the messages of commits."""

    def __init__(self) -> None:
        self.address = ""
        self.settings: dict[str, dict[str, Any]] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.tokens: set[str | None] = set()
        self.messages: list[str] = []
        self.objects: dict[str, bytes] = {}
        self.refuse: int | None = None
        """Status of every answer, if set."""


@contextmanager
def hub_server() -> Iterator[HubServer]:
    hub = HubServer()

    class Handler(BaseHTTPRequestHandler):
        def answer(self, found: Any, status: int = 200) -> None:
            body = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def do_PUT(self) -> None:
            data = self.body()
            hub.objects[urlparse(self.path).path.rpartition("/")[2]] = data
            self.answer({})

        def do_GET(self) -> None:
            self.answer({"id": "/".join(self.path.split("/")[3:5]), "sha": "0" * 40, "siblings": []})

        def do_POST(self) -> None:
            raw, path = self.body(), urlparse(self.path).path
            hub.tokens.add(self.headers.get("Authorization"))
            if hub.refuse is not None:
                self.answer({"error": "not allowed here"}, hub.refuse)
            elif path == "/api/repos/create":
                asked = json.loads(raw)
                name = f"{asked['organization']}/{asked['name']}"
                hub.settings[name] = asked
                hub.files.setdefault(name, {})
                self.answer({"url": f"{hub.address}/{name}"})
            elif path == "/api/validate-yaml":
                self.answer({"errors": [], "warnings": []})
            elif "/preupload/" in path:
                self.answer({"files": [
                    {"path": each["path"], "shouldIgnore": False,
                     "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular"}
                    for each in json.loads(raw)["files"]
                ]})  # fmt: skip
            elif path.endswith("/info/lfs/objects/batch"):
                self.answer({"transfer": "basic", "objects": [
                    {"oid": each["oid"], "size": each["size"],
                     "actions": {"upload": {"href": f"{hub.address}/lfs/{each['oid']}"}}}
                    for each in json.loads(raw)["objects"]
                ]})  # fmt: skip
            elif "/commit/" in path:
                self.commit("/".join(path.split("/")[3:5]), [json.loads(line) for line in raw.splitlines()])
            else:
                self.answer({"error": f"no {path} here"}, 404)

        def commit(self, name: str, lines: list[dict[str, Any]]) -> None:
            for line in lines:
                value = line["value"]
                if line["key"] == "header":
                    hub.messages.append(value["summary"])
                elif line["key"] == "file":
                    hub.files[name][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    data = hub.objects[value["oid"]]
                    assert hashlib.sha256(data).hexdigest() == value["oid"] and len(data) == value["size"]
                    hub.files[name][value["path"]] = data
            self.answer({"commitUrl": f"{hub.address}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40})

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
