"""A study's result as JSON values."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from simulations.study.folder import FORMAT, Study
from simulations.study.page import verdict
from simulations.study.summary import Difference, Spread, Summary, TargetTime


def describe_study(study: Study, summary: Summary) -> dict[str, Any]:
    """Arms with their figures, effects, and what they say; what was not measured is null."""
    document = {
        "format": FORMAT,
        "name": study.name,
        "command": study.command,
        "repeats": study.repeats,
        "vary": {varied.key: list(varied.values) for varied in study.varied},
        "set": list(study.overrides),
        "targets": list(summary.targets),
        "arms": [
            {
                "label": arm.label,
                "settings": dict(arm.settings),
                **{
                    name: _spread(getattr(arm, name))
                    for name in (
                        "accuracy", "virtual_seconds", "wasted", "worst_tenth", "median", "best_tenth", "gini",
                        "staleness",
                    )
                },
                "against_first": _difference(arm.against_first),
                "epsilon": arm.epsilon,
                "reached": [_target(target) for target in arm.targets],
                "runs": [asdict(run) for run in arm.runs],
            }
            for arm in summary.arms
        ],
        "effects": [
            {"value": effect.label, "instead_of": effect.first, "accuracy": _difference(effect.accuracy)}
            for effect in summary.effects
        ],
        "verdict": [sentence.replace("\u202f", " ") for sentence in verdict(study, summary)],
    }  # fmt: skip
    return {key: _finite(value) for key, value in document.items()}


def _spread(spread: Spread | None) -> dict[str, Any] | None:
    if spread is None:
        return None
    return {"mean": spread.mean, "lowest": spread.low, "highest": spread.high, "values": list(spread.values)}


def _difference(difference: Difference | None) -> dict[str, Any] | None:
    if difference is None:
        return None
    return {"mean": difference.mean, "error": difference.error, "verdict": difference.verdict}


def _target(target: TargetTime) -> dict[str, Any]:
    return {**asdict(target), "runs_that_did": len(target.rounds)}


def _finite(value: Any) -> Any:
    """JSON has no infinity: null in its place."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
