"""Configs: what is accepted, and what is said about what is not."""

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.config import RetrainConfig, load_config
from tasks.errors import InvalidConfig
from tasks.learning.adapters import AdapterConfig
from tests.world import write_world

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    return write_world(tmp_path, nights=1).config


def refusal(tmp_path: Path, tree: object) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    with pytest.raises(InvalidConfig) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_config_file_says_what_the_model_says(tmp_path: Path, tree: dict[str, Any]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert load_config(path) == RetrainConfig.model_validate(tree)


def test_a_config_survives_the_way_through_prefect(tree: dict[str, Any]) -> None:
    config = RetrainConfig.model_validate(tree)
    assert RetrainConfig.model_validate(json.loads(config.model_dump_json())) == config


@pytest.mark.parametrize(
    "change",
    [{"adapter": {"kind": "film"}}, {"adapter": {"kind": "bias"}}, {"ranker": {"factors": 0}}, {"data": None}],
    ids=["bent", "bias", "no factors", "nothing tells"],
)
def test_factors_by_columns_are_refused_where_they_would_do_nothing(
    tmp_path: Path, tree: dict[str, Any], change: dict[str, Any]
) -> None:
    tree["ranker"] = {**tree.get("ranker", {}), "warm_up": True}
    for kind in ("matching", "ridge"):
        assert RetrainConfig.model_validate({**tree, "adapter": {"kind": kind}}).ranker.warm_up
    refuse(tmp_path, tree, change, "ranker.warm_up: it tells an adapter the factors of items without rows")


@pytest.mark.parametrize("kind", ["ridge", "gradient", "matching"])
def test_adapters_of_features_are_refused_where_there_are_none(tmp_path: Path, tree: dict[str, Any], kind: str) -> None:
    tree["adapter"] = {"kind": kind}
    tree["ranker"] = {"factors": 0, "category_factors": 0, "features": 0, "direct": False}
    assert f"adapter.kind: '{kind}' weighs adapter features, and the ranker has none" in refusal(tmp_path, tree)
    for one in ("factors", "category_factors", "features"):
        assert RetrainConfig.model_validate({**tree, "ranker": {**tree["ranker"], one: 1}})
    assert RetrainConfig.model_validate({**tree, "ranker": {**tree["ranker"], "direct": True}})
    assert RetrainConfig.model_validate({**tree, "adapter": {"kind": "film"}})


@pytest.mark.parametrize(
    "change",
    [
        *({"adapter": {"kind": kind}} for kind in ("film", "bias", "matching")),
        *({"ranker": {"direct": False}}, {"data": None}),
    ],
    ids=["bent", "bias", "matching", "no numbers", "no columns"],
)
def test_predicted_weights_are_refused_where_there_are_none(
    tmp_path: Path, tree: dict[str, Any], change: dict[str, Any]
) -> None:
    tree["ranker"] = {**tree.get("ranker", {}), "prior": True}
    assert RetrainConfig.model_validate(tree).ranker.prior
    tree["ranker"]["features"] = 0
    assert RetrainConfig.model_validate(tree).ranker.prior
    refuse(tmp_path, tree, change, "ranker.prior: it predicts an adapter's weights of candidates' numbers")


def refuse(tmp_path: Path, tree: dict[str, Any], change: dict[str, Any], why: str) -> None:
    """A config whose sections are changed so, or lose their candidate columns, is refused, and the message says why."""
    for section, told in change.items():
        if told is None:
            tree[section]["columns"] = [one for one in tree[section]["columns"] if one["role"] != "candidate"]
        else:
            tree[section] = {**tree.get(section, {}), **told}
    assert why in refusal(tmp_path, tree)


@pytest.mark.parametrize("path", sorted((ROOT / "infra").glob("movielens*.yaml")), ids=lambda path: path.name)
def test_our_own_configs_fit(path: Path) -> None:
    assert load_config(path).pipeline


def test_an_unknown_field_is_named_with_the_nearest_known_one(tmp_path: Path, tree: dict[str, Any]) -> None:
    tree["gate"]["margn"] = 0.01
    message = refusal(tmp_path, tree)
    assert "gate.margn: unknown field; allowed: objective, margin" in message
    assert "did you mean 'margin'?" in message


def test_an_unknown_field_inside_a_list_is_named_by_position(tmp_path: Path, tree: dict[str, Any]) -> None:
    tree["data"]["columns"][2]["dtpye"] = "timestamp"
    assert "data.columns[2].dtpye: unknown field" in (message := refusal(tmp_path, tree))
    assert "did you mean 'dtype'?" in message


def test_a_wrong_choice_is_answered_with_the_choices(tmp_path: Path, tree: dict[str, Any]) -> None:
    tree["device"] = "gpu"
    assert "device: 'gpu' is unknown; allowed: auto, cpu, cuda" in refusal(tmp_path, tree)


@pytest.mark.parametrize(
    ("field", "value"), [("window_nights", "90"), ("window_nights", 9.5), ("max_bad_rows", "none"), ("min_rows", True)]
)
def test_a_wrong_type_is_refused_and_not_converted(
    tmp_path: Path, tree: dict[str, Any], field: str, value: object
) -> None:
    tree["data"][field] = value
    assert f"data.{field}: {value!r} does not fit" in refusal(tmp_path, tree)


def test_a_value_out_of_bounds_is_answered_with_the_bound(tmp_path: Path, tree: dict[str, Any]) -> None:
    tree["data"]["max_bad_rows"] = 1.5
    assert "data.max_bad_rows: 1.5 does not fit; input should be less than 1" in refusal(tmp_path, tree)


def test_a_missing_field_is_named(tmp_path: Path, tree: dict[str, Any]) -> None:
    del tree["data"]["source"], tree["pipeline"]
    message = refusal(tmp_path, tree)
    assert "has 2 faults" in message
    assert "data: source is missing: name the lake" in message
    assert "pipeline: is missing" in message


def test_another_version_is_refused(tmp_path: Path, tree: dict[str, Any]) -> None:
    tree["version"] = 2
    assert "version: 2 is unknown; allowed: 1" in refusal(tmp_path, tree)


@pytest.mark.parametrize("name", ["Movies", "a/b", "", "-x", "a" * 64, "ä"])
def test_a_pipeline_name_that_cannot_be_a_key_is_refused(tmp_path: Path, tree: dict[str, Any], name: str) -> None:
    tree["pipeline"] = name
    assert "pipeline: " in refusal(tmp_path, tree)


def test_segments_are_made_of_columns_that_a_request_brings(tmp_path: Path, tree: dict[str, Any]) -> None:
    tree["segments"]["levels"] = [["user_id"], ["markt"], ["genre"]]
    message = refusal(tmp_path, tree)
    assert "segments.levels[1]: 'markt' is not the user or a categorical request column" in message
    assert "did you mean 'market'?" in message
    assert "segments.levels[2]: 'genre' is not" in message


def test_a_level_names_a_column_once(tmp_path: Path, tree: dict[str, Any]) -> None:
    tree["segments"]["levels"] = [["market", "market"]]
    assert "segments.levels[0]: ['market', 'market'] names a column twice" in refusal(tmp_path, tree)


def test_a_cohort_is_made_of_categorical_request_columns(tmp_path: Path, tree: dict[str, Any]) -> None:
    tree["statistics"]["cohort"] = ["market", "age"]
    assert "statistics.cohort[1]: 'age' is not a categorical request column; allowed: market" in refusal(tmp_path, tree)


def test_episodes_are_even_by_a_categorical_request_column(tmp_path: Path, tree: dict[str, Any]) -> None:
    tree["training"] = {"even": "age"}
    assert "training.even: 'age' is not a categorical request column; allowed: market" in refusal(tmp_path, tree)
    tree["training"] = {"evenness": 1.0}
    assert "evenness = 1.0 is that of training.even, which names no column" in refusal(tmp_path, tree)


def test_the_lakes_of_the_readme_are_a_config(tmp_path: Path, tree: dict[str, Any]) -> None:
    shown = next(block for block in (ROOT / "README.md").read_text().split("```") if "lake_column" in block)
    told = yaml.safe_load(shown.removeprefix("yaml"))
    keys = [
        {**column, "dtype": "string"} if column["name"] == "item_id" else column for column in tree["data"]["columns"]
    ]
    domain = {"name": "domain", "role": "request", "dtype": "string", "kind": "categorical"}
    told["data"] = {**tree["data"], **told["data"], "columns": [*keys, domain]}
    del told["data"]["source"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**tree, **told}))
    config = load_config(tmp_path / "config.yaml")
    assert [lake.optional for lake in config.data.every_lake] == [False, False, True]
    assert config.data.every_lake[1].first_night == date(2026, 6, 1)
    assert config.training.even == config.data.lake_column


