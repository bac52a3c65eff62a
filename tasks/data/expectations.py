"""A night's verdict: Great Expectations over the frozen files, bad rows to quarantine, and the limit between them."""

import copy
import html
import logging
import shutil
import warnings
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import date
from functools import cache, lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import duckdb
import jinja2
from jinja2.bccache import Bucket

from tasks.data.canaries import Canary, canaries
from tasks.data.contract import PARTITION, DataConfig
from tasks.data.interactions import footers
from tasks.data.quarantine import NOT_SHOWN, VIEW, measured_view, night_view, reading, split
from tasks.data.rules import rules
from tasks.data.suite import Check, agree, failures, generated, plain
from tasks.errors import ExpectationsFailed, InvalidConfig, NightMissing, ValidatorBroken


@dataclass(frozen=True)
class Validated:
    """What a night's validation found; only a night that may be learned from has one."""

    rows: int
    clean: int
    bad: int
    reasons: dict[str, int]
    """Bad rows by reason code; a row with two reasons counts under both."""
    expectations: list[dict[str, Any]]
    """Per expectation: type, kwargs, about (reason code, part of the night or `config`), stops, success, unexpected,
    observed."""
    examples: tuple[dict[str, Any], ...]
    """Up to five bad rows: their reasons, their key, and the values they are bad for."""
    clean_file: Path
    quarantine_file: Path | None
    """None where no row is bad."""
    night: date
    verdicts: tuple[tuple[Check, Any], ...]
    """What was judged and Great Expectations' own result, for `data_docs`."""


def validate(
    data: DataConfig, night: date, files: Sequence[Path], out: Path, lakes: Sequence[str | None] | None = None
) -> Validated:
    """Splits a night into clean and quarantined rows and decides whether it may be learned from.

    Writes `clean.parquet`, and `quarantine.parquet` where rows are bad. The files are read through DuckDB with bounded
    memory. Before the first night of a contract, canary batches made from the contract prove that every generated
    expectation passes what is good and fails what is bad.

    Args:
        data: the contract.
        night: the night's date.
        files: local Parquet files of the night, as `thaw` returns them.
        out: folder to write to.
        lakes: which lake each file is of, in the same order; None for a single lake.

    Raises:
        NightMissing: the files hold no rows.
        CorruptFile, SchemaBroken: a file cannot be read, or does not have the contract's columns.
        ExpectationsFailed: an expectation of the night as a whole failed, more than `data.max_bad_rows` of the rows
            are bad, no row is clean, or a label is missing everywhere.
        ValidatorBroken: an expectation raised, misjudged a canary, or disagrees with the split.
        InvalidConfig: an expectation of the config, or the contract itself, cannot be evaluated.
    """
    held = footers(data, list(files))
    if (rows := sum(footer.rows for footer in held)) == 0:
        raise NightMissing(
            f"night {night}: {len(files)} file(s) hold 0 rows; deliver the night's rows and run it again"
        )
    checks = rules(data, night)
    suite = [*generated(data, checks), *_own(data)]
    _prove(_contract(data))
    out.mkdir(parents=True, exist_ok=True)
    clean_file, quarantine_file = out / "clean.parquet", out / "quarantine.parquet"
    quarantine_file.unlink(missing_ok=True)
    with (
        TemporaryDirectory(prefix="spill-", dir=out) as scratch,
        night_view(data, files, held, Path(scratch), lakes) as connection,
    ):
        with reading(files):
            parts = split(connection, data, checks, rows, clean_file, quarantine_file)
        results = _evaluate(connection, suite, measured_view(connection, data))
    expectations = [_told(data, check, result) for check, result in zip(suite, results, strict=True)]
    agree(f"night {night}", suite, expectations, parts.reasons)
    if found := failures(data, parts, expectations, quarantine_file):
        raise ExpectationsFailed(f"night {night} stops: {'; '.join(found)}")
    return Validated(
        rows=rows,
        clean=parts.clean,
        bad=parts.bad,
        reasons=parts.reasons,
        expectations=expectations,
        examples=parts.examples,
        clean_file=clean_file,
        quarantine_file=quarantine_file if parts.bad else None,
        night=night,
        verdicts=tuple(zip(suite, results, strict=True)),
    )


