"""What a private run would cost, before anything is trained: the plan as a document, and the same run otherwise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from common.config import RunConfig
from common.errors import PrivacyError
from common.privacy import PrivacyPlan, make_plan, spent
from common.privacy.accounting.accountant import PrivacyLoss, Renyi, ReplaceOne
from common.privacy.events import PrivacyEvent, Unit
from server.cohort import min_separation, participations

_ROWS = 8
_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)


def describe_plan(plan: PrivacyPlan, config: RunConfig, *, clients: int) -> dict[str, Any]:
    """The plan as JSON values: noise, epsilon after each round, and what it costs at a site."""
    delta = plan.budget.delta
    at_site = [plan.event(r + 1) for r in range(plan.participations)]
    return {
        "format": 1,
        "name": config.name,
        "unit": plan.unit,
        "trust": plan.trust,
        "relation": plan.relation,
        "mechanism": plan.mechanism,
        "clipping": plan.clipping,
        "clipping_norm": plan.clipping_norm,
        "noise_multiplier": plan.noise_multiplier,
        "noise_stddev": plan.noise_stddev,
        "sensitivity": plan.sensitivity,
        "dimensions": plan.dimensions,
        "sampling_rate": plan.sampling_rate,
        "denominator": plan.denominator,
        "local_steps": plan.local_steps,
        "shares": plan.shares and asdict(plan.shares),
        "rounds": plan.rounds,
        "clients": clients,
        "participations": plan.participations,
        "target_epsilon": config.privacy.target_epsilon,
        "budget": asdict(plan.budget),
        "after": [
            {"rounds": k, "epsilon": plan.epsilon_after(k), **_beside(plan.release(k), delta, plan.unit)}
            for k in _milestones(plan.rounds if plan.central else plan.participations)
        ],
        "site": {
            "unit": "example",
            "epsilon": spent(at_site, budget=plan.site_budget),
            "epsilon_against_coordinator": None if plan.central else spent(at_site, budget=plan.site_budget),
            **_beside(at_site, delta, "example"),
        },
        "warnings": warnings_of(plan),
    }


def warnings_of(plan: PrivacyPlan) -> list[str]:
    """What a person should know before they start this run."""
    found = []
    shares = plan.shares
    stddev = plan.noise_stddev * math.sqrt(plan.denominator / shares.honest if shares else 1.0)
    length = stddev * math.sqrt(plan.dimensions) / (plan.denominator * plan.clipping_norm)
    if plan.unit == "client" and length > 1:
        found.append(
            f"the cohort of {plan.denominator:g} is small: each round's noise is {length:.3g} times as long as the "
            "longest mean update; privacy.unit = 'example' protects each example with far less noise in the model"
        )
    if shares is not None and shares.honest < plan.denominator / 2:
        found.append(
            f"noise is made for {shares.honest} honest clients, {plan.denominator:g} add it: a round with all of them "
            f"has {plan.denominator / shares.honest:.3g} times the variance that is counted; raise secagg.honest to as "
            "many as can be relied on"
        )
    if plan.mechanism == "matrix" and len(plan.coefficients) == 1:
        found.append(
            "correlated noise gains nothing where a client can be asked in any two rounds in a row: noise is "
            "independent; ask fixed groups in turn (cohort.sampling = 'cyclic')"
        )
    if plan.budget.epsilon > 10:
        found.append(f"epsilon {plan.budget.epsilon:.3g} promises little: an odds ratio of e^{plan.budget.epsilon:.3g}")
    return found


def what_if(plan: PrivacyPlan, config: RunConfig, *, clients: int) -> dict[str, Any]:
    """Epsilon for other noise and rounds, and the noise that other targets need; null where there is no such plan."""
    rounds = sorted({max(1, round(config.rounds * f)) for f in _FACTORS})
    noises = [plan.noise_multiplier * f for f in (0.5, 0.7, 1.0, 1.5, 2.0)]
    targets = [plan.budget.epsilon * f for f in (0.33, 0.5, 1.0, 2.0, 3.0)]
    return {
        "rounds": rounds,
        "epsilon": [
            {
                "noise_multiplier": z,
                "epsilon": [
                    p and p.budget.epsilon for p in (_varied(plan, config, clients, r, noise=z) for r in rounds)
                ],
            }
            for z in noises
        ],
        "noise": [
            {
                "target_epsilon": e,
                "noise_multiplier": [
                    p and p.noise_multiplier for p in (_varied(plan, config, clients, r, target=e) for r in rounds)
                ],
            }
            for e in targets
        ],
    }


def _varied(
    plan: PrivacyPlan,
    config: RunConfig,
    clients: int,
    rounds: int,
    *,
    noise: float | None = None,
    target: float | None = None,
) -> PrivacyPlan | None:
    """The plan of the same run with other rounds, and other noise or another target; None where there is none."""
    privacy = config.privacy.model_copy(update={"noise_multiplier": noise, "target_epsilon": target})
    try:
        return make_plan(
            config.model_copy(update={"rounds": rounds, "privacy": privacy}),
            dimensions=plan.dimensions,
            participations=participations(config.cohort, clients, rounds),
            min_separation=min_separation(config.cohort, clients),
            clients=clients,
        )
    except PrivacyError:
        return None


def _beside(events: Sequence[PrivacyEvent], delta: float, unit: Unit) -> dict[str, float | None]:
    """What the other accountants say, as if all parameters had been fixed beforehand; null where it is infinite.

    Of distributed noise nobody has computed a privacy loss: there all of them are by Renyi accounting.
    """
    found = {
        "renyi_best_order": Renyi().epsilon(events, delta=delta, unit=unit),
        "privacy_loss": PrivacyLoss().epsilon(events, delta=delta, unit=unit),
        "replace_one": ReplaceOne().epsilon(events, delta=delta, unit=unit),
    }
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def _milestones(rounds: int) -> list[int]:
    """Some rounds between the first and the last, closer together at the start."""
    steps = {round(rounds ** (i / (_ROWS - 1))) for i in range(_ROWS)}
    return sorted({1, rounds, *(k for k in steps if 1 <= k <= rounds)})
