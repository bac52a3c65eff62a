"""A night whose release holds smaller graphs: what they are judged by, and who loads them."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from rich.console import Console

from flows.config import RetrainConfig
from flows.display_releases import show_fallback
from tasks.errors import InvalidConfig, ReleaseRefused
from tasks.evaluate import exam_table
from tasks.fallback import fall_back
from tasks.learning.bank import Bank
from tasks.learning.exams import CANDIDATE, Night, column, sit_nightly
from tasks.learning.ladder import Ladder
from tasks.learning.material import Material
from tasks.learning.metrics import auc_by_user, log_loss
from tasks.meta_train import rows_of, trained_base
from tasks.parents import release_file
from tasks.release.manifest import Manifest, manifest_key
from tasks.release.pointer import promote
from tasks.serving.loaded import load
from tasks.serving.ranker import Ranker
from tasks.steps import open_workspace, recalled
from tests.finished import Finished
from tests.release.test_variants import rounded_to_bytes
from tests.steps.plain import plain_night
from tests.steps.test_fallback import request_of

WIDE = {"variants": ["fp16", "int8"], "max_auc_loss": 0.1, "max_log_loss_rise": 0.1}
"""Limits that a night of a few hundred rows can tell."""


def test_a_night_tries_variants_on_rows_that_they_have_not_seen_and_rankers_take_what_passed(
    damageable: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, night = damageable, damageable.results[1].night
    config = RetrainConfig.model_validate(made.world.config | {"export": WIDE})
    result = plain_night(config, night)
    again = {one.step for one in result.steps if not one.reused}
    assert again == {"ingest", "variants", "export", "publish"} or again == {"variants", "export", "publish"}

    # By another way: torch, on the columns, with base and exam bank rounded in numpy.
    place, workspace = config.place(), open_workspace(config.place())
    step = {one.step: one for one in result.steps}
    layout = recalled(place, "prepare", step["prepare"].key)
    rows, base = rows_of(place, layout), trained_base(place, step["meta-train"])  # type: ignore[arg-type]
    bank = Bank.load(workspace.file(recalled(place, "adapt-exam", step["adapt-exam"].key), "bank.safetensors"))
    with torch.no_grad():
        for tensor in base.network.parameters():
            if tensor.ndim > 1:
                tensor.copy_(torch.from_numpy(rounded_to_bytes(tensor.numpy())))
    bank = replace(bank, weights=rounded_to_bytes(bank.weights))
    asked = Night.among(
        config.data, Ladder(rows, config.segments, config.data.user), Material(rows, "cpu"), night.toordinal()
    )
    said = sit_nightly(asked, base, bank, "int8")[column("nightly", "int8", "clicked")]
    table = exam_table(place, step["evaluate"].key)
    labels, plain = table["label/clicked"].to_numpy(), table[column("nightly", CANDIDATE, "clicked")].to_numpy()
    users = table["user"].to_numpy(zero_copy_only=False).astype(str)
    rise = log_loss(labels, said) - log_loss(labels, plain)
    lost = auc_by_user(labels, plain, users).mean - auc_by_user(labels, said, users).mean

    record = recalled(place, "variants", step["variants"].key)
    assert record.notes["exam"] < 1e-5
    assert record.content["rows"] == len(table)
    stored = made.store.find(manifest_key("tiny", result.published.release))
    assert stored is not None
    manifest = Manifest.parse(stored.data, "tiny", result.published.release)
    assert set(manifest.variants) == {"fp16", "int8"}
    told = manifest.variants["int8"].agreement["objectives"][0]  # type: ignore[index]
    assert told["log_loss_rise"]["estimate"] == pytest.approx(np.nanmean(rise), abs=2e-6)
    assert told["auc_loss"]["estimate"] == pytest.approx(lost, abs=1e-3)
    assert told["largest_difference"] == pytest.approx(np.abs(said - plain).max(), abs=2e-5)
    assert 0.5 < told["top_10_in_common"] <= 1
    assert all(one.verdict == "passed" for one in manifest.variants.values()), manifest.variants

    promote(made.store, "tiny", result.published.release, night, token=10**6)
    request = {
        spec.name: [spec.example] if spec.per == "request" else [[spec.example]] for spec in manifest.interface.inputs
    }
    scores = {}
    for wanted in ("auto", "fp32", "int8"):
        with Ranker(made.store, "tiny", "cpu", variant=wanted) as ranker:  # type: ignore[arg-type]
            assert ranker.variant == ("fp32" if wanted == "fp32" else "int8")
            scores[wanted] = ranker.score(request)
    assert (scores["auto"] == scores["int8"]).all()
    assert 0 < np.abs(scores["fp32"] - scores["int8"]).max() < manifest.variants["int8"].parity["tolerance"] + 0.01
    with pytest.raises(InvalidConfig, match="fp16 is not made for cpu"):
        Ranker(made.store, "tiny", "cpu", variant="fp16")

    folder = tmp_path / "files"
    shutil.copytree(workspace.folder(recalled(place, "export", step["export"].key), "release"), folder)
    refused = replace(manifest.variants["int8"], verdict="failed", why="it lost too much")
    without = replace(manifest, variants={"int8": refused})
    assert load(folder, without, "cpu", variant="auto").variant == "fp32"
    with pytest.raises(ReleaseRefused, match="it lost too much"):
        load(folder, without, "cpu", variant="int8")
    # A manifest that claims any difference to be right is not believed, and one that claims too little is not met.
    for claimed, match in ((0.4, "no int8 of ours"), (1e-9, "off by int8")):
        odd = replace(manifest.variants["int8"], parity={"tolerance": claimed})
        with pytest.raises(ReleaseRefused, match=match):
            load(folder, replace(manifest, variants={"int8": odd}), "cpu", variant="int8")

    a_fallback_has_them_too(config, made, manifest, capsys)


def a_fallback_has_them_too(
    config: RetrainConfig, made: Finished, champion: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the champion's verdicts, and without one bit that is different for anybody else."""
    place, who = config.place(), ["user-003", "user-004", "nobody"]
    with Ranker(made.store, "tiny", "cpu", variant="int8") as ranker:
        before = ranker.score(request_of(who))
        done = fall_back(place, config.data, config.segments.levels, {"user_id": "user-003"}, "complaints")
        assert ranker.refresh()
        assert (ranker.release, ranker.variant) == (done.pointer.release, "int8")
        after = ranker.score(request_of(who))
        assert np.array_equal(before[1:], after[1:])
        assert np.abs(before[0] - after[0]).max() > 1e-3
    stored = made.store.get(manifest_key("tiny", done.pointer.release))
    manifest = Manifest.parse(stored.data, "tiny", done.pointer.release)
    assert manifest.variants == done.variants
    for name, one in manifest.variants.items():
        was = champion.variants[name]
        assert (one.verdict, one.files) == ("passed", was.files)
        assert (
            one.why
            == f"as release {champion.release[:12]} was judged, but for segments that fell back since: {was.why}"
        )
        assert one.agreement == {**was.agreement, "release": champion.release}
        assert 0 < one.parity["largest"] < one.parity["tolerance"]
    show_fallback(Console(), done)
    assert f"variant   int8 passed: as release {champion.release[:12]} was judged" in capsys.readouterr().out

    # Bytes and scales of everybody else's weights are the champion's own: a row is held by itself.
    def held(release: Manifest) -> dict[str, np.ndarray]:
        folder = {name: release_file(place, release.release, name) for name in ("score_int8.onnx", "bank_int8.bin")}
        tensors = onnx.load(folder["score_int8.onnx"], load_external_data=False).graph.initializer
        found = {}
        for one in tensors:
            where = {entry.key: entry.value for entry in one.external_data}
            if where.get("location") == "bank_int8.bin":
                kind = np.int8 if one.data_type == onnx.TensorProto.INT8 else np.float32
                values = np.frombuffer(
                    folder["bank_int8.bin"].read_bytes(), kind, int(np.prod(one.dims)), int(where["offset"])
                )
                found[one.name] = values.reshape(one.dims)
        return found

    then, now = held(champion), held(manifest)
    assert len(then) == 2
    (gone,) = [
        at
        for at in range(len(next(iter(then.values()))))
        if all(np.array_equal(np.delete(then[name], at, axis=0), now[name]) for name in then)
    ]
    assert gone > 0

    # The night made anew under the hold has the same bytes, and its manifest is the one that is there.
    again = plain_night(config, manifest.night)
    assert again.published.release == manifest.release
    with Ranker(made.store, "tiny", "cpu", variant="int8") as ranker:
        assert np.array_equal(ranker.score(request_of(who)), after)
        back = fall_back(
            *(place, config.data, config.segments.levels, {"user_id": "user-003"}, "better now", champion.release)
        )
        assert (back.pointer.release, back.variants) == (champion.release, champion.variants)
        assert ranker.refresh()
        assert (ranker.release, ranker.variant) == (champion.release, "int8")
        assert np.array_equal(ranker.score(request_of(who)), before)


def test_the_same_night_without_variants_is_made_as_before(finished: Finished) -> None:
    """Nothing that a config says by default is part of a key."""
    export = recalled(
        RetrainConfig.model_validate(finished.world.config).place(), "export", finished.results[1].steps[-2].key
    )
    assert not [name for name in export.notes["made_from"] if "variants" in name]
    assert not [name for name in export.content["files"] if "int8" in name or "fp16" in name]
