"""Steady traffic on the HTTP service while releases change: failures, mixed answers, and latency beside a swap.

    python -m tests.benchmarks.traffic --seconds 180 --swaps 6

Offers 2,000 requests a second, or what this machine carried in a few seconds each of the rates below: a rate is
carried where no call fails and 99 of 100 are answered within a quarter of a second. A call brings several requests, as
a page with a few slots does. The machine is as busy as it is. During a swap means from the moment in which the pointer
moved to the first answer of the new release, so the service's wait for its next look at the pointer (about a second) is
in it.
"""

import argparse
import asyncio
import json
import tempfile
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from infra.ranker.load import Call, offer
from tasks.clients.object_store import open_store
from tasks.release.pointer import promote
from tasks.release.publishing import publish_release
from tests.infra.running import Running, answered_by, as_json, running, told_apart, under_traffic
from tests.releases import NIGHT, PIPELINE, Made, make_graph, make_release, next_night

WANTED = 2000.0
"""Requests a second that are offered where they are carried."""
RATES = (10, 15, 25, 40, 60, 90, 125, 175, 250, 350, 500, 700, 1000, 1500, 2000)
TRIAL_SECONDS = 4.0
CARRIED_MS = 250.0
"""99 of 100 calls are answered within so many milliseconds at a rate that is carried."""


def run(folder: Path, seconds: float, swaps: int, times: int = 4) -> dict[str, Any]:
    """Offer traffic while a new release comes in every so often.

    Args:
        folder: an empty one, for releases, store and the service's files.
        seconds: of traffic.
        swaps: releases that come in during it.
        times: how often a call brings its request.
    """
    first = make_release(folder / "0", make_graph("full"))
    later = [next_night(first, folder / str(n), NIGHT + timedelta(days=n), seed=n) for n in range(1, swaps + 1)]
    nights = [first, *later]
    (folder / "store").mkdir()
    store = open_store(str(folder / "store"))
    for made in nights:
        publish_release(store, PIPELINE, made.folder, made.manifest, {})

    def name(made: Made) -> None:
        promote(store, PIPELINE, made.manifest.release, made.manifest.night, token=1)

    name(first)
    with running(store, folder, "--poll", "1") as service:
        carried = asyncio.run(most_carried(service, nights, times))
        of_a_call = times * sum(len(nights[0].golden[number].scores) for number in told_apart(nights)) / 2
        rate = min(carried, WANTED / of_a_call)
        report, windows = asyncio.run(under_traffic(service, nights, rate, name, seconds / (swaps + 1), times))
    during = report.percentiles(lambda call: _within(call, windows))
    outside = report.percentiles(lambda call: not _within(call, windows))
    return {
        "calls_carried_per_second": carried,
        "calls_offered_per_second": report.rate,
        "requests_offered_per_second": report.rate * of_a_call,
        "seconds": round(max(call.due for call in report.calls), 1),
        "calls": len(report.calls),
        "failures": dict(report.failures),
        "swaps": len(windows),
        "releases": dict(report.said),
        "seconds_of_a_swap": [round(end - start, 2) for start, end in windows],
        "calls_during_swaps": sum(_within(call, windows) for call in report.calls),
        "milliseconds_during_swaps": _rounded(during),
        "milliseconds_outside": _rounded(outside),
    }


async def most_carried(service: Running, nights: list[Made], times: int) -> float:
    """The highest of the rates that the service carries now."""
    numbers = told_apart(nights)
    bodies = [as_json(nights[0], number, times) for number in numbers]
    judge = answered_by(nights, numbers, [], times)
    url = f"http://127.0.0.1:{service.port}/score"
    carried = float(RATES[0])
    for rate in RATES:
        report = await offer(url, bodies, rate, TRIAL_SECONDS, judge)
        if report.failures or report.percentiles()["p99"] > CARRIED_MS:
            break
        carried = float(rate)
    return carried


def _within(call: Call, windows: list[tuple[float, float]]) -> bool:
    return any(start <= call.due + call.seconds and call.due <= end for start, end in windows)


def _rounded(found: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 1) for name, value in found.items()}


def main() -> None:
    """The command line: prints one JSON object."""
    parser = argparse.ArgumentParser(prog="traffic", description="Steady traffic while releases change.")
    parser.add_argument("--seconds", type=float, default=600.0, help="of traffic (default: 600)")
    parser.add_argument("--swaps", type=int, default=20, help="releases that come in (default: 20)")
    parser.add_argument("--times", type=int, default=4, help="how often a call brings its request (default: 4)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nightrank-traffic-") as room:
        print(json.dumps(run(Path(room), options.seconds, options.swaps, options.times), indent=1))


if __name__ == "__main__":
    main()
