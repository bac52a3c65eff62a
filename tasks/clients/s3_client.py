"""The connection to S3: bounded in time, and never repeating a call behind our back."""

import os
from functools import cache
from typing import Any

import boto3
import botocore.session
from botocore.config import Config
from botocore.loaders import Loader, create_loader

from tasks.errors import InvalidConfig

CONNECT_TIMEOUT_S = 3
READ_TIMEOUT_S = 10


@cache
def _models(folder: str | None) -> Loader:
    """Descriptions of AWS's services, which every session would read again: most of the time that a client takes."""
    return create_loader(folder)


def s3_client() -> Any:
    """A boto3 S3 client that sends each call once, within bounded time.

    Endpoint, region and credentials come from the usual AWS environment and files.

    Raises:
        InvalidConfig: the endpoint in the environment is not a URL.
    """
    custom = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        retries={"total_max_attempts": 1, "mode": "standard"},
        # Digests are sent and checked by ourselves; servers other than AWS do not know boto3's default CRC.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        # A bucket is a host name on AWS; few other servers have the DNS for that.
        s3={"addressing_style": "path"} if custom else None,
    )
    try:
        session = botocore.session.get_session()
        models = _models(session.get_config_variable("data_path"))
        session.register_component("data_loader", models)
        made = boto3.session.Session(botocore_session=session)
        models.search_paths[:] = dict.fromkeys(models.search_paths)  # to which every session adds boto3's own
        return made.client("s3", config=config)
    except ValueError as error:
        raise InvalidConfig(f"S3 cannot be set up: {error}; correct AWS_ENDPOINT_URL_S3") from error
