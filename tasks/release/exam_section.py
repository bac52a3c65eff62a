"""The report's picture of both exams of one objective."""

from collections.abc import Mapping, Sequence

from tasks.release.charts import Whisker, intervals
from tasks.release.night import Comparison, Figures, ObjectiveExams, Retention
from tasks.release.page import Child, Markup, el, section, swatch, table

CANDIDATE = "candidate"
"""The method that is tonight's."""
COUNTS = frozenset({"rows", "users", "auc_users", "ndcg_users"})
"""Figures that are counts."""
_WORDS = {
    "log_loss": "log-loss", "calibration_error": "calibration", "auc": "AUC per user", "ndcg_at_10": "NDCG@10",
    "f1": "F1", "mae": "MAE", "rmse": "RMSE", "auc_users": "AUC users", "ndcg_users": "NDCG users",
}  # fmt: skip


def headline(exams: ObjectiveExams) -> tuple[str, str, str] | None:
    """The candidate's leading figure beside the best other method's."""
    figure = "log_loss" if "log_loss" in exams.nightly.get(CANDIDATE, {}) else "rmse"
    found = {name: value for name, figures in exams.nightly.items() if (value := figures.get(figure)) is not None}
    mine = found.pop(CANDIDATE, None)
    if mine is None:
        return None
    rival = min(found, key=lambda name: found[name], default=None)
    note = "no baseline" if rival is None else f"best other {found[rival]:.4f} ({rival})"
    return f"{mine:.4f}", f"{_WORDS[figure]} tonight, {exams.objective}", note


def exam_section(exams: ObjectiveExams) -> Markup:
    """Nightly and first contact: interval plots against every method, and all figures."""
    nightly = [c for c in exams.comparisons if c.exam == "nightly"]
    contact = [c for c in exams.comparisons if c.exam == "first_contact"]
    parts: list[Child] = [
        el(
            "div",
            swatch("better: the interval is wholly below zero", "--good"),
            swatch("unclear", "--dim"),
            swatch("worse", "--bad"),
            *([swatch(f"dashed: the gate's margin {exams.margin:g}", "--warn")] if exams.margin is not None else []),
            class_="key",
        )
    ]
    if nightly:
        parts += [
            el("h3", "Nightly: adapters from earlier nights, all of the night as query"),
            _plot(nightly, exams.margin),
        ]
    parts += [_figures(exams.nightly, open_=True) if exams.nightly else None]
    for k in sorted({c.k or 0 for c in contact} | set(exams.first_contact)):
        title = f"First contact, k = {k}: also adapted on each user's first {k} rows of the night"
        parts.append(el("h3", title if k else "First contact, k = 0: adapted on earlier nights only"))
        for common, words in ((False, None), (True, "The same, on the rows after the 20th only:")):
            if chosen := [c for c in contact if (c.k or 0) == k and c.common_rows is common]:
                parts += [el("p", words, class_="soft") if words else None, _plot(chosen, None)]
        if k in exams.first_contact:
            parts.append(_figures(exams.first_contact[k], open_=False))
    return section(
        f"Exams: {exams.objective}",
        f"Difference in {exams.loss} per row, candidate minus the other, with 95 % intervals bootstrapped by user.",
        *parts,
    )


def retention_section(retention: Retention) -> Markup:
    """Golden nights: what the base still knows of what its parent knew."""
    parts: list[Child] = [el("p", retention.told)]
    for k in sorted({c.k or 0 for c in retention.comparisons}):
        parts.append(el("h3", f"After {k} rows of the golden night" if k else "Adapted on the nights before only"))
        parts.append(_plot([c for c in retention.comparisons if (c.k or 0) == k], retention.margin))
    rows = [
        (
            night,
            f"{c.users:,}",
            f"{c.rows:,}",
            _figure("estimate", c.estimate),
            _figure("low", c.low),
            _figure("high", c.high),
        )
        for night, c in retention.nights
    ]
    if rows:
        headers = ("golden night", "users", "rows", "minus parent", "low", "high")
        parts.append(el("details", el("summary", "Each golden night, k = 0"), table(headers, rows, 5)))
    return section(
        "What is retained",
        "Difference in loss per row on earlier nights, tonight's base minus the one that it started from. Both may "
        "have trained on these rows: it says what is still known, not how good the base is, and the gate does not "
        "read it.",
        *parts,
    )


def _plot(comparisons: Sequence[Comparison], margin: float | None) -> Markup:
    notes = sorted(
        {
            f"{c.users:,} users, {c.rows:,} rows, {c.nights} {'night' if c.nights == 1 else 'nights'}"
            for c in comparisons
        }
    )
    whiskers = [
        Whisker(
            c.method, c.estimate, c.low, c.high, f"{c.users:,} users, {c.rows:,} rows, pooled over {c.nights} nights"
        )
        for c in comparisons
    ]
    return el("div", intervals(whiskers, margin), el("small", "; ".join(notes[:3])))


def _figures(methods: Mapping[str, Figures], open_: bool) -> Markup:
    names = list(dict.fromkeys(name for figures in methods.values() for name in figures))
    rows = [(method, *(_figure(name, figures.get(name)) for name in names)) for method, figures in methods.items()]
    shown = table(("method", *(_WORDS.get(name, name) for name in names)), rows, len(names), CANDIDATE)
    return shown if open_ else el("details", el("summary", "All figures"), shown)


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if name in COUNTS else f"{value:.4f}"