def _own(data: DataConfig) -> list[Check]:
    """The config's own expectations, each tried for whether it can be built at all."""
    names = {column.name for column in data.columns}
    for expectation in data.expectations:
        used = [expectation.kwargs.get(key) for key in ("column", "column_A", "column_B")]
        if absent := [name for name in used if name is not None and name not in names]:
            raise InvalidConfig(
                f"data.expectations: {expectation.type} speaks of {absent}, not among the columns {sorted(names)}"
            )
        try:
            _configured(Check(expectation.type, dict(expectation.kwargs), "config", True)).to_domain_obj()
        except Exception as error:
            raise InvalidConfig(
                f"data.expectations: {expectation.type} with {expectation.kwargs} cannot be built: "
                f"{' '.join(str(error).split())[:400]}; correct its type or kwargs"
            ) from error
    return [Check(own.type, dict(own.kwargs), "config", True) for own in data.expectations]


@dataclass(frozen=True)
class _GreatExpectations:
    """The few names of Great Expectations that are used, imported on first use: it costs seconds and 260 MB."""

    configuration: Any
    execution_engine: Any
    batch: Any
    batch_data: Any
    validator: Any
    context: Any


_DESCRIBED: ContextVar[dict[int, tuple[Any, Any]] | None] = ContextVar("described", default=None)
"""Expectations that are being judged and what each is configured by, by identity; None while nothing is judged."""


def _describe_once(kind: Any) -> None:
    """Let expectations make their `configuration` once per judgement.

    They make it anew for every word of it that is read, dozens of times each: a third of what judging a small night
    takes. Nothing changes them while they are judged.
    """
    anew = kind.configuration.fget

    def configuration(self: Any) -> Any:
        described = _DESCRIBED.get()
        if described is None:
            return anew(self)
        if id(self) not in described:
            described[id(self)] = self, anew(self)
        return described[id(self)][1]

    kind.configuration = property(configuration)


@cache
def _gx() -> _GreatExpectations:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its imports use what Python deprecates; ours stay errors
        import great_expectations as gx
        from great_expectations.core.batch import Batch
        from great_expectations.execution_engine.sqlalchemy_batch_data import SqlAlchemyBatchData
        from great_expectations.execution_engine.sqlalchemy_execution_engine import SqlAlchemyExecutionEngine
        from great_expectations.expectations.expectation import Expectation
        from great_expectations.expectations.expectation_configuration import ExpectationConfiguration
        from great_expectations.validator.validator import Validator
    _describe_once(Expectation)
    # what it logs comes back as exception_info, which is raised as ValidatorBroken
    logging.getLogger("great_expectations").setLevel(logging.CRITICAL)
    context = gx.get_context(mode="ephemeral", project_config=_project())
    return _GreatExpectations(
        ExpectationConfiguration, SqlAlchemyExecutionEngine, Batch, SqlAlchemyBatchData, Validator, context
    )


def _project() -> Any:
    """A project in memory: no files, no analytics, no progress bars."""
    from great_expectations.data_context.types.base import (
        DataContextConfig,
        InMemoryStoreBackendDefaults,
        ProgressBarsConfig,
    )

    return DataContextConfig(
        store_backend_defaults=InMemoryStoreBackendDefaults(),
        data_docs_sites={},
        analytics_enabled=False,
        progress_bars=ProgressBarsConfig(globally=False),
    )


