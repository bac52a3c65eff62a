"""The night's report: one HTML file that opens anywhere, without a network, and still opens in a year."""

import re
from collections.abc import Iterator

from tasks.release.charts import bars, curve, histogram
from tasks.release.exam_section import exam_section, headline, retention_section
from tasks.release.night import Adapters, Intake, NightReport, Worth
from tasks.release.page import Child, Markup, el, page, section, size, swatch, table
from tasks.release.signing import UNSIGNED
from tasks.release.worth_section import cost_section, earned_section, lift_section, variety_section

_OF_TRAINING = ("training", "TensorBoard")
"""What stands beside the learning curve: sentences that would fill the footer."""
_BESIDE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*")


def render(report: NightReport) -> str:
    """The report as a self-contained page: inline styles and SVG, light and dark, no script; every text is escaped."""
    return page(
        f"{report.pipeline}, night {report.night}",
        el("div", "nightrank · nightly report", class_="eyebrow"),
        el("h1", f"{report.pipeline} · {report.night}"),
        _lineage(report),
        _verdict(report),
        _alarms(report),
        _tiles(report),
        *(exam_section(exams) for exams in report.objectives),
        retention_section(report.retention) if report.retention else None,
        section(
            "Learning curve",
            "Loss by epoch on the training episodes, and on later nights held back to stop by.",
            el("div", swatch("training", "--dim"), swatch("stopping; the dot was kept", "--accent"), class_="key"),
            curve([(point.epoch, point.train_loss, point.stop_loss) for point in report.curve], report.best_epoch),
            *(el("p", f"{name}: {told}") for name, told in report.provenance.items() if name in _OF_TRAINING),
        ),
        _adapters(report.adapters),
        *_worth(report.worth),
        _intake(report.intake),
        _history(report),
        _published(report),
        section(
            "Seconds and memory",
            f"{sum(step.seconds for step in report.steps):,.1f} s in all; pale steps were remembered, not repeated.",
            bars(
                [
                    (
                        step.name,
                        step.seconds,
                        f"{step.seconds:,.1f} s · {step.peak_mib:,.0f} MiB{' · reused' * step.reused}",
                        step.reused,
                    )
                    for step in report.steps
                ]
            ),
        ),
        el(
            "footer",
            " · ".join(f"{name} {told}" for name, told in report.provenance.items() if name not in _OF_TRAINING),
        ),
    )


def _lineage(report: NightReport) -> Markup:
    known = (("release", report.release), ("parent", report.parent), ("champion before", report.champion))
    parts: list[Child] = []
    for name, release in known:
        parts += [" · " if parts else None, f"{name} ", el("code", release[:12], title=release) if release else "none"]
    signed = f"signed by key {report.signed_by}" if report.signed_by else None
    if report.release:
        parts += [" · ", signed or el("span", "unsigned", class_="pill bad", title=UNSIGNED)]
    return el("p", *parts, class_="soft")


def _verdict(report: NightReport) -> Markup:
    words = {
        "proven": "shown to be no worse",
        "proven_worse": "shown to be worse",
        "promote_if_not_worse": "unsure, decided by point estimates",
        "hold": "unsure, set to hold",
        "promote": "unsure, set to promote",
        "operator": "decided by an operator",
    }
    title = f"{'Go' if report.go else 'Held'}: {words.get(report.decided_by, report.decided_by)}"
    reasons = el("ul", *(el("li", reason) for reason in report.reasons))
    return el("section", el("h2", title), reasons, class_="verdict go" if report.go else "verdict hold")


def _alarms(report: NightReport) -> Markup | None:
    if not report.alarms:
        return None
    listed = [part for name, message in report.alarms for part in (el("dt", name), el("dd", message))]
    return el("section", el("h2", f"Alarms: {len(report.alarms)}"), el("dl", *listed), class_="alarms", role="alert")


def _tiles(report: NightReport) -> Markup:
    intake = report.intake
    new = sum(file.bytes for file in report.published if not file.reused)
    tiles = [
        (f"{intake.clean:,}", "clean rows", f"{intake.bad:,} to quarantine"),
        (
            f"{sum(level.adapted for level in report.adapters.levels):,}",
            "adapters",
            f"{len(report.adapters.levels)} levels",
        ),
        (size(sum(file.bytes for file in report.published)), "release", f"{size(new)} new"),
        (
            f"{sum(step.seconds for step in report.steps):,.0f} s",
            "the whole night",
            f"{len(report.history):,} nights of history",
        ),
    ]
    for exams in report.objectives[:1]:
        if best := headline(exams):
            tiles.insert(0, best)
    return el(
        "div",
        *(
            el("div", el("small", name), el("b", value), el("small", note), class_="tile")
            for value, name, note in tiles
        ),
        class_="tiles",
    )


