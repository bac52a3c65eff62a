"""The HTTP service: what it answers and refuses, and that new nights come in under traffic without one wrong answer."""

import asyncio
import json
import shlex
import shutil
import signal
import socket
import subprocess
import time
import venv
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from starlette.requests import Request
from starlette.types import Message

from infra.ranker.service import Limits, Refused, _body, main
from tasks.clients.object_store import ObjectStore, open_store
from tasks.release.manifest import blob_key
from tasks.release.pointer import promote
from tasks.release.publishing import publish_release
from tasks.serving.ranker import Ranker
from tests.benchmarks import traffic
from tests.infra.running import ROOT, Running, as_json, running, under_traffic
from tests.releases import (
    NIGHT,
    PIPELINE,
    UNSOLVABLE,
    Made,
    bounded,
    make_release,
    next_night,
    shared_feedback_graph,
    shared_graph,
    with_variants,
)


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory) -> list[Made]:
    """Releases of three nights that differ in their banks."""
    folder = tmp_path_factory.mktemp("nights")
    first = make_release(folder / "0", shared_graph(tmp_path_factory, "full"))
    later = [next_night(first, folder / str(n), NIGHT + timedelta(days=n), seed=n) for n in (1, 2)]
    return [first, *later]


@pytest.fixture
def store(tmp_path: Path, nights: list[Made]) -> ObjectStore:
    """A store whose champion is the first night's."""
    (tmp_path / "store").mkdir()
    opened = open_store(str(tmp_path / "store"))
    for made in nights:
        publish_release(opened, PIPELINE, made.folder, made.manifest, {})
    promote(opened, PIPELINE, nights[0].manifest.release, NIGHT, token=1)
    return opened


def test_it_answers_as_the_network_does_and_names_the_release(store: ObjectStore, nights: list[Made], tmp_path: Path):
    made = nights[0]
    named = {"release": made.manifest.release, "night": "2026-03-01"}
    options = ("--max-in-flight", "1", "--max-body-seconds", "300")
    with running(store, tmp_path, *options) as service, Ranker(store, PIPELINE, "cpu") as ranker:
        for number, golden in enumerate(made.golden):
            status, found = service.call("/score", as_json(made, number))
            assert (status, found.keys()) == (200, {"release", "night", "releases", "objectives", "scores"})
            assert found | named == found
            assert found["releases"] == [made.manifest.release] * len(golden.scores)
            assert found["objectives"] == ["liked", "stars"]
            np.testing.assert_allclose(found["scores"], golden.scores, rtol=1e-5, atol=1e-5)
        status, found = service.call("/rank", as_json(made, 8))
        assert (status, found | named) == (200, found)
        expected = ranker.rank(json.loads(as_json(made, 8)))
        assert [[one["item"] for one in row] for row in found["rankings"]] == [
            [one.item for one in row] for row in expected
        ]
        assert found["rankings"][0][0].keys() == {"position", "item", "scores"}
        assert service.call("/healthz") == (200, {"alive": True})
        ready = {"device": "cpu", "generation": 1, "challenger": None, "refusal": None, "pipeline": PIPELINE}
        told = service.call("/readyz")
        assert told == (200, told[1] | named | ready)
        metrics = service.text("/metrics")
        assert f'release="{made.manifest.release}",role="champion"}} 1.0' in metrics
        assert 'nightrank_http_calls_total{route="/score",status="200"} 10.0' in metrics
        refused(service, made)
        ends_on_term(service, made, tmp_path)


def test_it_tells_which_graph_serves_and_why_fp32_does(store: ObjectStore, nights: list[Made], tmp_path: Path):
    """The loaded release's own word, beside that of a reader in this process."""
    spoilt = with_variants(nights[0], tmp_path / "spoilt", spoilt=("int8",))
    sound = with_variants(nights[1], tmp_path / "sound")
    for made in (spoilt, sound):
        publish_release(store, PIPELINE, made.folder, made.manifest, {})
    promote(store, PIPELINE, spoilt.manifest.release, spoilt.manifest.night, token=1)
    with Ranker(store, PIPELINE, "cpu") as ranker:
        spared = ranker.spared
    with running(store, tmp_path, "--poll", "0.2") as service:
        _, told = service.call("/readyz")
        assert (told["release"], told["variant"], told["spared"]) == (spoilt.manifest.release, "fp32", spared)
        assert told["spared"].startswith("fp32 serves in place of int8: release ")
        assert "off by int8, limit 0.05" in told["spared"]
        promote(store, PIPELINE, sound.manifest.release, sound.manifest.night, token=1)
        while told["release"] != sound.manifest.release:
            _, told = service.call("/readyz")
        assert (told["variant"], told["spared"]) == ("int8", None)


