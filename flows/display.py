"""What a person at a terminal sees: live progress per step, tables at the end, one clear block per error."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich import box
from rich.console import Console, JustifyMethod
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from tasks.errors import NightrankError

if TYPE_CHECKING:  # their modules load Prefect and torch, which a ranked list needs no more than an error does
    from flows.backfill import NightOutcome, PlannedNight
    from flows.nightly import NightResult
    from flows.replay import ReplayedNight
    from tasks.references import ScoreRow
    from tasks.release.cost import Cost
    from tasks.release.earned import Step
    from tasks.release.lift import Summary
    from tasks.release.slices import Line
    from tasks.release.variety import Variety
    from tasks.search import SearchRef
    from tasks.serving.ranker import Ranked


class Screen:
    """Watches steps: a moving line for the one that runs, a still line for each that is done."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<11}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[amount]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._bar: TaskID | None = None

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def started(self, step: str, why: str) -> None:
        """Open the step's bar."""
        self._drop()
        self._console.print(f"[dim]{step:<11} {escape(why)}[/dim]", soft_wrap=True)
        self._bar = self._bars.add_task(step, total=None, amount="")

    def progressed(self, step: str, done: float, total: float | None, unit: str) -> None:
        """Move the step's bar."""
        if self._bar is not None:
            amount = f"{done:,.0f} {unit}" if total is None else f"{done:,.0f} of {total:,.0f} {unit}"
            self._bars.update(self._bar, completed=done, total=total, amount=escape(amount))

    def finished(self, step: str, reused: bool, seconds: float) -> None:
        """Close the step's bar."""
        self._drop()
        self._console.print(f"{step:<11} [dim]reused[/dim]" if reused else f"{step:<11} {seconds:.1f} s")

    def _drop(self) -> None:
        if self._bar is not None:
            self._bars.remove_task(self._bar)
            self._bar = None


class BackfillScreen:
    """Shows the plan, then one line per night."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.outcomes: list[NightOutcome] = []

    def __call__(self, event: "tuple[PlannedNight, ...] | NightOutcome") -> None:
        """Print the plan, or the line of a night."""
        if not isinstance(event, tuple):
            self.outcomes.append(event)
            self._console.print(f"[bold]{event.night}[/bold] {event.state}: {escape(event.why)}", soft_wrap=True)
            return
        title = f"plan: {sum(entry.runs for entry in event)} of {len(event)} nights to run"
        table = table_of(title, ("night", "", "why"), folds="why")
        for entry in event:
            table.add_row(str(entry.night), "runs" if entry.runs else "skipped", escape(entry.why))
        self._console.print(table)


class ReplayScreen:
    """One line per replayed night."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __call__(self, place: int, of: int, outcome: "ReplayedNight") -> None:
        """Print the line of a night."""
        shown = f"[bold]{outcome.night}[/bold] {outcome.state} ({place} of {of}): {escape(outcome.why)}"
        self._console.print(shown, soft_wrap=True)


@contextmanager
def errors_to(console: Console) -> Iterator[None]:
    """Print an error of our family as one block and leave with exit code 2, and on Ctrl-C with a line and 130."""
    try:
        yield
    except NightrankError as error:
        again = "[dim]Trying again later can help.[/dim]" if error.transient else ""
        console.print(f"[bold red]{type(error).__name__}[/bold red]\n{escape(str(error))}", soft_wrap=True)
        if again:
            console.print(again)
        sys.exit(2)
    except KeyboardInterrupt:
        console.print("stopped; what was finished is kept, and the same command goes on from there")
        sys.exit(130)


