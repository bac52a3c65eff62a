"""A self-contained HTML page: elements whose text is escaped by construction, and the one style sheet.

No script, no font and no picture is fetched; the page forbids it to itself. Whatever stands in a column name or a
quarantined value is text here and nothing else.
"""

import re
from collections.abc import Iterable, Sequence
from html import escape

LONGEST = 400
"""Characters of a text that are shown; a hostile name may have millions."""
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufffe\uffff\ud800-\udfff]")
_VOID = frozenset({"meta", "line", "rect", "circle", "polyline"})


class Markup(str):
    """A piece of finished HTML. Every other string is text, and is escaped where it enters an element."""

    __slots__ = ()


Child = Markup | str | int | None


def text(value: str | int) -> Markup:
    r"""Escapes a text; control characters and lone surrogates become the replacement character.

    >>> text("<b>&'\x00")
    '&lt;b&gt;&amp;&#x27;\ufffd'
    """
    shown = str(value)
    if len(shown) > LONGEST:
        shown = f"{shown[:LONGEST]}…"
    return Markup(_safe(shown))


def el(tag: str, *children: Child, **attributes: str | int | float) -> Markup:
    """An element; children that are not `Markup` are escaped, and so are attribute values.

    Underscores in attribute names stand for hyphens, a trailing one keeps clear of Python's words.

    >>> el("td", "a < b", class_="name")
    '<td class="name">a &lt; b</td>'
    """
    written = "".join(f' {name.rstrip("_").replace("_", "-")}="{_safe(str(v))}"' for name, v in attributes.items())
    if tag in _VOID:
        return Markup(f"<{tag}{written}>" if tag == "meta" else f"<{tag}{written}/>")
    return Markup(f"<{tag}{written}>{joined(children)}</{tag}>")


def _safe(value: str) -> str:
    return escape(_UNPRINTABLE.sub("\ufffd", value), quote=True)


def size(count: float) -> str:
    """Bytes for people.

    >>> size(999), size(48_300_000)
    ('999 B', '48.3 MB')
    """
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def joined(children: Iterable[Child]) -> Markup:
    """Children one after another, texts escaped, None left out."""
    return Markup("".join(c if isinstance(c, Markup) else text(c) for c in children if c is not None))


def table(headers: Sequence[str], rows: Iterable[Sequence[Child]], numeric: int, marked: str | None = None) -> Markup:
    """A table that scrolls sideways where the screen is narrow.

    Args:
        headers: one per column.
        rows: cells, one per header.
        numeric: how many columns, counted from the right, are numbers.
        marked: first cell of the row to emphasise.
    """
    texts = len(headers) - numeric

    def cells(tag: str, row: Sequence[Child]) -> list[Markup]:
        return [el(tag, cell, class_="text" if place < texts else "number") for place, cell in enumerate(row)]

    body = [
        el("tr", *cells("td", row), class_="marked" if marked is not None and row[0] == marked else "") for row in rows
    ]
    return el(
        "div",
        el("table", el("thead", el("tr", *cells("th", headers))), el("tbody", *body)),
        class_="scroll",
        tabindex=0,
        role="region",
        aria_label=f"Table: {headers[0]}",
    )


def section(title: str, lead: str, *parts: Child) -> Markup:
    """A card of the page."""
    return el("section", el("h2", title), el("p", lead, class_="soft"), *parts)


def swatch(words: str, colour: str) -> Markup:
    """A legend's entry."""
    return el("span", words, style=f"--swatch:var({colour})")


