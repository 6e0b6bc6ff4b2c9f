"""Charts of the report as inline SVG, coloured by the page's CSS variables so that they follow light and dark mode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

Points = Sequence[tuple[float, float]]


class Curve(NamedTuple):
    """A line of a chart. `tone` is a CSS colour, `mark` a point to point out, such as the best one."""

    name: str
    points: Points
    tone: str
    dashed: bool = False
    mark: tuple[float, float] | None = None


def bars(names: Sequence[str], series: Sequence[tuple[str, str, Sequence[float | None]]], alt: str) -> str:
    """Horizontal bars of per cent, a group a name, a bar a series `(name, tone, fractions)`."""
    thick, gap, left, width = 9, 12, 116, 560
    group = thick * len(series) + gap
    height = group * len(names) + 24
    scale = (width - left - 44) / 100
    body = [_vertical(left + scale * p, 4, height - 20, f"{p}") for p in range(0, 101, 20)]
    for row, name in enumerate(names):
        top = row * group + gap / 2
        body.append(_text(left - 10, top + group / 2 - gap / 2 + 4, name, "end", "name"))
        for i, (label, tone, values) in enumerate(series):
            value = values[row]
            if value is None:
                continue
            y, length = top + i * thick, max(1.0, scale * 100 * value)
            title = f"<title>{escape(f'{name}, {label}: {100 * value:.1f} %')}</title>"
            shape = f'x="{left}" y="{y:.1f}" width="{length:.1f}" height="{thick - 2}" rx="2" fill="{tone}"'
            body.append(f"<rect {shape}>{title}</rect>")
            body.append(_text(left + length + 5, y + thick - 2, f"{100 * value:.0f}", "start", "value"))
    return _svg(width, height, body, alt)


def lines(curves: Sequence[Curve], x_label: str, y_label: str, alt: str, percent: bool = True) -> str:
    """Lines over one pair of axes; `percent` shows fractions as per cent."""
    width, height, left, bottom, top = 560, 300, 46, 40, 12
    points = [point for curve in curves for point in curve.points]
    x0, x1 = min(x for x, _ in points), max(x for x, _ in points)
    ticks = _ticks(min(0.0, min(y for _, y in points)), max(y for _, y in points))
    y0, y1 = ticks[0], ticks[-1]
    unit = 100 if percent else 1

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x0) / ((x1 - x0) or 1)
        up = (y - y0) / ((y1 - y0) or 1)
        return left + across * (width - left - 14), height - bottom - up * (height - bottom - top)

    body = []
    for tick in ticks:
        y = place(x0, tick)[1]
        body.append(f'<line class="grid" x1="{left}" y1="{y:.1f}" x2="{width - 14}" y2="{y:.1f}"/>')
        body.append(_text(left - 7, y + 4, f"{unit * tick:g}", "end", "tick"))
    for tick in _ticks(x0, x1):
        if x0 <= tick <= x1:
            body.append(_text(place(tick, y0)[0], height - bottom + 16, f"{tick:g}", "middle", "tick"))
    body.append(_text((left + width) / 2, height - 6, x_label, "middle", "axis"))
    turned = f'text-anchor="middle" transform="translate(12 {height / 2:.0f}) rotate(-90)"'
    body.append(f'<text class="axis" {turned}>{escape(y_label)}</text>')
    for curve in curves:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in curve.points))
        dash = ' stroke-dasharray="5 4"' if curve.dashed else ""
        title = f"<title>{escape(curve.name)}</title>"
        body.append(f'<polyline class="line" points="{path}" stroke="{curve.tone}"{dash}>{title}</polyline>')
        if curve.mark:
            x, y = place(*curve.mark)
            title = f"<title>{escape(f'{curve.name}: {unit * curve.mark[1]:.1f} at {curve.mark[0]:g}')}</title>"
            body.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{curve.tone}" class="mark">{title}</circle>')
    return _svg(width, height, body, alt)


def legend(entries: Sequence[tuple[str, str, bool]]) -> str:
    """Names beside their colours: `(name, tone, dashed)`."""
    items = [
        f'<li><span class="swatch{" dashed" if dashed else ""}" style="--tone:{tone}"></span>{escape(name)}</li>'
        for name, tone, dashed in entries
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers that enclose both."""
    span = (high - low) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if span / (factor * step) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * i, 10) for i in range(first, max(last, first + 1) + 1)]


def _vertical(x: float, top: float, bottom: float, label: str) -> str:
    return f'<line class="grid" x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}"/>' + _text(
        x, bottom + 14, label, "middle", "tick"
    )


def _text(x: float, y: float, text: str, anchor: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(width: float, height: float, body: Sequence[str], alt: str) -> str:
    box = f'viewBox="0 0 {width:.0f} {height:.0f}" preserveAspectRatio="xMinYMin"'
    return f'<svg {box} role="img" aria-label="{escape(alt)}">{"".join(body)}</svg>'