def show_night(console: Console, result: "NightResult") -> None:
    """The table at the end of a night."""
    from tasks.release.signing import UNSIGNED

    console.print(_score_table(f"night {result.night}", result.verdict.scores))
    rejected = f", {result.validated.bad:,} in quarantine" if result.validated.bad else ""
    left_out = f", {len(result.prepared.left_out)} left out" if result.prepared.left_out else ""
    history = f"history {len(result.prepared.nights)} nights{left_out}"
    console.print(f"rows      {result.validated.clean:,} clean{rejected}; {history}")
    console.print(f"retained  {escape(result.retention.told)}", soft_wrap=True)
    for alarm in result.verdict.alarms:
        console.print(f"[bold yellow]alarm[/bold yellow]     {escape(alarm)}", soft_wrap=True)
    console.print(f"gate      {'go' if result.verdict.go else 'hold'}, {escape(result.verdict.decided_by)}")
    console.print(f"release   {result.published.release}")
    champion = "yes" if result.published.promoted else "no"
    console.print(f"champion  {champion}: {escape(result.published.why)}", soft_wrap=True)
    signed = result.published.signed_by
    told = f"by key {signed}" if signed else f"[bold yellow]{escape(UNSIGNED)}[/bold yellow]"
    console.print(f"signed    {told}", soft_wrap=True)
    console.print(f"report    {escape(result.published.report)}", soft_wrap=True)


def show_backfill(console: Console, outcomes: Sequence["NightOutcome"]) -> None:
    """The summary at the end of a backfill."""
    headings = ("night", "state", "rows", "loss", "AUC", "best baseline", "gate", "release")
    table = table_of("backfill", headings, numbers=("rows", "loss", "AUC"), folds="best baseline")
    for outcome in outcomes:
        if outcome.result is None:
            table.add_row(str(outcome.night), outcome.state)
            continue
        nightly = [row for row in outcome.result.verdict.scores if row.exam == "nightly"]
        own = next((row for row in nightly if row.method == "adapted"), None)
        others = [row for row in nightly if row.method not in ("adapted", "champion")]
        best = min(others, key=lambda row: row.log_loss, default=None)
        table.add_row(
            str(outcome.night),
            "promoted" if outcome.result.published.promoted else outcome.state,
            f"{outcome.result.validated.clean:,}",
            number(own.log_loss if own else None),
            number(own.auc if own else None),
            f"{number(best.log_loss)} {escape(best.method)}" if best else "",
            "go" if outcome.result.verdict.go else "hold",
            outcome.result.published.release[:12],
        )
    console.print(table)


def show_replay(
    console: Console,
    lines: Sequence["Line"],
    steps: Sequence["Step"],
    lifts: Sequence["Summary"],
    costs: Sequence["Cost"],
    varieties: Sequence["Variety"],
    written: Sequence[str],
    per_night: bool = False,
) -> None:
    """The end of a replay: night by night, in a line each or with `per_night` every method of each; then pooled.

    Pooled is every method on all rows, the candidate on each slice, whom own weights pay at what cost, and what each
    method would have shown to some of the users. What sums up comes last, where a person at a terminal looks first.
    """
    from tasks.release.earned import in_words
    from tasks.release.lift import TOO_FEW
    from tasks.release.replay_page import EXAMS
    from tasks.release.slices import ADAPTED, EVERYTHING, POOLED, SLICES

    nights = len({line.night for line in lines} - {POOLED})
    for objective in dict.fromkeys(line.objective for line in lines):
        for exam in EXAMS:
            whole = [line for line in lines if (line.objective, line.exam, line.slice) == (objective, exam, EVERYTHING)]
            _show_nights(console, f"{exam}, {objective}", whole, per_night)
        for exam in EXAMS:
            mine = [line for line in lines if (line.objective, line.exam, line.night) == (objective, exam, POOLED)]
            if not mine:
                console.print(f"{exam}, {objective}: no rows")
                continue
            whole = [line for line in mine if line.slice == EVERYTHING]
            _show_methods(console, f"{exam}, {objective}, {nights} nights", whole)
            headings = ("slice", "rows", "loss", "best other", "adapted minus it, 95 %")
            table = table_of(f"{exam}, {objective}, adapted by slice", headings, headings[1:3], folds="best other")
            for name in SLICES[1:]:
                rows = {line.method: line for line in mine if line.slice == name}
                if (own := rows.pop(ADAPTED, None)) is not None:
                    best = min(rows.values(), key=lambda line: line.loss, default=own)
                    table.add_row(name, f"{own.rows:,}", number(own.loss), escape(best.method), best.apart)
            console.print(table)
        for level in dict.fromkeys(step.level for step in steps if step.objective == objective):
            curve = [step for step in steps if (step.objective, step.level) == (objective, level)]
            console.print(f"{escape(level)}, {objective}: {in_words(curve)}")
            gained = next((one for one in lifts if (one.objective, one.level) == (objective, level)), None)
            console.print(f"{escape(level)}, {objective}: {TOO_FEW if gained is None else gained.in_words()}")
        for paid in costs:
            if paid.objective == objective:
                console.print(f"{escape(paid.level)}, {objective}: {escape(paid.in_words())}")
        _show_variety(console, [one for one in varieties if (one.objective, one.night) == (objective, POOLED)], nights)
    for path in written:
        console.print(escape(path), soft_wrap=True)