def test_the_gate_judges_an_objective_that_exists(tmp_path: Path, tree: dict[str, Any]) -> None:
    tree["gate"]["objective"] = "stars"
    assert "gate.objective: 'stars' is not an objective" in refusal(tmp_path, tree)


def test_the_history_asked_for_fits_into_the_window(tmp_path: Path, tree: dict[str, Any]) -> None:
    tree["data"].update(window_nights=5, min_history_nights=6)
    assert "data.min_history_nights: 6 nights are more than the window holds" in refusal(tmp_path, tree)


@pytest.mark.parametrize("outer", ["first_order", "reptile"])
def test_an_outer_loop_that_the_adapter_cannot_serve_is_refused_with_the_remedy(
    tmp_path: Path, tree: dict[str, Any], outer: str
) -> None:
    tree.setdefault("training", {})["outer"] = outer
    for closed in ({}, {"adapter": {"kind": "matching"}}):
        message = refusal(tmp_path, {**tree, **closed})
        assert f"training.outer: {outer!r} is made of the gradient steps" in message
    assert "set adapter.kind to 'gradient'" in message
    for adapter in ({"kind": "gradient"}, {"kind": "gradient", "bends": "dense"}, {"kind": "film"}, {"kind": "lora"}):
        tree["adapter"] = adapter
        assert RetrainConfig.model_validate(tree).training.outer == outer


