"""A contract as a suite of expectations, and what their results mean for a night."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from pathlib import Path
from typing import Any

from tasks.data.contract import DataConfig
from tasks.data.quarantine import Split
from tasks.data.rules import Rule, measures
from tasks.errors import ValidatorBroken

_SOME = 1e-12  # a share that one row in a trillion reaches


@dataclass(frozen=True)
class Check:
    """One expectation and what hangs on it."""

    type: str
    kwargs: dict[str, Any]
    about: str
    """The reason code it counts; of the night as a whole `columns`, `rows` or `labels:…`; `config`: the user's own."""
    stops: bool
    """Whether the night stops when it fails; rows that break a rule are quarantined instead."""
    codes: tuple[str, ...] = field(default=())
    """Reason codes that may explain unexpected rows beyond those of `about`."""


def generated(data: DataConfig, checks: Sequence[Rule]) -> list[Check]:
    """The contract as expectations: of the night as a whole, then one per rule for rows.

    Args:
        data: the contract.
        checks: its rules, from `rules`.
    """
    names = [*(column.name for column in data.columns), *measures(data)]
    bounds = {"min_value": data.min_rows, "max_value": data.max_rows}
    suite = [
        Check("expect_table_columns_to_match_set", {"column_set": names, "exact_match": True}, "columns", True),
        Check("expect_table_row_count_to_be_between", bounds, "rows", True),
    ]
    for label in dict.fromkeys(objective.column for objective in data.objectives):
        some = {"column": label, "mostly": _SOME}
        suite.append(Check("expect_column_values_to_not_be_null", some, f"labels:{label}", True))
    for rule in checks:
        ambiguous = rule.code.startswith(("range:", "negative:")) and data.column(rule.column or "").dtype == "float64"
        codes = (f"not_finite:{rule.column}",) if ambiguous else ()
        suite.append(Check(rule.expectation, {"column": rule.column, **rule.kwargs}, rule.code, False, codes))
    key = [data.user, data.item, data.time]
    suite.append(Check("expect_compound_columns_to_be_unique", {"column_list": key}, "duplicate", False))
    return suite


def agree(
    where: str, suite: Sequence[Check], expectations: Sequence[dict[str, Any]], reasons: Mapping[str, int]
) -> None:
    """Holds Great Expectations' counts against the split's: two ways to judge the same rows must not differ.

    Args:
        where: what was judged, for the message.
        suite: the expectations.
        expectations: what each of them found.
        reasons: bad rows by reason code.

    Raises:
        ValidatorBroken: they do.
    """
    for check, told in zip(suite, expectations, strict=True):
        if check.stops:
            continue
        least = reasons.get(check.about, 0)
        most = least + sum(reasons.get(code, 0) for code in check.codes)
        fits = least <= told["unexpected"] <= most
        if check.about == "duplicate":  # it counts every copy, and copies of keys that are partly missing
            missing = any(reasons.get(f"null:{name}") for name in check.kwargs["column_list"])
            copies = least + reasons.get("conflicting_duplicate", 0)
            fits = told["success"] == (copies == 0) or (missing and not told["success"])
        if not fits:
            raise ValidatorBroken(
                f"{where}: {check.type} with {told['kwargs']} finds {told['unexpected']} rows, our rule {check.about} "
                f"{least}: no verdict on the data; report this with the versions of duckdb and great-expectations"
            )


def failures(data: DataConfig, parts: Split, expectations: Sequence[dict[str, Any]], quarantine: Path) -> list[str]:
    """Why a night stops; empty where it may be learned from.

    Args:
        data: the contract.
        parts: the night, split.
        expectations: what each expectation found, as JSON.
        quarantine: where the bad rows lie.
    """
    found = [
        f"{told['type']} with {told['kwargs']} failed, observed {told['observed']}"
        + (f" ({told['unexpected']} unexpected)" if told["unexpected"] is not None else "")
        + "; fix the data upstream or change "
        + ("data.expectations" if told["about"] == "config" else "the contract in data")
        for told in expectations
        if told["stops"] and not told["success"]
    ]
    found += [
        f"label {name!r} is missing in all {parts.clean} clean rows; deliver labels before the night runs"
        for name in parts.empty_labels
        if parts.clean
    ]
    if parts.bad > data.max_bad_rows * parts.rows or not parts.clean:
        counts = ", ".join(
            f"{code} {count}" for code, count in sorted(parts.reasons.items(), key=lambda pair: -pair[1])
        )
        examples = json.dumps(parts.examples, ensure_ascii=False)
        found.append(
            f"{parts.bad} of {parts.rows} rows ({parts.bad / parts.rows:.2%}) are bad, limit {data.max_bad_rows:.2%}: "
            f"{counts}; examples {examples}; all of them in {quarantine}; fix them upstream or raise data.max_bad_rows"
        )
    return found


def plain(value: Any) -> Any:
    """A value as strict JSON can say it: dates as ISO text, numpy scalars as Python's, NaN and infinities as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items() if key != "batch_id"}
    if isinstance(value, list | tuple | set):
        return [plain(inner) for inner in value]
    if isinstance(value, datetime | date):
        return value.isoformat()
    if hasattr(value, "item"):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | None) else str(value)