def _evaluate(connection: duckdb.DuckDBPyConnection, suite: Sequence[Check], view: str = VIEW) -> list[Any]:
    """Great Expectations' result for each check of a view's rows, in order.

    Counting and sampling the rows of a rule costs twice as much as judging it, so only rules that fail are counted.

    Raises:
        ValidatorBroken: one of them raised, which is no verdict on the data.
    """
    from sqlalchemy.sql.elements import quoted_name

    from tasks.data.duckdb_engine import dialect_module, engine

    gx = _gx()
    execution = gx.execution_engine(engine=engine(connection), create_temp_table=False)
    execution.dialect_module = dialect_module()
    name = quoted_name(view, True)
    batch = gx.batch(data=gx.batch_data(execution, table_name=name, source_table_name=name, create_temp_table=False))
    validator = gx.validator(execution_engine=execution, batches=[batch], data_context=gx.context)
    brief, full = {"result_format": "BOOLEAN_ONLY"}, {"result_format": "BASIC", "partial_unexpected_count": 5}
    results = _graph(validator, [(number, check) for number, check in enumerate(suite) if not check.stops], brief)
    failed = [(number, suite[number]) for number, result in results.items() if not result.success]
    whole = [(number, check) for number, check in enumerate(suite) if check.stops]
    results |= _graph(validator, [*whole, *failed], full)
    execution.close()
    return [results[number] for number in range(len(suite))]


def _graph(validator: Any, numbered: Sequence[tuple[int, Check]], result_format: dict[str, Any]) -> dict[int, Any]:
    """Results by number of a few checks, evaluated together."""
    configurations = [_configured(check, number) for number, check in numbered]
    runtime = {"catch_exceptions": True, "result_format": result_format}
    described = _DESCRIBED.set({})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = validator.graph_validate(configurations, runtime_configuration=runtime)
    finally:
        _DESCRIBED.reset(described)
    for result in found:
        if message := _exception(result.exception_info):
            kind, kwargs = result.expectation_config.type, result.expectation_config.kwargs
            raise ValidatorBroken(
                f"{kind} with {plain(kwargs)} raised instead of judging: {message[:400]}; correct or remove it if it "
                "stands in data.expectations, else report it: this is no verdict on the data"
            )
    return {result.expectation_config.meta["number"]: result for result in found}


def _configured(check: Check, number: int = 0) -> Any:
    return _gx().configuration(type=check.type, kwargs=dict(check.kwargs), meta={"number": number})


def _exception(info: Mapping[str, Any] | None) -> str | None:
    """The message of an exception that Great Expectations caught, in either of the two shapes it reports them."""
    for part in [info or {}, *(value for value in (info or {}).values() if isinstance(value, Mapping))]:
        if part.get("raised_exception"):
            return " ".join(str(part.get("exception_message")).split())
    return None


def _told(data: DataConfig, check: Check, result: Any) -> dict[str, Any]:
    """A check and its result as JSON can say them, without a value of a personal column."""
    found = result.result or {}
    told = (one for value in check.kwargs.values() for one in (value if isinstance(value, list | tuple) else [value]))
    about = {one for one in told if isinstance(one, str)}
    named = any(column.personal is not None and column.name in about for column in data.columns)
    private = named and (not check.stops or check.about == "config")
    return {
        "type": check.type,
        "kwargs": plain(check.kwargs),
        "about": check.about,
        "stops": check.stops,
        "success": bool(result.success),
        "unexpected": found.get("unexpected_count", None if check.stops else 0),
        "observed": NOT_SHOWN if private else plain(found.get("observed_value", found.get("partial_unexpected_list"))),
    }


def _contract(data: DataConfig) -> str:
    """The part of the contract that generated expectations and rules hang on."""
    limits = {"min_rows": 1, "max_rows": 1, "max_bad_rows": 0.0, "window_nights": 2, "min_history_nights": 2}
    # The batches are tables with every column: where a column comes from is not their matter.
    where = {"source": "canary", "partition": PARTITION, "lakes": (), "lake_column": None, "own_keys": ()}
    return data.model_copy(update={**where, "expectations": (), **limits}).model_dump_json()


@lru_cache(maxsize=16)
def _prove(contract: str) -> None:
    """Judges the canary batches of a contract, once per process.

    Raises:
        ValidatorBroken: a good row was refused, or a bad one passed.
    """
    data = DataConfig.model_validate_json(contract)
    for canary in canaries(data):
        _judge(data, canary)


