"""Pages to look at: search answers, and a run with its metrics, curves and retrievals.

Each page is one HTML file that needs nothing else: no script, no font, no picture from outside (its own
policy forbids them). Thumbnails are inside as JPEG; captions and names are escaped, whatever they hold.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from evaluate.metrics import METRIC_NAMES, Metrics, Report
from featurize.images.decode import DecodeError, decode
from featurize.places import publish

THUMBNAIL = 160
"""Height of the embedded pictures in pixels; panoramas are at most three times as wide."""

CURVE_POINTS = 240
"""A longer curve is drawn as the means of so many stretches, with a band from lowest to highest."""

PROTOCOLS = {"full": "", "coco_5k": ", all 5K", "coco_1k": ", mean of five 1K folds"}
"""What the metrics table adds to a report's name."""


@dataclass(frozen=True)
class Hit:
    """One retrieved item.

    Attributes:
        rank: from 1.
        item: its id.
        distance: to the query, in the joint space.
        captions: the item's text, one or more captions.
        image: the item's encoded picture; None when the item is text or its picture is not at hand.
        right: whether it is relevant to the query, if that is known.
    """

    rank: int
    item: str
    distance: float
    captions: tuple[str, ...] = ()
    image: bytes | None = None
    right: bool | None = None


@dataclass(frozen=True)
class Answer:
    """A query and what was found for it.

    Attributes:
        query: text, or an encoded picture.
        hits: best first.
        name: what to call the query beside a picture (its id or file).
    """

    query: str | bytes
    hits: Sequence[Hit]
    name: str = ""


@dataclass(frozen=True)
class Curve:
    """One quantity over training.

    Attributes:
        title: what it is ("val rSum").
        unit: what x counts ("epoch", "step").
        x: ascending.
        y: as many values; those that are not finite are left out and counted on the page.
        best: which end is better; that point is marked.
    """

    title: str
    unit: str
    x: Sequence[float]
    y: Sequence[float]
    best: Literal["highest", "lowest"]

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise ValueError(f"curve {self.title!r}: {len(self.x)} x values, but {len(self.y)} y values")


def search_page(path: str | Path, title: str, answers: Sequence[Answer], *, note: str = "") -> None:
    """Writes a page with the answers to one or more queries.

    Args:
        path: the HTML file; it is replaced whole or not at all.
        title: heading.
        answers: in the order of the page.
        note: a line below the heading.
    """
    _write(path, title, note, [_answer(answer) for answer in answers])


def run_page(
    path: str | Path,
    title: str,
    *,
    note: str = "",
    reports: Mapping[str, Report],
    curves: Sequence[Curve] = (),
    text_to_image: Sequence[Answer] = (),
    image_to_text: Sequence[Answer] = (),
    settings: Mapping[str, object] | None = None,
) -> None:
    """Writes the page of a run.

    Args:
        path: the HTML file; it is replaced whole or not at all.
        title: heading.
        note: a line below the heading.
        reports: measured models by name, the run's own first ({"trained": ..., "untrained": ...}).
        curves: quantities over training.
        text_to_image: example captions and the images found.
        image_to_text: example images and the captions found.
        settings: the run's settings; nested mappings are shown with dotted names.

    Raises:
        ValueError: there is no report.
    """
    if not reports:
        raise ValueError(f"{path}: a run's page needs at least one report, found none")
    parts = [_headline(reports), _metrics(reports)]
    if curves:
        parts.append(_section("Training", f'<div class="curves">{"".join(map(_curve, curves))}</div>'))
    for heading, answers in (("Text to image", text_to_image), ("Image to text", image_to_text)):
        if answers:
            parts.append(_section(heading, "".join(map(_answer, answers))))
    if settings:
        parts.append(_section("Settings", _settings(settings)))
    _write(path, title, note, parts)


def _write(path: str | Path, title: str, note: str, parts: Sequence[str]) -> None:
    """Puts the parts into a page and the page on disk."""
    body = "\n".join(parts)
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header><h1>{escape(title)}</h1>{f"<p>{escape(note)}</p>" if note else ""}</header>
<main>
{body}
</main>
</body>
</html>
"""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    publish(path, page.encode())


def _section(heading: str, body: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>{body}</section>"


def _headline(reports: Mapping[str, Report]) -> str:
    """What one looks for first: rSum and both R@1 of the first report, the others' below them."""
    report, *_ = reports.values()
    others = list(reports.items())[1:]

    def figure(label: str, value: float, compared: Sequence[float]) -> str:
        beside = ", ".join(f"{other} {number:.1f}" for (other, _), number in zip(others, compared, strict=True))
        return (
            f'<div class="figure"><span class="label">{escape(label)}</span>'
            f'<span class="value">{value:.1f}</span>'
            f'<span class="label">{escape(beside)}</span></div>'
        )

    figures = [
        figure("rSum of 600", report.rsum, [other.rsum for _, other in others]),
        figure("R@1, image to text", report.i2t.r1, [other.i2t.r1 for _, other in others]),
        figure("R@1, text to image", report.t2i.r1, [other.t2i.r1 for _, other in others]),
    ]
    return f'<div class="figures">{"".join(figures)}</div>'


