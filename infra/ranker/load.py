"""A load generator: offers a steady rate of calls to a ranker on this host, and says how they were answered.

    python -m infra.ranker.load --url http://127.0.0.1:8080/score --request request.json --rate 200 --seconds 60

Calls begin when the clock says, whether earlier ones were answered or not, and latency counts from then: a service that
stalls is not spared the calls that would have come meanwhile. Calls that find no free connection wait for one.
"""

import argparse
import asyncio
import ipaddress
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from urllib.parse import urlsplit

MOST_PER_SECOND, MOST_SECONDS, MOST_CONNECTIONS = 10_000.0, 3_600.0, 256
"""No load generator of ours goes further."""
PATIENCE = 30.0
"""Seconds after which a call counts as failed."""
IDLE = 30.0
"""Seconds after which an idle connection is not used again, as callers' pools have it."""


@dataclass(frozen=True)
class Call:
    """One call.

    Attributes:
        due: when it was to begin, in seconds since the run began.
        seconds: from then to its answer.
        said: what the answer was taken for, such as its release.
        failure: why there was none; None where all was well.
    """

    due: float
    seconds: float
    said: str | None
    failure: str | None


@dataclass
class Report:
    """All calls of a run.

    Attributes:
        rate: calls a second that were offered.
        calls: in the order in which they ended.
    """

    rate: float
    calls: list[Call] = field(default_factory=list)

    @property
    def failures(self) -> Counter[str]:
        """Why calls failed."""
        return Counter(call.failure for call in self.calls if call.failure is not None)

    @property
    def said(self) -> Counter[str]:
        """What the answers were taken for."""
        return Counter(call.said for call in self.calls if call.said is not None)

    def percentiles(self, keep: Callable[[Call], bool] = lambda _: True) -> dict[str, float]:
        """Milliseconds to an answer of the answered calls that are kept: nearest ranks, and the longest."""
        times = sorted(call.seconds * 1e3 for call in self.calls if call.failure is None and keep(call))
        marks = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
        return {name: times[math.ceil(mark * len(times)) - 1] for name, mark in marks.items()} if times else {}


class _Connections:
    """Connections to one address that are used again and again."""

    def __init__(self, host: str, port: int, most: int) -> None:
        self._place, self._turn = (host, port), asyncio.Semaphore(most)
        self._free: list[tuple[float, asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._opened: list[asyncio.StreamWriter] = []

    async def ask(self, message: bytes) -> tuple[int, bytes]:
        """Send a whole request; its status and body."""
        async with self._turn:
            self._free = [one for one in self._free if time.monotonic() - one[0] < IDLE]
            _, reader, writer = self._free.pop() if self._free else await self._open()
            try:
                writer.write(message)
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
                lines = [line.partition(":") for line in head.split("\r\n")[1:]]
                headers = {name: value.strip() for name, _, value in lines}
                body = await reader.readexactly(int(headers["content-length"]))
            except BaseException:
                writer.close()
                raise
            if headers.get("connection") == "close":
                writer.close()
            else:
                self._free.append((time.monotonic(), reader, writer))
            return int(head.split(" ", 2)[1]), body

    async def _open(self) -> tuple[float, asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(*self._place)
        self._opened.append(writer)
        return 0.0, reader, writer

    async def close(self) -> None:
        """End them all."""
        for writer in self._opened:
            writer.close()
            with suppress(OSError):  # the other side was first
                await writer.wait_closed()


def release_of(body: bytes) -> str:
    """The release that scored an answer's requests; several where a challenger has a share of them."""
    return "+".join(sorted(set(json.loads(body)["releases"])))


async def offer(
    url: str,
    bodies: Sequence[bytes],
    rate: float,
    seconds: float,
    judge: Callable[[int, bytes], str] | None = None,
    connections: int = 32,
    until: asyncio.Event | None = None,
) -> Report:
    """Offer calls at a steady rate.

    Args:
        url: `http://` address of this host.
        bodies: what is sent, in turn.
        rate: calls a second.
        seconds: how long new calls begin.
        judge: takes the position of what was sent and the answer's body; what it says is counted, what it raises as a
            ValueError is a failure. By default the release that the answer names.
        connections: most at the same time.
        until: ends the run earlier.

    Raises:
        ValueError: the address is not this host's, or a bound is passed.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme != "http" or not (host == "localhost" or _is_loopback(host)):
        raise ValueError(f"{url} is not on this host; load is offered to 127.0.0.1 only")
    bounds = (("rate", rate, MOST_PER_SECOND), ("seconds", seconds, MOST_SECONDS))
    for name, value, most in (*bounds, ("connections", connections, MOST_CONNECTIONS)):
        if not 0 < value <= most:
            raise ValueError(f"{name} is {value}; give more than 0 and at most {most:g}")
    heads = f"POST {parts.path or '/'} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
    messages = [f"{heads}Content-Length: {len(body)}\r\n\r\n".encode() + body for body in bodies]
    pool, report = _Connections(host, parts.port or 80, connections), Report(rate)
    began = time.perf_counter()

    async def call(number: int, due: float) -> None:
        said = failure = None
        at = number % len(bodies)
        try:
            async with asyncio.timeout(PATIENCE):
                status, body = await pool.ask(messages[at])
            if status == 200:
                said = judge(at, body) if judge is not None else release_of(body)
            else:
                failure = f"{status}: {body[:200].decode(errors='replace')}"
        except (OSError, EOFError, TimeoutError, ValueError, KeyError) as error:
            failure = f"{type(error).__name__}: {error}"
        report.calls.append(Call(due, time.perf_counter() - began - due, said, failure))

    async with asyncio.TaskGroup() as group:
        for number in count():
            due = number / rate
            if due >= seconds or (until is not None and until.is_set()):
                break
            if (early := began + due - time.perf_counter()) > 0:
                await asyncio.sleep(early)
            group.create_task(call(number, due))
    await pool.close()
    return report


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: prints one JSON object."""
    parser = argparse.ArgumentParser(prog="load", description="Offers a steady rate of calls to a ranker on this host.")
    parser.add_argument("--url", required=True, help="such as http://127.0.0.1:8080/score")
    parser.add_argument("--request", type=Path, required=True, nargs="+", help="JSON files that are sent in turn")
    parser.add_argument("--rate", type=float, required=True, help="calls a second")
    parser.add_argument("--seconds", type=float, required=True, help="how long new calls begin")
    parser.add_argument("--connections", type=int, default=32, help="most at the same time (default: 32)")
    options = parser.parse_args(arguments)
    bodies = [path.read_bytes() for path in options.request]
    report = asyncio.run(offer(options.url, bodies, options.rate, options.seconds, connections=options.connections))
    told = {"offered_per_second": report.rate, "calls": len(report.calls), "failures": dict(report.failures)}
    print(json.dumps({**told, "releases": dict(report.said), "milliseconds": report.percentiles()}, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
