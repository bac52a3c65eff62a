"""What must not go unheard is planted, and a whole night says it by name: a leak, an inert adapter, a harmful one."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.config import RetrainConfig
from tasks.evaluate import judge
from tasks.learning.adapters import AdapterConfig
from tasks.retention import check_retention
from tests.finished import Finished
from tests.steps.leaks import Pipeline
from tests.steps.plain import plain_night
from tests.steps.test_leaks import replaced

OUTCOME = {"name": "outcome", "role": "request", "dtype": "string", "kind": "categorical"}
SECONDS = {"name": "seconds", "role": "candidate", "dtype": "float64", "kind": "numeric", "nullable": True}


def telling(table: pa.Table) -> pa.Table:
    """Two columns that are only known once the outcome is: one says it, the other is missing where nothing came."""
    clicked = table["clicked"].to_pylist()
    outcome = pa.array(["opened" if value else "ignored" for value in clicked])
    seconds = pa.array([30.0 + number % 7 if value else None for number, value in enumerate(clicked)])
    return table.append_column("outcome", outcome).append_column("seconds", seconds)


def test_a_leak_and_an_adapter_that_does_nothing_are_named_before_anything_is_published(
    finished: Finished, tmp_path: Path
) -> None:
    tree = finished.world.config
    contract = {**tree["data"], "columns": [*tree["data"]["columns"], OUTCOME, SECONDS]}
    nobody = {**tree["segments"], "min_support": 2000, "max_support": 2000}
    pipeline = Pipeline(tmp_path, {**tree, "data": contract, "segments": nobody})
    for night in finished.world.nights:
        pipeline.change(night, telling)
    made = pipeline.night(finished.next_night)
    config = made.config
    retention = check_retention.fn(
        *(config.place(), config.data, config.segments, config.gate), *(made.ingested, made.prepared, made.base)
    )

    def heard(adapter: AdapterConfig) -> tuple[str, ...]:
        return judge.fn(
            *(config.place(), config.data, config.segments, adapter, config.gate),
            *(made.ingested, made.validated, made.prepared, made.exam, retention),
        ).alarms

    alarms = heard(config.adapter)
    assert [alarm.split(" alone")[0] for alarm in alarms if alarm.startswith("leaking")] == [
        "leaking: input 'seconds'",
        "leaking: input 'outcome'",
    ]
    assert [alarm.split(":")[0] for alarm in alarms if not alarm.startswith("leaking")] == ["inert"]
    asked_for_nothing = heard(AdapterConfig(kind="none"))
    assert asked_for_nothing == tuple(alarm for alarm in alarms if alarm.startswith("leaking"))


@pytest.mark.parametrize("turned", [False, True], ids=["as they were", "turned"])
def test_a_night_of_turned_tastes_is_reported_as_harm(damageable: Finished, turned: bool) -> None:
    """Who liked what is short now likes what is long: weights that users earned before say the opposite. Good nights
    before it, pooled with it, would speak for them."""
    for path in damageable.files_of(damageable.next_night) if turned else ():
        table = pq.read_table(path)
        pq.write_table(replaced(table, clicked=[1 - value for value in table["clicked"].to_pylist()]), path)
    tree = damageable.world.config
    config = RetrainConfig.model_validate({**tree, "gate": {**tree["gate"], "pool_nights": 1}})
    result = plain_night(config, damageable.next_night)
    folder = f"tiny/releases/{result.published.release}"
    run, page = (damageable.store.get(f"{folder}/{name}").data.decode() for name in ("run.json", "report.html"))
    named = {name for name, _ in json.loads(run)["report"]["alarms"]}
    assert named == ({"harmful"} if turned else set())
    assert ("adaptation raises the loss" in page) == turned
    assert result.verdict.go != turned
