"""A ranker as an HTTP service: the reference reader behind a few routes, as an example that a team starts from.

    python -m infra.ranker.service --store s3://models/nightrank --pipeline movielens --port 8080

`POST /score` and `POST /rank` take requests as JSON: input name to values, as the release's manifest lists them.
Answers name the release of each request. `/healthz` says that the process lives, `/readyz` what it serves, `/metrics`
what Prometheus reads. A new night is picked up while requests are served. TERM stops it once the requests in flight are
answered.
"""

import argparse
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import anyio
import orjson
import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from tasks.errors import InvalidConfig, NightrankError, NoRelease, RequestRejected
from tasks.serving.metrics import Metrics
from tasks.serving.ranker import Answer, Ranker
from tasks.serving.sessions import Engine

log = logging.getLogger("nightrank.service")
KEEP_ALIVE = 75
"""Seconds that an idle connection stays open: longer than balancers and pools keep theirs (60), or a call now and then
meets a connection that is just being closed."""
PASSED_OVER = 8
"""Times the longest body that is read to its end, to be refused."""
Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Limits:
    """What a caller may ask for at once.

    Attributes:
        body: bytes of a request's body.
        body_seconds: until it has come.
        requests: ranking requests (R) in one call.
        candidates: candidates of each (M).
        connections: open ones; calls on more are told to come back.
        in_flight: calls that are answered at the same time; more are told to come back.
        threads: calls that compute at the same time.
    """

    body: int = 2**20
    body_seconds: int = 10
    requests: int = 64
    candidates: int = 2000
    connections: int = 1024
    in_flight: int = 256
    threads: int = 4

    def __post_init__(self) -> None:
        """Refuse limits that let nothing through.

        Raises:
            InvalidConfig: one is less than 1.
        """
        for name, value in asdict(self).items():
            if value < 1:
                raise InvalidConfig(f"--max-{name.replace('_', '-')} is {value}; give 1 or more")


class Refused(Exception):
    """A call that is answered with an error status.

    Attributes:
        status: HTTP status.
        kind: a stable word for programs.
        closes: whether the connection ends with it: what is left of the body is not waited for.
    """

    def __init__(self, status: int, kind: str, message: str, closes: bool = False) -> None:
        super().__init__(message)
        self.status, self.kind, self.closes = status, kind, closes


class Service:
    """The routes, over one ranker."""

    def __init__(self, ranker: Ranker, registry: CollectorRegistry, limits: Limits) -> None:
        """Take over a ranker, which is closed when the service stops.

        Args:
            ranker: looks for new releases by itself.
            registry: holds its metrics; those of the routes are added.
            limits: what a caller may ask for.
        """
        self._ranker, self._registry, self._limits = ranker, registry, limits
        self._threads = anyio.CapacityLimiter(limits.threads)
        self._busy = 0
        self._calls = Counter("nightrank_http_calls", "Calls answered.", ["route", "status"], registry=registry)
        self._seconds = Histogram("nightrank_http_seconds", "Seconds to an answer.", ["route"], registry=registry)
        Gauge("nightrank_http_in_flight", "Calls now.", registry=registry).set_function(lambda: self._busy)

    def app(self) -> Starlette:
        """The ASGI application."""
        asked = {"/score": _scores, "/rank": _rankings}
        return Starlette(
            routes=[
                *(
                    Route(path, self._counted(path, partial(self._ask, shape)), methods=["POST"])
                    for path, shape in asked.items()
                ),
                Route("/healthz", self._health, methods=["GET"]),
                Route("/readyz", self._ready, methods=["GET"]),
                Route("/metrics", self._metrics, methods=["GET"]),
            ],
            lifespan=self._life,
            exception_handlers={HTTPException: _elsewhere},
        )

    @asynccontextmanager
    async def _life(self, _app: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await anyio.to_thread.run_sync(self._ranker.close)

    def _counted(self, path: str, handler: Handler) -> Handler:
        """The handler with its errors as answers, counted and timed."""

        async def answered(request: Request) -> Response:
            began, status = time.perf_counter(), 500
            try:
                response = await handler(request)
                status = response.status_code
                return response
            except Refused as refused:
                status = refused.status
                return _error(status, refused.kind, str(refused), refused.closes)
            finally:
                self._calls.labels(path, str(status)).inc()
                self._seconds.labels(path).observe(time.perf_counter() - began)

        return answered

    async def _ask(self, shape: Callable[[Answer], Mapping[str, object]], request: Request) -> Response:
        if self._busy >= self._limits.in_flight:
            raise Refused(503, "busy", f"{self._busy} calls are in flight, limit {self._limits.in_flight}; try again")
        self._busy += 1
        try:
            body = await _body(request, self._limits)
            return await anyio.to_thread.run_sync(self._answer, body, shape, limiter=self._threads)
        finally:
            self._busy -= 1

    def _answer(self, body: bytes, shape: Callable[[Answer], Mapping[str, object]]) -> Response:
        """In a thread: read, score, write."""
        asked = _parsed(body)
        self._bounded(asked)
        try:
            answer = self._ranker.answer(asked)
        except RequestRejected as error:
            raise Refused(422, "rejected", str(error)) from error
        except NoRelease as error:
            raise Refused(503, "stopping", str(error)) from error
        except NightrankError as error:
            log.exception("a request failed")
            raise Refused(500, "failed", str(error)) from error
        named = {"release": answer.manifest.release, "night": answer.manifest.night, "releases": answer.releases}
        return _json(200, {**named, **shape(answer)})

    def _bounded(self, asked: Mapping[str, object]) -> None:
        """Refuse more requests or candidates than the limits, before anything is made of them."""
        for name, values in asked.items():
            if isinstance(values, list) and len(values) > self._limits.requests:
                raise Refused(
                    413,
                    "too_large",
                    f"{name!r} has {len(values)} requests, limit {self._limits.requests}; ask in parts",
                )
        item = next(spec.name for spec in self._ranker.manifest.interface.inputs if spec.per == "candidate")
        rows = asked.get(item)
        widest = max((len(row) for row in rows if isinstance(row, list)), default=0) if isinstance(rows, list) else 0
        if widest > self._limits.candidates:
            raise Refused(
                413, "too_large", f"{item!r} has {widest} candidates, limit {self._limits.candidates}; ask in parts"
            )

    async def _health(self, _request: Request) -> Response:
        return _json(200, {"alive": True})

    async def _ready(self, _request: Request) -> Response:
        ranker = self._ranker
        try:
            serves = {
                "pipeline": ranker.pipeline,
                "release": ranker.release,
                "night": ranker.night,
                "generation": ranker.generation,
                "challenger": ranker.challenger,
                "device": ranker.device,
                "variant": ranker.variant,
                "spared": ranker.spared,
                "signed": ranker.signed,
            }
        except NoRelease as error:
            return _error(503, "stopping", str(error))
        return _json(200, {**serves, "refusal": ranker.refusal, "warnings": ranker.warnings})

    async def _metrics(self, _request: Request) -> Response:
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)


