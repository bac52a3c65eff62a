"""Golden requests read back from a release, to be asked of another one."""

import json
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tasks.data.contract import DataConfig
from tasks.errors import ObjectCorrupt
from tasks.release.interface import InputSpec
from tasks.release.lookups import Request, input_specs


def read_requests(data: DataConfig, written: bytes, history: int = 0) -> tuple[Request, ...]:
    """The requests of a `golden.json`, as `write_golden` was given them; its scores are another release's.

    Args:
        data: the contract of the release that it is from.
        written: its bytes, whose digest was verified.
        history: entries of a user's history.

    Raises:
        ObjectCorrupt: its requests are not those of this contract.
    """
    read: list[Request] = []
    try:
        for one in json.loads(written)["requests"]:
            (requests, candidates), rows = one["shape"][:2], one.get("feedback", 0)
            axes = {"request": (requests,), "candidate": (requests, candidates), "feedback": (requests, rows)}
            specs = input_specs(data, history=history, feedback=rows)
            read.append({spec.name: _unlisted(one["inputs"][spec.name], spec, axes[spec.per]) for spec in specs})
    except (ValueError, KeyError, TypeError) as error:
        raise ObjectCorrupt(
            f"golden.json holds no requests of this config's columns ({error!r}); give the config that the release was "
            f"made with"
        ) from error
    return tuple(read)


def _unlisted(values: Sequence[object], spec: InputSpec, axes: tuple[int, ...]) -> npt.NDArray[np.generic]:
    """What `_listed` wrote, in its shape."""
    shape = axes if spec.values is None else (*axes, spec.values)
    if spec.dtype == "float32":
        numbers = [np.nan if value is None else value for value in values]
        return np.array(numbers, np.float32).reshape(shape)
    return np.array(values, np.int64 if spec.dtype == "int64" else object).reshape(shape)
