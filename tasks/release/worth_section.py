"""What own weights are worth, by support and by segment, what they cost for it, and what each method shows."""

from collections.abc import Sequence

from tasks.release.charts import Whisker, bars, intervals, lines
from tasks.release.cost import Cost
from tasks.release.earned import Step, in_words
from tasks.release.lift import TOO_FEW, Summary
from tasks.release.page import Child, Markup, el, section, size, swatch, table
from tasks.release.slices import ADAPTED, EVERYTHING, POOLED, Line
from tasks.release.variety import Variety


def key() -> Markup:
    """What the colours of intervals mean."""
    tones = (("better: the interval is wholly below zero", "--good"), ("unclear", "--dim"), ("worse", "--bad"))
    return el("div", *(swatch(words, colour) for words, colour in tones), class_="key")


def earned_section(objective: str, steps: Sequence[Step]) -> Markup:
    """The curve of each level, and from where on own weights pay."""
    parts: list[Child] = [key()]
    for level in dict.fromkeys(step.level for step in steps):
        mine = [step for step in steps if step.level == level]
        counted = f"{sum(step.rows for step in mine):,} rows"
        parts += [el("h3", f"{level}: {in_words(mine)}"), el("p", f"Nightly, {counted}.", class_="soft")]
        parts.append(
            intervals(
                [
                    Whisker(
                        step.name, step.difference, step.low, step.high,
                        f"own against the parent's weights, {step.segments:,} segments, {step.rows:,} rows",
                    )
                    for step in mine
                ]
            )
        )  # fmt: skip
    if not steps:
        parts.append(el("p", "No row was served by a segment's own weights.", class_="soft"))
    lead = "Loss per row with a segment's own weights minus its parent's, by the support rows behind the own ones. "
    return section(f"Own weights by support: {objective}", f"{lead}Intervals are bootstrapped by segment.", *parts)


def lift_section(objective: str, levels: Sequence[Summary], earned: Sequence[Step]) -> Markup:
    """Of each level, how many segments gain, and the ends of the scale; or why there is nothing to tell of it."""
    parts: list[Child] = []
    headers = ("segment", "rows", "measured", "shrunk", "standard deviation")
    for one in levels:
        parts += [el("h3", f"{one.level}: {one.in_words()}"), el("p", f"Nightly, {one.rows:,} rows.", class_="soft")]
        for words, ends in (("those that gain most", one.best), ("those that gain least", one.worst)):
            figures = ((f"{told.difference:+.4f}", f"{told.shrunk:+.4f}", f"{told.deviation:.4f}") for told in ends)
            rows = ((told.segment, f"{told.rows:,}", *row) for told, row in zip(ends, figures, strict=True))
            parts += [el("p", f"{words}:", class_="soft"), table(headers, rows, len(headers) - 1)]
    told_of = {one.level for one in levels}
    for level in dict.fromkeys(step.level for step in earned if step.objective == objective):
        if level not in told_of:
            parts.append(el("p", f"{level}: {TOO_FEW}.", class_="soft"))
    return section(
        f"Segments: {objective}",
        "Loss per row with a segment's own weights minus its parent's; below zero it is better off. A segment's "
        "measured mean is drawn towards that of its level by how unsure it is (empirical Bayes); better and worse off "
        "are those with a probability of 95 %.",
        *parts,
    )


