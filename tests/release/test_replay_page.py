"""A replay's page: whole, self-contained, and safe whatever the lake's names are."""

from collections.abc import Callable
from dataclasses import replace

from tasks.release.charts import lines as line_chart
from tasks.release.cost import Cost
from tasks.release.earned import Step
from tasks.release.lift import TOO_FEW, Served, Summary
from tasks.release.replay_page import EXAMS, render
from tasks.release.slices import ADAPTED, POOLED, SLICES, Line
from tasks.release.variety import Variety
from tests.release.test_report import HOSTILE, Page, harm

METHODS = (ADAPTED, "popularity", "bias + offset", "zero steps")
NIGHTS = ("1998-02-09", "1998-02-10", "1998-02-11")
LEFT_OUT = (("1998-02-12", "CorruptFile: part-0.parquet is cut short"),)


def found() -> list[Line]:
    """Every method in every exam, night and slice."""
    return [
        Line(
            exam, name, method, "liked", night, 1234 + number, 56, 60, 0.6 + 0.01 * place + 0.001 * number, None, 0.7,
            0.8, 0.01, None if method == ADAPTED else -0.01 * place, -0.02 if number < 3 else None, 0.001,
            *((None,) * 6 if method == ADAPTED else (0.002 * place, -0.003, 0.0125, 0.25, None, None)),
        )
        for exam in EXAMS
        for number, night in enumerate((*NIGHTS, POOLED))
        for name in SLICES
        for place, method in enumerate(METHODS)
    ]  # fmt: skip


def earned() -> list[Step]:
    """Two levels: one pays from its second step on, one never."""
    return [
        Step("liked", "user_id", 1, 1, 9, 90, -0.001, -0.01, 0.008),
        Step("liked", "user_id", 2, 3, 12, 240, -0.02, -0.03, -0.01),
        Step("liked", "job x age", 64, None, 3, 30, -0.02, None, None),
    ]


def lifts() -> list[Summary]:
    """One level, with a segment at either end."""
    best, worst = (Served("liked", "user_id", key, 40, 2 * at, at, 0.01) for key, at in (("7", -0.1), ("13", 0.05)))
    return [Summary("liked", "user_id", 90, 1230, -0.02, 60, 3, (best,), (worst,))]


def costs() -> list[Cost]:
    """A level that pays, and one with a gain that is not proven and costs that are not known."""
    return [
        Cost(
            "liked", "user_id", "log-loss", 3, 540, 64_800, 432.0, "a CPU, 1 thread", 1230, 24.6, -0.022, -0.03, -0.01
        ),
        Cost("liked", "job x age", "log-loss", 3, 66, None, None, None, 300, 0.6, -0.003, -0.02, 0.01),
    ]


def varieties() -> list[Variety]:
    """Two methods in three nights: one shows everybody the same."""
    return [
        Variety("liked", method, night, 40, 900, 10, 0.25 * place + 0.01, 0.875, 0.5 * place, None)
        for night in (*NIGHTS, POOLED)
        for place, method in enumerate(("popularity", ADAPTED))
    ]


def changed(change: Callable[[str], str]) -> str:
    lines = [replace(line, method=change(line.method), objective=change(line.objective)) for line in found()]
    lines = [replace(line, method=ADAPTED) if line.method.startswith(ADAPTED) else line for line in lines]
    steps = [replace(step, level=change(step.level), objective=lines[0].objective) for step in earned()]
    served = []
    for one in lifts():
        best = replace(one.best[0], segment=change("7"))
        served.append(replace(one, objective=lines[0].objective, level=change(one.level), best=(best,)))
    about = {"objective": lines[0].objective}
    paid = [replace(one, **about, level=change(one.level), device=change("a CPU")) for one in costs()]
    shown = [replace(one, **about, method=change(one.method)) for one in varieties()]
    missing = [(change("x"), change("y"))]
    began = change("the first one started cold")
    return render(change("movielens"), began, lines, steps, served, paid, shown, missing, 0)


def test_the_page_names_every_method_exam_and_slice() -> None:
    given = (found(), earned(), lifts(), costs(), varieties(), LEFT_OUT)
    page = Page(render("movielens", "the first one started cold", *given, 7))
    words = " ".join(page.words)
    for said in (
        "movielens · 1998-02-09 to 1998-02-11", "3 nights", "started cold", "Nothing was published", *METHODS,
        *EXAMS.values(), *(name for name in SLICES if name != "all"), "Log-loss by night:", "1998-02-12",
        "CorruptFile: part-0.parquet is cut short", "3 examined, 1 left out.", "1,234", "seed 7",
        "user_id: own weights pay from 2 support rows on", "job x age: own weights are not proven to pay",
        "support 2 to 3", "Nightly, 330 rows.",
        "user_id: 60 of 90 segments are better off, 3 worse; -0.0200 on average, 0.1500 between the best and the worst",
        "user_id: 180 adapters a night, 120 B and 0.80 ms each; gain of 0.0200 per row served: 2.6 kB and 18 ms per",
        "job x age: 22 adapters a night, what they cost was not measured; the gain of 0.0020 per row served is not",
        "+8.2 a night", "+0.2 a night", "a CPU, 1 thread", "40 users in all, 900 candidates a night", "0.2600",
        "0.8750", "-0.0220",
        "Nightly, 1,230 rows.", "-0.0100 (too few users)", "+0.0040 [-0.0030, +0.0125]", "+0.2500 (too few users)",
        "Each night, every method", "1998-02-10: 1,235 rows of 56 users, adapted 0.6010", "-0.0200 [-0.0200, +0.0010]",
        "-0.2000", "+0.1000", "+0.0500", f"job x age: {TOO_FEW}.",
    ):  # fmt: skip
        assert said in words
    told = [value or "" for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    for method in METHODS[1:]:
        assert sum(value.startswith(f"against {method}:") for value in told) == len(EXAMS) * (len(SLICES) + len(NIGHTS))


def test_lines_by_night_show_each_value() -> None:
    page = Page(render("movielens", "cold", found(), [], [], [], [], LEFT_OUT, 0))
    titles = {word for word in page.words if word.startswith(f"{ADAPTED}, ")}
    assert titles == {f"{ADAPTED}, {night}: {0.6 + 0.001 * number:.4f}" for number, night in enumerate(NIGHTS)}


def test_the_page_fetches_nothing_and_hostile_names_stay_text() -> None:
    for change in (str, lambda name: name + HOSTILE):
        markup = changed(change)
        page = Page(markup)
        assert harm(page) == []
        for word in ("url(", "@import", "<script", "\x00"):
            assert word not in markup
        assert "http" not in markup.replace("http-equiv", "")
        markup.encode()


def test_a_gap_parts_a_line_and_one_night_is_a_dot() -> None:
    markup = line_chart(("a", "b", "c"), {ADAPTED: [0.5, None, 0.6], "other": [None, None, None]}, ADAPTED)
    assert markup.count("<polyline") == 2
    assert markup.count("<circle") == 2
    assert "There is nothing to draw" in line_chart(("a",), {ADAPTED: [None]}, ADAPTED)
    assert line_chart(("a",), {ADAPTED: [0.5]}, ADAPTED).count("<circle") == 1
