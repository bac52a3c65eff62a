"""A search that is killed goes on, repeats nothing that is finished, and gives up what is not worth its time."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.errors import InvalidConfig, ObjectCorrupt, StoreUnwritable, TrainingDiverged
from tasks.learning.space import Parameter, Settings
from tasks.learning.study import STARTUP, Score, Search, Told

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


def run(path: Path, trials: int, score: Score, name: str = "one", go_on: Callable[[], bool] = lambda: True) -> Search:
    search = Search(path, name, SPACE, seed=0)
    search.run(score, trials, go_on, lambda done: None)
    return search


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[Settings]:
    """The settings of a search that nobody disturbed."""
    calls: list[Settings] = []
    search = run(tmp_path_factory.mktemp("whole") / "a.journal", 24, scored(calls))
    assert [one.settings for one in search.tried] == calls
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

    def killed(settings: Settings, told: Told) -> float:
        dying.append(settings)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(path, 12, killed)
    with path.open("ab") as file:
        file.write(b'{"op_code": 6, "wor')  # and a line that was never finished
    run(path, 12, scored(calls))
    assert calls == whole[:12]
    assert dying == [whole[5]]
    run(path, 12, scored(calls))
    assert len(calls) == 12


def test_another_study_in_the_same_file_starts_anew(tmp_path: Path) -> None:
    path, calls = tmp_path / "a.journal", list[Settings]()
    run(path, 2, scored(calls))
    assert len(run(path, 1, scored(calls), name="other").tried) == 1
    assert len(run(path, 2, scored(calls)).tried) == 2
    assert len(calls) == 3


def test_the_configs_own_settings_are_scored_once(tmp_path: Path) -> None:
    found = iter((0.25, 0.5))
    for _ in range(2):
        assert Search(tmp_path / "a.journal", "one", SPACE, 0).default(lambda: next(found)) == 0.25


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

    search = run(tmp_path / "a.journal", STARTUP + 5, score)
    assert parts == [3, 0, 0, *[3] * STARTUP, 1, 3]
    states = [one.state for one in search.tried]
    assert states == ["complete", "pruned", "pruned", *["complete"] * STARTUP, "pruned", "complete"]
    assert [one.why for one in search.tried if one.why] == ["the training loss is nan", "the loss is inf"]
    assert all((one.loss is None) == (one.state == "pruned") for one in search.tried)


def test_no_trial_begins_after_the_time_is_over(tmp_path: Path) -> None:
    left = iter((True, True, False))
    assert len(run(tmp_path / "a.journal", 9, scored([]), go_on=lambda: next(left)).tried) == 2


@pytest.mark.parametrize("text", ["pipeline: tiny\nstore: x\n", "no end", '{"version": 1}\n'])
def test_a_file_that_is_no_journal_is_refused_and_left_as_it_is(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ObjectCorrupt, match=r"is no journal of a search: .*; give another --storage"):
        Search(path, "one", SPACE, 0)
    assert path.read_text() == text


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnwritable, match="give another --storage"):
        Search(tmp_path / "file" / "a.journal", "one", SPACE, 0)


def test_without_optuna_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(InvalidConfig, match=r"pip install 'nightrank\[search\]'"):
        Search(tmp_path / "a.journal", "one", SPACE, 0)
