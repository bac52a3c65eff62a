"""A store in an S3 bucket, or on any server that speaks S3 and honours conditional writes.

Every HTTP call has bounded time-outs and is sent once by boto3: its own retries would turn a write that succeeded
without an answer into "precondition failed". Repeating is done here, where the outcome can be judged. A conditional
PUT is safe to repeat: if the first one arrived after all, the second is refused, and the object reads as ours.
"""

import base64
import hashlib
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from botocore.exceptions import ClientError
from urllib3.exceptions import HTTPError

from tasks.clients import s3_failures
from tasks.clients.local_files import CHUNK_BYTES, file_sha256, open_local
from tasks.clients.object_store import ObjectStore, Stored, checked_key, checked_prefix
from tasks.clients.s3_client import s3_client
from tasks.errors import Conflict, ObjectMissing, OutcomeUnknown, StoreUnavailable, StoreUnwritable

PAGE_KEYS = 1000
MAX_OBJECT_BYTES = 5 * 1024**3

T = TypeVar("T")


@dataclass(frozen=True)
class _Content:
    """What a PUT sends, openable any number of times."""

    open: Callable[[], BinaryIO]
    size: int
    sha256: bytes


@dataclass(frozen=True)
class _Answer:
    """What is known of a conditional PUT.

    Attributes:
        etag: the new object's, if the PUT was seen to be done.
        silence: the failure of the last attempt that went without an answer.
        repeated: whether it was sent more than once.
    """

    etag: str | None
    silence: Exception | None
    repeated: bool


