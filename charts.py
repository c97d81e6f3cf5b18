"""Charts as inline SVG: axes, dots, lines and bands, with no script and no library.

Colours are custom properties of page.STYLE, so one drawing serves a light and a dark page.
"""
import itertools
import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 250, 58, 12, 24, 40  # of a chart, in its own units
DRAWN = 500  # points of a curve, at most
Points = Sequence[tuple[float, ...]]


class Mark(NamedTuple):
    """Something to draw through `points`, (x, y), or (x, low, high) of a band."""

    shape: str  # dots, rows (larger dots), line, dashes or band
    color: str  # a custom property, without its two dashes
    points: Points
    label: str = ""  # written above the mark's last point


class Frame(NamedTuple):
    """The ranges of both axes, and where a point lies between them."""

    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, x: float, y: float) -> tuple[float, float]:
        """(right, down) in units of the drawing, never outside the axes."""
        share = [(min(max(v, low), high) - low) / (high - low)
                 for v, (low, high) in ((x, self.x), (y, self.y))]
        return (LEFT + share[0] * (WIDTH - LEFT - RIGHT),
                HEIGHT - BOTTOM - share[1] * (HEIGHT - TOP - BOTTOM))


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high, seven at most."""
    step = 10 ** math.floor(math.log10((high - low) / 6))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 6)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def spread(values: Sequence[float]) -> tuple[float, float]:
    """(low, high) of an axis: a little beyond the values, and never of no length."""
    low, high = min(values), max(values)
    room = 0.04 * (high - low) or abs(high) / 2 or 1.0
    return low - room, high + room


def curve(rows: Sequence[dict], name: str) -> list[tuple[float, float, float]]:
    """(step, value, mean of the latest tenth of values) wherever a metric is finite; a
    learning rate is its own mean. Thinned from the end, which stays, to about DRAWN points."""
    points = [(r["step"], r[name]) for r in rows if math.isfinite(r.get(name, math.inf))]
    back = 1 if name == "learning_rate" else max(1, len(points) // 10)
    kept = range(len(points))[:: -max(1, math.ceil(len(points) / DRAWN))][::-1]
    latest = ([v for _, v in points[max(0, i + 1 - back) : i + 1]] for i in kept)
    return [(*points[i], sum(some) / len(some)) for i, some in zip(kept, latest, strict=True)]


def smooth(points: Points) -> Points:
    """The (step, mean) of a curve."""
    return [(step, mean) for step, _, mean in points]


def bins(pairs: Points, count: int = 10) -> Points:
    """(mean x, mean y) of `count` bins of equally many pairs, to one, in the order of x."""
    order, count = sorted(pairs), min(count, len(pairs))
    cuts = [round(i * len(order) / count) for i in range(count + 1)]
    return [tuple(sum(part) / (b - a) for part in zip(*order[a:b], strict=True))
            for a, b in itertools.pairwise(cuts)]


def frame(marks: Sequence[Mark]) -> Frame:
    """Wide enough for every line and band, and for 96 in 100 of the dots."""
    dots = sorted(p[1] for m in marks if m.shape == "dots" for p in m.points)
    out = len(dots) // 50
    other = [y for m in marks if m.shape != "dots" for p in m.points for y in p[1:]]
    return Frame(spread([p[0] for m in marks for p in m.points]),
                 spread([*dots[out : len(dots) - out], *other]))


def path(mark: Mark, axes: Frame) -> str:
    """One mark; a dot beyond the axes is left out, a line is held inside."""
    dots = mark.shape in ("dots", "rows")
    if mark.shape == "band":
        places = [(x, high) for x, _, high in mark.points]
        places += [(x, low) for x, low, _ in reversed(mark.points)]
    else:
        places = [(x, y) for x, y in mark.points
                  if not dots or axes.y[0] <= y <= axes.y[1]]
    steps = ["{:.1f} {:.1f}".format(*axes.at(x, y)) for x, y in places]
    drawn = ("M" + ("h0M" if dots else "L").join(steps)
             + ("Z" if mark.shape == "band" else "h0")) if steps else ""
    paint = "fill" if mark.shape == "band" else "stroke"
    return f'<path class="{mark.shape}" {paint}="var(--{mark.color})" d="{drawn}"/>'


def labels(marks: Sequence[Mark], axes: Frame) -> str:
    """The labels of marks, in turn at the right end and at the left, so that they stay apart."""
    out = ""
    for number, mark in enumerate(m for m in marks if m.label):
        x, y = axes.at(*mark.points[-(number + 1) % 2][:2])
        out += (f'<text class="label" x="{x:.1f}" y="{max(y - 4, TOP + 10):.1f}" '
                f'text-anchor="{"start" if number % 2 else "end"}">{escape(mark.label)}</text>')
    return out


def grid(units: tuple[str, str], axes: Frame) -> str:
    """Lines and numbers of both axes; whole numbers only along steps and tokens."""
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    out = f'<text x="{LEFT}" y="14">{escape(units[1])}</text>'
    for value in ticks(*axes.y):
        y = axes.at(axes.x[0], value)[1]
        out += (f'<path d="M{LEFT} {y:.1f}H{right}" stroke="var(--line)" '
                f'stroke-width="{1 + (value == 0)}"/><text x="{LEFT - 6}" y="{y + 4:.1f}" '
                f'text-anchor="end">{value:.6g}</text>')
    counts = units[0] in ("step", "token of the response")
    for value in (v for v in ticks(*axes.x) if not counts or v == round(v)):
        out += (f'<text x="{axes.at(value, axes.y[0])[0]:.1f}" y="{bottom + 18}" '
                f'text-anchor="middle">{value:.6g}</text>')
    return out + f'<text x="{right}" y="{HEIGHT - 4}" text-anchor="end">{escape(units[0])}</text>'


def chart(title: str, units: tuple[str, str], marks: Sequence[Mark],
          keys: Sequence[tuple[str, str]], note: str, axes: Frame | None = None) -> str:
    """A figure: caption with keys (colour, text), drawing, and a sentence on how to read it."""
    axes = axes or frame(marks)
    named = "".join(f'<span class="key"><span style="color:var(--{color})">&#9632;</span> '
                    f"{escape(text)}</span> " for color, text in keys)
    order = sorted(marks, key=lambda m: m.shape != "band")
    return (f'<figure><figcaption><b>{escape(title)}</b> {named}</figcaption>\n<svg viewBox="0 0 '
            f'{WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{grid(units, axes)}'
            f"{''.join(path(m, axes) for m in order)}{labels(marks, axes)}</svg>"
            f"<p><small>{escape(note)}</small></p></figure>\n")