def test_every_adapter_loop_and_freeze_that_go_together_can_be_configured(tree: dict[str, Any]) -> None:
    """All that gradient steps make, every loop trains for; the rest has no steps for two of the loops."""
    closed: list[dict[str, Any]] = [{"kind": kind} for kind in ("none", "bias", "ridge", "matching")]
    stepping: list[dict[str, Any]] = [{"kind": kind} for kind in ("gradient", "film", "lora")]
    stepping.append({"kind": "gradient", "bends": "dense"})
    tree.pop("adapter", None)
    for adapter in closed + stepping:
        for outer in ("second_order", "first_order", "reptile", "joint"):
            for freeze in ("nothing", "embeddings", "all_but_head"):
                asked = {**tree, "adapter": adapter, "training": {"outer": outer, "freeze": freeze}}
                if adapter in closed and outer in ("first_order", "reptile"):
                    with pytest.raises(ValueError, match=f"training.outer: '{outer}' is made of the gradient steps"):
                        RetrainConfig.model_validate(asked)
                    continue
                config = RetrainConfig.model_validate(asked)
                assert (config.training.outer, config.training.freeze) == (outer, freeze)
                assert config.adapter == AdapterConfig.model_validate(adapter)


@pytest.mark.parametrize("zone", ["Mars/Olympus", "", "../UTC", "/etc/localtime"])
def test_a_zone_that_is_none_is_refused(tmp_path: Path, tree: dict[str, Any], zone: str) -> None:
    tree["data"]["time_zone"] = zone
    assert f"data.time_zone: {zone!r} is no time zone" in refusal(tmp_path, tree)


def test_a_key_written_twice_is_refused(tmp_path: Path, tree: dict[str, Any]) -> None:
    assert "the key 'pipeline' is written twice" in refusal(tmp_path, yaml.safe_dump(tree) + "pipeline: other\n")


@pytest.mark.parametrize("text", ["", "[]", "just words", "a: [", "a: !!python/object/apply:os.system [ls]", "\0"])
def test_what_is_no_config_is_refused(tmp_path: Path, text: str) -> None:
    refusal(tmp_path, text)


def test_a_number_that_is_not_finite_is_refused(tmp_path: Path, tree: dict[str, Any]) -> None:
    tree["gate"]["margin"] = float("nan")
    assert "gate.margin: numbers must be finite" in refusal(tmp_path, tree)


def test_a_file_that_is_not_there_is_said_to_be_so(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="does not exist"):
        load_config(tmp_path / "none.yaml")


def test_the_digest_knows_what_is_obeyed_and_not_where(tree: dict[str, Any]) -> None:
    config = RetrainConfig.model_validate(tree)
    moved = config.model_copy(update={"store": "elsewhere", "scratch": "there", "device": "auto"})
    assert moved.digest() == config.digest()
    tree["data"]["window_nights"] = 31
    assert RetrainConfig.model_validate(tree).digest() != config.digest()


def test_an_export_section_that_says_nothing_new_leaves_the_digest_as_it_was(tree: dict[str, Any]) -> None:
    """A config of a time before the section has the same digest, so that its nights are not made again."""
    without = RetrainConfig.model_validate(tree)
    assert "export" not in without.model_dump(mode="json")
    for said in ({}, {"variants": []}, {"max_auc_loss": 0.001}):
        assert RetrainConfig.model_validate(tree | {"export": said}).digest() == without.digest()
    assert RetrainConfig.model_validate(tree | {"export": {"variants": ["int8"]}}).digest() != without.digest()


def test_variants_that_are_unknown_or_named_twice_are_refused(tmp_path: Path, tree: dict[str, Any]) -> None:
    tree["export"] = {"variants": ["int4"]}
    assert "export.variants[0]: 'int4' is unknown; allowed: fp16, int8" in refusal(tmp_path, tree)
    tree["export"] = {"variants": ["int8", "int8"]}
    assert "names one twice" in refusal(tmp_path, tree)
