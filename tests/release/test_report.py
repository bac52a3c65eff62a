"""The report: whole, valid, self-contained, and safe whatever the lake's names are."""

import dataclasses
import json
from html.parser import HTMLParser
from math import inf, nan

import pytest

from tasks.learning.intervals import Interval
from tasks.release import charts
from tasks.release import night as facts
from tasks.release.charts import Whisker
from tasks.release.cost import Cost
from tasks.release.earned import Step
from tasks.release.lift import Served, Summary
from tasks.release.night import Comparison, NightReport
from tasks.release.page import LONGEST, el, text
from tasks.release.report import render
from tasks.release.variety import Variety

METHODS = {
    "global rate": (0.6842, 0.09, 0.5),
    "popularity": (0.6231, 0.031, 0.688),
    "bias + offset": (0.6120, 0.028, 0.688),
    "matrix factorisation": (0.6188, 0.035, 0.692),
    "zero steps": (0.6074, 0.027, 0.701),
    "champion": (0.5925, 0.022, 0.716),
}


def figures(log_loss: float, calibration: float, auc: float) -> dict[str, float | None]:
    return {
        "rows": 2143,
        "users": 61,
        "log_loss": log_loss,
        "calibration_error": calibration,
        "auc": auc,
        "ndcg_at_10": auc + 0.05,
        "accuracy": 0.68,
        "precision": 0.69,
        "recall": 0.74,
        "f1": 0.714,
        "fitness": None,
    }


def comparisons() -> tuple[Comparison, ...]:
    found = []
    for place, (method, (loss, _, _)) in enumerate(METHODS.items()):
        gap = 0.5911 - loss
        wide = 0.006 + 0.004 * place
        found.append(Comparison.of("nightly", method, Interval(gap, gap - wide, gap + wide, 318, 12_904), nights=7))
        for k in (0, 5, 20):
            better = gap - 0.0012 * k
            contact = Interval(better, better - 1.2 * wide, better + 1.2 * wide, 61 - k, 2143 - 50 * k)
            found.append(Comparison.of("first_contact", method, contact, k=k))
    found.append(Comparison.of("first_contact", "champion", Interval(0.01, -inf, inf, 3, 40), k=20, common_rows=True))
    found.append(Comparison.of("first_contact", "zero steps", Interval(nan, -inf, inf, 0, 0), k=20, common_rows=True))
    return tuple(found)


