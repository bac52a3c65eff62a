"""A store in an S3 bucket, or on any server that speaks S3 and honours conditional writes.

Every HTTP call has bounded time-outs and is sent once by boto3: its own retries would turn a write that succeeded
without an answer into "precondition failed". Repeating is done here, where the outcome can be judged. A conditional
PUT is safe to repeat: if the first one arrived after all, the second is refused, and the object reads as ours. The
same holds for the call that ends an upload in parts, as large objects are sent.
"""

import base64
import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from botocore.exceptions import ClientError
from urllib3.exceptions import HTTPError

from tasks.clients import s3_failures
from tasks.clients.local_files import CHUNK_BYTES, file_sha256, open_local
from tasks.clients.object_store import ObjectStore, Stored, checked_key, checked_prefix
from tasks.clients.s3_client import s3_client
from tasks.clients.s3_multipart import MAX_OBJECT_BYTES, Answer, Content, Upload, conditional, content_of
from tasks.errors import Conflict, ObjectMissing, OutcomeUnknown, StoreError, StoreUnavailable, StoreUnwritable

PAGE_KEYS = 1000
SINGLE_PUT_BYTES = 64 * 1024**2
"""A larger object is sent in parts."""
UPLOADS = ".nightrank-uploads/"
"""Where uploads in parts are noted while they last, so that what a killed process leaves is found and freed."""

T = TypeVar("T")

