"""What a person at a terminal reads: names whole on 80 columns, data never as markup, one block per error."""

from dataclasses import replace
from datetime import UTC, date, datetime
from io import StringIO

import pytest
from rich.console import Console

from flows.backfill import NightOutcome
from flows.display import (
    ReplayScreen,
    Screen,
    errors_to,
    show_backfill,
    show_night,
    show_ranked,
    show_replay,
    show_search,
)
from flows.display_releases import show_releases
from flows.nightly import NightResult
from flows.replay import ReplayedNight
from tasks.errors import ExpectationsFailed, NightrankError, StoreUnavailable
from tasks.references import (
    PrepareRef,
    PublishRef,
    ReleaseRow,
    RetentionRef,
    ScoreRow,
    ValidateRef,
    VerdictRef,
)
from tasks.release.cost import Cost
from tasks.release.earned import Step
from tasks.release.lift import Served, Summary
from tasks.release.slices import ADAPTED, POOLED, SLICES, Line
from tasks.release.variety import Variety
from tasks.search import SearchRef
from tasks.serving.ranker import Ranked

NIGHT = date(2026, 3, 5)
STEP = {"step": "s", "key": "k", "digest": "d", "reused": False, "seconds": 1.0, "peak_mib": 2.0}
METHODS = ("adapted", "matrix factorisation", "bias + offset", "zero steps")


def scores() -> tuple[ScoreRow, ...]:
    return tuple(
        ScoreRow(
            exam=exam, method=method, rows=123_456, log_loss=0.5 + 0.01 * place, calibration=0.01, auc=0.7, ndcg=0.8
        )
        for exam in ("nightly", "first contact, 20 rows")
        for place, method in enumerate(METHODS)
    )


@pytest.fixture
def result() -> NightResult:
    rejected = {"bad": 1, "reasons": {"range:stars": 1}}
    told = {"promoted": True, "why": "the gate said go", "report": "/r.html"}
    return NightResult(
        night=NIGHT,
        validated=ValidateRef.model_validate({**STEP, "rows": 100, "clean": 99, "docs": "d", **rejected}),
        prepared=PrepareRef.model_validate(
            {
                **STEP, "history": "h", "nights": (NIGHT,), "left_out": {"2026-03-04": "CorruptFile"}, "rows": 1,
                "users": 1, "items": 1, "segments": 1,
            }
        ),
        retention=RetentionRef.model_validate({**STEP, "compared": False, "told": "not compared: [why]"}),
        verdict=VerdictRef.model_validate(
            {
                **STEP, "go": True, "decided_by": "proven", "reasons": (), "scores": scores(),
                "alarms": ("inert: nothing changes [1]",),
            }
        ),
        published=PublishRef.model_validate({**STEP, "release": "a" * 64, "night": NIGHT, **told}),
        steps=(),
    )  # fmt: skip


@pytest.fixture
def console() -> Console:
    return Console(file=StringIO(), width=80, highlight=False)


def shown_on(console: Console) -> str:
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_a_night_on_80_columns_has_every_name_and_number_whole(console: Console, result: NightResult) -> None:
    show_night(console, result)
    lines = shown_on(console).splitlines()
    assert max(map(len, lines)) <= 80
    for method in METHODS:
        (first, second) = (line for line in lines if f" {method} " in line)
        for number in ("123,456", "0.0100", "0.7000", "0.8000"):
            assert number in first
            assert number in second
    assert not any("…" in line for line in lines)
    shown = "\n".join(lines)
    for fact in (
        "rows      99 clean, 1 in quarantine; history 1 nights, 1 left out", "alarm     inert: nothing changes [1]",
        "retained  not compared: [why]",
        "gate      go, proven", "a" * 64, "champion  yes: the gate said go", "report    /r.html",
    ):  # fmt: skip
        assert fact in shown