def night(**changes: object) -> NightReport:
    """A whole night as MovieLens might give it."""
    nightly = {"candidate": figures(0.5911, 0.021, 0.719)} | {
        name: figures(*values) for name, values in METHODS.items()
    }
    report = NightReport(
        pipeline="movielens",
        night="1998-03-27",
        release="3fa94c1d" * 8,
        parent="b0e7712c" * 8,
        champion="b0e7712c" * 8,
        go=True,
        decided_by="promote_if_not_worse",
        reasons=(
            "against champion: -0.0014 [-0.0274, +0.0246] over 318 users and 12,904 rows, "
            "upper bound above the margin 0.005",
            "against zero steps: -0.0163 [-0.0383, +0.0057] over 318 users and 12,904 rows, "
            "upper bound above the margin 0.005",
            "go: unsure, but no point estimate is above zero",
        ),
        intake=facts.Intake(
            files=(facts.InputFile("interactions/night=1998-03-27/part-0.parquet", 48_211, 2151, "9d" * 32),),
            rows=2151,
            clean=2143,
            bad=8,
            limit=0.01,
            reasons={"range:age": 5, "duplicate": 2, "null:movie_id": 1},
            examples=({"user_id": 17, "movie_id": None, "age": 31}, {"user_id": 4, "movie_id": 50, "age": 212}),
            expectations=(
                facts.Expectation("expect_table_row_count_to_be_between", True, "2151"),
                facts.Expectation("expect_column_values_to_not_be_null(movie_id)", False, "1 of 2151"),
            ),
            data_docs="data_docs/index.html",
        ),
        history=(
            *(facts.HistoryNight(f"1998-03-{day:02}", 1500 + 31 * day) for day in range(1, 26)),
            facts.HistoryNight("1998-03-26", None, "SchemaBroken: column age is string, the contract says int64"),
        ),
        curve=tuple(
            facts.Epoch(e, 0.69 - 0.1 * (1 - 0.9**e), 0.695 - 0.085 * (1 - 0.86**e) + 0.00006 * e**2) for e in range(30)
        ),
        best_epoch=17,
        objectives=(
            facts.ObjectiveExams(
                "liked", "log-loss", nightly, dict.fromkeys((0, 5, 20), nightly), comparisons(), margin=0.005
            ),
        ),
        adapters=facts.Adapters(
            levels=(
                facts.LadderLevel("user_id", 541, 498, 12, 640, 61_752, 417.25),
                facts.LadderLevel("occupation × age_band", 96, 88, 0, 1433),
                facts.LadderLevel("base", 1, 1, 0, 70),
            ),
            support=(("1", 14), ("2–5", 31), ("6–10", 52), ("11–20", 96), ("21–50", 182), ("51–100", 87), ("101+", 36)),
            tested=(
                {
                    "level": 0,
                    "tested": "support 1 to 5",
                    "rows": 301,
                    "estimate": 0.031,
                    "shrunk": None,
                    "p": 0.004,
                    "harmful": True,
                    "segments": 12,
                },
                {
                    "level": 0,
                    "tested": "405",
                    "rows": 122,
                    "estimate": -0.011,
                    "shrunk": -0.004,
                    "p": 0.81,
                    "harmful": False,
                    "segments": 1,
                },
            ),
        ),
        published=(
            facts.PublishedFile("model.onnx", 212_004, "aa" * 32, False),
            facts.PublishedFile("base.bin", 1_204_224, "bb" * 32, True),
            facts.PublishedFile("bank.bin", 40_128, "cc" * 32, False),
        ),
        steps=(
            facts.TimedStep("ingest", 0.3, 210, True),
            facts.TimedStep("validate", 2.9, 480, True),
            facts.TimedStep("prepare", 3.1, 512, False),
            facts.TimedStep("meta_train", 14.2, 804, False),
            facts.TimedStep("adapt", 1.1, 804, False),
            facts.TimedStep("evaluate", 4.4, 820, False),
            facts.TimedStep("export", 3.0, 911, False),
            facts.TimedStep("publish", 0.4, 911, False),
        ),
        alarms=(
            (
                "vanished",
                "of 12 occupation × age_band segments with 100 rows or more in the previous exam, 1 have none tonight",
            ),
        ),
        retention=facts.Retention(
            "after 5 rows +0.0004 [-0.0021, +0.0030] against the parent, on 2 golden nights",
            tuple(
                Comparison.of("golden", method, Interval(0.0004, -0.0021, 0.003, 44, 1800), k=k, nights=2)
                for k in (0, 5)
                for method in ("parent", "zero steps")
            ),
            (("1998-01-09", Comparison.of("golden", "parent", Interval(0.0127, -inf, inf, 4, 77), k=0)),),
            0.005,
        ),
        worth=facts.Worth(
            nights=7,
            steps=(
                Step("liked", "user_id", 1, 1, 40, 120, 0.004, -0.002, 0.01),
                Step("liked", "user_id", 64, None, 9, 300, -0.02, -0.03, -0.01),
            ),
            lifts=(
                Summary(
                    *("liked", "user_id", 49, 420, -0.011, 12, 1),
                    best=(Served("liked", "user_id", "a single one", 30, -0.09, -0.05, 0.01),),
                    worst=(Served("liked", "user_id", "a single one", 22, 0.07, 0.03, 0.02),),
                ),
            ),
            costs=(
                Cost("liked", "user_id", "log-loss", 7, 3486, 432_264, 2920.0, "cpu", 420, 4.6, -0.011, -0.02, -0.002),
                Cost("liked", "job", "log-loss", 7, 616, 76_384, 300.0, "cpu", 90, None, 0.001, -0.02, 0.02),
            ),
            varieties=(
                Variety("liked", "adapted", "1998-03-27", 61, 1500, 10, 0.21, 0.9, 0.8, 0.7),
                Variety("liked", "adapted", "pooled", 61, 1500, 10, 0.21, 0.9, 0.8, 0.7),
                Variety("liked", "popularity", "1998-03-27", 61, 1500, 10, 0.01, 0.99, None, None),
                Variety("liked", "popularity", "pooled", 61, 1500, 10, 0.01, 0.99, None, None),
            ),
        ),
        provenance={"commit": "1f2e3d4", "torch": "2.13.0", "device": "cpu", "seed": "0"},
    )
    return dataclasses.replace(report, **changes)