def _show_nights(console: Console, exam: str, lines: Sequence["Line"], every: bool) -> None:
    """Each night of an exam: against zero steps and the method that is the best of all nights, or against every one."""
    from tasks.learning.exams import ZERO_STEPS
    from tasks.release.slices import ADAPTED, POOLED

    nights: dict[str, dict[str, Line]] = {}
    for line in lines:
        nights.setdefault(line.night, {})[line.method] = line
    pooled = nights.pop(POOLED, {})
    others = [line for method, line in pooled.items() if method not in (ADAPTED, ZERO_STEPS)]
    if every or not others:
        for night, methods in nights.items():
            _show_methods(console, f"{exam}, {night}", list(methods.values()))
        return
    best = min(others, key=lambda line: line.loss).method
    heads = ("night", "rows", "loss", "minus zero steps, 95 %", "minus the best other, 95 %")
    title = f"{exam}, adapted night by night; the best other of all nights is {escape(best)}"
    table = table_of(title, heads, heads[1:], folds="rows")
    table.padding, table.show_edge = 0, False  # two intervals side by side leave no room for more on 80 columns
    for night, methods in nights.items():
        own = methods[ADAPTED]
        gaps = (methods[name].apart if name in methods else "" for name in (ZERO_STEPS, best))
        table.add_row(night, f"{own.rows:,}", number(own.loss), *gaps)
    console.print(table)


def _show_methods(console: Console, title: str, lines: Sequence["Line"]) -> None:
    """Every method on the same rows: its loss, and where rows are ranked how it orders a user's list."""
    from tasks.release.slices import ADAPTED

    apart = "adapted minus it, 95 %"
    loss = table_of(title, ("method", "rows", "loss", apart), ("rows", "loss", apart), folds="method")
    ranking = table_of(None, ("method", "AUC", apart, "NDCG@10"), ("AUC", apart, "NDCG@10"), folds="method")
    for line in sorted(lines, key=lambda line: (line.method != ADAPTED, line.loss)):
        name, style = escape(line.method), "bold" if line.method == ADAPTED else None
        loss.add_row(name, f"{line.rows:,}", number(line.loss), line.apart, style=style)
        ranking.add_row(name, number(line.auc), line.auc_apart, number(line.ndcg), style=style)
    console.print(loss)
    if any(line.auc is not None or line.ndcg is not None for line in lines):
        console.print(ranking)


def _show_variety(console: Console, shown: Sequence["Variety"], nights: int) -> None:
    """What each method's lists are like, for one objective; nothing where nothing was ranked."""
    from tasks.release.slices import ADAPTED

    if not shown:
        return
    first = shown[0]
    asked = f"{first.users:,} users, {first.candidates:,} candidates, {nights} nights"
    numbers = ("coverage", "Gini", "personalisation", "diversity")
    table = table_of(f"top {first.length}, {first.objective}, {asked}", ("method", *numbers), numbers, folds="method")
    for one in shown:
        figures = (one.coverage, one.gini, one.personalisation, one.diversity)
        table.add_row(escape(one.method), *map(number, figures), style="bold" if one.method == ADAPTED else None)
    console.print(table)


