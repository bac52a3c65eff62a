"""A replay's page: every method over all of its nights, night by night, and by whose rows they are."""

from collections.abc import Iterable, Sequence

from tasks.release.charts import Whisker, intervals, lines
from tasks.release.cost import Cost
from tasks.release.earned import Step
from tasks.release.lift import Summary
from tasks.release.page import Child, Markup, el, page, section, table
from tasks.release.slices import ADAPTED, BY_NOVELTY, BY_SUPPORT, COMMON_ROWS, EVERYTHING, POOLED, Line
from tasks.release.variety import Variety
from tasks.release.worth_section import cost_section, earned_section, key, lift_section, variety_section

EXAMS = {
    "nightly": "Nightly: adapters from earlier nights, all of the night as query",
    "contact 5": "First contact, 5 rows: also adapted on each user's first 5 rows of the night",
    "contact 20": "First contact, 20 rows: also adapted on each user's first 20 rows of the night",
}
"""The exams that are shown, with what they ask."""
_APART = "adapted − it, 95 %"
_HEADERS = ("method", "rows", "users", "loss", _APART, "calibration", "AUC", _APART, "NDCG@10", _APART)


def render(
    pipeline: str,
    start: str,
    found: Sequence[Line],
    earned: Sequence[Step],
    lifts: Sequence[Summary],
    costs: Sequence[Cost],
    varieties: Sequence[Variety],
    left_out: Sequence[tuple[str, str]],
    seed: int,
) -> str:
    """The page: inline styles and SVG, light and dark, no script; every text is escaped.

    Args:
        pipeline: its name.
        start: what the first night started from, in words.
        found: lines of every exam.
        earned: what own weights are worth by support, of every level.
        lifts: what they are worth to the segments, of every level.
        costs: what they cost for it, of every level.
        varieties: what each method's ranked lists are like.
        left_out: nights that were not examined, with the reason.
        seed: of the bootstrap.
    """
    nights = list(dict.fromkeys(line.night for line in found if line.night != POOLED))
    objectives = list(dict.fromkeys(line.objective for line in found))
    counted = f"{len(nights):,} {'night' if len(nights) == 1 else 'nights'}"
    return page(
        f"{pipeline}, replay of {nights[0]} to {nights[-1]}",
        el("div", "nightrank · replay", class_="eyebrow"),
        el("h1", f"{pipeline} · {nights[0]} to {nights[-1]}"),
        el("p", f"{counted}, each started from the one before; {start}. Nothing was published.", class_="soft"),
        *(_exams(name, nights, [line for line in found if line.objective == name]) for name in objectives),
        *(_slices(name, [line for line in found if line.objective == name]) for name in objectives),
        *(earned_section(name, [step for step in earned if step.objective == name]) for name in objectives),
        *(lift_section(name, [one for one in lifts if one.objective == name], earned) for name in objectives),
        *(cost_section(name, costs) for name in objectives),
        *(variety_section(name, varieties, found) for name in objectives),
        _nights(found, nights, left_out),
        el("footer", f"95 % intervals, bootstrapped by user with seed {seed}"),
    )


def _exams(objective: str, nights: Sequence[str], found: Sequence[Line]) -> Markup:
    """Each exam pooled, and its loss night by night."""
    parts: list[Child] = [key()]
    for exam, words in EXAMS.items():
        mine = [line for line in found if line.exam == exam and line.slice == EVERYTHING]
        pooled = [line for line in mine if line.night == POOLED]
        if not pooled:
            continue
        by_night = {(line.method, line.night): line for line in mine}
        series = {
            name: [line.loss if (line := by_night.get((name, night))) else None for night in nights]
            for name in dict.fromkeys(line.method for line in pooled)
        }
        parts += [
            el("h3", words),
            _plot(pooled),
            _figures(pooled),
            el("p", f"{_loss(pooled)} by night:", class_="soft"),
        ]
        parts.append(lines(nights, series, marked=ADAPTED))
        each = ((night, [line for line in mine if line.night == night]) for night in nights)
        told = (_slice(night, rows) for night, rows in each if rows)
        parts.append(el("details", el("summary", "Each night, every method"), *told))
    ranked = (
        " AUC and NDCG@10 are means over users' nights; their differences are paired by user's night, and above zero "
        "adapted ranks better."
        if found[0].log_loss is not None
        else ""
    )
    return section(
        f"Exams: {objective}",
        f"Difference in {_unit(found)} per row, adapted minus the other, pooled over the nights.{ranked}",
        *parts,
    )


def _slices(objective: str, found: Sequence[Line]) -> Markup:
    """Each exam pooled, by whose rows they are."""
    parts: list[Child] = [key()]
    groups = (
        ("by support rows of the user", (*BY_SUPPORT, COMMON_ROWS)),
        ("by who and what is new", tuple(BY_NOVELTY)),
    )
    for exam, words in EXAMS.items():
        for group, names in groups:
            parts.append(el("h3", f"{words.partition(':')[0]}, {group}"))
            for name in names:
                rows = [line for line in found if (line.exam, line.slice, line.night) == (exam, name, POOLED)]
                parts.append(_slice(name, rows) if rows else el("p", f"{name}: no rows", class_="soft"))
    lead = "A row's support is the user's earlier rows in the window and those given of the night. New is who or what "
    return section(f"Whose rows: {objective}", f"{lead}has no row on an earlier night of the window.", *parts)


def _slice(name: str, rows: Sequence[Line]) -> Markup:
    own = next(line for line in rows if line.method == ADAPTED)
    told = f"{name}: {own.rows:,} rows of {own.users:,} users, adapted {own.loss:.4f}"
    return el("details", el("summary", told), _plot(rows), _figures(rows))


def _plot(rows: Sequence[Line]) -> Markup:
    return intervals(
        [
            Whisker(line.method, line.difference, line.low, line.high, f"{line.users:,} users, {line.rows:,} rows")
            for line in rows
            if line.method != ADAPTED
        ]
    )


def _figures(rows: Sequence[Line]) -> Markup:
    ordered = sorted(rows, key=lambda line: (line.method != ADAPTED, line.loss))
    return table(_HEADERS, (_cells(line) for line in ordered), len(_HEADERS) - 1, ADAPTED)


def _cells(line: Line) -> tuple[str, ...]:
    given = (line.calibration, line.auc, line.ndcg)
    calibration, auc, ndcg = ("–" if value is None else f"{value:.4f}" for value in given)
    figures = (f"{line.loss:.4f}", line.apart, calibration, auc, line.auc_apart, ndcg, line.ndcg_apart)
    return (line.method, f"{line.rows:,}", f"{line.users:,}", *figures)


def _nights(found: Sequence[Line], nights: Sequence[str], left_out: Iterable[tuple[str, str]]) -> Markup:
    lead = next(line.objective for line in found)
    own = {
        line.night: line
        for line in found
        if (line.exam, line.slice, line.method, line.objective) == ("nightly", EVERYTHING, ADAPTED, lead)
    }
    rows = [(night, f"{own[night].rows:,}", f"{own[night].users:,}") for night in nights if night in own]
    parts: list[Child] = [table(("night", "rows", "users"), rows, 2)]
    missing = list(left_out)
    if missing:
        parts.append(el("details", el("summary", f"{len(missing):,} left out"), table(("night", "why"), missing, 0)))
    return section("Nights", f"{len(rows):,} examined, {len(missing):,} left out.", *parts)


def _loss(rows: Sequence[Line]) -> str:
    return "RMSE" if rows[0].log_loss is None else "Log-loss"


def _unit(rows: Sequence[Line]) -> str:
    return "squared error" if rows[0].log_loss is None else "log-loss"