def page(title: str, *body: Child) -> Markup:
    """The whole document."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", title),
        el("style", Markup(STYLE)),
    )
    return Markup(f"<!doctype html>\n{el('html', head, el('body', el('main', *body)), lang='en')}\n")


STYLE = """
:root{--paper:#f6f7f9;--card:#fff;--ink:#171b22;--soft:#5a6472;--line:#e2e6ec;--fill:#eef1f5;--accent:#3d5bd9;
--good:#0b7a6b;--good-soft:#e2f4f0;--bad:#bd3b12;--bad-soft:#fdeae2;--warn:#8a5a00;--warn-soft:#fff3d6;--dim:#7b8594}
@media (prefers-color-scheme:dark){:root{--paper:#0e1116;--card:#161b22;--ink:#e7ebf1;--soft:#9ca7b5;--line:#2a313b;
--fill:#212832;--accent:#8ea4ff;--good:#3fd0b6;--good-soft:#11312c;--bad:#ff9166;--bad-soft:#3a1c12;--warn:#f0c264;
--warn-soft:#352a10;--dim:#8390a0}}
:root{--hue0:#d1495b;--hue1:#d9822b;--hue2:#a89200;--hue3:#4c9f38;--hue4:#1b998b;
--hue5:#2e86ab;--hue6:#8e5bd6;--hue7:#c45bb3;--hue8:#8a7565;--hue9:#6b7a8f}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;-webkit-text-size-adjust:100%;overflow-wrap:anywhere}
main{max-width:1020px;margin:0 auto;padding:2.2rem 1.2rem 4rem}
h1{font-size:1.7rem;line-height:1.2;margin:.1rem 0 .3rem;letter-spacing:-.015em}
h2{font-size:1.15rem;margin:0 0 .2rem;letter-spacing:-.005em}
h3{font-size:.95rem;margin:1.5rem 0 .4rem}
p{margin:.2rem 0 .7rem}
.soft,small{color:var(--soft)} small{font-size:.82rem}
code,.mono{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:.86em;
unicode-bidi:isolate}
a{color:var(--accent)}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:1.2rem 1.3rem 1.3rem;
margin-top:1.1rem}
.eyebrow{color:var(--soft);font-size:.8rem;letter-spacing:.08em;text-transform:uppercase}
.verdict{border-left:6px solid var(--good);background:var(--good-soft)}
.verdict.hold{border-left-color:var(--warn);background:var(--warn-soft)}
.verdict h2{font-size:1.25rem}
.verdict ul{margin:.5rem 0 0;padding-left:1.1rem}
.alarms{border-left:6px solid var(--bad);background:var(--bad-soft)}
.alarms dl{margin:.4rem 0 0}.alarms dt{font-weight:650}.alarms dd{margin:0 0 .5rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(148px,1fr));gap:.8rem;margin-top:1.1rem}
.tile{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:.8rem 1rem}
.tile b{display:block;font-size:1.35rem;line-height:1.3;font-weight:650;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto;margin-top:.5rem}
.scroll:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
table{border-collapse:collapse;width:100%;font-size:.87rem}
th{font-weight:600;color:var(--soft);font-size:.78rem;vertical-align:bottom;white-space:nowrap}
th,td{padding:.36rem .7rem .36rem 0;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
tr:last-child td{border-bottom:0}
td.text{min-width:6.5rem}
.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap;padding-right:0;padding-left:.9rem}
.marked td{background:var(--fill);font-weight:650}
.marked td:first-child{box-shadow:-.5rem 0 0 var(--fill)}.marked td:last-child{box-shadow:.5rem 0 0 var(--fill)}
svg{display:block;overflow:visible}
.rows{margin-top:.3rem}
.row{display:grid;grid-template-columns:minmax(7rem,11.5rem) minmax(0,1fr) 12.4rem 3.6rem;gap:0 .9rem;
align-items:center}
.row .value,.row .tone{font-size:.82rem;text-align:right;white-space:nowrap}
.row .value{font-variant-numeric:tabular-nums;color:var(--soft)}.row .wide{grid-column:3/5}
.row .tone{color:var(--tone);font-weight:650}
.row .name{font-size:.9rem;line-height:1.25}
.better{--tone:var(--good)}.worse{--tone:var(--bad)}.unclear{--tone:var(--dim)}
.span{stroke:var(--tone);stroke-width:3;stroke-linecap:round}.dot{fill:var(--tone);stroke:var(--card);stroke-width:2}
.open{stroke:var(--tone);stroke-width:2;stroke-dasharray:2 5;stroke-linecap:round}
.zero{stroke:var(--ink);stroke-width:1.2}.grid{stroke:var(--line)}
.margin{stroke:var(--warn);stroke-width:1.2;stroke-dasharray:4 3}
.tick{fill:var(--soft);font-size:11px;font-variant-numeric:tabular-nums}
.ends{display:flex;justify-content:space-between;gap:1rem;font-size:.78rem;color:var(--soft)}
.key{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;font-size:.82rem;color:var(--soft);margin:.4rem 0}
.key span::before{content:"";display:inline-block;width:1.2em;height:.28em;border-radius:2px;margin-right:.5em;
vertical-align:.22em;background:var(--swatch)}
.curve{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:.2rem .7rem;font-size:.78rem;color:var(--soft);
font-variant-numeric:tabular-nums}
.curve .scale{display:flex;flex-direction:column;justify-content:space-between;text-align:right}
.train,.stop{fill:none;stroke-width:2;vector-effect:non-scaling-stroke;stroke-linejoin:round;stroke-linecap:round}
.train{stroke:var(--dim)}.stop{stroke:var(--accent)}.best{fill:var(--accent);stroke:var(--card);stroke-width:2}
.bar{fill:var(--accent)}.bar.quiet{fill:var(--dim);opacity:.55}.back{fill:var(--fill)}
.labels{display:grid;grid-auto-flow:column;grid-auto-columns:minmax(0,1fr);text-align:center;font-size:.74rem;
line-height:1.25;color:var(--soft);font-variant-numeric:tabular-nums;overflow-wrap:normal}
.labels b{display:block;color:var(--ink);font-weight:600}
details{margin-top:.9rem}summary{cursor:pointer;font-size:.88rem;color:var(--accent)}
.pill{display:inline-block;padding:0 .55em;border-radius:99px;background:var(--fill);color:var(--soft);font-size:.76rem;
line-height:1.6;white-space:nowrap}
.pill.bad{background:var(--bad-soft);color:var(--bad)}.pill.good{background:var(--good-soft);color:var(--good)}
footer{margin-top:1.6rem;color:var(--soft);font-size:.82rem}
@media (max-width:780px){
main{padding:1.2rem .7rem 3rem}section{padding:1rem .9rem;border-radius:10px}h1{font-size:1.4rem}
.row{grid-template-columns:minmax(0,1fr) auto;gap:0 .6rem;padding:.4rem 0}.row .plot{grid-column:1/-1;grid-row:3}
.row .name{grid-column:1;grid-row:1}.row .tone,.row .wide.value{grid-column:2;grid-row:1}
.row .value{grid-column:1/-1;grid-row:2;text-align:left}
.row.axis{padding:0}.row.axis .name{display:none}.tiles{grid-template-columns:1fr 1fr;gap:.6rem}
.tile{padding:.65rem .8rem}.labels{font-size:.66rem}}
@media print{body{background:#fff}section,.tile{break-inside:avoid}}
"""
