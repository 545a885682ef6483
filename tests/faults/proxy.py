"""A bad network on loopback: a proxy that cuts, halves, swallows, delays or answers 503."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# Of a request, by its method and number: pass; cut before the server has it; swallow the answer, or half of
# it; 503 before the server has it, or late-503 afterwards; slow; silent until the client gives up.
FATES = ("cut", "swallow", "half", "503", "late-503", "slow")
Fate = Callable[[str, int], str]
SLOW_SECONDS, SILENT_SECONDS = 1.0, 40.0


class Proxy(ThreadingHTTPServer):
    """Passes requests on to host:port `target`, but for those that `fate(method, number)` has otherwise."""

    daemon_threads = True
    fate: Fate

    def __init__(self, target: str, fate: Fate = lambda method, number: "pass", fd: int | None = None):
        self.target, self.fate, self.count = target, fate, 0
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler, bind_and_activate=fd is None)
        if fd is not None:  # a socket that listens already
            self.socket.close()
            self.socket = socket.socket(fileno=fd)
            self.server_address = self.socket.getsockname()
            self.server_name, self.server_port = self.server_address[:2]
        else:
            threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request: object, client_address: object) -> None:
        """A connection cut on purpose is no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def _pass(self) -> None:
        with self.server.lock:
            self.server.count += 1
            fate = self.server.fate(self.command, self.server.count)
        body = self._body()
        if fate == "cut":
            self._hang_up()
        elif fate == "503":
            self._answer(503, [], b"busy")
        elif fate == "silent":
            time.sleep(SILENT_SECONDS)
            self._hang_up()
        else:
            if fate == "slow":
                time.sleep(SLOW_SECONDS)
            self._ask(body, fate)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = do_PATCH = _pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _ask(self, body: bytes, fate: str) -> None:
        onward = http.client.HTTPConnection(self.server.target, timeout=60)
        kept = {k: v for k, v in self.headers.items() if k.lower() != "transfer-encoding"}
        onward.request(self.command, self.path, body, kept)
        answer = onward.getresponse()
        data = answer.read()
        if fate == "swallow":
            self._hang_up()
        elif fate == "late-503":
            self._answer(503, [], b"busy")
        else:
            length = answer.headers["Content-Length"] if self.command == "HEAD" else None
            self._answer(answer.status, answer.getheaders(), data, length, half=fate == "half")

    def _answer(
        self,
        status: int,
        headers: list[tuple[str, str]],
        data: bytes,
        length: str | None = None,
        *,
        half: bool = False,
    ) -> None:
        self.send_response_only(status)
        for key, value in headers:
            if key.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(key, value)
        self.send_header("Content-Length", length or str(len(data)))
        if half:
            self._half(data)
            return
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _half(self, data: bytes) -> None:
        """Half of the reply: of its body, or of its headers where it has none."""
        if data:
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
        else:
            self.wfile.write(b"".join(self._headers_buffer)[:-9])  # type: ignore[attr-defined]
        self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()

    def log_message(self, format: str, *arguments: object) -> None:
        """Quiet."""
