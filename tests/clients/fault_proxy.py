"""An HTTP proxy before a real S3 server that loses, cuts, delays or replaces answers, or forgets what was asked."""

import hashlib
import http.client
import threading
from collections.abc import Iterable
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from tests.s3_server import ADMIN

BEGIN, PART, END = ("POST", "?uploads"), ("PUT", "partNumber="), ("POST", "uploadId=")
"""How the calls of an upload in parts are told from others: the method, and a piece of the path."""


@dataclass(frozen=True)
class Fault:
    """What happens to one call.

    Attributes:
        method: the HTTP method it waits for.
        path: a piece of the path and query that it waits for.
        served: whether the server gets the call and finishes it.
        status: the answer that the client gets instead of the server's; None closes the connection without one.
        body: what that answer says.
        cut: send the server's own headers and half of its body, then close.
        hang: say nothing until the proxy calms down.
    """

    method: str = "PUT"
    served: bool = True
    status: int | None = None
    path: str = ""
    body: bytes = b""
    cut: bool = False
    hang: bool = False


class FaultProxy:
    """Passes calls on; each `Fault` in `plan` is spent on one call of its method, in order.

    Attributes:
        plan: faults still to come.
        always: methods whose every answer is lost, after the server finished.
        seen: methods of all calls so far.
        calls: methods and paths of all calls so far.
        forgets: method, header (lower case) and piece of the path: calls that are passed on without that header.
        from_then_on: the fault of a call that fits and of all that come after it.
        hangs: pass nothing on and say nothing.
        nods: answer every PUT with success, and do nothing.
        overrules: answer conditional PUTs as they should be, and write all the same.
    """

    def __init__(self, target: str) -> None:
        address = urlsplit(target)
        assert address.hostname is not None
        assert address.port is not None
        self.plan: list[Fault] = []
        self.always: set[str] = set()
        self.seen: list[str] = []
        self.calls: list[str] = []
        self.forgets: set[tuple[str, str, str]] = set()
        self.from_then_on: Fault | None = None
        self.hangs = self.nods = self.overrules = False
        self._over = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, address.hostname, address.port))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.calm()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def fault_for(self, method: str, path: str) -> Fault | None:
        """The fault that this call gets, spent by asking."""
        self.seen.append(method)
        self.calls.append(f"{method} {path}")
        if self.hangs:
            return Fault(method, served=False, hang=True)
        then = self.from_then_on
        if then is not None and (then.method in ("any", method)) and then.path in path:
            self.from_then_on = replace(then, method="any", path="")
            return then
        if method in self.always:
            return Fault(method)
        if self.nods and method == "PUT":
            return Fault(served=False, status=200)
        if self.plan and self.plan[0].method == method and self.plan[0].path in path:
            return self.plan.pop(0)
        return None

    def hang(self) -> None:
        """Return when the proxy calms down."""
        self._over.wait()

    def calm(self) -> None:
        """Forget all faults and calls, and let go of what hangs."""
        self.plan, self.always, self.seen, self.calls = [], set(), [], []
        self.forgets = set()
        self.from_then_on: Fault | None = None
        self.hangs = self.nods = self.overrules = False
        self._over.set()
        self._over = threading.Event()


def _handler(proxy: FaultProxy, host: str, port: int) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one_request(self) -> None:
            self.raw_requestline = self.rfile.readline(65537)
            understood = bool(self.raw_requestline) and self.parse_request()
            self.close_connection = True  # which parsing resets
            if not understood:
                return
            fault = proxy.fault_for(self.command, self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, headers, content = 0, [], b""
            if fault is None or fault.served:
                status, headers, content = self._ask(body)
            if fault is None:
                self._answer(status, headers, content, len(content))
            elif fault.hang:
                proxy.hang()
            elif fault.cut:
                self._answer(status, headers, content, len(content) // 2)
            elif fault.status is not None:
                said = [("Content-Length", str(len(fault.body))), ("ETag", '"0"')]
                self._answer(fault.status, said if fault.status == 200 else said[:1], fault.body, len(fault.body))

        def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
            headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
            forgotten = [
                name
                for name in headers
                if any((self.command, name.lower()) == (m, h) and p in self.path for m, h, p in proxy.forgets)
            ]
            if forgotten:
                return self._passed_on(body, self._signed_without(forgotten, headers, body))
            answer = self._passed_on(body, headers)
            conditions = [name for name in headers if name.lower() in ("if-match", "if-none-match")]
            if proxy.overrules and answer[0] == 412 and conditions:
                self._passed_on(body, self._signed_without(conditions, headers, body))
            return answer

        def _signed_without(self, names: Iterable[str], headers: dict[str, str], body: bytes) -> dict[str, str]:
            """The headers without some of them, signed as the administrator would."""
            kept = {name: value for name, value in headers.items() if name not in names and name != "Authorization"}
            kept = {name: value for name, value in kept.items() if name.lower() not in ("x-amz-date",)}
            kept["X-Amz-Content-SHA256"] = hashlib.sha256(body).hexdigest()
            request = AWSRequest(self.command, f"http://{headers['Host']}{self.path}", headers=kept, data=body)
            S3SigV4Auth(Credentials(*ADMIN), "s3", "us-east-1").add_auth(request)
            return dict(request.headers.items())

        def _passed_on(self, body: bytes, headers: dict[str, str]) -> tuple[int, list[tuple[str, str]], bytes]:
            connection = http.client.HTTPConnection(host, port, timeout=30)
            try:
                connection.request(self.command, self.path, body=body, headers=headers)
                answer = connection.getresponse()
                return answer.status, answer.getheaders(), answer.read()
            finally:
                connection.close()

        def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes, count: int) -> None:
            self.send_response_only(status)
            length = {name.lower(): value for name, value in headers}.get("content-length", str(len(content)))
            for name, value in headers:
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            self.send_header("Content-Length", length)
            self.send_header("Connection", "close")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[:count])

    return Handler
