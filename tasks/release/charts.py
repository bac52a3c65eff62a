"""Pictures as inline SVG that keeps its text size at any width: positions in per cent, sizes in pixels."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, isfinite, log10

from tasks.release.page import Markup, el, joined, swatch

ROW_HEIGHT = 26
"""Pixels of one interval."""
CURVE_HEIGHT = 200
"""Pixels of a curve."""
BARS_HEIGHT = 120
"""Pixels of a histogram."""
HUES = 10
"""Colours for lines side by side (`--hue0` and so on in the page's style); more lines begin again."""


@dataclass(frozen=True)
class Whisker:
    """One interval to draw; None where there is no figure or no bound."""

    name: str
    """What the candidate is compared with."""
    estimate: float | None
    """The difference."""
    low: float | None
    """Lower bound, None: unbounded."""
    high: float | None
    """Upper bound, None: unbounded."""
    note: str
    """What it rests on."""

    @property
    def tone(self) -> str:
        """`better`, `worse` or `unclear`, by where the whole interval lies.

        >>> Whisker("popularity", -0.02, -0.03, -0.01, "").tone
        'better'
        """
        if self.high is not None and self.high < 0:
            return "better"
        return "worse" if self.low is not None and self.low > 0 else "unclear"


def ticks(low: float, high: float, about: int = 5) -> tuple[float, ...]:
    """Round numbers from below `low` to above `high`, in steps of 1, 2 or 5 times a power of ten.

    >>> ticks(-0.034, 0.011)
    (-0.04, -0.03, -0.02, -0.01, 0.0, 0.01, 0.02)
    """
    raw = (high - low) / about or 1.0
    power = 10.0 ** floor(log10(raw))
    step = power * next(size for size in (1, 2, 5, 10) if raw <= size * power * (1 + 1e-9))
    digits = max(0, 1 - floor(log10(step)))
    first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
    return tuple(round(place * step, digits) + 0.0 for place in range(first, last + 1))


def intervals(whiskers: Sequence[Whisker], margin: float | None = None) -> Markup:
    """An interval plot: one row per method, zero as a line, a gate's margin dashed.

    Args:
        whiskers: top to bottom; drawn on one scale.
        margin: where to draw the gate's limit, if these are the intervals that it reads.
    """
    ends = [v for w in whiskers for v in (w.estimate, w.low, w.high) if v is not None]
    ends += [-w.estimate for w in whiskers if w.estimate is not None and None in (w.low, w.high)]
    scale = ticks(min([0.0, *ends]), max([0.0, margin or 0.0, *ends]))
    if len(scale) < 2:
        scale = (-1.0, 0.0, 1.0)

    def x(value: float) -> str:
        return f"{100 * (value - scale[0]) / (scale[-1] - scale[0]):.3f}%"

    back = [
        el("line", x1=x(tick), x2=x(tick), y1=0, y2="100%", class_="zero" if tick == 0 else "grid") for tick in scale
    ]
    if margin is not None:
        back.append(el("line", x1=x(margin), x2=x(margin), y1=0, y2="100%", class_="margin"))
    rows = [_interval_row(w, joined(back), x) for w in whiskers]
    every = ceil(len(scale) / 6)
    sparse = [tick for place, tick in enumerate(scale) if (place - scale.index(0.0)) % every == 0]
    labels = [
        el("text", f"{tick:+g}" if tick else "0", x=x(tick), y=13, text_anchor="middle", class_="tick")
        for tick in sparse
    ]
    axis = el("svg", *labels, width="100%", height=18, aria_hidden="true")
    ends_row = el("div", el("span", "← candidate better"), el("span", "candidate worse →"), class_="ends")
    foot = el("div", el("span", class_="name"), el("div", axis, ends_row, class_="plot"), class_="row axis")
    return el("div", *rows, foot, class_="rows")


def _interval_row(whisker: Whisker, back: Markup, x: Callable[[float], str]) -> Markup:
    marks: list[Markup] = []
    middle = ROW_HEIGHT / 2
    if whisker.estimate is None:
        label = "no rows"
    else:
        low = "0%" if whisker.low is None else x(whisker.low)
        high = "100%" if whisker.high is None else x(whisker.high)
        bounded = whisker.low is not None and whisker.high is not None
        marks.append(el("line", x1=low, x2=high, y1=middle, y2=middle, class_="span" if bounded else "open"))
        marks.append(el("circle", cx=x(whisker.estimate), cy=middle, r=5.5, class_="dot"))
        bounds = f"[{_signed(whisker.low)}, {_signed(whisker.high)}]" if bounded else "too few to tell"
        label = f"{_signed(whisker.estimate)} {bounds}"
    told = f"against {whisker.name}: {label}, {whisker.tone}, {whisker.note}"
    svg = el("svg", el("title", told), back, *marks, width="100%", height=ROW_HEIGHT, role="img", aria_label=told)
    return el(
        "div",
        el("span", whisker.name, class_="name"),
        el("div", svg, class_="plot"),
        el("span", label, class_="value"),
        None if whisker.estimate is None else el("span", whisker.tone, class_="tone"),
        class_=f"row {whisker.tone}",
    )


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.4f}".replace("-", "−")


