"""A ranker's HTTP service in a process of its own, and traffic on it while releases change."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from infra.ranker.load import Report, offer
from tasks.clients.object_store import ObjectStore
from tests.ports import free_ports
from tests.releases import PIPELINE, Made

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Running:
    """A service in a process of its own."""

    process: subprocess.Popen[bytes]
    port: int

    def call(self, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        """Status and JSON of one call."""
        sent = {"Content-Type": "application/json"} if headers is None else headers
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", body, sent)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.loads(response.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def text(self, path: str) -> str:
        """A page as text."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as response:
            found: str = response.read().decode()
            return found

    def half(self, body: bytes) -> socket.socket:
        """A call to /score whose last byte is still to come."""
        head = (
            f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(head.encode() + body[:-1])
        return connection


@contextmanager
def running(
    store: ObjectStore, folder: Path, *options: str, python: str = sys.executable, root: Path = ROOT
) -> Iterator[Running]:
    """A service, once it is ready; ended where the block ends."""
    (port,) = free_ports(1)
    temporary = folder / "temporary"
    temporary.mkdir()
    words = ("--store", store.url, "--pipeline", PIPELINE, "--port", str(port), "--device", "cpu", *options)
    command = [python, "-m", "infra.ranker.service", *words]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with (folder / "service.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=log)
        service = Running(process, port)
        try:
            while True:
                assert process.poll() is None, (folder / "service.log").read_text()
                try:
                    service.call("/readyz")
                    break
                except urllib.error.URLError:
                    time.sleep(0.05)
            yield service
        finally:
            process.kill()
            process.wait()


def as_json(made: Made, number: int, times: int = 1) -> bytes:
    """A golden request as a caller sends it, so many times in one call."""
    listed: dict[str, Any] = {}
    for spec in made.manifest.interface.inputs:
        flat = made.golden[number].inputs[spec.name].astype(object)
        flat[(flat != flat) if spec.missing is None else (flat == spec.missing)] = None
        listed[spec.name] = flat.tolist() * times
    return json.dumps(listed).encode()


def told_apart(nights: Sequence[Made], count: int = 2) -> list[int]:
    """The smallest golden requests whose scores differ from night to night by so much that a mixed answer shows."""

    def apart(number: int) -> float:
        scores = [made.golden[number].scores for made in nights]
        return min(float(np.abs(one - other).max()) for one, other in pairwise(scores))

    numbers = [number for number in range(len(nights[0].golden)) if apart(number) > 0.01]
    assert len(numbers) >= count
    return sorted(numbers, key=lambda number: nights[0].golden[number].scores.size)[:count]


def answered_by(
    nights: Sequence[Made], numbers: Sequence[int], seen: list[str], times: int = 1
) -> Callable[[int, bytes], str]:
    """A judge: every score is the named release's own."""
    expected = {
        made.manifest.release: [np.tile(made.golden[number].scores, (times, 1, 1)) for number in numbers]
        for made in nights
    }

    def judge(at: int, body: bytes) -> str:
        found = json.loads(body)
        (release,) = set(found["releases"])
        off = np.abs(np.array(found["scores"], np.float32) - expected[release][at]).max()
        if not off <= 1e-4:
            raise ValueError(f"mixed: an answer that names {release[:12]} is {off:.3g} off its scores")
        seen.append(release)
        return str(release)

    return judge


async def under_traffic(
    service: Running,
    nights: Sequence[Made],
    rate: float,
    swap: Callable[[Made], None],
    between: float = 0.0,
    times: int = 1,
) -> tuple[Report, list[tuple[float, float]]]:
    """Traffic from the first night's release to the last one's; each swap from its promotion to its first answer."""
    numbers, seen, done = told_apart(nights), list[str](), asyncio.Event()
    began, swaps = time.perf_counter(), []
    bodies = [as_json(nights[0], number, times) for number in numbers]
    url = f"http://127.0.0.1:{service.port}/score"
    judge = answered_by(nights, numbers, seen, times)
    traffic = asyncio.create_task(offer(url, bodies, rate, 3600, judge, connections=32, until=done))
    try:
        for made in nights:
            if made is not nights[0]:
                await asyncio.sleep(between)
                started = time.perf_counter() - began
                await asyncio.to_thread(swap, made)
            while made.manifest.release not in seen[-50:] and not traffic.done():
                await asyncio.sleep(0.02)
            if made is not nights[0]:
                swaps.append((started, time.perf_counter() - began))
        await asyncio.sleep(between or 0.5)
    finally:
        done.set()
    return await traffic, swaps