def show_search(console: Console, found: "SearchRef") -> None:
    """The end of a search: what was tried, what the best is worth where it was not chosen, and its YAML."""
    from flows.config import as_yaml

    table = table_of(f"search, {found.objective}", ("setting", "own", "best"), ("own", "best"), folds="setting")
    for one in found.settings:
        table.add_row(escape(one.name), escape(str(one.own)), escape(str(one.best)))
    console.print(table)
    left_out = f", {len(found.left_out)} left out: {', '.join(found.left_out)}" if found.left_out else ""
    console.print(f"history   {found.history} nights{escape(left_out)}", soft_wrap=True)
    given_up = f", {found.pruned} given up early" if found.pruned else ""
    console.print(
        f"trials    {found.complete} finished{given_up}; remembered in {escape(found.storage)}", soft_wrap=True
    )
    for why in found.refused:
        console.print(f"          given up: {escape(why)}", soft_wrap=True)
    first, last = found.chosen_by
    console.print(
        f"chosen by {first} to {last}: own settings {found.own:.4f}, best {found.best:.4f} "
        "(optimistic: it was chosen by these nights)",
        soft_wrap=True,
    )
    first, last = found.last
    if found.complete == 0:
        console.print("no trial was finished: nothing is known of other settings")
        return
    if found.own_is_best:
        console.print("the config's own settings did best: there is nothing to change")
        return
    numbers = ("rows", "own", "best", "best minus own, 95 %")
    table = table_of(f"{first} to {last}, which nothing was chosen by", ("support", *numbers), numbers, folds="support")
    for line in found.lines:
        bounded = line.low is not None and line.high is not None
        gap = f"{line.difference:+.4f} " + (f"[{line.low:+.4f}, {line.high:+.4f}]" if bounded else "(too few users)")
        name = f"first contact, {line.support} rows" if line.support else "earlier nights"
        table.add_row(name, f"{line.rows:,}", f"{line.own:.4f}", f"{line.best:.4f}", gap)
    console.print(table)
    bounds = [(one.low, one.high) for one in found.lines if one.low is not None and one.high is not None]
    if any(low > 0 for low, _ in bounds):
        console.print("worse on nights that nothing was chosen by: keep the config's own settings, not these:")
    elif any(high < 0 for _, high in bounds):
        console.print("proven better on nights that nothing was chosen by; to be merged into the config:")
    else:
        console.print("not proven on nights that nothing was chosen by; to be merged if there is another reason:")
    console.print(as_yaml({one.name: one.best for one in found.settings}), markup=False, soft_wrap=True, end="")


def show_ranked(console: Console, release: str, night: date, rankings: Sequence[Sequence["Ranked"]]) -> None:
    """The candidates of each request, best first."""
    for place, ranking in enumerate(rankings, start=1):
        title = f"request {place} of {len(rankings)}, release {release[:12]} of night {night}"
        objectives = tuple(ranking[0].scores) if ranking else ()
        console.print(title)
        table = table_of(None, ("", "candidate", *objectives), numbers=("", *objectives), folds="candidate")
        for ranked in ranking:
            table.add_row(str(ranked.position), escape(str(ranked.item)), *map(number, ranked.scores.values()))
        console.print(table)


def _score_table(title: str, scores: Sequence["ScoreRow"]) -> Table:
    numbers = ("rows", "loss", "calib.", "AUC", "NDCG@10")
    table = table_of(title, ("exam", "method", *numbers), numbers, folds="exam")
    last = ""
    for row in scores:
        if last and row.exam != last:
            table.add_section()
        style = "bold" if row.method == "adapted" else None
        shown = (number(value) for value in (row.log_loss, row.calibration, row.auc, row.ndcg))
        exam = "" if row.exam == last else escape(row.exam)
        table.add_row(exam, escape(row.method), f"{row.rows:,}", *shown, style=style)
        last = row.exam
    return table


def table_of(title: str | None, headings: Sequence[str], numbers: Sequence[str] = (), folds: str = "") -> Table:
    """A table that fits a terminal of 80 columns: only the column `folds` goes over several lines."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in headings:
        justify: JustifyMethod = "right" if heading in numbers else "left"
        table.add_column(escape(heading), justify=justify, no_wrap=heading != folds, overflow="fold")
    return table


def number(value: float | None) -> str:
    """A figure as tables show it."""
    return "" if value is None else f"{value:.4f}"
