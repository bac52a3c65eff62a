"""A search that is killed goes on, repeats nothing that is finished, and gives up what is not worth its time."""

import math
import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tasks.errors import InvalidConfig, ObjectCorrupt, SearchRunning, StoreUnwritable, TrainingDiverged
from tasks.learning.adapters import AdapterConfig
from tasks.learning.networks import RankerConfig
from tasks.learning.space import Parameter, Sections, Settings, Space
from tasks.learning.study import STARTUP, Score, Told, Tried, remembered
from tasks.learning.training_config import TrainingConfig

NOW = Sections(RankerConfig(), AdapterConfig(), TrainingConfig())

SPACE = {
    "training.learning_rate": Parameter(type="float", low=1e-5, high=1e-1, log=True),
    "ranker.factors": Parameter(type="int", low=1, high=16),
    "ranker.kind": Parameter(type="choice", choices=("mlp", "dcn")),
}


def loss_of(settings: Settings) -> float:
    """Least at a rate of 0.001, 5 factors and `dcn`."""
    rate, factors = settings["training.learning_rate"], settings["ranker.factors"]
    assert isinstance(rate, float)
    assert isinstance(factors, int)
    return (math.log10(rate) + 3) ** 2 + 0.1 * (factors - 5) ** 2 + (settings["ranker.kind"] == "mlp")


def scored(calls: list[Settings]) -> Score:
    def score(settings: Settings, told: Told) -> float:
        calls.append(settings)
        return loss_of(settings)

    return score


def run(
    path: Path,
    trials: int,
    score: Score,
    name: str = "one",
    go_on: Callable[[], bool] = lambda: True,
    space: Space = SPACE,
) -> list[Tried]:
    with remembered(path, name, space, 0, NOW) as search:
        search.run(score, trials, go_on, lambda done: None)
        return search.tried


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[Settings]:
    """The settings of a search that nobody disturbed."""
    calls: list[Settings] = []
    tried = run(tmp_path_factory.mktemp("whole") / "a.journal", 24, scored(calls))
    assert [one.settings for one in tried] == calls
    return calls


def test_the_sampler_comes_nearer_to_the_best(whole: list[Settings]) -> None:
    losses = [loss_of(settings) for settings in whole]
    assert sum(losses[-8:]) < 0.5 * sum(losses[:STARTUP])
    for settings in whole:
        rate = settings["training.learning_rate"]
        assert isinstance(rate, float)
        assert rate == float(f"{rate:.4g}")
        assert 1e-5 <= rate <= 1e-1


def test_a_search_that_goes_on_repeats_nothing_and_draws_what_it_would_have_drawn(
    whole: list[Settings], tmp_path: Path
) -> None:
    path, calls = tmp_path / "a.journal", list[Settings]()
    run(path, 5, scored(calls))
    assert len(calls) == 5
    dying = list[Settings]()

    def stopped(settings: Settings, told: Told) -> float:
        dying.append(settings)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(path, 12, stopped)
    with path.open("ab") as file:
        file.write(b'{"op_code": 6, "wor')  # and a line that was never finished
    run(path, 12, scored(calls))
    assert calls == whole[:12]
    assert dying == [whole[5]]
    run(path, 12, scored(calls))
    assert len(calls) == 12


def test_settings_whose_process_was_killed_are_given_up_and_the_others_go_on(
    whole: list[Settings], tmp_path: Path
) -> None:
    """While it lives, no other search has the file; the kernel gives it back."""
    path, calls = tmp_path / "a.journal", list[Settings]()
    (here, there), child = os.pipe(), 0

    def deadly(settings: Settings, told: Told) -> float:
        calls.append(settings)
        if len(calls) == 3:
            os.write(there, b"here")
            signal.pause()
        return loss_of(settings)

    if (child := os.fork()) == 0:
        try:
            run(path, 12, deadly)
        except BaseException:  # noqa: BLE001  (nothing may come back to the tests)
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(there)
    try:
        assert os.read(here, 4) == b"here"
        with pytest.raises(SearchRunning, match=r"another search is using .*a\.journal; wait .* another --storage"):
            run(path, 12, scored(calls))
    finally:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(here)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    assert calls == []
    tried = run(path, 6, scored(calls))
    # Whatever it was that a trial came to, the first ones are drawn at random and do not depend on it.
    assert calls == whole[3:6]
    assert [one.settings for one in tried] == whole[:6]
    assert [one.state for one in tried] == ["complete", "complete", "pruned", *["complete"] * 3]
    rate = whole[2]["training.learning_rate"]
    assert tried[2].why.startswith("the process was killed, perhaps for want of memory, with")
    assert f"training.learning_rate {rate}" in tried[2].why


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: np.empty(1 << 60, np.uint8),
        lambda: torch.empty(1 << 60, dtype=torch.uint8),
        lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")),
    ],
)
def test_settings_that_need_more_memory_than_there_is_are_given_up(
    allocate: Callable[[], object], tmp_path: Path
) -> None:
    calls: list[Settings] = []

    def hungry(settings: Settings, told: Told) -> float:
        calls.append(settings)
        if len(calls) == 2:
            list(allocate())  # type: ignore[call-overload]
        return loss_of(settings)

    for _ in range(2):
        tried = run(tmp_path / "a.journal", 3, hungry)
    assert [one.state for one in tried] == ["complete", "pruned", "complete"]
    assert tried[1].why.startswith("out of memory with training.learning_rate")
    assert [one.settings for one in tried] == calls


