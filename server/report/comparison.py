"""The comparison: each site alone, federated, federated with privacy, and pooled, over identical folds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from server.report.clients import MAX_ROWS
from server.report.record import Arm, Comparison, Gain, Score
from server.report.svg import Figure, Plot, cut, padded
from server.report.words import joined, number, percent, points

LABELS = {
    "alone": ("s4", "alone"),
    "federated": ("s1", "federated"),
    "federated_dp": ("s2", "federated, private"),
    "pooled": ("s3", "pooled"),
}
"""CSS class and label of each arm, in the order in which they are drawn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmRow:
    """One way of training, over all sites' held-out examples."""

    css: str
    label: str
    score: Score
    epsilon: float | None
    delta: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteRow:
    """One site's own held-out examples under every way of training.

    Attributes:
        scores: By arm; arms that were not run are missing.
        gains: Accuracy beyond training alone: federated, and federated with privacy.
    """

    site: str
    scores: Mapping[str, Score]
    majority: float | None
    gains: Mapping[str, Gain]


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """What the page shows of a comparison."""

    folds: int
    test_majority: float | None
    arms: tuple[ArmRow, ...]
    sites: tuple[SiteRow, ...]
    left_out: int
    verdict: tuple[str, ...]
    figure: Figure | None


def compared(comparison: Comparison | None) -> Compared | None:
    """The comparison's tables, chart and verdict; None where there was none."""
    if comparison is None:
        return None
    rows = _site_rows(comparison)
    return Compared(
        folds=comparison.folds,
        test_majority=comparison.test_majority,
        arms=_arm_rows(comparison),
        sites=rows[:MAX_ROWS],
        left_out=max(0, len(rows) - MAX_ROWS),
        verdict=_verdict(comparison, rows),
        figure=_figure(rows) if 0 < len(rows) <= MAX_ROWS else None,
    )


def _shared(comparison: Comparison) -> dict[str, Arm]:
    """The arms that train one model for all sites."""
    arms = comparison.arms
    pairs = (("federated", arms.federated), ("federated_dp", arms.federated_dp), ("pooled", arms.pooled))
    return {key: arm for key, arm in pairs if arm is not None}


def _arm_rows(comparison: Comparison) -> tuple[ArmRow, ...]:
    shared = [(*LABELS[key], arm) for key, arm in _shared(comparison).items()]
    alone = [("s4", f"{site} alone", arm) for site, arm in comparison.arms.alone.items()][:MAX_ROWS]
    return tuple(
        ArmRow(
            css=css,
            label=label,
            score=arm,
            epsilon=max(arm.epsilon.values(), default=None),
            delta=arm.delta,
        )
        for css, label, arm in (*shared, *alone)
    )


def _site_rows(comparison: Comparison) -> tuple[SiteRow, ...]:
    shared, alone = _shared(comparison), comparison.arms.alone
    rows = []
    for site in dict.fromkeys([*alone, *(site for arm in shared.values() for site in arm.sites)]):
        arms = {**({"alone": alone[site]} if site in alone else {}), **shared}
        scores = {key: arm.sites[site] for key, arm in arms.items() if site in arm.sites}
        majority = next((score.majority for score in scores.values() if score.majority is not None), None)
        gains = {key: gain for key, gain in comparison.gains.get(site, {}).items() if gain.accuracy_gain is not None}
        rows.append(SiteRow(site=site, scores=scores, majority=majority, gains=gains))
    return tuple(rows)


def _verdict(comparison: Comparison, rows: tuple[SiteRow, ...]) -> tuple[str, ...]:
    """Who gains over training alone, what pooling would add, and where nothing helps, in sentences."""
    sentences = []
    for key, name in (("federated", "Federation"), ("federated_dp", "Federation with privacy")):
        sites: dict[str, list[str]] = {"gains": [], "no clear gain": [], "loses": []}
        for row in rows:
            if key in row.gains:
                sites.setdefault(row.gains[key].verdict, []).append(f"{row.site} ({gain_text(row.gains[key])})")
        parts = [f"{verdict} at {joined(named)}" for verdict, named in sites.items() if named and verdict]
        if parts:
            sentences.append(f"{name} against training alone, in points of accuracy: {'; '.join(parts)}.")
    if sentences:
        sentences.append("A difference counts as a gain or a loss where it is more than twice its standard error (±).")
    if comparison.pooled_minus_federated is not None:
        change = points(comparison.pooled_minus_federated)
        sentences.append(f"Pooling all data in one place would change federation's accuracy by {change} points.")
    hopeless = [row.site for row in rows if row.majority is not None and _best(row) <= row.majority]
    if hopeless:
        sentences.append(f"At {joined(hopeless)} no way of training beats always naming the commonest class.")
    return tuple(sentences)


def gain_text(gain: Gain) -> str:
    """A difference in percentage points, with its standard error where that is known."""
    error = f" ± {100 * gain.standard_error:.1f}" if gain.standard_error is not None else ""
    return f"{points(gain.accuracy_gain or 0.0)}{error}"


def _best(row: SiteRow) -> float:
    return max((score.accuracy_mean or 0.0 for score in row.scores.values()), default=0.0)


def _figure(rows: tuple[SiteRow, ...]) -> Figure | None:
    """A block a site: a dot for each way of training, with one standard deviation to each side."""
    scores = [score for row in rows for score in row.scores.values() if score.accuracy_mean is not None]
    if not scores:
        return None
    ends = [(s.accuracy_mean or 0.0) + side * (s.accuracy_sd or 0.0) for s in scores for side in (-1, 1)]
    ends += [row.majority for row in rows if row.majority is not None]
    keys = [key for key in LABELS if any(key in row.scores for row in rows)]
    block = len(keys) + 1
    total = block * len(rows)
    left = min(180, 24 + round(7.4 * max(len(cut(row.site)) for row in rows)))
    plot = Plot(
        x=padded(ends, floor=0, ceiling=1), y=(total, 0), width=1080, height=15 * total + 56, left=left, right=90,
        top=6, bottom=40,
    )  # fmt: skip
    plot.axes(x=lambda v: percent(v, 0), y=None, x_label="accuracy on the site's own held-out examples")
    for i, row in enumerate(rows):
        start = i * block + 0.5
        middle = plot.py(start + len(keys) / 2) + 4
        plot.text(plot.left - 12, middle, cut(row.site), css="row strong", anchor="end", title=row.site)
        if row.majority is not None:
            plot.notch(row.majority, (start, start + len(keys)))
        for k, key in enumerate(keys):
            score = row.scores.get(key)
            if score is None or score.accuracy_mean is None:
                continue
            mean, sd, y = score.accuracy_mean, score.accuracy_sd or 0.0, start + k + 0.5
            css, label = LABELS[key]
            plot.whisker((mean - sd, mean + sd), y, css)
            plot.dot(mean, y, css, f"{row.site}, {label}: {percent(mean)} ± {number(100 * sd, 2)} points")
            plot.text(plot.right + 8, plot.py(y) + 4, percent(mean))
    summary = (
        "Each dot is a mean over folds, its line one standard deviation to each side; the dashed mark is always naming "
        "the site's commonest class."
    )
    return Figure(
        title="Accuracy at each site, by way of training",
        summary=summary,
        drawing=plot.draw(f"Comparison at {joined([row.site for row in rows])}. The tables hold the figures."),
        legend=tuple(LABELS[key] for key in keys),
        wide=True,
    )