def cost_section(objective: str, costs: Sequence[Cost]) -> Markup:
    """Each level in words, the gains as bars, and everything that was counted."""
    levels = [one for one in costs if one.objective == objective]
    headers = (
        *("level", "adapters", "bytes each", "ms each", "rows served", "gain per row", "gain", "measured"),
        *("low", "high", "bytes per unit", "ms per unit"),
    )
    drawn = [
        (
            one.level,
            max(0.0, one.gain or 0.0) / one.nights,
            "not compared" if one.gain is None else f"{one.gain / one.nights:+,.1f} a night",
            not one.pays,
        )
        for one in levels
    ]
    unit = levels[0].unit if levels else "loss"
    devices = ", ".join(dict.fromkeys(one.device for one in levels if one.device is not None))
    measured = f"Milliseconds were measured on {devices}, in the runs that solved the banks." if devices else None
    return section(
        f"Cost: {objective}",
        "Bytes and milliseconds of the exams' banks, and what the rows that a level serves gain on its parent's "
        f"weights. One unit is 0.001 {unit} on each of 1,000 rows. A gain is the shrunk one; it is proven where the "
        "interval of own minus parent's loss per row lies below zero. What a level gives to finer ones as their start "
        "is not counted.",
        *(el("h3", f"{one.level}: {one.in_words()}") for one in levels),
        el("p", f"{unit.capitalize()} gained, summed over a night's rows:", class_="soft"),
        bars(drawn),
        table(headers, (_cost_cells(one) for one in levels), len(headers) - 1),
        None if measured is None else el("p", measured, class_="soft"),
    )


def _cost_cells(one: Cost) -> tuple[str, ...]:
    each = max(one.adapters, 1)
    return (
        one.level,
        f"{one.adapters:,}",
        "–" if one.bytes is None else size(one.bytes / each),
        "–" if one.milliseconds is None else f"{one.milliseconds / each:.3f}",
        f"{one.rows:,}",
        *("–" if value is None else f"{value:.4f}" for value in (one.gain_per_row, one.gain)),
        *("–" if value is None else f"{value:+.4f}" for value in (one.difference, one.low, one.high)),
        "–" if one.bytes_per_gain is None else size(one.bytes_per_gain),
        "–" if one.milliseconds_per_gain is None else f"{one.milliseconds_per_gain:,.2f}",
    )


def variety_section(objective: str, varieties: Sequence[Variety], exams: Sequence[Line]) -> Markup | None:
    """What each method's lists are like beside how accurate it is; None where nothing was ranked."""
    found = [one for one in varieties if one.objective == objective]
    pooled = [one for one in found if one.night == POOLED]
    if not pooled:
        return None
    nights = list(dict.fromkeys(one.night for one in found if one.night != POOLED))
    by_night = {(one.method, one.night): one for one in found}
    loss = {
        line.method: line.loss
        for line in exams
        if (line.objective, line.exam, line.slice, line.night) == (objective, "nightly", EVERYTHING, POOLED)
    }
    length = pooled[0].length
    headers = ["method", f"coverage at {length}", "Gini index", "personalisation", "diversity in a list"]
    cells = [_variety_cells(one) for one in pooled]
    if loss:
        headers.insert(1, "loss")
        cells = [(method, _figure(loss.get(method)), *others) for method, *others in cells]
    parts: list[Child] = [table(headers, cells, len(headers) - 1, ADAPTED)]
    for words, figures in (
        ("Coverage", [(one, one.coverage) for one in pooled]),
        ("Personalisation", [(one, one.personalisation) for one in pooled]),
    ):
        drawn = [
            (one.method, value or 0.0, "–" if value is None else f"{value:.4f}", one.method != ADAPTED)
            for one, value in figures
        ]
        parts += [el("p", f"{words}:", class_="soft"), bars(drawn)]
    series = {
        one.method: [told.personalisation if (told := by_night.get((one.method, night))) else None for night in nights]
        for one in pooled
    }
    if len(nights) > 1:
        parts += [el("p", "Personalisation by night:", class_="soft"), lines(nights, series, marked=ADAPTED)]
    return section(
        f"Lists: {objective}",
        f"The {length} best of one set of candidates for a sample of each night's users: {pooled[0].users:,} users in "
        f"all, {pooled[0].candidates:,} candidates a night on average, known before the night. Coverage is the share "
        "of candidates that anybody is shown; a Gini index of 0 shows each as often, near 1 few to everybody; "
        "personalisation is one minus what two users' lists share; diversity is how often two items of a list differ "
        "in a categorical column. Means over nights. Few users cannot be shown many candidates: compare methods, not "
        "nights.",
        *parts,
    )


def _variety_cells(one: Variety) -> tuple[str, ...]:
    return (one.method, *map(_figure, (one.coverage, one.gini, one.personalisation, one.diversity)))


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