def curve(points: Sequence[tuple[int, float | None, float | None]], best: int | None) -> Markup:
    """The learning curve: training loss quiet, stopping loss in the accent, the epoch that was kept dotted.

    Args:
        points: epoch, training loss, stopping loss; a loss that is None or not finite leaves a gap.
        best: the epoch whose weights were kept.
    """
    losses = [value for _, *pair in points for value in pair if value is not None and isfinite(value)]
    if not losses:
        return el("p", "No epoch was trained.", class_="soft")
    low, high = _padded(losses)
    first, last = points[0][0], points[-1][0]

    def place(epoch: int, value: float) -> tuple[float, float]:
        return 100 * (epoch - first) / max(last - first, 1), 100 * (high - value) / (high - low)

    lines = []
    for column, kind in ((1, "train"), (2, "stop")):
        for run in _runs([(point[0], point[column]) for point in points]):
            path = " ".join("{:.3f},{:.3f}".format(*place(epoch, value)) for epoch, value in run)
            lines.append(el("polyline", points=path, class_=kind))
    kept = [place(epoch, stop) for epoch, _, stop in points if epoch == best and stop is not None and isfinite(stop)]
    marks = [el("circle", cx=f"{cx:.3f}%", cy=f"{cy:.3f}%", r=5.5, class_="best") for cx, cy in kept]
    return _framed(
        lines, marks, low, high, f"Loss by epoch, from {first} to {last}", (f"epoch {first}", f"epoch {last}")
    )


def _padded(values: Sequence[float]) -> tuple[float, float]:
    """Bounds of a scale that leaves some room above and below the values."""
    low, high = min(values), max(values)
    pad = (high - low) * 0.06 or 0.01
    return low - pad, high + pad


def _framed(
    drawn: Sequence[Markup], marks: Sequence[Markup], low: float, high: float, told: str, ends: Iterable[str]
) -> Markup:
    """Lines in a square of 100 by 100, marks in percent, with a scale on the left and the ends named below."""
    plot = el(
        "svg",
        *(el("line", x1=0, x2="100%", y1=f"{y}%", y2=f"{y}%", class_="grid") for y in (0, 50, 100)),
        el("svg", *drawn, viewBox="0 0 100 100", preserveAspectRatio="none", width="100%", height="100%"),
        *marks,
        width="100%",
        height=CURVE_HEIGHT,
        role="img",
        aria_label=told,
    )
    scale = el("div", *(el("span", f"{value:.4f}") for value in (high, (low + high) / 2, low)), class_="scale")
    return el(
        "div", scale, el("div", plot), el("span"), el("div", *(el("span", end) for end in ends), class_="ends"),
        class_="curve",
    )  # fmt: skip


def _runs(series: Sequence[tuple[int, float | None]]) -> list[list[tuple[int, float]]]:
    """Stretches of finite values."""
    runs: list[list[tuple[int, float]]] = [[]]
    for epoch, value in series:
        if value is None or not isfinite(value):
            runs.append([])
        else:
            runs[-1].append((epoch, value))
    return [run for run in runs if run]


