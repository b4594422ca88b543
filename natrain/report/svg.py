"""Charts as SVG text: readable without colour, in print and on a phone; no script, no font, no network.

Series differ in colour (Okabe and Ito's, which colour-blind readers tell apart, without their light ones, which white
paper swallows) and in the shape of their marks; a cell of a heat map says its number. Every mark has a title that names
it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#4B1FBF", "#5C3D00", "#444444")
_WIDTH = 640
_INK, _FAINT = "#222222", "#D0D0D0"
_FONT = 'font-family="system-ui, sans-serif"'


def document(width: float, height: float, title: str, body: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'aria-label="{escape(title, quote=True)}" {_FONT} font-size="13" fill="{_INK}">'
        f"<title>{escape(title)}</title>{body}</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str = "start", extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {extra}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str = _FAINT, extra: str = "") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" {extra}/>'


def mark(index: int, x: float, y: float, title: str, size: float = 4.0, opacity: float = 0.75) -> str:
    """The ``index``-th series' mark: circle, square, triangle, diamond, cross, then again in other colours."""
    colour = COLOURS[index % len(COLOURS)]
    s = size
    shapes: tuple[Callable[[], str], ...] = (
        lambda: f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{s}"',
        lambda: f'<rect x="{x - s:.1f}" y="{y - s:.1f}" width="{2 * s}" height="{2 * s}"',
        lambda: f'<path d="M{x:.1f} {y - s:.1f}l{s} {2 * s}h{-2 * s}z"',
        lambda: f'<path d="M{x:.1f} {y - 1.3 * s:.1f}l{s} {1.3 * s}l{-s} {1.3 * s}l{-s} {-1.3 * s}z"',
        lambda: (
            f'<path d="M{x - s:.1f} {y - s:.1f}l{2 * s} {2 * s}m0 {-2 * s}l{-2 * s} {2 * s}" stroke="{colour}" '
            'stroke-width="2"'
        ),
    )
    shape = shapes[index % len(shapes)]()
    return f'{shape} fill="{colour}" fill-opacity="{opacity}"><title>{escape(title)}</title></{shape[1:].split()[0]}>'


@dataclass(frozen=True)
class Axis:
    """From values to pixels, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    @staticmethod
    def over(values: Sequence[float], start: float, end: float, is_log: bool = False) -> Axis:
        low, high = min(values), max(values)
        if is_log:
            low, high = low / 1.15, high * 1.15
        else:
            margin = (high - low or abs(high) or 1) * 0.06
            low, high = low - margin, high + margin
        return Axis(low, high, start, end, is_log)

    def at(self, value: float) -> float:
        low, high, value = (math.log(v) if self.is_log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values inside, at most about eight."""
        if self.is_log:
            steps = [10.0**e * m for e in range(-9, 16) for m in (1, 2, 5)]
            inside = [v for v in steps if self.low <= v <= self.high]
            return inside if len(inside) <= 8 else [v for v in inside if math.log10(v) % 1 < 1e-9 or len(inside) <= 8]
        step = 10 ** math.floor(math.log10((self.high - self.low) / 4))
        step = next(step * m for m in (1, 2, 5, 10) if (self.high - self.low) / (step * m) <= 8)
        first = math.ceil(self.low / step)
        return [step * i for i in range(first, math.floor(self.high / step) + 1)]


def number(value: float) -> str:
    """A tick or a cell: short, k, M and G for thousands."""
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.3g}"


def legend(names: Sequence[str], y: float, left: float = 60) -> str:
    """One mark and name a series, in a row."""
    parts, x = [], left
    for index, name in enumerate(names):
        parts.append(mark(index, x, y - 4, name, 5, 1) + _text(x + 10, y, name))
        x += 30 + 8.5 * len(name)
    return "".join(parts)


def _frame(x: Axis, y: Axis, x_title: str, y_title: str) -> str:
    parts = []
    for value in x.ticks():
        parts.append(_line(x.at(value), y.start, x.at(value), y.end))
        parts.append(_text(x.at(value), y.start + 16, number(value), "middle"))
    for value in y.ticks():
        parts.append(_line(x.start, y.at(value), x.end, y.at(value)))
        parts.append(_text(x.start - 6, y.at(value) + 4, number(value), "end"))
    parts.append(_text((x.start + x.end) / 2, y.start + 36, x_title, "middle"))
    middle = (y.start + y.end) / 2
    parts.append(_text(14, middle, y_title, "middle", f'transform="rotate(-90 14 {middle:.1f})"'))
    return "".join(parts)


