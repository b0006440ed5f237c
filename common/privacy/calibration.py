"""From a run's configuration to its plan: checks, calibration of the noise, choice of the order of accounting."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn

from common.config.settings import RunConfig
from common.errors import PrivacyError
from common.privacy import matrix
from common.privacy.accounting.accountant import ORDERS, Budget, best_order, calibrate_noise
from common.privacy.events import PrivacyEvent
from common.privacy.plan import PrivacyPlan
from common.privacy.shares import shares_of


def make_plan(
    config: RunConfig,
    *,
    dimensions: int,
    participations: int,
    min_separation: int = 1,
    clients: int = 1,
    noise_multiplier: float | None = None,
    order: int | None = None,
) -> PrivacyPlan:
    """The plan of a private run; noise is calibrated where the configuration gives a target.

    Args:
        config: A private configuration.
        dimensions: How many values get noise (`noised_values`), or more.
        participations: Most rounds in which one client takes part.
        min_separation: Fewest rounds from one participation of a client to its next.
        clients: Number of clients of the run; decides denominator and rate for unit `client`.
        noise_multiplier: Noise that was calibrated before, by whoever started the run; None calibrates now.
        order: Order of the accounting that it was calibrated with; None chooses the one that needs the least noise.

    Guarantee: With a target, `epsilon_after(participations) <= target_epsilon`.

    Raises:
        PrivacyError: The configuration is not private, the target cannot be reached or is not kept by the given noise,
            or the arguments contradict the configuration: other noise than it gives, more participations than rounds,
            fewer clients than a sum needs.
    """
    privacy, example = config.privacy, config.privacy.unit == "example"
    if privacy.unit == "none":
        raise PrivacyError("a run without privacy has no privacy plan", hint="set privacy.unit = 'example'")
    if not 1 <= participations <= config.rounds:
        raise PrivacyError(
            f"{participations} participations in {config.rounds} rounds", hint="a client takes part once a round"
        )
    given = privacy.noise_multiplier if noise_multiplier is None else noise_multiplier
    if privacy.noise_multiplier is not None and given != privacy.noise_multiplier:
        raise PrivacyError(
            f"noise {given} was asked for, the configuration says {privacy.noise_multiplier}",
            hint="leave it to privacy.noise_multiplier",
        )
    if given is None and privacy.target_epsilon is None:
        raise PrivacyError("neither target_epsilon nor noise_multiplier is set", hint="set privacy.target_epsilon")
    if config.cohort.size > clients and not example:
        raise PrivacyError(
            f"a cohort of {config.cohort.size} out of {clients} clients", hint="lower cohort.size, or name more clients"
        )
    cohort = config.cohort.expected_size(clients)
    schedule = {"rounds": config.rounds, "participations": participations, "min_separation": min_separation}
    plan = PrivacyPlan(
        run=config.digest(),
        unit=privacy.unit,
        mechanism=privacy.mechanism,
        clipping=privacy.clipping,
        clipping_norm=privacy.max_grad_norm if example else privacy.clipping_norm,
        target_quantile=privacy.target_quantile,
        clipping_learning_rate=privacy.clipping_learning_rate,
        noise_multiplier=given or 1.0,
        dimensions=dimensions,
        sampling_rate=privacy.sampling_rate if example else cohort / clients if _secret(config) else 1.0,
        denominator=privacy.expected_batch_size if example else cohort,
        local_steps=config.training.local_steps if example else 1,
        clients=clients,
        rounds=config.rounds,
        participations=participations,
        min_separation=min_separation,
        coefficients=matrix.coefficients(rounds=config.rounds, bands=matrix.choose_bands(**schedule))
        if privacy.mechanism == "matrix"
        else (1.0,),
        budget=Budget.opened(privacy.target_epsilon or 1.0, privacy.target_delta, order),
        shares=shares_of(config, clients=clients),
    )
    return _calibrated(plan, target=privacy.target_epsilon, given=given, order=order)


def noised_values(model: nn.Module, config: RunConfig) -> int:
    """How many values of a model get noise: those that are trained, or all, which are in a sum that clients add it to.

    A site takes all that a message holds, which is the same number there and at most that elsewhere.
    """
    if config.distributed:
        return sum(values.numel() for values in model.state_dict().values())
    return sum(values.numel() for values in model.parameters() if values.requires_grad)


def _secret(config: RunConfig) -> bool:
    """Whether cohorts are drawn so that nobody can know who was in them; the members of a masked sum do."""
    return config.central and config.cohort.sampling == "poisson" and config.cohort.size > 0


def _calibrated(plan: PrivacyPlan, *, target: float | None, given: float | None, order: int | None) -> PrivacyPlan:
    """The plan with the noise that keeps its target, or with the target that its noise keeps."""
    delta = plan.budget.delta
    if given is None and target is not None:
        release = _release(plan)
        chosen = order or best_order(target, delta, release, unit=plan.unit)
        plan = replace(plan, budget=Budget(epsilon=target, delta=delta, order=chosen))
        return replace(plan, noise_multiplier=calibrate_noise(plan.budget, release, unit=plan.unit))
    budgets = [Budget(epsilon=target or 1.0, delta=delta, order=o) for o in ((order,) if order else ORDERS)]
    cheapest = min(budgets, key=lambda budget: replace(plan, budget=budget).epsilon_after(plan.participations))
    plan = replace(plan, budget=cheapest)
    cost = plan.epsilon_after(plan.participations)
    if not math.isfinite(cost):
        raise PrivacyError(
            f"noise {given} protects nobody: epsilon is infinite at delta {delta:g}",
            hint="raise privacy.noise_multiplier, or set privacy.target_epsilon instead",
        )
    if target is None:
        return replace(plan, budget=replace(cheapest, epsilon=cost * (1 + 1e-9)))  # models differ in what is trained
    if cost > target:
        raise PrivacyError(
            f"noise {given} does not keep epsilon {target}", hint="calibrate it for these participations"
        )
    return plan


def _release(plan: PrivacyPlan) -> Callable[[float], Sequence[PrivacyEvent]]:
    def release(noise_multiplier: float) -> Sequence[PrivacyEvent]:
        return replace(plan, noise_multiplier=noise_multiplier).release(plan.participations)

    return release