def test_the_summary_of_a_backfill_fits_80_columns(console: Console, result: NightResult) -> None:
    outcomes = [
        NightOutcome(night=NIGHT, state="released", why="", result=result),
        NightOutcome(night=NIGHT, state="rejected", why="[bold]"),
    ]
    show_backfill(console, outcomes)
    shown = shown_on(console)
    assert max(map(len, shown.splitlines())) <= 80
    for fact in ("2026-03-05", "promoted", "rejected", "0.5000", "0.5100 matrix", "factorisation", "a" * 12):
        assert fact in shown
    assert "…" not in shown


@pytest.fixture
def found() -> SearchRef:
    line = {"rows": 123_456, "users": 9, "own": 0.6, "best": 0.58, "difference": -0.02, "low": -0.03, "high": -0.01}
    return SearchRef.model_validate(
        {
            "objective": "clicked", "own_is_best": False, "chosen_by": (NIGHT, NIGHT), "last": (NIGHT, NIGHT),
            "settings": (
                {"name": "training.embedding_decay", "own": 3.0, "best": 0.5003},
                {"name": "ranker.kind", "own": "mlp", "best": "dcn"},
            ),
            "own": 0.61, "best": 0.57, "complete": 11, "pruned": 2, "refused": ("[b]",), "storage": "/s.journal",
            "history": 30, "left_out": {"2026-02-01": "NightMissing", "2026-02-02": "CorruptFile"},
            "lines": ({"support": 0, **line}, {"support": 20, **line, "low": None, "high": None}),
        }
    )  # fmt: skip


def test_a_search_says_which_figure_is_optimistic_and_ends_with_yaml(console: Console, found: SearchRef) -> None:
    show_search(console, found)
    shown = shown_on(console)
    for fact in (
        "history   30 nights, 2 left out: 2026-02-01, 2026-02-02",
        "trials    11 finished, 2 given up early; remembered in /s.journal", "given up: [b]", "0.5003",
        "own settings 0.6100, best 0.5700 (optimistic: it was chosen by these nights)", "123,456",
        "2026-03-05 to 2026-03-05, which nothing was chosen by", "-0.0200 [-0.0300, -0.0100]", "(too few users)",
        "training:\n  embedding_decay: 0.5003\nranker:\n  kind: dcn\n",
    ):  # fmt: skip
        assert fact in shown
    tables = shown[: shown.index("trials")] + shown[shown.index("which nothing") : shown.index("to be merged")]
    assert max(map(len, tables.splitlines())) <= 80
    show_search(console, found.model_copy(update={"own_is_best": True, "lines": ()}))
    assert "own settings did best: there is nothing to change" in shown_on(console)


PROVEN = "proven better on nights that nothing was chosen by; to be merged into the config:"
DOUBTFUL = "not proven on nights that nothing was chosen by; to be merged if there is another reason:"
WORSE = "worse on nights that nothing was chosen by: keep the config's own settings, not these:"
NOTHING = "no trial was finished: nothing is known of other settings"
SAME = "the config's own settings did best: there is nothing to change"


@pytest.mark.parametrize(
    ("changed", "bounds", "says"),
    [
        ({}, [(-0.03, -0.01), (-0.02, 0.01)], PROVEN),
        ({}, [(-0.03, 0.0), (-0.02, 0.01)], DOUBTFUL),
        ({}, [(None, None)], DOUBTFUL),
        ({}, [], DOUBTFUL),
        ({}, [(-0.03, -0.01), (0.001, 0.02)], WORSE),
        ({"own_is_best": True}, [], SAME),
        ({"own_is_best": True, "complete": 0}, [], NOTHING),
    ],
)
def test_a_search_says_whether_its_best_is_proven(
    console: Console,
    found: SearchRef,
    changed: dict[str, object],
    bounds: list[tuple[float | None, float | None]],
    says: str,
) -> None:
    """One proven exam is proof only where no other one is proven worse."""
    lines = tuple(found.lines[0].model_copy(update={"low": low, "high": high}) for low, high in bounds)
    show_search(console, found.model_copy(update={"lines": lines, **changed}))
    shown = " ".join(shown_on(console).split())
    assert [one for one in (PROVEN, DOUBTFUL, WORSE, NOTHING, SAME) if one in shown] == [says]
    assert ("embedding_decay: 0.5003" in shown) == (says not in (SAME, NOTHING))