def test_labels_out_of_bounds_and_feedback_without_a_solution_are_rejected_and_blame_nobody(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
):
    graphs = shared_graph(tmp_path_factory, "full"), shared_feedback_graph(tmp_path_factory, "full")
    made = make_release(tmp_path / "made", graphs[0], with_feedback=graphs[1])
    wide = bounded(made, tmp_path / "wide", -3.4e38, 3.4e38)
    store = open_store(str(tmp_path / "feedback"))
    for one in (made, wide):
        publish_release(store, PIPELINE, one.folder, one.manifest, {})
        promote(store, PIPELINE, one.manifest.release, NIGHT, token=1)
    promote(store, PIPELINE, made.manifest.release, NIGHT, token=1)
    body, good = (json.dumps(UNSOLVABLE | {"feedback_stars": [[1, 2, 3, 4, one]]}).encode() for one in (1e30, 5))
    with running(store, tmp_path, "--poll", "0.2") as service:
        assert service.call("/score", good)[0] == 200
        status, told = service.call("/score", body)
        assert (status, told["error"]) == (422, "rejected")
        assert "the label 1.0000000150474662e+30 in row 4 of request 0, expected a number from" in told["message"]
        promote(store, PIPELINE, wide.manifest.release, NIGHT, token=1)
        while service.call("/readyz")[1]["release"] != wide.manifest.release:
            time.sleep(0.02)
        status, told = service.call("/score", json.dumps(UNSOLVABLE).encode())
        assert (status, told["error"]) == (422, "rejected")
        assert told["message"].startswith("the feedback of 1 of 1 requests cannot be solved")
        metrics = service.text("/metrics")
        assert f'nightrank_requests_total{{outcome="rejected",pipeline="{PIPELINE}",role="champion"}} 2.0' in metrics
        assert 'outcome="failed"' not in metrics
        assert service.call("/readyz")[1]["warnings"] == []


def refused(service: Running, made: Made) -> None:
    """What is no request gets a status and a sentence, and what serves goes on serving."""
    good = json.loads(as_json(made, 8))
    plain = {"Content-Type": "text/plain"}
    many = {name: values * 5 for name, values in good.items()}
    wide = good | {"item": [[1] * 2001] * 16}
    cases: list[tuple[str, bytes | None, dict[str, str] | None, int, str]] = [
        ("/score", b"", None, 400, "the body is not JSON"),
        ("/score", b'{"user": NaN}', None, 400, "the body is not JSON"),
        ("/score", b"[" * 100_000, None, 400, "the body is not JSON"),
        ("/score", b"[1]", None, 400, "the body is a JSON list; send an object: input name to values"),
        ("/score", b"{}", plain, 415, "the content type is 'text/plain'; send application/json"),
        ("/score", b" " * (2**20 + 1), None, 413, "the body has more than 1048576 bytes; ask in parts"),
        ("/score", json.dumps(many).encode(), None, 413, "'user' has 80 requests, limit 64; ask in parts"),
        ("/rank", json.dumps(wide).encode(), None, 413, "'item' has 2001 candidates, limit 2000; ask in parts"),
        ("/rank", json.dumps(good | {"zone": ["1"] * 16}).encode(), None, 422, "column 'zone' holds '1' of type str"),
        ("/score", b"{}", None, 422, "the request lacks user, job"),
        ("/score", None, None, 405, "Method Not Allowed"),
        ("/scores", b"{}", None, 404, "Not Found: POST /score, /rank"),
    ]
    for path, body, headers, status, message in cases:
        found, told = service.call(path, body, headers)
        assert (found, told["message"][: len(message)]) == (status, message)
        assert told.keys() == {"error", "message"}
    assert service.call("/score", as_json(made, 8))[0] == 200


def lets_go(service: Running, made: Made) -> None:
    """A connection whose body is too slow or too long is answered and closed."""
    with service.half(as_json(made, 8)) as connection:
        assert read_to_its_end(connection).startswith(b"HTTP/1.1 408 ")
    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as connection:
        head = f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {2**40}\r\n\r\n"
        connection.sendall(head.encode())
        assert read_to_its_end(connection).startswith(b"HTTP/1.1 413 ")


