"""What the rights in `infra/policies` forbid: each call answers 403 and changes nothing.

That they are enough for a night and a ranker is told by `tests/steps/test_s3_night.py`, which runs with them, and for
an operator by `test_operator.py`.
"""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from botocore.exceptions import ClientError

from tasks.clients.object_store import CHECKS, open_store
from tasks.clients.s3_client import s3_client
from tasks.errors import StoreUnwritable
from tests.s3_server import OPERATOR, POLICIES, PUBLISHER, RANKER, S3Server

HOME, OTHER = "nightrank/tiny", "nightrank/other"
THERE = {
    "models": (
        f"{HOME}/current.json", f"{HOME}/blobs/a", f"{HOME}/releases/r/manifest.json", f"{HOME}/releases/r/run.json",
        f"{HOME}/state/released/n.json", f"{HOME}/work/prepare/k/record.json", f"{HOME}/lease", f"{HOME}/ledger/1.json",
        f"{OTHER}/current.json", f"{OTHER}/state/n.json",
    ),
    "lake": ("interactions/night=2026-03-01/p.parquet", "secrets/salaries.parquet"),
}  # fmt: skip


@pytest.fixture(scope="module")
def admin(s3_server: S3Server) -> Iterator[Any]:
    """The administrator's client, in a world with an object of every kind."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in s3_server.environment().items():
            environment.setenv(name, value)
        client = s3_client()
    made = []
    for bucket, keys in THERE.items():
        s3_server.make_bucket(bucket)
        for key in keys:
            if "Contents" not in client.list_objects_v2(Bucket=bucket, Prefix=key):  # else it is another test's
                client.put_object(Bucket=bucket, Key=key, Body=b"was here")
                made.append((bucket, key))
    yield client
    for bucket, key in made:
        client.delete_object(Bucket=bucket, Key=key)
    client.close()


def test_no_policy_allows_more_calls_than_it_names() -> None:
    """And an operator's is for one pipeline: he removes releases, and cannot write any."""
    for who in ("operator", "publisher", "reader"):
        told = json.loads((POLICIES / f"{who}.json").read_text())["Statement"]
        actions = [
            one for part in told for one in ([part["Action"]] if isinstance(part["Action"], str) else part["Action"])
        ]
        assert actions
        assert not [one for one in actions if "*" in one]
    written = {
        name
        for part in json.loads((POLICIES / "operator.json").read_text())["Statement"]
        if part["Action"] == "s3:PutObject"
        for name in part["Resource"]
    }
    home = "arn:aws:s3:::models/nightrank/movielens"
    assert {f"{home}/current.json", f"{home}/ledger/*", f"{home}/lease", f"{home}/state/gc.json"} <= written
    assert not [one for one in written if one.startswith((f"{home}/releases", f"{home}/blobs", f"{home}/*"))]


@pytest.fixture(scope="module")
def clients(admin: Any, s3_server: S3Server) -> dict[str, Any]:
    """Clients of the publisher, the operator and the ranker."""
    made = {}
    for who, identity in (("publisher", PUBLISHER), ("operator", OPERATOR), ("ranker", RANKER)):
        with pytest.MonkeyPatch.context() as environment:
            for name, value in s3_server.environment(identity).items():
                environment.setenv(name, value)
            made[who] = s3_client()
    return made


def get(bucket: str, key: str) -> Callable[[Any], Any]:
    return lambda client: client.get_object(Bucket=bucket, Key=key)


def put(bucket: str, key: str) -> Callable[[Any], Any]:
    return lambda client: client.put_object(Bucket=bucket, Key=key, Body=b"forged")


def delete(bucket: str, key: str) -> Callable[[Any], Any]:
    return lambda client: client.delete_object(Bucket=bucket, Key=key)


def begin(bucket: str, key: str) -> Callable[[Any], Any]:
    return lambda client: client.create_multipart_upload(Bucket=bucket, Key=key)