def _adapters(adapters: Adapters) -> Markup:
    levels = [
        (
            level.name,
            f"{level.segments:,}",
            f"{level.adapted:,}",
            f"{level.fallen_back:,}",
            "–" if level.rows is None else f"{level.rows:,}",
            "–" if level.bytes is None else size(level.bytes),
            "–" if level.milliseconds is None else f"{level.milliseconds:,.1f}",
        )
        for level in adapters.levels
    ]
    headers = ("level", "segments", "adapted", "fell back", "rows served", "bank", "milliseconds")
    parts: list[Child] = [table(headers, levels, len(headers) - 1)]
    if adapters.support:
        parts += [el("h3", "Adapters by support rows"), histogram(adapters.support)]
    if adapters.tested:
        rows = [
            (
                f"level {row['level']}",
                str(row["tested"]),
                el("span", "harmful", class_="pill bad") if row["harmful"] else el("span", "ships", class_="pill good"),
                f"{row['rows']:,}",
                f"{row['estimate']:+.4f}",
                "–" if row["shrunk"] is None else f"{row['shrunk']:+.4f}",
                f"{row['p']:.3f}",
                f"{row['segments']:,}",
            )
            for row in adapters.tested
        ]
        of_tests = ("level", "tested", "verdict", "exam rows", "own − parent", "shrunk", "p of no harm", "segments")
        parts.append(el("details", el("summary", "Segments and groups tested for harm"), table(of_tests, rows, 5)))
    return section("Who got which adapter", "A segment without an adapter of its own is served by its parent.", *parts)


def _worth(worth: Worth | None) -> Iterator[Markup | None]:
    if worth is None:
        return
    counted = "tonight's exam" if worth.nights == 1 else f"{worth.nights:,} nightly exams, tonight's included"
    for name in dict.fromkeys(one.objective for one in worth.costs):
        yield section(
            f"What own weights are worth: {name}",
            f"Of {counted}; by the same ones the gate has judged whose own weights fall back.",
        )
        yield earned_section(name, [step for step in worth.steps if step.objective == name])
        yield lift_section(name, [one for one in worth.lifts if one.objective == name], worth.steps)
        yield cost_section(name, worth.costs)
        yield variety_section(name, worth.varieties, ())


def _intake(intake: Intake) -> Markup:
    share = intake.bad / intake.rows if intake.rows else 0.0
    parts: list[Child] = []
    if intake.reasons:
        most = sorted(intake.reasons.items(), key=lambda pair: (-pair[1], pair[0]))
        parts += [
            el("h3", "Rejected, by reason"),
            bars([(code, count, f"{count:,} rows", False) for code, count in most]),
        ]
    if intake.examples:
        columns = list(dict.fromkeys(name for example in intake.examples for name in example))
        rows = [tuple(str(example.get(name, "")) for name in columns) for example in intake.examples]
        parts.append(el("details", el("summary", f"Rejected rows, {len(rows)} examples"), table(columns, rows, 0)))
    failed = sum(not e.success for e in intake.expectations)
    checks = [
        (
            e.name,
            el("span", "met" if e.success else "failed", class_=f"pill {'good' if e.success else 'bad'}"),
            e.observed,
        )
        for e in sorted(intake.expectations, key=lambda e: e.success)
    ]
    summary = f"{len(checks):,} expectations, {failed:,} failed"
    parts.append(el("details", el("summary", summary), table(("expectation", "verdict", "observed"), checks, 1)))
    files = [
        (el("code", f.path), el("code", f.sha256[:12], title=f.sha256), f"{f.rows:,}", size(f.bytes))
        for f in intake.files
    ]
    counted = f"{len(files):,} {'file' if len(files) == 1 else 'files'}, {size(sum(f.bytes for f in intake.files))}"
    parts.append(el("details", el("summary", counted), table(("file", "SHA-256", "rows", "size"), files, 2)))
    if intake.data_docs is not None:
        # A link only if it stays beside the report; anything else is shown and not followed.
        beside = _BESIDE.fullmatch(intake.data_docs)
        docs = el("a", intake.data_docs, href=intake.data_docs) if beside else el("code", intake.data_docs)
        parts.append(el("p", "Data Docs: ", docs))
    kept = f"{intake.rows:,} rows: {intake.clean:,} clean, {intake.bad:,} to quarantine"
    lead = f"{kept} ({share:.2%}, limit {intake.limit:.2%})."
    return section("What came in", lead, *parts)


def _history(report: NightReport) -> Markup:
    used = [night for night in report.history if night.left_out is None]
    left_out = [night for night in report.history if night.left_out is not None]
    parts: list[Child] = []
    if left_out:
        parts.append(table(("left out", "why"), [(night.night, night.left_out) for night in left_out], 0))
    if used:
        rows = [(night.night, "–" if night.rows is None else f"{night.rows:,}") for night in used]
        parts.append(
            el("details", el("summary", f"{len(used):,} nights used"), table(("night", "clean rows"), rows, 1))
        )
    rows_used = sum(night.rows or 0 for night in used)
    return section(
        "History", f"{len(used):,} nights with {rows_used:,} clean rows; {len(left_out):,} left out.", *parts
    )


def _published(report: NightReport) -> Markup:
    if not report.published:
        return section("What was published", "Nothing.")
    rows = [
        (
            el("code", file.name),
            el("code", file.sha256[:12], title=file.sha256),
            el("span", "shared", class_="pill") if file.reused else el("span", "new", class_="pill good"),
            size(file.bytes),
        )
        for file in report.published
    ]
    new = sum(file.bytes for file in report.published if not file.reused)
    lead = f"{len(rows)} files, {size(sum(file.bytes for file in report.published))}, of which {size(new)} new."
    return section("What was published", lead, table(("file", "SHA-256", "blob", "size"), rows, 1))