def test_releases_fit_80_columns(console: Console) -> None:
    row = {"release": "b" * 64, "night": NIGHT, "created": datetime(2026, 3, 6, 4, 30, tzinfo=UTC), "go": True}
    row |= {"roles": ("champion", "previous"), "parent": None, "config": "c", "report": f"/{'long/' * 30}report.html"}
    show_releases(console, [ReleaseRow.model_validate(row)])
    shown = shown_on(console)
    for fact in ("b" * 12, "2026-03-06 04:30", "champion, previous", "none", str(row["report"])):
        assert fact in shown


def test_a_replay_fits_80_columns_and_says_where_its_page_is(console: Console) -> None:
    lines = [
        Line(
            exam, name, method, "clicked", night, 123_456, 789, 999, 0.5 + 0.01 * place, None, 0.7, 0.8, 0.01,
            None if method == ADAPTED else -0.01 * place, -0.5, None if name == "new item" else 0.25,
            None if method == ADAPTED else 0.003 * place, -0.004, 0.0125, None, None, None,
        )
        for exam in ("nightly", "contact 0", "contact 5", "contact 20")
        for night in (NIGHT.isoformat(), POOLED)
        for name in SLICES
        for place, method in enumerate(METHODS)
    ]  # fmt: skip
    step = Step("clicked", "user_id [x]", 2, 3, 12, 240, -0.02, -0.03, -0.01)
    served = Served("clicked", "user_id [x]", "u", 40, -0.2, -0.1, 0.01)
    level = Summary("clicked", "user_id [x]", 1234, 56_789, -0.02, 600, 3, (served,), (replace(served, shrunk=0.05),))
    steps = [step, replace(step, level="job"), replace(step, objective="stars")]
    paid = Cost("clicked", "user_id [x]", "log-loss", 1, 180, 64_800, 432.0, "a CPU", 1230, 24.6, -0.02, -0.03, -0.01)
    shown = [
        Variety("clicked", method, night, 200, 1_500, 10, 0.125, 0.875, 0.5, None)
        for night in (NIGHT.isoformat(), POOLED)
        for method in METHODS
    ]
    levels = [level, replace(level, objective="stars")]
    show_replay(console, lines, steps, levels, [paid], shown, [f"/{'long/' * 30}replay.html"])
    ReplayScreen(console)(1, 60, ReplayedNight(night=NIGHT, state="rejected", why="[bold]"))
    shown = shown_on(console).splitlines()
    for fact in (
        "2026-03-05 123,456 0.5000 -0.0300 [-0.5000, +0.2500] -0.0100 [-0.5000, +0.2500]",
        "nightly, clicked, 1 nights", "-0.0100 [-0.5000, +0.2500]", "(too few users)",
        "matrix factorisation  0.7000  +0.0030 [-0.0040, +0.0125]   0.8000", "123,456", "replay.html",
        "user_id [x], clicked: own weights pay from 2 support rows on",
        "user_id [x], clicked: 600 of 1,234 segments are better off, 3 worse; -0.0200 on",
        "average, 0.1500 between the best and the worst served", "job, clicked: fewer than 5 segments were served",
        "user_id [x], clicked: 180 adapters a night, 360 B and 2.4 ms each; gain of",
        "top 10, clicked, 200 users, 1,500 candidates, 1 nights", "0.1250", "0.8750",
        "2026-03-05 rejected (1 of 60): [bold]", *(name for name in SLICES if name != "all"),
    ):  # fmt: skip
        assert any(fact in line for line in shown), fact
    assert max(len(line) for line in shown if "long/" not in line) <= 80
    assert not any("…" in line or "contact 0" in line for line in shown)


