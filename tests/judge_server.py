"""A server with the chat completions of OpenAI on 127.0.0.1, as good or bad as a test wants it. It counts what it gets."""

from __future__ import annotations

import json
import select
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, dict[str, str], bytes]
SILENT = "silent"
"""Answer nothing until the client goes away."""
DROP = "drop"
"""Close the connection without an answer."""


def says(text: str, status: int = 200, **headers: str) -> Answer:
    """A chat completion, or an error with this text."""
    choices = [{"message": {"role": "assistant", "content": text}}]
    message = {"choices": choices} if status == 200 else {"error": {"message": text}}
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, json.dumps(message).encode()


class JudgeServer:
    """Counts of a server, and its behaviour: a function from (number of the request, its JSON) to an answer."""

    def __init__(self, behave: Callable[[int, dict[str, Any]], Answer | str]) -> None:
        self.behave = behave
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.in_flight = self.peak = 0
        self.lock = threading.Lock()
        self.ends = threading.Event()
        self.base_url = ""

    @property
    def calls(self) -> int:
        return len(self.bodies)


@contextmanager
def judge_server(behave: Callable[[int, dict[str, Any]], Answer | str]) -> Iterator[JudgeServer]:
    seen = JudgeServer(behave)
    silent: set[Any] = set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with seen.lock:
                number = seen.calls
                seen.bodies.append(body)
                seen.headers.append(dict(self.headers))
                seen.in_flight += 1
                # a client that gave up has closed its connection before it sends another request
                gone = select.select(list(silent), [], [], 0)[0]
                seen.peak = max(seen.peak, seen.in_flight - len(gone))
            try:
                answer = seen.behave(number, body) if self.path == "/v1/chat/completions" else says("no such path", 404)
                if answer == SILENT:
                    silent.add(self.connection)
                    while not seen.ends.is_set() and not select.select([self.connection], [], [], 0.02)[0]:
                        pass
            finally:
                with seen.lock:
                    silent.discard(self.connection)
                    seen.in_flight -= 1  # before the answer, after which the client may send the next request
            if isinstance(answer, str):
                self.close_connection = True
                return
            status, headers, content = answer
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    seen.base_url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        seen.ends.set()
        server.shutdown()
        server.server_close()
        thread.join()