FORBIDDEN: dict[tuple[str, str], Callable[[Any], Any]] = {
    ("ranker", "moves the pointer"): put("models", f"{HOME}/current.json"),
    ("ranker", "writes a blob"): put("models", f"{HOME}/blobs/b"),
    ("ranker", "writes a blob in parts"): begin("models", f"{HOME}/blobs/b"),
    ("ranker", "deletes the pointer"): delete("models", f"{HOME}/current.json"),
    ("ranker", "deletes a manifest"): delete("models", f"{HOME}/releases/r/manifest.json"),
    ("ranker", "reads a night's metrics"): get("models", f"{HOME}/releases/r/run.json"),
    ("ranker", "reads what steps left"): get("models", f"{HOME}/work/prepare/k/record.json"),
    ("ranker", "reads the state of nights"): get("models", f"{HOME}/state/released/n.json"),
    ("ranker", "reads another pipeline"): get("models", f"{OTHER}/current.json"),
    ("ranker", "reads the lake"): get("lake", "interactions/night=2026-03-01/p.parquet"),
    ("ranker", "lists the lake"): lambda client: client.list_objects_v2(Bucket="lake", Prefix="interactions/"),
    ("operator", "writes a blob"): put("models", f"{HOME}/blobs/b"),
    ("operator", "writes a blob in parts"): begin("models", f"{HOME}/blobs/b"),
    ("operator", "writes a manifest"): put("models", f"{HOME}/releases/r/manifest.json"),
    ("operator", "writes beside a manifest"): put("models", f"{HOME}/releases/r/run.json"),
    ("operator", "writes the state of nights"): put("models", f"{HOME}/state/released/n.json"),
    ("operator", "writes what steps left"): put("models", f"{HOME}/work/prepare/k/record.json"),
    ("operator", "deletes the pointer"): delete("models", f"{HOME}/current.json"),
    ("operator", "deletes the lease"): delete("models", f"{HOME}/lease"),
    ("operator", "deletes the state of nights"): delete("models", f"{HOME}/state/released/n.json"),
    ("operator", "deletes from the ledger"): delete("models", f"{HOME}/ledger/1.json"),
    ("operator", "reads another pipeline"): get("models", f"{OTHER}/current.json"),
    ("operator", "moves another pipeline's pointer"): put("models", f"{OTHER}/current.json"),
    ("operator", "deletes another pipeline's state"): delete("models", f"{OTHER}/state/n.json"),
    ("operator", "writes outside of every pipeline"): put("models", "index.html"),
    ("operator", "reads the lake"): get("lake", "interactions/night=2026-03-01/p.parquet"),
    ("operator", "lists the lake"): lambda client: client.list_objects_v2(Bucket="lake", Prefix="interactions/"),
    ("operator", "deletes from the lake"): delete("lake", "interactions/night=2026-03-01/p.parquet"),
    ("operator", "deletes the bucket"): lambda client: client.delete_bucket(Bucket="models"),
    ("publisher", "deletes a blob"): delete("models", f"{HOME}/blobs/a"),
    ("publisher", "deletes a manifest"): delete("models", f"{HOME}/releases/r/manifest.json"),
    ("publisher", "deletes the pointer"): delete("models", f"{HOME}/current.json"),
    ("publisher", "deletes the lease"): delete("models", f"{HOME}/lease"),
    ("publisher", "moves another pipeline's pointer"): put("models", f"{OTHER}/current.json"),
    ("publisher", "reads another pipeline's state"): get("models", f"{OTHER}/state/n.json"),
    ("publisher", "writes outside of every pipeline"): put("models", "index.html"),
    ("publisher", "writes the lake"): put("lake", "interactions/night=2026-03-02/p.parquet"),
    ("publisher", "deletes from the lake"): delete("lake", "interactions/night=2026-03-01/p.parquet"),
    ("publisher", "reads what else is in the lake's bucket"): get("lake", "secrets/salaries.parquet"),
    ("publisher", "lists what else is in the lake's bucket"): lambda client: client.list_objects_v2(
        Bucket="lake", Prefix="secrets/"
    ),
    ("publisher", "makes a release public"): lambda client: client.put_object_acl(
        Bucket="models", Key=f"{HOME}/blobs/a", ACL="public-read"
    ),
    ("publisher", "writes a policy"): lambda client: client.put_bucket_policy(
        Bucket="models", Policy=(POLICIES / "publisher.json").read_text()
    ),
    ("publisher", "deletes the bucket"): lambda client: client.delete_bucket(Bucket="models"),
}


def held(admin: Any) -> dict[str, tuple[str, bytes]]:
    """Everything that is in both buckets."""
    return {
        f"{bucket}/{entry['Key']}": (
            entry["ETag"],
            admin.get_object(Bucket=bucket, Key=entry["Key"])["Body"].read()[:100],
        )
        for bucket in THERE
        for entry in admin.list_objects_v2(Bucket=bucket).get("Contents", ())
    }


def test_every_forbidden_call_answers_403_and_changes_nothing(admin: Any, clients: dict[str, Any]) -> None:
    before = held(admin)
    answers = {}
    for (who, what), call in FORBIDDEN.items():
        try:
            call(clients[who])
            answers[who, what] = 200
        except ClientError as error:
            answers[who, what] = error.response["ResponseMetadata"]["HTTPStatusCode"]
    assert answers == dict.fromkeys(FORBIDDEN, 403)
    assert len(answers) >= 15
    assert held(admin) == before
    assert admin.list_multipart_uploads(Bucket="models").get("Uploads", []) == []


def test_a_ranker_s_rights_are_told_to_be_too_few_to_publish(
    admin: Any, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.environment(RANKER).items():
        monkeypatch.setenv(name, value)
    store = open_store("s3://models/nightrank")
    assert store.exists("tiny/current.json")
    with pytest.raises(StoreUnwritable, match="check the AWS credentials, the clock, and the bucket's policy"):
        store.check()


def test_what_is_absent_is_absent_to_both_and_not_forbidden(
    admin: Any, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for identity in (PUBLISHER, RANKER):
        for name, value in s3_server.environment(identity).items():
            monkeypatch.setenv(name, value)
        store = open_store("s3://models/nightrank")
        assert store.find("tiny/blobs/none") is None
        assert store.size("tiny/blobs/none") is None


def test_the_publisher_s_rights_pass_the_check_and_free_uploads_and_what_checks_left(
    admin: Any, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    admin.put_object(Bucket="models", Key=f"nightrank/{CHECKS}{'0a' * 16}", Body=b"left")
    for name, value in s3_server.environment(PUBLISHER).items():
        monkeypatch.setenv(name, value)
    store = open_store("s3://models/nightrank")
    store.check()
    assert list(store.list(".nightrank")) == [f"{CHECKS}{'0a' * 16}"]
    now = time.time()
    with monkeypatch.context() as later:
        later.setattr(time, "time", lambda: now + 25 * 3600)
        store.sweep()
    assert list(store.list(".nightrank")) == []


def test_the_rule_for_uploads_that_nobody_ended_is_one_that_servers_take(admin: Any) -> None:
    rule = json.loads((POLICIES / "lifecycle.json").read_text())
    admin.put_bucket_lifecycle_configuration(Bucket="models", LifecycleConfiguration=rule)
    (taken,) = admin.get_bucket_lifecycle_configuration(Bucket="models")["Rules"]
    assert taken["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 3}