def replayed(night: str, exam: str, **losses: float) -> list[Line]:
    """The lines of one exam on one night, by method: the candidate's loss minus each other's, from -0.5 to 0.25."""
    return [
        Line(
            exam, "all", method.replace("_", " "), "clicked", night, 1_234_567, 3, 3, loss, None, None, None, None,
            None if method == ADAPTED else losses[ADAPTED] - loss, -0.5, 0.25, *(None,) * 6,
        )
        for method, loss in losses.items()
    ]  # fmt: skip


def test_a_night_of_a_replay_is_held_against_zero_steps_and_the_best_of_all_nights(console: Console) -> None:
    """Not against whatever happened to be the best that night; `--per-night` has every method of it."""
    lines = [
        *replayed("2026-03-05", "nightly", adapted=0.5, popularity=0.4, bias=0.7, zero_steps=0.3),
        *replayed("2026-03-06", "nightly", adapted=0.6, bias=0.65),
        *replayed("2026-03-06", "contact 5", adapted=0.6),
        *replayed(POOLED, "nightly", adapted=0.55, popularity=0.7, bias=0.675, zero_steps=0.3),
        *replayed(POOLED, "contact 5", adapted=0.6),
    ]
    show_replay(console, lines, [], [], [], [], [])
    by_night = shown_on(console).partition("2 nights")[0]
    told = " ".join(by_night.split())
    assert "nightly, clicked, adapted night by night; the best other of all nights is bias" in told
    # A number of rows that has no room is folded, never cut.
    assert "2026-03-05 1,234,56 0.5000 +0.2000 [-0.5000, +0.2500] -0.2000 [-0.5000, +0.2500] 7 2026-03-06" in told
    assert "0.6000 -0.0500 [-0.5000, +0.2500] 7" in told
    assert "popularity" not in told
    assert "contact 5, clicked, 2026-03-06" in told
    assert max(map(len, by_night.splitlines())) <= 80
    show_replay(console, lines, [], [], [], [], [], per_night=True)
    every = shown_on(console).rpartition("nightly, clicked, 2026-03-05")[2].partition("2 nights")[0].split()
    assert " ".join(every).count("+0.1000 [-0.5000, +0.2500]") == 1
    assert [every.count(name) for name in ("popularity", "bias", "steps")] == [1, 2, 1]


def test_a_ranked_list_takes_items_literally(console: Console) -> None:
    ranked = [Ranked(1, "[red]shoe[/red]", {"liked": 0.75}), Ranked(2, 7, {"liked": 0.25})]
    show_ranked(console, "a" * 64, NIGHT, [ranked])
    shown = shown_on(console)
    assert "[red]shoe[/red]" in shown
    assert shown.index("0.7500") < shown.index("0.2500")
    assert "request 1 of 1, release aaaaaaaaaaaa of night 2026-03-05" in shown


def test_steps_are_shown_as_they_end(console: Console) -> None:
    with Screen(console) as screen:
        screen.started("export", "changed since last time: config [x]")
        screen.progressed("export", 1, 3, "parts")
        screen.finished("export", False, 2.25)
        screen.finished("publish", True, 0.1)
    assert shown_on(console).splitlines() == [
        "export      changed since last time: config [x]", "export      2.2 s", "publish     reused",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "again"), [(ExpectationsFailed("3 rows [of] 4"), False), (StoreUnavailable("busy"), True)]
)
def test_an_error_of_the_family_is_one_block(console: Console, error: NightrankError, again: bool) -> None:
    with pytest.raises(SystemExit) as caught, errors_to(console):
        raise error
    assert caught.value.code == 2
    expected = f"{type(error).__name__}\n{error}\n" + ("Trying again later can help.\n" if again else "")
    assert shown_on(console) == expected


def test_a_bug_keeps_its_traceback(console: Console) -> None:
    with pytest.raises(KeyError), errors_to(console):
        raise KeyError("a bug")


def test_a_ctrl_c_is_one_line_and_no_success(console: Console) -> None:
    with pytest.raises(SystemExit) as caught, errors_to(console):
        raise KeyboardInterrupt
    assert caught.value.code == 130
    assert shown_on(console) == "stopped; what was finished is kept, and the same command goes on from there\n"
