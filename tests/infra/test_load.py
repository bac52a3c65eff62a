"""The load generator: whom it asks, how it counts, and what it takes for a failure."""

import asyncio
import json
from collections.abc import Awaitable, Callable

import pytest

from infra.ranker.load import Call, Report, offer

Answer = Callable[[int], Awaitable[bytes]]


def http(status: str, body: bytes) -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


async def served(answer: Answer, rate: float, seconds: float, **options: object) -> Report:
    """Load against a server that answers its n-th call as told; nothing: it closes the connection."""
    calls = 0

    talks = set()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal calls
        talks.add(asyncio.current_task())
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
                calls += 1
                said = await answer(calls)
                writer.write(said)
                if not said:
                    break
        except asyncio.IncompleteReadError:
            pass
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(talk, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        report = await offer(f"http://127.0.0.1:{port}/score", [b"{}"], rate, seconds, **options)  # type: ignore[arg-type]
        await asyncio.gather(*talks)
    return report


@pytest.mark.parametrize("url", ["http://10.0.0.1/", "http://example.com/", "https://127.0.0.1/", "http:///score"])
def test_only_this_host_is_asked(url: str):
    with pytest.raises(ValueError, match="is not on this host"):
        asyncio.run(offer(url, [b"{}"], 1, 1))


@pytest.mark.parametrize("bound", [{"rate": 20_000}, {"rate": 0}, {"seconds": 4_000}, {"connections": 1_000}])
def test_every_run_is_bounded(bound: dict[str, int]):
    with pytest.raises(ValueError, match=f"{next(iter(bound))} is {next(iter(bound.values()))}; give more than 0"):
        asyncio.run(offer("http://127.0.0.1:9/", [b"{}"], **{"rate": 1, "seconds": 1, **bound}))  # type: ignore[arg-type]


def test_calls_begin_by_the_clock_and_a_stall_counts_for_all_that_were_due():
    """One connection and a server that is silent for half a second: four calls were due in its first fifth."""

    async def answer(number: int) -> bytes:
        if number == 1:
            await asyncio.sleep(0.5)
        return http("200 OK", b'{"releases": ["a"]}')

    report = asyncio.run(served(answer, rate=20, seconds=0.2, connections=1))
    assert [call.due for call in report.calls] == [0, 0.05, 0.1, 0.15]
    assert all(call.seconds >= 0.5 - call.due for call in report.calls)
    assert report.said == {"a": 4}


def test_what_is_no_answer_is_a_failure_and_says_why():
    said = [
        http("200 OK", b'{"releases": ["a"]}'),
        http("503 Busy", b"later"),
        b"",
        http("200 OK", b'{"releases": ["b"]}'),
    ]

    async def answer(number: int) -> bytes:
        return said[number - 1]

    def judge(_at: int, body: bytes) -> str:
        if json.loads(body)["releases"] == ["b"]:
            raise ValueError("mixed")
        return "good"

    report = asyncio.run(served(answer, rate=50, seconds=0.08, judge=judge, connections=1))
    assert report.said == {"good": 1}
    assert {reason.split(":")[0] for reason in report.failures} == {"503", "IncompleteReadError", "ValueError"}
    assert sum(report.failures.values()) == 3


def test_percentiles_are_nearest_ranks_of_answered_calls():
    calls = [Call(due=n, seconds=n / 1000, said="a", failure=None) for n in range(1, 101)]
    report = Report(1.0, [*calls, Call(0, 9.0, None, "503")])
    assert report.percentiles() == {"p50": 50.0, "p95": 95.0, "p99": 99.0, "max": 100.0}
    assert report.percentiles(lambda call: call.due <= 10) == {"p50": 5.0, "p95": 10.0, "p99": 10.0, "max": 10.0}
    assert report.percentiles(lambda call: call.due > 100) == {}
