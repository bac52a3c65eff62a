"""What a person reads about releases: lists, one of them, two of them, what was checked, moved and removed."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from flows.display import number, table_of

if TYPE_CHECKING:
    from tasks.fallback import FellBack
    from tasks.references import ReleaseRow
    from tasks.release.about import About, Change, Difference
    from tasks.release.garbage import Collected
    from tasks.release.holds import HeldSegment
    from tasks.release.manifest import Pointer
    from tasks.release.manifest_parts import Requires, Variant
    from tasks.release.resigning import Resigned
    from tasks.verify import Check

_SHOWN = 10
"""Lines of a list that may be long."""


def show_releases(console: Console, rows: Sequence["ReleaseRow"]) -> None:
    """The releases of a pipeline, oldest night first."""
    table = table_of(None, ("night", "release", "gate", "is", "parent", "created"), folds="is")
    for row in rows:
        table.add_row(
            "unknown" if row.night is None else str(row.night),
            row.release[:12],
            _gate(row.go),
            ", ".join(row.roles),
            "unknown" if row.created is None else (row.parent or "none")[:12],
            "damaged" if row.created is None else f"{row.created:%Y-%m-%d %H:%M}",
        )
    console.print(table)
    for row in rows:
        for why in row.damaged:
            console.print(f"[bold yellow]damaged[/bold yellow] {row.release[:12]}: {escape(why)}", soft_wrap=True)
    if rows:
        console.print(f"the newest report: {escape(rows[-1].report)}", soft_wrap=True)


def _gate(go: bool | None) -> str:
    return "unknown" if go is None else "go" if go else "hold"


def show_release(console: Console, found: "About", store: str) -> None:
    """One release."""
    alone = "beside no champion" if found.created else "unknown"  # without a time there is no `run.json` to tell
    decided = ", ".join(filter(None, (_gate(found.go), found.decided_by)))
    _lines(
        console,
        {
            "release": found.release,
            "night": f"{found.night}, made {found.created or 'at a time that nothing tells'}",
            "is": ", ".join(found.roles) or "named by no pointer",
            "gate": decided if found.override is None else f"{decided}: {found.override}",
            "parent": found.parent or ("none: it started cold" if found.created else "unknown"),
            "examined": f"beside release {found.compared_with}" if found.compared_with else alone,
            "config": found.config or "unknown",
            "manifest": f"schema version {found.schema_version}",
            "requires": _required(found.requires),
            "signed": found.signed.told,
            "report": f"{store.rstrip('/')}/{found.report}",
        },
    )
    for why in found.damaged:
        console.print(f"[bold yellow]damaged[/bold yellow]   {escape(why)}", soft_wrap=True)
    for move in found.moves:
        when = f"{move.what}, generation {move.generation}, {move.moved_at[:19]}"
        console.print(f"moved     {when}: {escape(move.reason)}", soft_wrap=True)
    table = table_of(f"{len(found.files)} files", ("file", "bytes", "SHA-256"), ("bytes",), folds="file")
    for file in found.files:
        table.add_row(escape(file.name), f"{file.bytes:,}", file.sha256[:12])
    table.add_row("together", f"{found.bytes:,}", "")
    console.print(table)
    _show_segments(console, found)
    _show_variants(console, found.variants)
    inputs = ", ".join(f"{name} ({what})" for name, what in found.inputs.items())
    console.print(f"inputs    {escape(inputs)}", soft_wrap=True)
    for objective, kind in found.objectives.items():
        heads = ("method", "rows", "loss", "AUC", "NDCG@10")
        table = table_of(f"nightly exam, {objective} ({kind})", heads, heads[1:], folds="method")
        for method, figures in found.metrics.get(objective, {}).items():
            rows = figures.get("rows")
            table.add_row(
                escape(method),
                "" if rows is None else f"{rows:,.0f}",
                number(found.loss(objective, method)),
                number(figures.get("auc")),
                number(figures.get("ndcg_at_10")),
            )
        console.print(table)
    for title, told in (("parity", found.parity), ("made by", found.provenance)):
        said = ", ".join(f"{name} {value}" for name, value in told.items())
        console.print(f"{title:<9} {escape(said)}", soft_wrap=True)


def show_difference(console: Console, found: "Difference") -> None:
    """Two releases side by side."""
    before, after = found.before, found.after
    console.print(f"from release {before.release[:12]} of night {before.night}")
    console.print(f"to release   {after.release[:12]} of night {after.night}")
    console.print(f"a ranker that has the first fetches {found.fetched:,} of {after.bytes:,} bytes")
    table = table_of("files that differ", ("file", "before", "after"), ("before", "after"), folds="file")
    for file in found.files:
        if not file.same:
            sizes = ("" if size is None else f"{size:,}" for size in (file.before, file.after))
            table.add_row(escape(file.name), *sizes)
    console.print(table)
    if found.interface:
        console.print("[bold yellow]requests have to change[/bold yellow]")
        for change in found.interface:  # whole, however long
            sides = f"{change.before or 'none'} -> {change.after or 'none'}"
            console.print(f"  {change.name}: {escape(sides)}", soft_wrap=True)
    else:
        console.print("inputs and objectives are the same")
    _show_changes(console, "segments with weights of their own", found.levels)
    heads = ("objective", "method", "before", "after")
    table = table_of("loss in the nightly exam of each, on nights of their own", heads, heads[2:], folds="method")
    for objective, method, then, now in found.losses:
        table.add_row(escape(objective), escape(method), number(then), number(now))
    console.print(table)
    _show_changes(console, "made by", found.provenance)


def show_checks(console: Console, release: str, checks: Sequence["Check"]) -> None:
    """What was looked at about a release."""
    console.print(f"release {release[:12]}")
    for check in checks:
        said = "fine  " if check.fine else "[bold red]FAILED[/bold red]"
        console.print(f"  {check.name:<9} {said} {escape(check.told)}", soft_wrap=True)


def show_pointer(console: Console, pointer: "Pointer") -> None:
    """The pointer after a move."""
    _lines(
        console,
        {
            "champion": f"{pointer.release} of night {pointer.night}",
            "before it": pointer.previous or "none",
            "pointer": f"generation {pointer.generation}, moved {pointer.moved_at[:19]}: {pointer.reason}",
            "rival": "none"
            if pointer.challenger is None
            else f"{pointer.challenger} answers {pointer.share / 100:g} % of the users",
            "held": "no: nights promote" if pointer.hold is None else f"no night promotes: {pointer.hold}",
        },
    )


def show_fallback(console: Console, done: "FellBack") -> None:
    """What became of a segment."""
    if done.held:
        told = "is served by its parent's weights, on nights to come as well"
        again = "is held already, and the champion has no weights of its own for it"
    else:
        told = "has its earlier weights, until the next night solves it anew"
        again = "has these very weights in the champion: no release was made, and the pointer stays"
    console.print(f"segment {escape(done.segment)} {told if done.new else again}", soft_wrap=True)
    if done.ended is not None:
        since = f"{done.ended.since[:16]} by {escape(done.ended.by)}: {escape(done.ended.reason)}"
        console.print(f"its hold  ends, so that nights to come solve it; it was held since {since}", soft_wrap=True)
    if done.variants:
        _show_variants(console, done.variants)
    if failed := [name for name, one in done.variants.items() if one.verdict == "failed"]:
        console.print(
            f"rankers   that insist on {' or '.join(failed)} refuse the new release and keep the one before; with "
            'variant="auto" they take fp32 until the next night',
            soft_wrap=True,
        )
    show_pointer(console, done.pointer)


def show_let_go(console: Console, found: "HeldSegment", left: Sequence["HeldSegment"]) -> None:
    """A segment that is held no longer, and those that are."""
    console.print(f"segment {escape(found.told)} has weights of its own again from the next night on")
    console.print(f"was held  since {found.since[:16]} by {escape(found.by)}: {escape(found.reason)}", soft_wrap=True)
    for one in left:
        console.print(f"held      {escape(one.told)}: {escape(one.reason)}", soft_wrap=True)


def show_signed(console: Console, done: "Resigned") -> None:
    """What was signed, and what was left."""
    console.print(f"key {done.key_id} signs {len(done.new)} releases; {len(done.already)} were signed by it before")
    for release, why in done.refused.items():
        console.print(f"left      {release[:12]}: {escape(why)}", soft_wrap=True)
    left = "there is none" if done.pointer_asked else "left as it is: releases were named, and --pointer was not given"
    told = f"generation {done.pointer.generation}" if done.pointer is not None else left
    console.print(f"pointer   {escape(done.pointer_refused or told)}", soft_wrap=True)


def show_collected(console: Console, done: "Collected", dry_run: bool) -> None:
    """What was removed, marked and kept."""
    found = done.found
    table = table_of("releases that stay", ("release", "because it is"), folds="because it is")
    for release, why in found.kept.items():
        table.add_row(release[:12], escape(", ".join(why)))
    console.print(table)
    would = "would be " if dry_run else ""
    for title, names in (("removed", done.removed), ("marked", done.marked), ("waiting", done.waiting)):
        releases = [name.partition("/")[2] for name in names if name.startswith("releases/")]
        shown = ", ".join(one[:12] for one in releases[:_SHOWN]) + (" ..." if len(releases) > _SHOWN else "")
        counted = f"{len(releases)} releases{': ' if releases else ''}{shown}, {len(names) - len(releases)} blobs"
        freed = f", {done.bytes:,} bytes" if title == "removed" else ""
        console.print(f"{'' if title == 'waiting' else would}{title:<8} {counted}{freed}", soft_wrap=True)
    for release, count in found.torn.items():
        console.print(
            f"[bold yellow]torn[/bold yellow]     release {release[:12]} lacks {count} files; run its night again"
        )
    if done.next is not None:
        console.print(f"next     something is old enough to be removed from {done.next:%Y-%m-%d %H:%M} UTC on")


def _show_segments(console: Console, found: "About") -> None:
    """Who is served by what, level by level; of an older manifest the segments with weights of their own alone."""
    if not found.segments:
        levels = "; ".join(f"{one.name}: {one.segments:,}" for one in found.levels)
        console.print(f"segments with weights of their own: {escape(levels)}", soft_wrap=True)
        return
    heads = ("level", "adapter", "segments", "own", "parent's", "rolled back", "rows each", "changes loss by")
    table = table_of("segments, finest level first: whose weights serve them", heads, heads[2:], folds="level")
    for one in found.segments:
        support, lift = one.support, one.lift
        table.add_row(
            escape(", ".join(one.columns)),
            escape(one.kind),
            *(f"{count:,}" for count in (one.segments, one.own, one.parent, one.rolled_back)),
            "" if support is None else f"{support.median:,.0f}, 9 of 10 below {support.p90:,.0f}",
            "" if lift is None else f"{lift.mean:+.4f} [{lift.low:+.4f}, {lift.high:+.4f}]",
        )
    console.print(table)


def _show_variants(console: Console, variants: "Mapping[str, Variant]") -> None:
    for name, one in variants.items():
        verdict = one.verdict if one.verdict == "passed" else f"[bold yellow]{one.verdict}[/bold yellow]"
        console.print(f"variant   {escape(name)} {verdict}: {escape(one.why)}", soft_wrap=True)
    if not variants:
        console.print("variant   none but fp32")


def _required(requires: "Requires | None") -> str:
    if requires is None:
        return "the manifest does not tell"
    opsets = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in requires.opsets.items())
    return (
        f"onnxruntime {requires.onnxruntime}; operator sets {opsets}; IR {requires.ir_version}, by {requires.producer}"
    )


def _show_changes(console: Console, title: str, changes: Sequence["Change"]) -> None:
    if changes:
        table = table_of(title, ("", "before", "after"), folds="")
        for change in changes:
            sides = ("none" if side is None else side for side in (change.before, change.after))
            table.add_row(
                escape(change.name), *(escape(side if len(side) <= 30 else f"{side[:27]}...") for side in sides)
            )
        console.print(table)


def _lines(console: Console, told: dict[str, str]) -> None:
    for name, what in told.items():
        console.print(f"{name:<9} {escape(what)}", soft_wrap=True)