_log = logging.getLogger(__name__)


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

    def find(self, key: str, most: int | None = None) -> Stored | None:
        """The object, or None when there is none; `ObjectCorrupt`, unread, when it is larger than `most` bytes."""
        return self._found(key, most=most)

    def _found(self, key: str, began: float | None = None, most: int | None = None) -> Stored | None:
        def read() -> Stored | None:
            try:
                answer = self._client.get_object(Bucket=self._bucket, Key=self._name(key))
            except ClientError as error:
                if s3_failures.code_of(error) == "NoSuchKey":
                    return None
                raise
            body = answer["Body"]
            with body:
                if most is None:
                    return Stored(body.read(), answer["ETag"])
                if (size := answer.get("ContentLength")) is not None and size > most:
                    raise self._too_large(key, size, most)
                data = b""
                # To the end, where length and checksum are looked at; of a body longer than was said, one byte more.
                while chunk := body.read(most + 1 - len(data)):
                    data += chunk
                if len(data) > most:
                    raise self._too_large(key, None, most)
                return Stored(data, answer["ETag"])

        return self._repeated(key, read, began=began)

    def get(self, key: str, most: int | None = None) -> Stored:
        """The object; `ObjectMissing` when there is none. Otherwise as `find`."""
        found = self.find(key, most)
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
        return self._put_new(key, content_of(data))

    def put_file_if_absent(self, key: str, path: Path) -> bool:
        """Write a new object with a local file's content; False if one is there already."""
        with open_local(path) as file:
            size = os.fstat(file.fileno()).st_size
        content = Content(lambda: open_local(path), size, bytes.fromhex(file_sha256(path)))
        if size <= SINGLE_PUT_BYTES:
            return self._put_new(key, content)
        if size > MAX_OBJECT_BYTES:
            raise StoreUnwritable(
                f"{self.url}/{key} would have {size} bytes, limit {MAX_OBJECT_BYTES} (5 TiB); make it smaller: fewer "
                "leaves (segments.max_leaves) or a shorter window"
            )
        return not self.exists(key) and self._put_in_parts(key, content)

    def swap(self, key: str, data: bytes, etag: str | None) -> str:
        """Replace the object with this etag, None meaning an absent one; `Conflict` if it is another."""
        began = time.monotonic()
        condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}
        answer = self._put(key, content_of(data), condition, began)
        if answer.etag is not None:
            return answer.etag
        with self._judging(key, answer, began):
            found = self._found(key, began)
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
        # Not every server sorts across folders by bytes.
        yield from sorted(key for key, _ in self._listed(prefix))

    def _written_before(self, prefix: str, moment: float) -> Iterator[str]:
        yield from (key for key, written in self._listed(prefix) if written < moment)

    def _listed(self, prefix: str) -> Iterator[tuple[str, float]]:
        """Keys, and when the server says that they were written (seconds since 1970)."""
        start = self._prefix + checked_prefix(prefix)
        token: dict[str, str] = {}
        while True:
            page = self._page(start, token)
            for entry in page.get("Contents", ()):
                if not entry["Key"].endswith("/"):  # consoles leave empty "folder" objects
                    yield entry["Key"].removeprefix(self._prefix), entry["LastModified"].timestamp()
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def delete(self, key: str) -> None:
        """Remove the object; an absent one is fine."""
        name = self._name(key)
        self._repeated(key, lambda: self._client.delete_object(Bucket=self._bucket, Key=name), writing=True)

    def local_path(self, key: str) -> Path | None:
        """None: nothing of this store is on the local disk."""
        checked_key(key)
        return None

    def download(
        self, key: str, path: Path, sha256: str | None = None, between: Callable[[], object] | None = None
    ) -> None:
        """Copy the object to a local file; a transfer that breaks is started again."""
        self._repeated(key, lambda: super(S3Store, self).download(key, path, sha256, between))

    def _stream(self, key: str) -> Generator[bytes, None, None]:
        """One attempt at the content; a failure passes as it is, for `_repeated` to judge."""
        try:
            body = self._client.get_object(Bucket=self._bucket, Key=self._name(key))["Body"]
        except ClientError as error:
            if s3_failures.code_of(error) == "NoSuchKey":
                raise self._missing(key) from error
            raise
        except OSError as error:
            raise _broken(error) from error
        with body:
            while chunk := _read_chunk(body):
                yield chunk

    def _page(self, start: str, token: dict[str, str]) -> Any:
        return self._repeated(
            start,
            lambda: self._client.list_objects_v2(Bucket=self._bucket, Prefix=start, MaxKeys=PAGE_KEYS, **token),
        )

    def _put_new(self, key: str, content: Content) -> bool:
        began = time.monotonic()
        answer = self._put(key, content, {"IfNoneMatch": "*"}, began)
        if answer.etag is not None or not answer.repeated:
            return answer.etag is not None
        # What is there now is the work of an attempt whose answer was lost, or another writer's.
        with self._judging(key, answer, began):
            return self._repeated(key, lambda: self._holds(key, content), began=began)

    def _holds(self, key: str, content: Content) -> bool:
        digest = hashlib.sha256()
        for chunk in self._stream(key):
            digest.update(chunk)
        return digest.digest() == content.sha256

    def _put(self, key: str, content: Content, condition: dict[str, str], began: float) -> Answer:
        """One conditional PUT, repeated while that can help."""
        name = self._name(key)

        def send() -> Any:
            with content.open() as body:
                return self._client.put_object(
                    Bucket=self._bucket,
                    Key=name,
                    Body=body,
                    ContentLength=content.size,
                    ChecksumSHA256=base64.b64encode(content.sha256).decode(),
                    **condition,
                )

        answer = conditional(send, began)
        if answer.failure is not None and answer.silence is None:
            raise s3_failures.translated(self.url, self._bucket, key, answer.failure, True) from answer.failure
        return answer

    def _put_in_parts(self, key: str, content: Content) -> bool:
        """An upload in parts, ended by one conditional call; aborted where its outcome is known and is not success."""
        upload = Upload(self._client, self._bucket, self._name(key), partial(self._repeated, key, writing=True))
        note = f"{UPLOADS}{uuid.uuid4().hex}.json"
        said = {"key": key, "upload": upload.id, "began": time.time()}
        try:
            self._put_new(note, content_of(json.dumps(said).encode()))
            upload.send(content)
            ours = self._completed(key, content, upload)
        except StoreError as error:
            # While it may still appear its parts are kept; and a store that fell silent is not asked to free them.
            if not s3_failures.unanswered(error):
                self._end(upload, note)
            raise
        self._end(None if ours else upload, note)
        return ours

    def _completed(self, key: str, content: Content, upload: Upload) -> bool:
        began = time.monotonic()
        answer = upload.complete(began)
        if answer.etag is not None:
            return True
        if answer.failure is None and not answer.repeated:
            return False
        # Also where the upload is gone: it may have been ended by an attempt whose answer was lost.
        with self._judging(key, answer, began):
            try:
                return self._repeated(key, lambda: self._holds(key, content), began=began)
            except ObjectMissing as missing:
                if answer.failure is None or answer.silence is not None:
                    raise
                failure = s3_failures.translated(self.url, self._bucket, key, answer.failure, True)
                raise failure from missing

    def _end(self, upload: Upload | None, note: str) -> bool:
        """Abort an upload, if there is one to abort, and forget it; False if the store says nothing.

        What fails here is made up for by `sweep`.
        """
        try:
            if upload is not None:
                upload.abort()
            self._client.delete_object(Bucket=self._bucket, Key=self._name(note))
        except s3_failures.FAILURES as error:
            _log.warning("could not free what %s/%s notes, it is freed on a later night: %s", self.url, note, error)
            return isinstance(error, ClientError)
        return True

    def _free(self, horizon: float) -> None:
        """Abort uploads in parts that processes began before the horizon, and did not live to end."""
        for note in self.list(UPLOADS):
            found = self.find(note)
            if found is None:  # its process lives, and has just ended it
                continue
            try:
                said = json.loads(found.data)
                name, upload, began = self._name(said["key"]), str(said["upload"]), float(said["began"])
            except (ValueError, TypeError, KeyError, StoreError) as error:
                _log.warning("%s/%s is not a note of ours, delete it: %s", self.url, note, error)
                continue
            if began < horizon:
                _log.warning("%s was being sent by a process that died; freeing its parts", said["key"])
                if not self._end(Upload(self._client, self._bucket, name, _once, upload), note):
                    return

    def check(self) -> None:
        """Prove that the store can be written and honours conditions, in one part and in several."""
        super().check()
        first, second = uuid.uuid4().bytes, uuid.uuid4().bytes
        with self._scratch(1) as (key,):
            written = self._put_in_parts(key, content_of(first))
            self._expect(written, "a new object sent in parts was reported as already there")
            self._expect_content(key, first, "an object sent in parts with success reads differently")
            kept = not self._put_in_parts(key, content_of(second))
            self._expect(kept, "If-None-Match did not protect an object from one that was sent in parts")
            self._expect_content(key, first, "a refused upload in parts changed the object")

    @contextmanager
    def _judging(self, key: str, answer: Answer, began: float) -> Iterator[None]:
        """Read back to judge a write; where that fails after a lost answer, the outcome is unknown."""
        unknown = f"the write of {self.url}/{key} got no answer ({answer.silence})"
        remedy = "once the store answers, run the same again: a finished write is recognised"
        if answer.silence is not None and s3_failures.too_late(began):
            raise OutcomeUnknown(f"{unknown} for {s3_failures.LAST_START_S:.0f} s; {remedy}") from answer.silence
        try:
            yield
        except (StoreUnavailable, ObjectMissing) as error:
            if answer.silence is None:
                raise
            raise OutcomeUnknown(f"{unknown}, and reading it back says: {error}; {remedy}") from answer.silence

    def _repeated(self, key: str, call: Callable[[], T], writing: bool = False, began: float | None = None) -> T:
        """A call that may be sent any number of times, until it succeeds, cannot succeed, or patience ends."""
        failure: Exception | None = None
        for _ in s3_failures.attempts(began):
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


def _once(call: Callable[[], T]) -> T:
    return call()


def _read_chunk(body: Any) -> bytes:
    try:
        return bytes(body.read(CHUNK_BYTES))
    except OSError as error:
        raise _broken(error) from error


def _broken(error: OSError) -> HTTPError:
    """The network's failure as one that `write_local` cannot take for the local disk's: some time-outs are OSErrors."""
    return HTTPError(f"the connection broke: {error}")