class S3Store(ObjectStore):
    """Objects below a prefix of one bucket.

    Args:
        bucket: an existing bucket.
        prefix: put before every key, without slashes at its ends; may be empty.
        client: a boto3 S3 client that sends each call once; None makes `s3_client()` at the first call.
    """

    def __init__(self, bucket: str, prefix: str = "", client: Any = None) -> None:
        self._bucket = bucket
        self._prefix = f"{checked_key(prefix)}/" if prefix else ""
        self._made = client
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")

    def find(self, key: str) -> Stored | None:
        """The object, or None when there is none."""

        def read() -> Stored | None:
            try:
                answer = self._client.get_object(Bucket=self._bucket, Key=self._name(key))
            except ClientError as error:
                if s3_failures.code_of(error) == "NoSuchKey":
                    return None
                raise
            with answer["Body"] as body:
                return Stored(body.read(), answer["ETag"])

        return self._repeated(key, read)

    def get(self, key: str) -> Stored:
        """The object; `ObjectMissing` when there is none."""
        found = self.find(key)
        if found is None:
            raise self._missing(key)
        return found

    def size(self, key: str) -> int | None:
        """The object's size in bytes, or None when there is none."""

        def head() -> int | None:
            try:
                return int(self._client.head_object(Bucket=self._bucket, Key=self._name(key))["ContentLength"])
            except ClientError as error:
                if s3_failures.status_of(error) == 404:
                    return None
                raise

        return self._repeated(key, head)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write a new object; False if one is there already."""
        return self._put_new(key, _content_of(data))

    def put_file_if_absent(self, key: str, path: Path) -> bool:
        """Write a new object with a local file's content; False if one is there already."""
        with open_local(path) as file:
            size = os.fstat(file.fileno()).st_size
        return self._put_new(key, _Content(lambda: open_local(path), size, bytes.fromhex(file_sha256(path))))

    def swap(self, key: str, data: bytes, etag: str | None) -> str:
        """Replace the object with this etag, None meaning an absent one; `Conflict` if it is another."""
        answer = self._put(key, _content_of(data), {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag})
        if answer.etag is not None:
            return answer.etag
        with self._judging(key, answer):
            found = self.find(key)
        if found is not None and found.data == data:
            return found.etag
        now = found.etag if found else None
        if answer.silence is not None:
            raise OutcomeUnknown(
                f"the swap of {self.url}/{key} got no answer, and the object now has ETag {now}: ours may have been "
                "there in between, or may still arrive; read it and decide anew"
            ) from answer.silence
        raise Conflict(
            f"{self.url}/{key} has ETag {now}, the swap expected {etag}: another writer was here; read it again and "
            "decide anew"
        )

    def list(self, prefix: str) -> Iterator[str]:
        """All keys that start with the prefix, sorted by their bytes."""
        start = self._prefix + checked_prefix(prefix)
        keys: list[str] = []
        token: dict[str, str] = {}
        while True:
            page = self._page(start, token)
            keys.extend(entry["Key"].removeprefix(self._prefix) for entry in page.get("Contents", ()))
            if not page.get("IsTruncated"):
                break
            token = {"ContinuationToken": page["NextContinuationToken"]}
        # Consoles leave empty "folder" objects; and not every server sorts across folders by bytes.
        yield from sorted(key for key in keys if not key.endswith("/"))

    def delete(self, key: str) -> None:
        """Remove the object; an absent one is fine."""
        name = self._name(key)
        self._repeated(key, lambda: self._client.delete_object(Bucket=self._bucket, Key=name), writing=True)

    def local_path(self, key: str) -> Path | None:
        """None: nothing of this store is on the local disk."""
        checked_key(key)
        return None

    def download(self, key: str, path: Path, sha256: str | None = None) -> None:
        """Copy the object to a local file; a transfer that breaks is started again."""
        self._repeated(key, lambda: super(S3Store, self).download(key, path, sha256))

    def _stream(self, key: str) -> Iterator[bytes]:
        """One attempt at the content; a failure passes as it is, for `_repeated` to judge."""
        try:
            body = self._client.get_object(Bucket=self._bucket, Key=self._name(key))["Body"]
        except ClientError as error:
            if s3_failures.code_of(error) == "NoSuchKey":
                raise self._missing(key) from error
            raise
        with body:
            while chunk := _read_chunk(body):
                yield chunk

    def _page(self, start: str, token: dict[str, str]) -> Any:
        return self._repeated(
            start,
            lambda: self._client.list_objects_v2(Bucket=self._bucket, Prefix=start, MaxKeys=PAGE_KEYS, **token),
        )

    def _put_new(self, key: str, content: _Content) -> bool:
        answer = self._put(key, content, {"IfNoneMatch": "*"})
        if answer.etag is not None or not answer.repeated:
            return answer.etag is not None
        # What is there now is the work of an attempt whose answer was lost, or another writer's.
        with self._judging(key, answer):
            return self._repeated(key, lambda: self._holds(key, content))

    def _holds(self, key: str, content: _Content) -> bool:
        digest = hashlib.sha256()
        for chunk in self._stream(key):
            digest.update(chunk)
        return digest.digest() == content.sha256

    def _put(self, key: str, content: _Content, condition: dict[str, str]) -> _Answer:
        """One conditional PUT, repeated while that can help."""
        name = self._name(key)
        if content.size > MAX_OBJECT_BYTES:
            raise StoreUnwritable(
                f"{self.url}/{key} would have {content.size} bytes, limit {MAX_OBJECT_BYTES} (5 GiB) for an object "
                "sent in one part; make it smaller: fewer leaves (segments.max_leaves) or a shorter window"
            )
        silence: Exception | None = None
        failure: Exception | None = None
        for number in s3_failures.attempts():
            try:
                with content.open() as body:
                    answer = self._client.put_object(
                        Bucket=self._bucket,
                        Key=name,
                        Body=body,
                        ContentLength=content.size,
                        ChecksumSHA256=base64.b64encode(content.sha256).decode(),
                        **condition,
                    )
                return _Answer(answer["ETag"], silence, number > 0)
            except s3_failures.FAILURES as error:
                failure, fate = error, s3_failures.fate_of(error)
            if fate == "refused":
                return _Answer(None, silence, number > 0)
            if fate == "impossible":
                break
            silence = failure if fate == "in doubt" else silence
        if silence is not None:
            return _Answer(None, silence, True)
        assert failure is not None  # attempts() yields at least once
        raise s3_failures.translated(self.url, self._bucket, key, failure, writing=True) from failure

    @contextmanager
    def _judging(self, key: str, answer: _Answer) -> Iterator[None]:
        """Read back to judge a write; where that fails after a lost answer, the outcome is unknown."""
        try:
            yield
        except (StoreUnavailable, ObjectMissing) as error:
            if answer.silence is None:
                raise
            raise OutcomeUnknown(
                f"the write of {self.url}/{key} got no answer ({answer.silence}), and reading it back says: {error}; "
                "once the store answers, run the same again: a finished write is recognised"
            ) from answer.silence

    def _repeated(self, key: str, call: Callable[[], T], writing: bool = False) -> T:
        """A call that may be sent any number of times, until it succeeds, cannot succeed, or patience ends."""
        failure: Exception | None = None
        for _ in s3_failures.attempts():
            try:
                return call()
            except s3_failures.FAILURES as error:
                failure = error
            if s3_failures.fate_of(failure) in ("refused", "impossible"):
                break
        assert failure is not None  # attempts() yields at least once
        raise s3_failures.translated(self.url, self._bucket, key, failure, writing) from failure

    @property
    def _client(self) -> Any:
        if self._made is None:
            self._made = s3_client()
        return self._made

    def _name(self, key: str) -> str:
        return self._prefix + checked_key(key)

    def _missing(self, key: str) -> ObjectMissing:
        return ObjectMissing(f"there is no {key} in {self.url}; check the store's URL, or restore the object")


def _content_of(data: bytes) -> _Content:
    return _Content(lambda: io.BytesIO(data), len(data), hashlib.sha256(data).digest())


def _read_chunk(body: Any) -> bytes:
    try:
        return bytes(body.read(CHUNK_BYTES))
    except OSError as error:  # the network's, which `write_local` would take for the local disk's
        raise HTTPError(f"the connection broke: {error}") from error