def _judge(data: DataConfig, canary: Canary) -> None:
    checks = rules(data, canary.night)
    suite = generated(data.model_copy(update={"max_rows": canary.most_rows}), checks)
    with TemporaryDirectory(prefix="canary-") as folder, canary.table(data) as connection:
        files = (Path(folder) / "clean.parquet", Path(folder) / "quarantine.parquet")
        parts = split(connection, data, checks, len(canary.rows), *files)
        results = _evaluate(connection, suite, measured_view(connection, data))
    expectations = [_told(data, check, result) for check, result in zip(suite, results, strict=True)]
    failing = {told["about"] for told in expectations if not told["success"]}
    for by, found, wanted in (("rules", set(parts.reasons), canary.reasons), ("expectations", failing, canary.failing)):
        if wrong := sorted((found ^ wanted) if canary.good else (wanted - found)):
            raise ValidatorBroken(
                f"the {canary.name} canary batch is misjudged by the {by} about {', '.join(wrong)}: no night "
                "can be judged; report this with the versions of duckdb and great-expectations"
            )
    agree(f"the {canary.name} canary batch", suite, expectations, parts.reasons)


class _Compiled(jinja2.BytecodeCache):
    """Templates that this process has compiled, for whichever environment asks for them next."""

    def __init__(self) -> None:
        self._code: dict[tuple[str, str], Any] = {}

    def load_bytecode(self, bucket: Bucket) -> None:
        """Fill the bucket if its source has been compiled."""
        bucket.code = self._code.get((bucket.key, bucket.checksum))

    def dump_bytecode(self, bucket: Bucket) -> None:
        """Keep what was compiled."""
        self._code[bucket.key, bucket.checksum] = bucket.code


_COMPILED = _Compiled()


def _escaped(result: Any) -> Any:
    """A copy for Data Docs, whose templates put values of the data into the page as they are."""

    def escape(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: escape(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [escape(inner) for inner in value]
        return html.escape(value) if isinstance(value, str) else value

    told = copy.deepcopy(result)
    told.result = escape(told.result)
    return told


def data_docs(validated: Validated, folder: Path) -> None:
    """Write Great Expectations' own site of a night's results, replacing what the folder held."""
    import great_expectations as gx
    from great_expectations.core.expectation_validation_result import ExpectationSuiteValidationResult
    from great_expectations.core.run_identifier import RunIdentifier
    from great_expectations.data_context.types.resource_identifiers import (
        ExpectationSuiteIdentifier,
        ValidationResultIdentifier,
    )
    from great_expectations.render.renderer.site_builder import SiteBuilder
    from great_expectations.validator.validation_statistics import calc_validation_statistics

    shutil.rmtree(folder, ignore_errors=True)
    store = {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(folder.absolute())}
    context = gx.get_context(mode="ephemeral", project_config=_project())
    name = f"night-{validated.night}"
    results = [result for _, result in validated.verdicts]
    statistics = calc_validation_statistics(results)
    run = RunIdentifier(run_name=name)
    suite = gx.ExpectationSuite(
        name=name, expectations=[_configured(check).to_domain_obj() for check, _ in validated.verdicts]
    )
    outcome = ExpectationSuiteValidationResult(
        results=[_escaped(result) for result in results],
        success=bool(statistics.success),
        suite_name=name,
        statistics={key: value for key, value in statistics._asdict().items() if key != "success"},
        meta={"run_id": run, "batch_markers": {}, "active_batch_definition": {}},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        context.suites.add(suite)
        identifier = ValidationResultIdentifier(ExpectationSuiteIdentifier(name), run, VIEW)
        context.validation_results_store.set(identifier, outcome)
        site = SiteBuilder(context, store, site_name="night", site_section_builders={"profiling": "None"})
        # Every part of the site has an environment of its own, and would compile the same templates again.
        for part in (*site.site_section_builders.values(), site.site_index_builder):
            part.view_class.env.bytecode_cache = _COMPILED
        site.build()
