"""Figures over clients: how well the model serves each, and how the data is divided among them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from server.report.record import ClientResult, Record, Result
from server.report.svg import Figure, Plot, cut, padded, series
from server.report.words import count, joined, number, percent, quantiles

MAX_ROWS = 60
"""Beyond so many clients, distributions stand in for rows."""

MAX_STACKED = 8
MAX_MAPPED = 40
"""Most classes that are told apart by colour, and by column; beyond that only sizes are drawn."""

ROW = 19
BINS = 24


def accuracy_by_client_figure(record: Record) -> Figure | None:
    """The final model's accuracy on each client's own held-out examples; None where it is not on record."""
    result = record.result
    scores = {n: c.accuracy for n, c in result.clients.items() if c.accuracy is not None} if result else {}
    if result is None or not scores:
        return None
    ranked = sorted(scores.items(), key=lambda item: -item[1])
    (best, high), (worst, low) = ranked[0], ranked[-1]
    summary = (
        f"Best at {best} ({percent(high)}), worst at {worst} ({percent(low)})."
        if len(ranked) > 1
        else f"{percent(high)} at {best}."
    )
    if result.accuracy is not None:
        summary += f" The dashed line is the accuracy overall, {percent(result.accuracy)}."
    title = "Accuracy at each client"
    if len(ranked) > MAX_ROWS:
        plot = _histogram(list(scores.values()), lambda v: percent(v, 0), "accuracy", also=result.accuracy)
        if result.accuracy is not None:
            plot.upright(result.accuracy, f"overall {percent(result.accuracy)}")
        middle = quantiles(list(scores.values()))
        half = f"{percent(middle[2][1])} and {percent(middle[4][1])}"
        summary = f"Half of the {number(len(scores))} clients lie between {half}. {summary}"
        return Figure(title=title, summary=summary, drawing=plot.draw(f"{title}. {summary}"))
    left = _margin(scores)
    span = padded([*scores.values(), *([result.accuracy] if result.accuracy is not None else [])], floor=0, ceiling=1)
    height = ROW * len(ranked) + 60
    wide = _mapped(result)  # the map below takes the full width
    plot = Plot(
        x=span, y=(len(ranked), 0), width=1080 if wide else 520, height=height, left=left, right=60, top=22, bottom=38
    )
    plot.axes(x=lambda v: percent(v, 0 if span[1] - span[0] > 0.05 else 1), y=None, x_label="accuracy")
    if result.accuracy is not None:
        plot.upright(result.accuracy, "overall")
    for i, (name, accuracy) in enumerate(ranked):
        n = result.clients[name].test_examples
        size = f" of {count(n, 'example')}" if n else ""
        _row_label(plot, i + 0.5, name)
        plot.dot(accuracy, i + 0.5, "s1", f"{name}: {percent(accuracy)}{size}", 5)
        plot.text(plot.right + 8, plot.py(i + 0.5) + 4, percent(accuracy))
    return Figure(title=title, summary=summary, drawing=plot.draw(f"{title}. {summary}"), wide=wide)


def partition_figures(record: Record) -> list[Figure]:
    """How many examples of which class each client holds; empty where it is not on record."""
    result = record.result
    sizes = {n: size for n, c in result.clients.items() if (size := _size(c)) is not None} if result else {}
    if result is None or not sizes:
        return []
    smallest, largest, total = min(sizes.values()), max(sizes.values()), sum(sizes.values())
    each = f"{number(smallest)} each" if smallest == largest else f"between {number(smallest)} and {number(largest)}"
    summary = f"{count(len(sizes), 'client')} hold {count(total, 'training example')}, {each}."
    counts = {n: result.clients[n].class_counts for n in sizes if any(result.clients[n].class_counts)}
    if len(sizes) > MAX_ROWS:
        return [_sizes_figure(sizes, summary), *_skew_figures(counts)]
    classes = max((len(c) for c in counts.values()), default=0)
    names = [*result.data.class_names, *(f"class {i}" for i in range(len(result.data.class_names), classes))]
    if 0 < classes <= MAX_STACKED:
        return [_stacked_figure(sizes, counts, names[:classes], summary)]
    if _mapped(result):
        return [_mapped_figure(sizes, counts, names[:classes], summary)]
    return [_stacked_figure(sizes, {}, [], summary)]


def _mapped(result: Result) -> bool:
    """Whether the partition is drawn as a map of clients and classes."""
    return MAX_STACKED < max((len(c.class_counts) for c in result.clients.values()), default=0) <= MAX_MAPPED


def _size(client: ClientResult) -> int | None:
    return client.train_examples if client.train_examples is not None else sum(client.class_counts) or None


def _margin(names: Mapping[str, object]) -> int:
    """Room that the longest name needs."""
    return min(160, 18 + round(6.8 * max(len(cut(name)) for name in names)))


def _row_label(plot: Plot, row: float, name: str) -> None:
    plot.text(plot.left - 8, plot.py(row) + 4, cut(name), css="row", anchor="end", title=name)


def _histogram(
    values: Sequence[float], label: Callable[[float], str], x_label: str, *, also: float | None = None
) -> Plot:
    """How many clients have which value; the axis reaches `also`."""
    low, high = min(values), max(values)
    if also is not None:
        low, high = min(low, also), max(high, also)
    if high <= low:
        low, high = low - 0.5, high + 0.5
    bins = [0] * BINS
    for value in values:
        bins[min(BINS - 1, int((value - low) / (high - low) * BINS))] += 1
    width = (high - low) / BINS
    plot = Plot(x=(low, high), y=(0, max(bins) * 1.08), top=26)
    plot.axes(x=label, y=number, x_label=x_label, y_label="clients", whole_y=True)
    for i, n in enumerate(bins):
        edges = (low + i * width, low + (i + 1) * width)
        if n:
            plot.bar(edges, (0, n), "s1 cell", f"{label(edges[0])} to {label(edges[1])}: {count(n, 'client')}")
    return plot


def _sizes_figure(sizes: Mapping[str, int], summary: str) -> Figure:
    plot = _histogram(list(sizes.values()), number, "training examples")
    title = "Clients by size"
    return Figure(title=title, summary=summary, drawing=plot.draw(f"{title}. {summary}"))


def _skew_figures(counts: Mapping[str, Sequence[int]]) -> list[Figure]:
    if not counts:
        return []
    shares = [max(c) / sum(c) for c in counts.values()]
    held = sorted(sum(1 for n in c if n) for c in counts.values())
    plot = _histogram(shares, lambda v: percent(v, 0), "share of a client's commonest class")
    summary = (
        f"The median client holds {held[len(held) // 2]} of {max(map(len, counts.values()))} classes; its commonest "
        f"class makes up {percent(quantiles(shares)[3][1], 0)} of its examples."
    )
    title = "Clients by skew"
    return [Figure(title=title, summary=summary, drawing=plot.draw(f"{title}. {summary}"))]


def _stacked_figure(
    sizes: Mapping[str, int], counts: Mapping[str, Sequence[int]], classes: Sequence[str], summary: str
) -> Figure:
    widest = max([1, *sizes.values(), *(sum(c) for c in counts.values())])
    height = ROW * len(sizes) + 52
    plot = Plot(x=(0, widest), y=(len(sizes), 0), height=height, left=_margin(sizes), right=54, top=8, bottom=44)
    plot.axes(x=number, y=None, x_label="training examples")
    for i, (name, size) in enumerate(sizes.items()):
        _row_label(plot, i + 0.5, name)
        start = 0
        for k, n in enumerate(counts.get(name, [size])):
            label = f"{classes[k]}: " if classes else ""
            plot.bar((start, start + n), (i + 0.14, i + 0.86), series(k), f"{name}, {label}{count(n, 'example')}")
            start += n
        plot.text(plot.px(start) + 6, plot.py(i + 0.5) + 4, number(start))
    legend = tuple((series(k), name) for k, name in enumerate(classes))
    title = "Who holds what"
    return Figure(title=title, summary=summary, drawing=plot.draw(f"{title}. {summary}"), legend=legend)


def _mapped_figure(
    sizes: Mapping[str, int], counts: Mapping[str, Sequence[int]], classes: Sequence[str], summary: str
) -> Figure:
    top = 20 + round(4.6 * max(len(cut(name, 14)) for name in classes)) if len(classes) > 12 else 30
    height = ROW * len(sizes) + top + 8
    plot = Plot(
        x=(0, len(classes)), y=(len(sizes), 0), width=1080, height=height, left=_margin(sizes), right=70, top=top,
        bottom=8,
    )  # fmt: skip
    for k, name in enumerate(classes):
        shown = cut(name, 12) if len(classes) <= 12 else cut(name, 3)
        plot.text(plot.px(k + 0.5), plot.top - 9, shown, anchor="middle", title=name)
    plot.text(plot.right + 10, plot.top - 9, "all")
    for i, (name, size) in enumerate(sizes.items()):
        _row_label(plot, i + 0.5, name)
        row = counts.get(name, [])
        total = sum(row) or 1
        for k, n in enumerate(row):
            tip = f"{name}, {classes[k]}: {count(n, 'example')}, {percent(n / total)} of the client's"
            plot.bar((k, k + 1), (i, i + 1), "s1 cell", tip, opacity=max(0.04, n / total))
            if n and len(classes) <= 16:
                dark = " over" if n / total > 0.75 else ""  # light text needs this much colour behind it
                plot.text(plot.px(k + 0.5), plot.py(i + 0.5) + 4, number(n), css=f"count{dark}", anchor="middle")
        plot.text(plot.right + 10, plot.py(i + 0.5) + 4, number(size))
    summary += " The darker a cell, the larger that class's share of the client's examples."
    absent = [name for k, name in enumerate(classes) if not any(k < len(c) and c[k] for c in counts.values())]
    if absent:
        summary += f" Nobody holds {joined(absent)}."
    title = "Who holds what"
    return Figure(title=title, summary=summary, drawing=plot.draw(f"{title}. {summary}"), wide=True)
