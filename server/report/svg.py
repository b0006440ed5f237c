"""Charts as inline SVG, without a plotting library.

Colours are the page's CSS classes (`s1` ... `s8` for series), so that one drawing serves light, dark and print; every
mark can carry a tooltip. All text is escaped here: site and class names come from elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup, escape

SERIES = 8
"""Number of colours that can be told apart; see page.html."""

MAX_POINTS = 300
"""A line has no more points than this, however many rounds it spans."""

Point = tuple[float, float]
Format = Callable[[float], str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A chart and what stands around it.

    Attributes:
        title: Heading.
        summary: What the chart shows, in a sentence or two; read aloud in place of the drawing.
        drawing: The SVG.
        legend: CSS class and label of each series; may be empty.
        wide: Whether it takes the page's full width.
    """

    title: str
    summary: str
    drawing: Markup
    legend: tuple[tuple[str, str], ...] = ()
    wide: bool = False


def tag(name: str, *children: Markup | str, **attributes: object) -> Markup:
    """An element; `class_` stands for `class`, `stroke_width` for `stroke-width`; floats are cut to 0.1 units."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_short(value))}"' for key, value in attributes.items()
    )
    return Markup("<{0}{1}>{2}</{0}>").format(name, Markup(written), Markup("").join(children))  # noqa: S704 - escaped


def _short(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)


def cut(text: str, length: int = 22) -> str:
    """A name short enough for an axis."""
    return text if len(text) <= length else text[: length - 1] + "…"


def series(index: int) -> str:
    """CSS class of the series with that index, from 0."""
    return f"s{index % SERIES + 1}"


def ticks(low: float, high: float, count: int = 5, *, whole: bool = False) -> list[float]:
    """Round numbers, about `count` of them, that lie within `low` to `high`."""
    span = high - low
    if not (math.isfinite(span) and span > 0):
        return [low]
    magnitude = 10.0 ** math.floor(math.log10(span / count))
    step = min((m * magnitude for m in (1, 2, 2.5, 5, 10)), key=lambda s: abs(span / s - count))
    if whole:
        step = max(1.0, float(round(step)))
    slack = 1e-9 * span  # 0.3 / 0.1 is not quite 3
    return [n * step for n in range(math.ceil((low - slack) / step), math.floor((high + slack) / step) + 1)]


def padded(values: Iterable[float], *, floor: float = -math.inf, ceiling: float = math.inf) -> Point:
    """A range that leaves a little room around the values; (0, 1) where there are none."""
    known = [v for v in values if math.isfinite(v)]
    if not known:
        return 0.0, 1.0
    room = (max(known) - min(known)) * 0.08 or abs(known[0]) * 0.1 or 0.5
    return max(floor, min(known) - room), min(ceiling, max(known) + room)


def thin(points: Sequence[Point]) -> list[Point]:
    """At most `MAX_POINTS` of the points, first and last among them."""
    if len(points) <= MAX_POINTS:
        return list(points)
    last = len(points) - 1
    return [points[round(i * last / (MAX_POINTS - 1))] for i in range(MAX_POINTS)]


class Plot:
    """A frame with linear scales, to which marks are added."""

    def __init__(
        self, *, x: Point, y: Point, width: int = 520, height: int = 230, left: int = 46, right: int = 14,
        top: int = 12, bottom: int = 38,
    ) -> None:  # fmt: skip
        self._x, self._y = x, y
        self._width, self._height = width, height
        self.left, self.right, self.top, self.bottom = left, width - right, top, height - bottom
        self._marks: list[Markup] = []

    def px(self, x: float) -> float:
        """Horizontal position of a value."""
        return self.left + (x - self._x[0]) / (self._x[1] - self._x[0]) * (self.right - self.left)

    def py(self, y: float) -> float:
        """Vertical position of a value."""
        return self.bottom - (y - self._y[0]) / (self._y[1] - self._y[0]) * (self.bottom - self.top)

    def draw(self, label: str) -> Markup:
        """The SVG, described to screen readers by `label`."""
        box = f"0 0 {self._width} {self._height}"
        return tag("svg", *self._marks, viewBox=box, role="img", aria_label=label)

    def text(
        self, x: float, y: float, text: str, *, css: str = "tick",
        anchor: Literal["start", "middle", "end"] = "start", title: str = "",
    ) -> None:  # fmt: skip
        """Text with its baseline at the position, in drawing units."""
        self._marks.append(tag("text", escape(text), _tip(title), x=x, y=y, class_=css, text_anchor=anchor))

    def axes(
        self, *, x: Format, y: Format | None, x_label: str = "", y_label: str = "", whole_x: bool = False,
        whole_y: bool = False,
    ) -> None:  # fmt: skip
        """Grid lines and tick labels; without a y format, rows label themselves and the grid is vertical."""
        for value in ticks(*self._x, 7 if whole_x else 5, whole=whole_x):
            if y is None:
                self._rule(self.px(value), self.top, self.px(value), self.bottom, "grid")
            self.text(self.px(value), self.bottom + 15, x(value), anchor="middle")
        if y is not None:
            for value in ticks(*self._y, 4, whole=whole_y):
                self._rule(self.left, self.py(value), self.right, self.py(value), "grid")
                self.text(self.left - 7, self.py(value) + 4, y(value), anchor="end")
        self._rule(self.left, self.bottom, self.right, self.bottom, "axis")
        if x_label:
            self.text((self.left + self.right) / 2, self.bottom + 31, x_label, css="label", anchor="middle")
        if y_label:
            self.text(2, self.top - 12, y_label, css="label")

    def _rule(self, x1: float, y1: float, x2: float, y2: float, css: str) -> None:
        self._marks.append(tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=css))

    def level(self, y: float, label: str) -> None:
        """A dashed horizontal line: something to compare with."""
        self._rule(self.left, self.py(y), self.right, self.py(y), "mark")
        self.text(self.right, self.py(y) - 5, label, css="note", anchor="end")

    def upright(self, x: float, label: str) -> None:
        """A dashed vertical line with its label above."""
        self._rule(self.px(x), self.top - 2, self.px(x), self.bottom, "mark")
        late = self.px(x) > (self.left + self.right) / 2
        at = self.px(x) + (4 if late else -4)
        self.text(at, self.top - 6, label, css="note", anchor="end" if late else "start")

    def line(self, points: Sequence[Point], css: str, tip: Callable[[Point], str], *, dashed: bool = False) -> None:
        """Straight lines through the points, with a dot at each where they are few."""
        points = thin(points)
        path = " ".join(f"{self.px(x):.1f},{self.py(y):.1f}" for x, y in points)
        self._marks.append(tag("polyline", points=path, class_=f"line {css}{' dashed' if dashed else ''}"))
        radius = 2.4 if len(points) <= 40 else 1.0
        for point in points:
            self.dot(*point, f"{css} point", tip(point), radius)

    def band(self, lower: Sequence[Point], upper: Sequence[Point], css: str) -> None:
        """The area between two lines."""
        outline = [*thin(lower), *reversed(thin(upper))]
        path = " ".join(f"{self.px(x):.1f},{self.py(y):.1f}" for x, y in outline)
        self._marks.append(tag("polygon", points=path, class_=f"band {css}"))

    def dot(self, x: float, y: float, css: str, tip: str = "", radius: float = 4.5) -> None:
        """A dot at a value."""
        self._marks.append(tag("circle", _tip(tip), cx=self.px(x), cy=self.py(y), r=radius, class_=f"dot {css}"))

    def bar(self, x: Point, y: Point, css: str, tip: str = "", opacity: float = 1.0) -> None:
        """A rectangle between two values on each axis."""
        x1, x2 = sorted(map(self.px, x))
        y1, y2 = sorted(map(self.py, y))
        fade = {} if opacity >= 1 else {"fill_opacity": f"{opacity:.2f}"}
        self._marks.append(
            tag("rect", _tip(tip), x=x1, y=y1, width=x2 - x1, height=y2 - y1, class_=f"bar {css}", **fade)
        )

    def whisker(self, x: Point, y: float, css: str) -> None:
        """A horizontal interval."""
        self._rule(self.px(x[0]), self.py(y), self.px(x[1]), self.py(y), f"whisker {css}")

    def notch(self, x: float, y: Point, css: str = "mark") -> None:
        """A short vertical line."""
        self._rule(self.px(x), self.py(y[0]), self.px(x), self.py(y[1]), css)


def _tip(text: str) -> Markup:
    """What shows while the pointer rests on a mark."""
    return tag("title", escape(text)) if text else Markup()
