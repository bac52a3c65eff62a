"""An object that is sent to S3 in parts: each part with its SHA-256, and one conditional call that makes it appear.

Nobody sees the parts before that call, and only the call's outcome decides what may happen to them: an upload is
aborted where it is known not to have made the object, never where it may still make it.
"""

import base64
import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

from botocore.exceptions import ClientError

from tasks.clients import s3_failures
from tasks.errors import ObjectCorrupt

PART_BYTES = 16 * 1024**2
"""What is held in memory of an object; more where it would have more than `MAX_PARTS` of them."""
MAX_PARTS = 10_000
MAX_OBJECT_BYTES = 5 * 1024**4


@dataclass(frozen=True)
class Content:
    """What is written, openable any number of times."""

    open: Callable[[], BinaryIO]
    size: int
    sha256: bytes


@dataclass(frozen=True)
class Answer:
    """What is known of a conditional write.

    Attributes:
        etag: the new object's, if the write was seen to be done.
        silence: the failure of the last attempt that went without an answer.
        repeated: whether it was sent more than once, or may have been done by an attempt whose answer was lost.
        failure: why the last attempt did nothing; None where the condition did not hold.
    """

    etag: str | None
    silence: Exception | None
    repeated: bool
    failure: Exception | None = None


def content_of(data: bytes) -> Content:
    """Bytes in memory as what is written."""
    return Content(lambda: io.BytesIO(data), len(data), hashlib.sha256(data).digest())


def part_bytes_of(size: int) -> int:
    """The size of the parts of an object.

    >>> part_bytes_of(100 * 2**20) == PART_BYTES
    True
    >>> -(-(2**40) // part_bytes_of(2**40)) <= MAX_PARTS
    True
    """
    return max(PART_BYTES, -(-size // MAX_PARTS))


def conditional(send: Callable[[], Any], began: float) -> Answer:
    """Send a conditional write, again while that can help.

    Args:
        send: one attempt, returning boto3's answer.
        began: when the operation began, on the monotonic clock.
    """
    silence: Exception | None = None
    failure: Exception | None = None
    number = 0
    for number in s3_failures.attempts(began):
        try:
            etag = send().get("ETag")
            if etag:
                return Answer(etag, silence, number > 0)
            failure = silence = s3_failures.Senseless("the answer says success and names no ETag")
            continue
        except s3_failures.FAILURES as error:
            failure, fate = error, s3_failures.fate_of(error)
        if fate == "refused":
            return Answer(None, silence, number > 0)
        if fate == "impossible":
            break
        silence = failure if fate == "in doubt" else silence
    return Answer(None, silence, number > 0 or silence is not None, failure)


class Upload:
    """One upload in parts.

    Args:
        client: a boto3 S3 client that sends each call once.
        bucket: the bucket.
        name: the object's whole key.
        repeated: sends a call that may be sent any number of times until it succeeds, or raises a `StoreError`.
    """

    def __init__(
        self, client: Any, bucket: str, name: str, repeated: Callable[[Callable[[], Any]], Any], id_: str | None = None
    ) -> None:
        self._client, self._repeated = client, repeated
        self._named = {"Bucket": bucket, "Key": name}
        self.id = id_ or str(self._begin()["UploadId"])
        self._parts: list[dict[str, Any]] = []

    def _begin(self) -> Any:
        return self._repeated(lambda: self._client.create_multipart_upload(**self._named, ChecksumAlgorithm="SHA256"))

    def send(self, content: Content) -> None:
        """Send every part.

        Raises:
            ObjectCorrupt: a part changed on its way, or the local file changed since its digest was taken.
            StoreError: the store refuses, is not there, or has lost the upload.
        """
        whole, size = hashlib.sha256(), part_bytes_of(content.size)
        with content.open() as file:
            while part := file.read(size):
                whole.update(part)
                self._parts.append(self._sent(len(self._parts) + 1, part))
        if whole.digest() != content.sha256:
            raise ObjectCorrupt(
                f"the local file of {self._named['Key']} has SHA-256 {whole.hexdigest()}, expected "
                f"{content.sha256.hex()}: it changed while it was sent; run again"
            )

    def _sent(self, number: int, part: bytes) -> dict[str, Any]:
        checksum = base64.b64encode(hashlib.sha256(part).digest()).decode()

        def send() -> str:
            answer = self._client.upload_part(
                **self._named, UploadId=self.id, PartNumber=number, Body=part, ChecksumSHA256=checksum
            )
            if not answer.get("ETag"):
                raise s3_failures.Senseless("the answer says success and names no ETag")
            return str(answer["ETag"])

        return {"ETag": self._repeated(send), "PartNumber": number, "ChecksumSHA256": checksum}

    def complete(self, began: float) -> Answer:
        """Make the object of the parts, unless there is one."""
        return conditional(
            lambda: self._client.complete_multipart_upload(
                **self._named, UploadId=self.id, MultipartUpload={"Parts": self._parts}, IfNoneMatch="*"
            ),
            began,
        )

    def abort(self) -> None:
        """Free what the parts occupy; sent once. Parts that are gone are fine, other failures pass as they are."""
        try:
            self._client.abort_multipart_upload(**self._named, UploadId=self.id)
        except ClientError as error:
            if s3_failures.code_of(error) != "NoSuchUpload":
                raise