def lines(steps: Sequence[str], series: Mapping[str, Sequence[float | None]], marked: str) -> Markup:
    """Several series over the same steps as lines on one scale, with a legend.

    Args:
        steps: what the values belong to, in order, such as nights.
        series: name to one value per step; None leaves a gap.
        marked: the series that is drawn strong, in the accent.
    """
    values = [value for one in series.values() for value in one if value is not None and isfinite(value)]
    if not values:
        return el("p", "There is nothing to draw.", class_="soft")
    low, high = _padded(values)

    def place(step: int, value: float) -> tuple[float, float]:
        return 100 * (step + 0.5) / len(steps), 100 * (high - value) / (high - low)

    drawn: list[Markup] = []
    dots: list[Markup] = []
    legend: list[Markup] = []
    quiet = [name for name in series if name != marked]
    for name in (*quiet, marked) if marked in series else quiet:  # the marked one last, above the others
        colour = "--accent" if name == marked else f"--hue{quiet.index(name) % HUES}"
        legend.append(swatch(name, colour))
        for run in _runs(list(enumerate(series[name]))):
            path = " ".join("{:.3f},{:.3f}".format(*place(step, value)) for step, value in run)
            width = 2.5 if name == marked else 1.2
            drawn.append(
                el("polyline", points=path, class_="train", style=f"stroke:var({colour});stroke-width:{width}")
            )
            for step, value in run:
                x, y = (f"{part:.3f}%" for part in place(step, value))
                dot = el("circle", cx=x, cy=y, r=1.6 * width, style=f"fill:var({colour})")
                dots.append(el("g", el("title", f"{name}, {steps[step]}: {value:.4f}"), dot))
    told = f"{', '.join(series)}: from {steps[0]} to {steps[-1]}"
    chart = _framed(drawn, dots, low, high, told, dict.fromkeys((steps[0], steps[-1])))
    return el("div", el("div", *reversed(legend), class_="key"), chart)


def histogram(bars: Sequence[tuple[str, int]]) -> Markup:
    """A histogram: one bar per label, its count above the label."""
    tallest = max((count for _, count in bars), default=0) or 1
    width = 100 / max(len(bars), 1)
    drawn = [
        el(
            "rect",
            x=f"{width * (place + 0.1):.3f}%",
            y=f"{100 - 100 * count / tallest:.3f}%",
            width=f"{width * 0.8:.3f}%",
            height=f"{100 * count / tallest:.3f}%",
            rx=3,
            class_="bar",
        )
        for place, (_, count) in enumerate(bars)
    ]
    base = el("line", x1=0, x2="100%", y1="100%", y2="100%", class_="grid")
    told = ", ".join(f"{label}: {count:,}" for label, count in bars)
    svg = el("svg", *drawn, base, width="100%", height=BARS_HEIGHT, role="img", aria_label=told)
    return el("div", svg, el("div", *(el("span", el("b", f"{n:,}"), label) for label, n in bars), class_="labels"))


def bars(rows: Sequence[tuple[str, float, str, bool]]) -> Markup:
    """Horizontal bars from zero: name, size, what to say about it, and whether it is quiet."""
    longest = max((size for _, size, _, _ in rows), default=0.0) or 1.0
    return el(
        "div",
        *(
            el(
                "div",
                el("span", name, class_="name"),
                el(
                    "div",
                    el(
                        "svg",
                        el("rect", x=0, y=8, width="100%", height=10, rx=3, class_="back"),
                        el(
                            "rect",
                            x=0,
                            y=8,
                            width=f"{100 * size / longest:.3f}%",
                            height=10,
                            rx=3,
                            class_="bar quiet" if quiet else "bar",
                        ),
                        width="100%",
                        height=ROW_HEIGHT,
                        aria_hidden="true",
                    ),
                    class_="plot",
                ),
                el("span", note, class_="value wide"),
                class_="row",
            )
            for name, size, note, quiet in rows
        ),
        class_="rows",
    )