async def _body(request: Request, limits: Limits) -> bytes:
    """The body, of which no more than the limit is ever kept.

    A caller who is still sending would not read an answer, so what is a little too long is let come, and passed over.
    """
    told, most = request.headers.get("content-length", "0"), PASSED_OVER * limits.body
    too_large = Refused(413, "too_large", f"the body has more than {limits.body} bytes; ask in parts", closes=True)
    if told.isdecimal() and int(told) > most:
        raise too_large
    body, come = bytearray(), 0
    try:
        with anyio.fail_after(limits.body_seconds):
            async for chunk in request.stream():
                come += len(chunk)
                if come > most:
                    raise too_large
                if come <= limits.body:
                    body += chunk
    except ClientDisconnect as error:
        raise Refused(400, "incomplete", "the connection was closed before the body was complete") from error
    except TimeoutError as error:
        message = f"the body did not come within {limits.body_seconds} s"
        raise Refused(408, "incomplete", message, closes=True) from error
    if come > limits.body:
        raise too_large
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(415, "not_json", f"the content type is {kind!r}; send application/json")
    return bytes(body)


async def _elsewhere(_request: Request, error: Exception) -> Response:
    """No such route, or not by this method."""
    assert isinstance(error, HTTPException)
    return _error(error.status_code, "no_route", f"{error.detail}: POST /score, /rank; GET /healthz, /readyz, /metrics")


def _parsed(body: bytes) -> dict[str, object]:
    try:
        asked = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Refused(400, "not_json", f"the body is not JSON: {error}") from error
    if not isinstance(asked, dict):
        raise Refused(
            400, "not_json", f"the body is a JSON {type(asked).__name__}; send an object: input name to values"
        )
    return asked


def _scores(answer: Answer) -> Mapping[str, object]:
    """Scores as lists [R, M, K], and what K is."""
    names = [objective.name for objective in answer.manifest.interface.objectives]
    return {"objectives": names, "scores": answer.scores}


def _rankings(answer: Answer) -> Mapping[str, object]:
    """Per request its candidates, best first."""
    return {"rankings": [[asdict(one) for one in ranking] for ranking in answer.ranked()]}


def _json(status: int, content: Mapping[str, object], headers: Mapping[str, str] | None = None) -> Response:
    data = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(data, status, headers, media_type="application/json")


def _error(status: int, kind: str, message: str, closes: bool = False) -> Response:
    headers = {"Retry-After": "1"} if status == 503 else {}
    headers |= {"Connection": "close"} if closes else {}
    return _json(status, {"error": kind, "message": message}, headers)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="ranker", description="Serves a pipeline's champion over HTTP.")
    parser.add_argument("--store", required=True, help="a directory or s3://bucket/prefix")
    parser.add_argument("--pipeline", required=True, help="the pipeline's name")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where scores are computed")
    parser.add_argument("--cache", type=Path, help="folder for releases, kept over restarts (default: a temporary one)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this host only)")
    parser.add_argument("--port", type=int, default=8080, help="port to listen on (default: 8080)")
    parser.add_argument("--poll", type=float, default=10.0, metavar="SECONDS", help="between looks at the pointer")
    for name, default in asdict(Limits()).items():
        parser.add_argument(f"--max-{name.replace('_', '-')}", type=int, default=default, dest=name, metavar="N")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    registry = CollectorRegistry()
    try:
        limits = Limits(**{name: getattr(options, name) for name in asdict(Limits())})
        ranker = Ranker(
            options.store,
            options.pipeline,
            options.device,
            options.cache,
            engine=Engine(threads=1),  # calls are answered by several threads
            refresh_every=options.poll,
            batching=options.device == "cuda",  # on a CPU a run costs no more than waking a thread for it
            events=Metrics(registry, options.pipeline),
        )
    except NightrankError as error:
        parser.exit(2, f"{type(error).__name__}: {error}\n")
    uvicorn.run(
        Service(ranker, registry, limits).app(),
        host=options.host,
        port=options.port,
        access_log=False,
        log_config=None,
        timeout_keep_alive=KEEP_ALIVE,
        limit_concurrency=limits.connections,
        timeout_graceful_shutdown=20,
    )


if __name__ == "__main__":
    main()
