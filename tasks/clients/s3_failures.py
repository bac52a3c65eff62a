"""What a failed S3 call means: whether the write can have happened, whether to send it again, and our error for it."""

import random
import re
import time
from collections.abc import Iterator
from typing import Literal

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ProxyConnectionError,
    SSLError,
)
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from tasks.errors import ConditionsIgnored, ObjectCorrupt, OutcomeUnknown, StoreError, StoreUnavailable, StoreUnwritable

PATIENCE_S = 15.0
"""No further attempt starts this long after the first one."""
LAST_START_S = 16.0
"""No attempt at all starts this long after its operation began: with the time-outs of a call, a connection (3 s) and an
answer (10 s), no operation is silent for 30 s."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0

Fate = Literal["refused", "not done", "in doubt", "impossible"]
"""refused: the condition does not hold. not done: nothing happened, try again. in doubt: it may have happened.
impossible: nothing happened, and trying again cannot change that."""


class Senseless(HTTPError):
    """An answer that is no answer: it says success without what every success has."""


FAILURES = (BotoCoreError, ClientError, ResponseParserError, HTTPError, OSError)
"""Everything that boto3 and its connections raise."""


def attempts(operation: float | None = None) -> Iterator[int]:
    """Numbers of attempts, with growing random pauses between them, until patience ends.

    Args:
        operation: when the operation began that the call is a part of, on the monotonic clock; None: now.
    """
    began, number = time.monotonic(), 0
    end = min(began + PATIENCE_S, (began if operation is None else operation) + LAST_START_S)
    while number == 0 or time.monotonic() <= end:
        yield number
        pause = random.uniform(0.5, 1.0) * min(_FIRST_PAUSE_S * 2**number, _LONGEST_PAUSE_S)
        if time.monotonic() + pause > end:
            return
        time.sleep(pause)
        number += 1


def too_late(operation: float) -> bool:
    """Whether nothing more may be asked in an operation that began then."""
    return time.monotonic() > operation + LAST_START_S


def unanswered(error: StoreError) -> bool:
    """Whether an operation ended in silence: asked more now, the store would be silent for longer than it may be."""
    cause = error.__cause__
    silent = isinstance(cause, FAILURES) and not isinstance(cause, ClientError)
    return isinstance(error, OutcomeUnknown) or (isinstance(error, StoreUnavailable) and silent)


def code_of(error: Exception) -> str:
    """The S3 error code, or the empty string when the failure is not an S3 answer."""
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, ClientError) else ""


def status_of(error: Exception) -> int:
    """The HTTP status, or 0 when the failure is not an S3 answer."""
    if not isinstance(error, ClientError):
        return 0
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def fate_of(error: Exception) -> Fate:
    """What became of the call.

    500, 502, 504, a broken connection and silence say nothing about a write. 503 and 429 say that it was not taken on,
    409 that a concurrent one was being finished. AWS answers If-Match on an absent key with 404, others with 412.
    """
    if isinstance(error, ClientError):
        status, code = status_of(error), code_of(error)
        if status == 412 or code in ("NoSuchKey", "PreconditionFailed"):
            return "refused"
        if status in (409, 429, 503) or code == "RequestTimeout":
            return "not done"
        return "in doubt" if status >= 500 and status not in (501, 507) else "impossible"
    if isinstance(error, (EndpointConnectionError, ConnectTimeoutError, ProxyConnectionError)):
        return "not done"
    if isinstance(error, SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
        return "impossible"
    if isinstance(error, BotoCoreError):
        answerless = (HTTPClientError, IncompleteReadError)
        return "in doubt" if isinstance(error, answerless) else "impossible"
    return "in doubt"


def translated(url: str, bucket: str, key: str, error: Exception, writing: bool) -> StoreError:
    """The member of our family for a failure, with what to do about it.

    Args:
        url: the store.
        bucket: its bucket.
        key: the object, or words for several.
        error: one of `FAILURES`.
        writing: whether the call was a write.
    """
    status, code = status_of(error), code_of(error)
    # An endpoint may carry user:password@; nothing secret goes into a message.
    said = re.sub(r"//[^/@\s]+@", "//***@", str(error))
    reason = f"cannot {'write' if writing else 'read'} {key} {'to' if writing else 'from'} {url}: {said}"
    denied = StoreUnwritable if writing else StoreError
    if code == "NoSuchUpload":
        return StoreUnavailable(f"{reason}; the upload of its parts was ended by somebody else: try again")
    if code == "NoSuchBucket":
        return denied(f"{reason}; create the bucket {bucket!r}, or correct the store's URL")
    if status in (401, 403):
        return denied(f"{reason}; check the AWS credentials, the clock, and the bucket's policy")
    if isinstance(error, (NoCredentialsError, PartialCredentialsError)):
        return denied(f"{reason}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile or role")
    if status == 507:
        return StoreUnwritable(f"{reason}; free space on the server")
    if status == 501:
        return ConditionsIgnored(f"{reason}; use a server with If-None-Match and If-Match on PUT, and uploads in parts")
    if code in ("BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"):
        return ObjectCorrupt(f"{reason}; the bytes changed on their way, or the local file changed: run again")
    if fate_of(error) in ("not done", "in doubt"):
        return StoreUnavailable(f"{reason}; tried for {PATIENCE_S:.0f} s, try again later")
    return StoreError(f"{reason}; check the store's URL, AWS_ENDPOINT_URL_S3 and AWS_REGION")
