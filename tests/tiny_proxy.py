"""A proxy in front of an S3 server that goes wrong on purpose: throttles, resets, drops answers, breaks conditions.

It remembers every request. Each fault says which requests it is for and how often it strikes; the first that fits does.
"""

from __future__ import annotations

import http.client
import http.server
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass
class Fault:
    """What goes wrong with requests of a method, whose path and query contain something, how many times.

    `does`: '' nothing, 'answer' without asking the server, 'reset' the connection, 'drop' the server's answer,
    'truncate', 'reset_body' or 'corrupt' it, 'ignore_condition', 'race' (look at the condition, write a while later),
    'queue' requests so that one at a time is with the server.
    """

    does: str
    method: str = ""
    contains: str = ""  # in path or query
    times: int = 1
    status: int = 503
    code: str = "SlowDown"
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None


@dataclass(frozen=True)
class Seen:
    method: str
    path: str
    headers: dict[str, str]  # lower-case names


class Proxy:
    def __init__(self, upstream: str) -> None:
        self.upstream = urlsplit(upstream).netloc
        self.faults: list[Fault] = []
        self.seen: list[Seen] = []
        self.taken: set[str] = set()  # names, for the fault 'race'
        self.lock, self.queue = threading.Lock(), threading.Lock()
        self.url = ""

    def requests(self, method: str, contains: str = "") -> list[Seen]:
        """Those of a method, without those of the probe."""
        found = [seen for seen in self.seen if seen.method == method and contains in seen.path]
        return [seen for seen in found if ".fourmill-probe" not in seen.path]

    def next_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method in ("", method) and fault.contains in path:
                    fault.times -= 1
                    return fault
        return None


@contextmanager
def proxy_before(upstream: str) -> Iterator[Proxy]:
    proxy = Proxy(upstream)
    with _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": proxy})) as server:
        proxy.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield proxy
        finally:
            server.shutdown()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_: object) -> None:
        """Quiet: clients that go away are what this is for."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.proxy.seen.append(Seen(self.command, self.path, headers))
        fault = self.proxy.next_fault(self.command, self.path)
        does = fault.does if fault else ""
        if does == "reset":
            return self._reset()
        if does == "answer":
            assert fault is not None
            return self._answer_by_itself(fault)
        if does in ("ignore_condition", "race") and "if-none-match" in headers:
            return self._without_condition(body, headers, racing=does == "race")
        with self.proxy.queue if does == "queue" else nullcontext():
            status, answered, data = self._forward(body, headers)
        if does == "drop":
            return self._reset()
        if does == "corrupt" and data:
            data = bytes([data[0] ^ 1]) + data[1:]
        self._send(status, answered, data, whole=does not in ("truncate", "reset_body"))
        if does == "reset_body":
            self._reset()
        return None

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _handle  # noqa: N815  (names that http.server calls)

    def _forward(self, body: bytes, headers: dict[str, str]) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.proxy.upstream, timeout=60)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        return answer.status, answer.getheaders(), data

    def _without_condition(self, body: bytes, headers: dict[str, str], racing: bool) -> None:
        """As a store that never looks at If-None-Match, or looks first and writes a while later."""
        name = self.path.partition("?")[0]
        if racing:
            if name in self.proxy.taken:
                return self._answer_by_itself(Fault("answer", status=412, code="PreconditionFailed"))
            time.sleep(0.05)
        self._send(*self._forward(body, self._signed_without_condition(body, headers)))
        self.proxy.taken.add(name)
        return None

    def _signed_without_condition(self, body: bytes, headers: dict[str, str]) -> dict[str, str]:
        from botocore.auth import S3SigV4Auth
        from botocore.awsrequest import AWSRequest
        from botocore.credentials import Credentials

        kept = {n: v for n, v in headers.items() if n not in ("if-none-match", "authorization", "x-amz-date")}
        request = AWSRequest(self.command, f"http://{headers['host']}{self.path}", headers=kept, data=body)
        S3SigV4Auth(Credentials("testkey", "testsecret123"), "s3", "us-east-1").add_auth(request)
        return {name.lower(): str(value) for name, value in request.headers.items()}

    def _answer_by_itself(self, fault: Fault) -> None:
        data = fault.body
        if data is None:
            data = f"<Error><Code>{fault.code}</Code><Message>m</Message></Error>".encode()
        self._send(fault.status, [("x-amz-request-id", "R7"), *fault.headers.items()], data)

    def _send(self, status: int, headers: list[tuple[str, str]], data: bytes, whole: bool = True) -> None:
        self.send_response_only(status)
        length = next((value for name, value in headers if name.lower() == "content-length"), str(len(data)))
        for name, value in headers:
            if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data if whole else data[: len(data) // 2])
        if not whole:
            self.wfile.flush()
            self.close_connection = True

    def _reset(self) -> None:
        """Close with a TCP reset instead of an end."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def log_message(self, *_: object) -> None:
        """Quiet."""