Point = tuple[float, float, str]


def scatter(
    title: str,
    series: Mapping[str, Sequence[Point]],
    x_title: str,
    y_title: str,
    ceilings: Sequence[tuple[str, Sequence[tuple[float, float]]]] = (),
    joined: bool = False,
    is_log: bool = True,
) -> str:
    """Points (x, y, title) of each series, ``joined`` by lines or not; ``ceilings`` are named lines above them."""
    height = 400
    points = [point for own in series.values() for point in own]
    lines = [corner for _, corners in ceilings for corner in corners]
    x = Axis.over([point[0] for point in points], 60, _WIDTH - 12, is_log)
    y = Axis.over([point[1] for point in points] + [at for _, at in lines], height - 50, 34, is_log)
    parts = [_frame(x, y, x_title, y_title)]
    for name, corners in ceilings:
        visible = [(min(max(a, x.low), x.high), b) for a, b in corners]
        path = "L".join(f"{x.at(a):.1f} {y.at(b):.1f}" for a, b in visible)
        parts.append(f'<path d="M{path}" fill="none" stroke="{_INK}" stroke-width="1.5" stroke-dasharray="6 3"/>')
        parts.append(_text(x.at(visible[-1][0]) - 4, y.at(visible[-1][1]) - 6, name, "end", 'font-size="11"'))
    for index, own in enumerate(series.values()):
        if joined and len(own) > 1:
            path = "L".join(f"{x.at(a):.1f} {y.at(b):.1f}" for a, b, _ in own)
            colour = COLOURS[index % len(COLOURS)]
            parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts += [mark(index, x.at(a), y.at(b), text, 3.5 if len(own) > 60 else 4.5) for a, b, text in own]
    parts.append(legend(list(series), 18))
    return document(_WIDTH, height, title, "".join(parts))


def strips(
    title: str,
    series: Mapping[str, Sequence[tuple[float, str]]],
    kinds: Mapping[str, int],
    x_title: str,
    reference: float,
) -> str:
    """A row a series: every value as a mark, a box over the middle half and its median; ``reference`` as a line.

    Series of one of ``kinds`` share their mark.
    """
    row, top = 54, 12
    height = top + row * len(series) + 48
    left = 20 + 7.5 * max(map(len, series))
    values = [value for own in series.values() for value, _ in own] + [reference]
    x = Axis.over(values, left, _WIDTH - 12, is_log=True)
    y = Axis(0, 1, top + row * len(series), top)
    parts = []
    for value in x.ticks():
        parts.append(_line(x.at(value), y.start, x.at(value), y.end))
        parts.append(_text(x.at(value), y.start + 16, f"{number(value)}x", "middle"))
    parts.append(_line(x.at(reference), y.start, x.at(reference), y.end, _INK, 'stroke-width="1.5"'))
    parts.append(_text((x.start + x.end) / 2, y.start + 38, x_title, "middle"))
    for place, (name, own) in enumerate(series.items()):
        middle, index = top + row * (place + 0.5), kinds[name]
        ordered = sorted(value for value, _ in own)
        low, median, high = (_quantile(ordered, share) for share in (0.25, 0.5, 0.75))
        parts.append(_text(left - 8, middle + 4, name, "end"))
        for order, (value, text) in enumerate(own):
            # Marks of near values are spread over the row in a fixed pattern.
            offset = ((order * 0.618034) % 1 - 0.5) * row * 0.6
            parts.append(mark(index, x.at(value), middle + offset, text, 2.5, 0.5))
        width = max(1.0, x.at(high) - x.at(low))
        parts.append(
            f'<rect x="{x.at(low):.1f}" y="{middle - 11:.1f}" width="{width:.1f}" height="22" fill="#FFFFFF" '
            f'fill-opacity="0.55" stroke="{_INK}"><title>{escape(name)}: the middle half lies between '
            f"{low:.2f}x and {high:.2f}x</title></rect>"
        )
        parts.append(_line(x.at(median), middle - 11, x.at(median), middle + 11, _INK, 'stroke-width="2.5"'))
    return document(_WIDTH, height, title, "".join(parts))


def _quantile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def diverging(ratio: float) -> tuple[str, str]:
    """(fill, ink) of a speed-up: white at 1, blue above, orange below, full at 8x and 1/8x; the ink that reads best."""
    share = max(-1.0, min(1.0, math.log2(ratio) / 3))
    target = (0, 90, 160) if share >= 0 else (200, 80, 0)
    red, green, blue = (round(255 + abs(share) * (channel - 255)) for channel in target)
    fill = f"#{red:02X}{green:02X}{blue:02X}"
    return fill, max(("#000000", "#FFFFFF"), key=lambda ink: contrast(fill, ink))


def contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio of two colours, 1 to 21."""
    dark, light = sorted(map(_luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return sum(share * c for share, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def heat_map(
    title: str,
    cells: Mapping[tuple[str, str], tuple[float, int]],
    columns: Sequence[str],
    rows: Sequence[str],
    x_title: str,
    y_title: str,
) -> str:
    """``cells[row, column]`` is (speed-up, number of problems): its number on its colour; an empty cell stays blank."""
    left, top = 26 + 7.2 * max(map(len, rows)), 8
    width = max(46.0, min(76.0, (_WIDTH - left - 8) / len(columns)))
    slanted = max(map(len, columns)) * 7.2 > width
    bottom = 22 + (4.6 * max(map(len, columns)) if slanted else 0)
    row_height = 30
    y_end = top + row_height * len(rows)
    parts = []
    for i, row in enumerate(rows):
        y = top + row_height * i
        parts.append(_text(left - 6, y + 20, row, "end"))
        for j, column in enumerate(columns):
            if (row, column) not in cells:
                continue
            ratio, count = cells[row, column]
            fill, ink = diverging(ratio)
            x = left + width * j
            said = escape(f"{y_title} {row}, {x_title} {column}: {ratio:.2f}x over {count} problems")
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width - 2:.1f}" height="{row_height - 2}" fill="{fill}" '
                f'stroke="#999"><title>{said}</title></rect>'
            )
            parts.append(_text(x + width / 2 - 1, y + 19, f"{ratio:.3g}x", "middle", f'fill="{ink}" font-size="12"'))
    for j, column in enumerate(columns):
        x, y = left + width * (j + 0.5), y_end + 14
        turned = f'transform="rotate(-35 {x:.1f} {y:.1f})"' if slanted else ""
        parts.append(_text(x, y, column, "end" if slanted else "middle", turned))
    total = left + width * len(columns) + 8
    parts.append(_text((left + total) / 2, y_end + bottom + 14, x_title, "middle"))
    middle = (top + y_end) / 2
    parts.append(_text(13, middle, y_title, "middle", f'transform="rotate(-90 13 {middle:.1f})"'))
    return document(max(total, 300), y_end + bottom + 24, title, "".join(parts))


def bars(title: str, series: Mapping[str, Mapping[str, tuple[float, float, float]]], x_title: str) -> str:
    """Horizontal bars: ``series[name][group]`` is (value, low, high), the interval drawn on the bar's end."""
    groups = list(dict.fromkeys(group for own in series.values() for group in own))
    thick, gap = 16, 14
    left = 16 + 7.2 * max(map(len, groups))
    top = 30
    height = top + len(groups) * (thick * len(series) + gap) + 44
    most = max(high for own in series.values() for _, _, high in own.values())
    x = Axis(0, most * 1.02, left, _WIDTH - 60)
    parts = [legend(list(series), 16, left)]
    y_end = height - 44
    for value in x.ticks():
        parts.append(_line(x.at(value), top, x.at(value), y_end))
        parts.append(_text(x.at(value), y_end + 16, number(value), "middle"))
    parts.append(_text((x.start + x.end) / 2, y_end + 36, x_title, "middle"))
    for i, group in enumerate(groups):
        y = top + i * (thick * len(series) + gap) + gap / 2
        parts.append(_text(left - 8, y + thick * len(series) / 2 + 4, group, "end"))
        for j, (name, own) in enumerate(series.items()):
            if group not in own:
                continue
            value, low, high = own[group]
            colour = COLOURS[j % len(COLOURS)]
            at, said = y + thick * j, escape(f"{group}, {name}: {value:,.4g} ({low:,.4g} to {high:,.4g})")
            parts.append(
                f'<rect x="{left:.1f}" y="{at:.1f}" width="{x.at(value) - left:.1f}" height="{thick - 2}" '
                f'fill="{colour}"><title>{said}</title></rect>'
            )
            parts.append(_line(x.at(low), at + thick / 2 - 1, x.at(high), at + thick / 2 - 1, _INK, 'stroke-width="2"'))
            parts.append(_text(x.at(high) + 5, at + thick - 4, number(value), "start", 'font-size="11"'))
            parts.append(
                mark(j, left - 0.0 + 7, at + thick / 2 - 1, name, 3, 1).replace(f'fill="{colour}"', 'fill="#FFF"')
            )
    return document(_WIDTH, height, title, "".join(parts))