HOSTILE = "</style></td><script>alert(1)</script><img src=x onerror='alert(2)'>\"&\x00\u202e\ud800"
VOID = {"meta", "line", "rect", "circle", "polyline"}


class Page(HTMLParser):
    """Reads a page, insists that elements nest, and keeps what could do harm."""

    def __init__(self, markup: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.words: list[str] = []
        self.feed(markup)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in VOID
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def hostile(value):
    """The same facts with every string replaced or extended by a hostile one."""
    if isinstance(value, str):
        return value if value in ("nightly", "first_contact", "pooled") else value + HOSTILE
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(
            value, **{f.name: hostile(getattr(value, f.name)) for f in dataclasses.fields(value) if f.name != "tested"}
        )
    if isinstance(value, dict):
        return {
            hostile(key) if key not in ("candidate", "log_loss") else key: hostile(item) for key, item in value.items()
        }
    return tuple(hostile(item) for item in value) if isinstance(value, tuple) else value


def harm(page: Page) -> list[object]:
    tags = [tag for tag in page.tags if tag in ("script", "img", "iframe", "object", "embed", "link", "form", "base")]
    fetched = [
        a for a in page.attributes if a[1] in ("src", "srcset", "action", "data", "xlink:href") or a[1].startswith("on")
    ]
    return tags + fetched


def test_the_page_nests_and_says_what_a_person_asks():
    page = Page(render(night()))
    words = " ".join(page.words)
    for said in (
        "movielens · 1998-03-27",
        "Go: unsure, decided by point estimates",
        "unsure, but no point estimate is above zero",
        "Alarms: 1",
        "vanished",
        "2,151 rows: 2,143 clean, 8 to quarantine (0.37%, limit 1.00%).",
        "range:age",
        "5 rows",
        "SchemaBroken: column age is string",
        "Learning curve",
        "occupation × age_band",
        "51–100",
        "640 61.8 kB 417.2 occupation",
        "1,433 – – base",
        "model.onnx",
        "shared",
        "meta_train",
        "14.2 s · 804 MiB",
        "0.3 s · 210 MiB · reused",
        "too few to tell",
        "no rows",
        "torch 2.13.0",
        "What is retained",
        "on 2 golden nights",
        "1998-01-09 4 77 0.0127 – –",
        "Of 7 nightly exams, tonight's included",
        "user_id: own weights pay from 64 support rows on",
        "12 of 49 segments are better off, 1 worse; -0.0110 on average, 0.0800 between the best and the worst served",
        "a single one 30 -0.0900 -0.0500 0.0100",
        "user_id: 498 adapters a night, 124 B and 0.84 ms each; gain of 0.0110 per row served",
        "adapted 0.2100 0.9000 0.8000 0.7000",
        "popularity 0.0100 0.9900 – –",
    ):
        assert said in words
    for k in (0, 5, 20):
        assert f"k = {k}" in words


def test_every_method_has_an_interval_in_every_exam():
    page = Page(render(night()))
    told = [value for tag, name, value in page.attributes if tag == "svg" and name == "aria-label"]
    for method in METHODS:
        assert sum(value.startswith(f"against {method}:") for value in told) >= 4
    assert (
        "against global rate: −0.0931 [−0.0991, −0.0871], better, 318 users, 12,904 rows, pooled over 7 nights" in told
    )


def test_the_page_fetches_nothing_and_runs_nothing():
    markup = render(night())
    page = Page(markup)
    assert harm(page) == []
    assert "url(" not in markup
    assert "@import" not in markup
    assert "http" not in markup.replace("http-equiv", "")
    assert (
        "meta",
        "content",
        "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'",
    ) in page.attributes


def test_hostile_names_stay_text():
    markup = render(hostile(night()))
    page = Page(markup)
    assert harm(page) == []
    assert "<script" not in markup
    assert sorted(set(page.tags)) == sorted(set(Page(render(night())).tags) - {"a"})
    assert "<script>alert(1)</script>" in " ".join(page.words)
    markup.encode()
    assert "\x00" not in markup


@pytest.mark.parametrize(
    "link",
    ["javascript:alert(1)", "//evil.example/x", "https://evil.example", "/etc/passwd", "../../x", "a/../../b", "a b"],
)
def test_a_link_that_leaves_the_report_is_text(link):
    report = night()
    page = Page(render(night(intake=dataclasses.replace(report.intake, data_docs=link))))
    assert "a" not in page.tags
    assert link in page.words


def test_a_name_of_a_million_letters_is_cut():
    report = render(night(pipeline="x" * 1_000_000))
    assert "x" * (LONGEST + 1) not in " ".join(Page(report).words)


def test_light_dark_and_phone_are_provided_for():
    markup = render(night())
    assert "prefers-color-scheme:dark" in markup
    assert "width=device-width" in markup
    assert "max-width:780px" in markup


def test_a_held_night_with_nothing_in_it_renders():
    report = night(
        release=None,
        parent=None,
        champion=None,
        go=False,
        decided_by="hold",
        reasons=(),
        alarms=(),
        history=(),
        curve=(),
        best_epoch=None,
        objectives=(facts.ObjectiveExams("liked", "log-loss", {}, {}, ()),),
        published=(),
        steps=(),
        provenance={},
        adapters=facts.Adapters((), ()),
        intake=facts.Intake((), 0, 0, 0, 0.01, {}, (), ()),
    )
    words = " ".join(Page(render(report)).words)
    for said in ("Held: unsure, set to hold", "No epoch was trained.", "Nothing.", "release none"):
        assert said in words
    assert "Alarms" not in words


def test_the_same_facts_give_the_same_page():
    assert render(night()) == render(night())


def test_the_facts_are_json():
    facts_as_json = json.dumps(dataclasses.asdict(night()), allow_nan=False)
    assert json.loads(facts_as_json)["objectives"][0]["comparisons"][0]["method"] == "global rate"


def test_an_objective_of_ratings_leads_with_its_own_figure():
    rating = {"candidate": {"rows": 10, "mae": 0.7, "rmse": 0.9}, "popularity": {"rows": 10, "mae": 0.8, "rmse": 1.0}}
    page = Page(render(night(objectives=(facts.ObjectiveExams("rating", "squared error", rating, {}, ()),))))
    assert {"RMSE tonight, rating", "0.9000", "best other 1.0000 (popularity)"} <= set(page.words)


@pytest.mark.parametrize(
    ("low", "high", "tone"),
    [
        (-0.2, -0.1, "better"),
        (-0.2, 0.0, "unclear"),
        (0.0, 0.1, "unclear"),
        (0.1, 0.2, "worse"),
        (None, None, "unclear"),
    ],
)
def test_the_tone_of_an_interval_is_where_all_of_it_lies(low, high, tone):
    assert Whisker("other", 0.0, low, high, "").tone == tone


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0), (-1e-9, 1e-9), (-1e6, 3.0), (0.0, 0.07), (-0.3, 0.1)])
def test_ticks_enclose_their_range_with_few_round_numbers(low, high):
    marks = charts.ticks(low, high)
    assert marks[0] <= low <= high <= marks[-1]
    assert len(marks) <= 8
    assert 0.0 in marks


def test_intervals_are_drawn_where_they_belong():
    markup = charts.intervals([Whisker("other", -0.05, -0.1, 0.1, "")])
    assert 'x1="0.000%" x2="100.000%"' in markup  # the whole scale, from -0.1 to 0.1
    assert 'cx="25.000%"' in markup


def test_a_loss_that_left_the_finite_numbers_leaves_a_gap_in_the_curve():
    markup = charts.curve([(0, 1.0, 1.0), (1, nan, 0.9), (2, 0.8, inf), (3, 0.7, None)], best=1)
    assert markup.count("<polyline") == 3
    assert "nan" not in markup
    assert "inf" not in markup


def test_a_histogram_of_nothing_is_flat():
    assert 'height="0.000%"' in charts.histogram([("1", 0), ("2–5", 0)])


def test_only_markup_enters_unescaped():
    assert el("p", "<b>", text("<i>")) == "<p>&lt;b&gt;&lt;i&gt;</p>"
    assert el("p", title='"><script>') == '<p title="&quot;&gt;&lt;script&gt;"></p>'