def _metrics(reports: Mapping[str, Report]) -> str:
    """A table for each direction; a row for each report, and for its folds."""
    rows: list[tuple[str, Report]] = []
    for name, report in reports.items():
        rows += [(name + PROTOCOLS[one.protocol], one) for one in (report, report.folds_1k) if one is not None]
    tables = "".join(
        _table(direction, [(name, getattr(report, field)) for name, report in rows])
        for direction, field in (("Image to text", "i2t"), ("Text to image", "t2i"))
    )
    legend = (
        "Recall (R@k), mAP@R and R-Precision (R-P) in percent, higher is better; medR and meanR are ranks, "
        "lower is better, 1 is best. rSum adds the six recalls."
    )
    splits = " and ".join(dict.fromkeys(report.split for report in reports.values()))
    return _section(f"Metrics on {splits}", f'{tables}<p class="quiet">{legend}</p>')


def _table(caption: str, rows: Sequence[tuple[str, Metrics]]) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in METRIC_NAMES.values())
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{value:.1f}</td>" for value in asdict(metrics).values())
        + "</tr>"
        for name, metrics in rows
    )
    return (
        f'<div class="wide"><table><caption>{caption}</caption>'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _settings(settings: Mapping[str, object]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in _flatten(settings)
    )
    table = f'<div class="wide"><table class="settings"><tbody>{rows}</tbody></table></div>'
    return f"<details><summary>every setting</summary>{table}</details>"


def _flatten(settings: Mapping[str, object], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted name, text)."""
    flat: list[tuple[str, str]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat += _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            flat.append((f"{prefix}{name}", ", ".join(map(str, value)) or "none"))
        else:
            flat.append((f"{prefix}{name}", str(value)))
    return flat


def _answer(answer: Answer) -> str:
    """A query, whether the right item was found where that is known, and the hits."""
    if isinstance(answer.query, bytes):
        name = f"<p>{escape(answer.name)}</p>" if answer.name else ""
        query = f'<div class="asked">{_picture(answer.query, answer.name or "query")}{name}</div>'
    else:
        query = f'<p class="asked text">{escape(answer.query)}</p>'
    shape = _cards if any(hit.image is not None for hit in answer.hits) else _lines
    hits = shape(answer.hits) if answer.hits else '<p class="quiet">Nothing was found.</p>'
    return f'<article class="answer">{query}<div class="found">{_verdict(answer.hits)}{hits}</div></article>'


def _verdict(hits: Sequence[Hit]) -> str:
    """Where the right item stands, if it is known which one is right."""
    if all(hit.right is None for hit in hits):
        return ""
    right = [str(hit.rank) for hit in hits if hit.right]
    if right:
        return f'<p class="verdict good">right at rank {", ".join(right)}</p>'
    return f'<p class="verdict">right: none of these {len(hits)}</p>'


def _cards(hits: Sequence[Hit]) -> str:
    """Hits with pictures, side by side."""
    cards = "".join(
        f"<li{_right(hit)}><figure>{_picture(hit.image, hit.captions[0] if hit.captions else hit.item)}"
        f"<figcaption>{_place(hit)}{_captions(hit)}</figcaption></figure></li>"
        for hit in hits
    )
    return f'<ol class="cards">{cards}</ol>'


def _lines(hits: Sequence[Hit]) -> str:
    """Hits that are text, one below the other."""
    lines = "".join(f"<li{_right(hit)}>{_place(hit)}{_captions(hit)}</li>" for hit in hits)
    return f'<ol class="lines">{lines}</ol>'


def _right(hit: Hit) -> str:
    return ' class="right"' if hit.right else ""


def _place(hit: Hit) -> str:
    mark = ' <b class="mark">right</b>' if hit.right else ""
    return (
        f'<span class="place" title="{escape(hit.item)}"><b>{hit.rank}</b>{mark}'
        f' <span class="distance">{hit.distance:.3f}</span></span>'
    )


def _captions(hit: Hit) -> str:
    """The first caption; the others unfold."""
    if not hit.captions:
        return f'<span class="caption">{escape(hit.item)}</span>'
    first, *others = hit.captions
    if not others:
        return f'<span class="caption">{escape(first)}</span>'
    more = "".join(f"<p>{escape(caption)}</p>" for caption in others)
    return f'<details class="caption"><summary>{escape(first)}</summary>{more}</details>'


def _picture(data: bytes | None, label: str) -> str:
    """A thumbnail inside the page, or a box that says why there is none."""
    if data is None:
        return '<span class="missing">no picture</span>'
    try:
        image = decode(data)
    except DecodeError:
        return '<span class="missing">picture cannot be read</span>'
    image.thumbnail((THUMBNAIL * 3, THUMBNAIL), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=82, optimize=True)
    source = base64.b64encode(out.getvalue()).decode("ascii")
    return (
        f'<img src="data:image/jpeg;base64,{source}" alt="{escape(label)}" '
        f'width="{image.width}" height="{image.height}">'
    )


def _curve(curve: Curve) -> str:
    """A line chart as inline SVG; its best point is marked and named above."""
    pairs = [(float(x), float(y)) for x, y in zip(curve.x, curve.y, strict=True) if math.isfinite(y)]
    missing = len(curve.y) - len(pairs)
    lost = f" Left out, not finite: {missing}." if missing else ""
    title = escape(curve.title)
    if not pairs:
        return f'<figure class="curve"><figcaption><b>{title}</b> has no values.{lost}</figcaption></figure>'
    stretches = np.array_split(np.array(pairs), min(len(pairs), CURVE_POINTS))
    x, y = ([float(part[:, axis].mean()) for part in stretches] for axis in (0, 1))
    low, high = (
        [float(part[:, 1].min()) for part in stretches],
        [float(part[:, 1].max()) for part in stretches],
    )
    best = y.index(max(y) if curve.best == "highest" else min(y))
    smooth = f" (means of {len(stretches[0])})" if len(pairs) > len(stretches) else ""
    label = f"{curve.best} {_number(y[best])} at {curve.unit} {_number(round(x[best]))}{smooth}"

    width, height, left, right, top, bottom = 400, 210, 44, 18, 10, 30
    y_ticks = _ticks(min(low), max(high))
    x_from, x_to = pairs[0][0], max(pairs[-1][0], pairs[0][0] + 1)
    y_from, y_to = y_ticks[0], y_ticks[-1]
    x_ticks = [tick for tick in _ticks(x_from, x_to) if x_from <= tick <= x_to]

    def across(value: float) -> float:
        return left + (width - left - right) * (value - x_from) / (x_to - x_from)

    def up(value: float) -> float:
        return height - bottom - (height - top - bottom) * (value - y_from) / (y_to - y_from)

    def points(xs: Sequence[float], ys: Sequence[float]) -> str:
        return " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b in zip(xs, ys, strict=True))

    grid = "".join(
        f'<line x1="{left}" x2="{width - right}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>'
        f'<text x="{left - 6}" y="{up(tick) + 4:.1f}" text-anchor="end">{_number(tick)}</text>'
        for tick in y_ticks
    ) + "".join(
        f'<text x="{across(tick):.1f}" y="{height - bottom + 16}" text-anchor="middle">{_number(tick)}</text>'
        for tick in x_ticks
    )
    band = f'<polygon class="band" points="{points(x + x[::-1], low + high[::-1])}"/>' if smooth else ""
    return (
        f'<figure class="curve"><figcaption><b>{title}</b> by {escape(curve.unit)}: {escape(label)}.{lost}'
        f'</figcaption><svg viewBox="0 0 {width} {height}" role="img" aria-label="{title}, {escape(label)}">'
        f'<g class="grid">{grid}</g>{band}<polyline class="line" points="{points(x, y)}"/>'
        f'<circle class="best" cx="{across(x[best]):.1f}" cy="{up(y[best]):.1f}" r="3.5"/></svg></figure>'
    )


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, evenly apart, the first not above `low` and the last not below `high`."""
    if not high > low:
        low, high = low - 1, high + 1
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= rough)
    return [step * n for n in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _number(value: float) -> str:
    """Short: at most four significant digits, no exponent below a million."""
    return f"{value:,.0f}" if abs(value) >= 1000 or value == round(value) else f"{value:.4g}"


STYLE = """
:root {
  color-scheme: light dark;
  --ground: #fbfaf7; --card: #ffffff; --ink: #23272b; --quiet: #6a7076; --rule: #e3e1da;
  --line: #2f6f77; --right: #2c7a4b; --right-ground: #e9f4ec;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #16191c; --card: #1e2226; --ink: #e4e6e7; --quiet: #98a0a6; --rule: #31363b;
    --line: #7fc0c8; --right: #86d0a1; --right-ground: #1d3126;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2.5rem 1.25rem 5rem; max-width: 66rem;
  background: var(--ground); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
h1 { margin: 0; font-size: 1.6rem; font-weight: 600; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 3rem 0 1rem; font-size: 1.15rem; font-weight: 600; }
header p, .quiet { margin: .35rem 0 0; color: var(--quiet); font-size: .9rem; }
b { font-weight: 600; }
.figures { display: flex; flex-wrap: wrap; gap: .75rem 3.5rem; margin-top: 2rem; }
.figure { display: flex; flex-direction: column; }
.figure .value { font-size: 2.4rem; line-height: 1.15; font-variant-numeric: tabular-nums; }
.figure .label { color: var(--quiet); font-size: .85rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.wide table { width: 100%; margin-bottom: 1.25rem; }
caption { text-align: left; font-size: .9rem; color: var(--quiet); padding-bottom: .25rem; }
.wide th, .wide td { padding: .4rem .75rem; text-align: right; white-space: nowrap; }
.wide tr { border-bottom: 1px solid var(--rule); }
.wide thead th { font-weight: 500; font-size: .85rem; color: var(--quiet); }
.wide tbody th { padding-left: 0; text-align: left; font-weight: 400; }
.wide tbody tr:first-child { font-weight: 600; }
.wide tbody tr:first-child th { font-weight: 600; }
.curves {
  display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr));
}
.curve { margin: 0; }
.curve figcaption { font-size: .9rem; color: var(--quiet); margin-bottom: .4rem; }
.curve figcaption b { color: var(--ink); }
.curve svg { display: block; width: 100%; height: auto; }
.grid line { stroke: var(--rule); }
.grid text { fill: var(--quiet); font-size: 11px; }
.line { fill: none; stroke: var(--line); stroke-width: 1.75; stroke-linejoin: round; }
.band { fill: var(--line); opacity: .15; }
.best { fill: var(--line); stroke: var(--ground); stroke-width: 1.5; }
.answer {
  margin: 0 0 1rem; padding: 1.1rem 1.25rem 1.25rem;
  background: var(--card); border: 1px solid var(--rule); border-radius: .6rem;
}
main > .answer:first-child { margin-top: 2rem; }
.asked { margin: 0; }
.asked.text { font-size: 1.1rem; line-height: 1.4; overflow-wrap: anywhere; }
.asked img { border-radius: .35rem; }
.asked p { margin: .25rem 0 0; font-size: .8rem; color: var(--quiet); overflow-wrap: anywhere; }
.verdict { margin: .1rem 0 0; font-size: .85rem; color: var(--quiet); }
.verdict.good { color: var(--right); }
img, .missing { display: block; max-width: 100%; }
.missing {
  display: grid; place-items: center; width: 9rem; min-height: 6rem; padding: .5rem; text-align: center;
  border: 1px dashed var(--rule); border-radius: .35rem; color: var(--quiet); font-size: .8rem;
}
ol { list-style: none; margin: .85rem 0 0; padding: 0; }
.cards { display: flex; flex-wrap: wrap; gap: 1rem .85rem; }
.cards li { width: min-content; min-width: 8rem; }
.cards figure { margin: 0; }
.cards img { width: auto; max-width: none; height: 8.5rem; border-radius: .35rem; }
.cards .missing { width: 11rem; height: 8.5rem; }
.asked:has(img) + .found > ol:first-child { margin-top: 0; }
.cards .right img { outline: 3px solid var(--right); outline-offset: 2px; }
.cards figcaption { margin-top: .4rem; font-size: .82rem; line-height: 1.35; }
.place { display: flex; align-items: baseline; gap: .45rem; font-variant-numeric: tabular-nums; }
.mark { color: var(--right); font-size: .8em; }
.distance { margin-left: auto; color: var(--quiet); font-size: .9em; }
.caption { color: var(--quiet); overflow-wrap: anywhere; }
.caption summary { cursor: pointer; list-style: none; }
.caption summary::after { content: " +"; color: var(--line); }
.caption[open] summary::after { content: ""; }
.caption p { margin: .3rem 0 0; }
.lines li {
  display: grid; grid-template-columns: 7.5rem 1fr; gap: .75rem; padding: .35rem .6rem;
  border-radius: .35rem; font-size: .95rem;
}
.lines .caption { color: var(--ink); }
.lines .right { background: var(--right-ground); }
.answer:has(.asked img) { display: grid; grid-template-columns: auto 1fr; gap: 0 1.5rem; }
summary { cursor: pointer; }
.settings { margin-top: .75rem; font-size: .85rem; }
.settings th, .settings td { padding: .2rem 1.5rem .2rem 0; text-align: left; font-weight: 400; }
.settings th { color: var(--quiet); }
@media (max-width: 40rem) {
  body { padding: 1.5rem .9rem 3rem; }
  .cards li { width: calc(50% - .425rem); }
  .cards img { width: 100%; height: auto; aspect-ratio: 1; object-fit: cover; }
  .cards .missing { width: 100%; }
  .answer { padding: .9rem; }
  .answer:has(.asked img) { display: block; }
  .found { margin-top: .6rem; }
  .lines li { grid-template-columns: 6rem 1fr; padding: .35rem .4rem; }
}
"""