def read_to_its_end(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(2**16):
        parts.append(part)
    return b"".join(parts)


def ends_on_term(service: Running, made: Made, folder: Path) -> None:
    """While a call is in flight others are told to come back; it is answered, and nothing is left on the disk."""
    body = as_json(made, 8)
    with service.half(body) as connection:
        while "nightrank_http_in_flight 1.0" not in service.text("/metrics"):
            time.sleep(0.02)
        busy = {"error": "busy", "message": "1 calls are in flight, limit 1; try again"}
        assert service.call("/score", body) == (503, busy)
        assert service.call("/healthz") == (200, {"alive": True})
        service.process.send_signal(signal.SIGTERM)
        while True:
            try:
                socket.create_connection(("127.0.0.1", service.port), timeout=60).close()
                time.sleep(0.02)
            except ConnectionRefusedError:
                break
        assert service.process.poll() is None
        connection.sendall(body[-1:])
        assert connection.recv(2**16).startswith(b"HTTP/1.1 200 OK\r\n")
    assert service.process.wait(60) in (0, -signal.SIGTERM)
    assert list((folder / "temporary").glob("nightrank-*")) == []


def test_a_body_that_does_not_come_is_let_go():
    async def nothing() -> Message:
        await asyncio.sleep(3600)
        raise AssertionError

    request = Request({"type": "http", "headers": [(b"content-type", b"application/json")]}, nothing)
    with pytest.raises(Refused, match="the body did not come within 1 s") as refusal:
        asyncio.run(_body(request, Limits(body_seconds=1)))
    assert refusal.value.status == 408


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-threads", "0"], "InvalidConfig: --max-threads is 0; give 1 or more\n"),
        (["--pipeline", "shops"], "NoRelease: "),
    ],
)
def test_a_service_that_cannot_start_says_why(
    store: ObjectStore, capsys: pytest.CaptureFixture[str], options: list[str], message: str
):
    with pytest.raises(SystemExit, match="2"):
        main(["--store", store.url, "--pipeline", PIPELINE, *options])
    assert capsys.readouterr().err.startswith(message)


def test_two_nights_come_in_under_traffic_and_no_call_fails_or_is_answered_by_two(
    store: ObjectStore, nights: list[Made], tmp_path: Path
):
    def swap(made: Made) -> None:
        promote(store, PIPELINE, made.manifest.release, made.manifest.night, token=1)

    with running(store, tmp_path, "--poll", "0.1") as service:
        report, swaps = asyncio.run(under_traffic(service, nights, 25.0, swap))
        assert service.call("/readyz")[1]["release"] == nights[-1].manifest.release
    assert report.failures == {}
    assert report.said.keys() == {made.manifest.release for made in nights}
    assert len(swaps) == 2
    order = [call.said for call in sorted(report.calls, key=lambda call: call.due)]
    assert order[0] == nights[0].manifest.release
    assert order[-1] == nights[-1].manifest.release


def test_a_refused_night_shows_and_the_last_good_one_serves(store: ObjectStore, nights: list[Made], tmp_path: Path):
    with running(store, tmp_path, "--poll", "0.1", "--max-body-seconds", "1") as service:
        bad = nights[2].manifest
        store.delete(blob_key(PIPELINE, next(file.sha256 for file in bad.files if file.name == "bank.bin")))
        promote(store, PIPELINE, bad.release, bad.night, token=1)
        while (told := service.call("/readyz"))[1]["refusal"] is None:
            time.sleep(0.05)
        assert told[0] == 200
        assert told[1]["release"] == nights[0].manifest.release
        assert told[1]["refusal"].startswith("ReleaseRefused: ")
        assert f'nightrank_refused{{pipeline="{PIPELINE}"}} 1.0' in service.text("/metrics")
        assert service.call("/score", as_json(nights[0], 8))[0] == 200
        lets_go(service, nights[0])


@pytest.mark.soak
def test_twenty_nights_come_in_during_ten_minutes_of_traffic(tmp_path: Path):
    figures = traffic.run(tmp_path, seconds=600.0, swaps=20)
    print(json.dumps(figures, indent=1))
    assert figures["failures"] == {}
    assert figures["swaps"] == 20
    assert len(figures["releases"]) == 21


@pytest.mark.soak
def test_the_steps_of_the_image_give_a_service_without_what_trains(
    store: ObjectStore, nights: list[Made], tmp_path: Path
):
    """What the Dockerfile copies and installs, in a folder and an environment of their own."""
    image, environment = tmp_path / "image", tmp_path / "environment"
    venv.create(environment, with_pip=True)
    python = str(environment / "bin" / "python")
    steps = (ROOT / "infra" / "ranker" / "Dockerfile").read_text().splitlines()
    for what, *words in (step.split() for step in steps if step.startswith(("COPY ", "RUN pip "))):
        if what == "COPY":
            *sources, target = words
            for source in sources:
                place = image / target / (source if target == "./" else "")
                place.parent.mkdir(parents=True, exist_ok=True)
                ours = ROOT / source
                shutil.copytree(ours, place) if ours.is_dir() else shutil.copy(ours, place)
        else:
            subprocess.run([python, "-m", *shlex.split(" ".join(words))], cwd=image, check=True)
    for name in ("torch", "prefect", "pandas", "pyarrow", "onnx"):
        assert subprocess.run([python, "-c", f"import {name}"], cwd=image, stderr=subprocess.PIPE).returncode == 1, name
    with running(store, tmp_path, python=python, root=image) as service:
        status, found = service.call("/score", as_json(nights[0], 8))
    assert status == 200
    np.testing.assert_allclose(found["scores"], nights[0].golden[8].scores, rtol=1e-5, atol=1e-5)