def test_an_error_of_another_kind_ends_the_search(tmp_path: Path) -> None:
    def broken(settings: Settings, told: Told) -> float:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        run(tmp_path / "a.journal", 3, broken)
    assert len(run(tmp_path / "a.journal", 1, scored([]))) == 1


def test_a_setting_is_drawn_in_the_trials_of_the_kind_that_it_belongs_to(tmp_path: Path) -> None:
    space = {
        "adapter.rank": Parameter(type="int", low=1, high=8),
        "ranker.factors": Parameter(type="int", low=1, high=8),
        "adapter.kind": Parameter(type="choice", choices=("ridge", "lora")),
    }
    calls: list[Settings] = []

    def score(settings: Settings, told: Told) -> float:
        calls.append(settings)
        made = NOW.changed(settings)
        assert made.adapter.kind == settings["adapter.kind"]
        return float(made.adapter.rank)

    tried = run(tmp_path / "a.journal", 12, score, space=space)
    assert all(one.state == "complete" for one in tried)
    assert [one.settings for one in tried] == calls
    names = {"ridge": {"adapter.kind", "ranker.factors"}, "lora": {"adapter.kind", "adapter.rank"}}
    assert {settings["adapter.kind"] for settings in calls} == names.keys()
    for settings in calls:
        assert settings.keys() == names[str(settings["adapter.kind"])]


def test_another_study_in_the_same_file_starts_anew(tmp_path: Path) -> None:
    path, calls = tmp_path / "a.journal", list[Settings]()
    run(path, 2, scored(calls))
    assert len(run(path, 1, scored(calls), name="other")) == 1
    assert len(run(path, 2, scored(calls))) == 2
    assert len(calls) == 3


def test_the_configs_own_settings_are_scored_once(tmp_path: Path) -> None:
    found = iter((0.25, 0.5))
    for _ in range(2):
        with remembered(tmp_path / "a.journal", "one", SPACE, 0, NOW) as search:
            assert search.default(lambda: next(found)) == 0.25


def test_what_is_worse_than_the_median_is_given_up_and_what_cannot_be_trained_says_why(tmp_path: Path) -> None:
    parts: list[int] = []

    def score(settings: Settings, told: Told) -> float:
        number = len(parts)
        parts.append(0)
        if number == 1:
            raise TrainingDiverged("the training loss is nan")
        if number == 2:
            return math.inf
        for part in range(3):
            parts[number] = part + 1
            told(part, 9.0 if number == STARTUP + 3 else 1.0 - 0.01 * number)
        return 1.0

    tried = run(tmp_path / "a.journal", STARTUP + 5, score)
    assert parts == [3, 0, 0, *[3] * STARTUP, 1, 3]
    states = [one.state for one in tried]
    assert states == ["complete", "pruned", "pruned", *["complete"] * STARTUP, "pruned", "complete"]
    assert [one.why for one in tried if one.why] == ["the training loss is nan", "the loss is inf"]
    assert all((one.loss is None) == (one.state == "pruned") for one in tried)


def test_no_trial_begins_after_the_time_is_over(tmp_path: Path) -> None:
    left = iter((True, True, False))
    assert len(run(tmp_path / "a.journal", 9, scored([]), go_on=lambda: next(left))) == 2


@pytest.mark.parametrize("text", ["pipeline: tiny\nstore: x\n", "no end", '{"version": 1}\n'])
def test_a_file_that_is_no_journal_is_refused_and_left_as_it_is(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ObjectCorrupt, match=r"is no journal of a search: .*; give another --storage"):
        run(path, 1, scored([]))
    assert path.read_text() == text


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnwritable, match="give another --storage"):
        run(tmp_path / "file" / "a.journal", 1, scored([]))


def test_without_optuna_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(InvalidConfig, match=r"pip install 'nightrank\[search\]'"):
        run(tmp_path / "a.journal", 1, scored([]))
