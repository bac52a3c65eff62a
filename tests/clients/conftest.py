"""Stores to test against: a directory, and a bucket on a real S3 server."""

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.clients.object_store import ObjectStore, open_store
from tasks.clients.s3_client import s3_client
from tasks.clients.s3_store import S3Store
from tests.clients.fault_proxy import FaultProxy
from tests.s3_server import S3Server


@pytest.fixture(scope="session")
def s3_bucket_url(s3_server: S3Server) -> Iterator[str]:
    """URL of a bucket, with the environment set so that it can be opened here and in subprocesses."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in s3_server.environment().items():
            environment.setenv(name, value)
        yield "s3://tests"


@pytest.fixture(params=["directory", "s3"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty store of either kind."""
    if request.param == "directory":
        return str(tmp_path / "store")
    return f"{request.getfixturevalue('s3_bucket_url')}/{uuid.uuid4().hex}"


@pytest.fixture(scope="session")
def client(s3_bucket_url: str) -> Iterator[Any]:
    """One client for all stores of this process: making one takes half a second."""
    client = s3_client()
    yield client
    client.close()


@pytest.fixture
def store(store_url: str, request: pytest.FixtureRequest) -> ObjectStore:
    """An empty store of either kind."""
    if store_url.startswith("s3://"):
        bucket, _, prefix = store_url.removeprefix("s3://").partition("/")
        return S3Store(bucket, prefix, request.getfixturevalue("client"))
    return open_store(store_url)


@pytest.fixture
def s3_url(s3_bucket_url: str) -> str:
    """URL of an empty store on the S3 server."""
    return f"{s3_bucket_url}/{uuid.uuid4().hex}"


@pytest.fixture(scope="session")
def faulty_server(s3_server: S3Server, s3_bucket_url: str) -> Iterator[tuple[FaultProxy, Any]]:
    """A proxy before the S3 server, and a client that goes through it."""
    with FaultProxy(s3_server.endpoint) as proxy:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
            client = s3_client()
        yield proxy, client
        client.close()


@pytest.fixture
def proxy(faulty_server: tuple[FaultProxy, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """The proxy without faults until told, in the environment in the server's place."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", faulty_server[0].endpoint)
    yield faulty_server[0]
    faulty_server[0].calm()


@pytest.fixture
def proxy_client(faulty_server: tuple[FaultProxy, Any]) -> Any:
    """The client that goes through the proxy."""
    return faulty_server[1]
