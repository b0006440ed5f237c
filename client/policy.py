"""`policy.toml`: what a site takes part in, and what it may spend. Nothing that arrives can change it.

    [budget]                    # of new ledgers, over all runs; `coterie ledger budget` changes one that exists
    epsilon = 10.0
    delta = 1e-6                # below one over the number of rows: `coterie policy check` compares them here

    [allow]
    data = ["icu"]              # not set: the data sets of site.toml, and none of the built-in ones

    [limits]
    units = ["example"]         # none, example, client
    smallest_cohort = 3
    hours = "20:00-06:00"

    [secure_aggregation]
    colluding = 2               # sites that may help the coordinator

All rules are constants of this file. None depends on how many rows there are now: whoever tries out values of delta or
of the batch size against such a limit would find that number by bisection.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

from client.policy_tables import (
    METRICS,
    UNITS,
    Allow,
    BudgetTable,
    Coordinator,
    Limits,
    Operators,
    Privacy,
    SecureAggregation,
    Table,
)
from common.config import RunConfig
from common.errors import FailureCode, PeerError, PrivacyError, SiteError
from common.flower import TRAIN_LOSS, WEIGHT, WITHIN
from common.privacy import Budget, PrivacyPlan
from common.site import read_own_toml


class Policy(Table):
    """The site's own rules."""

    budget: BudgetTable | None = Field(None, description="Without it the site trains nothing.")
    coordinator: Coordinator = Coordinator()
    operators: Operators = Operators()
    allow: Allow = Allow()
    limits: Limits = Limits()
    privacy: Privacy = Privacy()
    secure_aggregation: SecureAggregation = SecureAggregation()

    def check(self, config: RunConfig) -> None:
        """Refuse a run that this site does not join.

        Guarantee: The answer depends on the run's configuration and this file alone, never on the data.

        Raises:
            PeerError: The run asks for more than the policy allows; the peer learns no more than that.
        """
        if any(broken for broken, _ in self.rules(config)):
            raise PeerError(FailureCode.POLICY_REFUSED)

    def check_plan(self, plan: PrivacyPlan) -> None:
        """Refuse a run whose privacy plan protects less than this site wants. Depends on public constants, too.

        Raises:
            PeerError: As `check`.
        """
        if any(broken for broken, _ in self.plan_rules(plan)):
            raise PeerError(FailureCode.POLICY_REFUSED)

    def rules(self, config: RunConfig) -> Iterator[tuple[bool, str]]:
        """Whether each rule is broken, and what it is: the reason is for the site's own people."""
        limits, privacy, training, allow = self.limits, config.privacy, config.training, self.allow
        yield privacy.unit not in limits.units, f"limits.units does not hold {privacy.unit!r}"
        yield (
            config.private and privacy.target_delta > limits.largest_delta,
            "privacy.target_delta is above limits.largest_delta",
        )
        yield training.local_steps > limits.largest_local_steps, "training.local_steps is above the limit"
        epochs, length = 0 if training.local_steps else training.local_epochs, config.data.sequence_length
        yield epochs > limits.largest_local_epochs, "training.local_epochs is above limits.largest_local_epochs"
        yield length > limits.largest_sequence_length, "data.sequence_length is above limits.largest_sequence_length"
        yield (
            training.max_physical_batch > limits.largest_physical_batch,
            "training.max_physical_batch is above the limit",
        )
        yield config.rounds > limits.largest_rounds, "rounds are above limits.largest_rounds"
        if privacy.unit == "example":
            yield (
                privacy.expected_batch_size > limits.largest_batch_size,
                "privacy.expected_batch_size is above limits.largest_batch_size",
            )
            yield (
                privacy.sampling_rate > limits.largest_sampling_rate,
                "privacy.sampling_rate is above limits.largest_sampling_rate",
            )
        yield (
            allow.models is not None and config.model.name not in allow.models,
            f"allow.models does not list {config.model.name}",
        )
        for metric in released_metrics(config):
            yield metric not in allow.metrics, f"the run releases {metric}, which allow.metrics does not list"
        compression = config.transport.compression
        yield compression not in allow.compression, f"allow.compression does not list {compression}"
        yield (
            self.privacy.require_secure_aggregation and not privacy.secure_aggregation,
            "privacy.require_secure_aggregation: the run has none",
        )
        if privacy.secure_aggregation:
            yield from self.secure_aggregation.rules(config)

    def plan_rules(self, plan: PrivacyPlan) -> Iterator[tuple[bool, str]]:
        """As `rules`, for what is known once a run's noise was calibrated."""
        wanted = self.privacy
        yield (
            plan.noise_multiplier < wanted.least_noise_multiplier,
            f"the noise multiplier {plan.noise_multiplier:.4g} is below privacy.least_noise_multiplier",
        )
        yield (
            wanted.largest_epsilon is not None and plan.budget.epsilon > wanted.largest_epsilon,
            f"the run's epsilon {plan.budget.epsilon:.4g} is above privacy.largest_epsilon",
        )

    def allows_data(self, name: str, *, registered: Iterable[str]) -> bool:
        """Whether a data set may be trained on; `registered` are those of site.toml."""
        return name in (registered if self.allow.data is None else self.allow.data)

    def tables(self) -> list[tuple[str, BaseModel]]:
        """All tables but the budget, by name."""
        return [(name, getattr(self, name)) for name in type(self).model_fields if name != "budget"]

    def opened_budget(self) -> Budget:
        """The budget that a new ledger opens with.

        Raises:
            PrivacyError: The policy sets none.
        """
        if self.budget is None:
            raise PrivacyError("the policy sets no budget", hint="add a [budget] table with epsilon and delta")
        return Budget.opened(self.budget.epsilon, self.budget.delta, self.budget.order)


def released_metrics(config: RunConfig) -> tuple[str, ...]:
    """Names of the metrics in a run's replies that tell anything; a weight that is always 1 does not.

    Under secure aggregation they are part of the sum, and have to be allowed all the same.
    """
    if config.privacy.unit == "none":
        return (TRAIN_LOSS, WEIGHT) if config.strategy.weighting == "examples" else (TRAIN_LOSS,)
    return (WITHIN,) if config.central and config.privacy.clipping == "adaptive" else ()


PERMISSIVE = Policy(
    allow=Allow(metrics=list(METRICS)),
    limits=Limits(
        units=list(UNITS), largest_delta=0.5, largest_physical_batch=1 << 20, largest_rounds=1 << 30,
        largest_local_epochs=1 << 30, largest_sequence_length=1 << 30,
    ),
    secure_aggregation=SecureAggregation(
        smallest_cohort=2, colluding=0, largest_clipping_norm=1e6, most_aborts_a_day=1 << 30
    ),
)  # fmt: skip
"""Joins every run that is valid; for simulations, where the person who runs them owns the data."""


def load_policy(path: Path) -> Policy:
    """Read `policy.toml`.

    Raises:
        SiteError: The file is missing, not TOML, or has unknown keys or impossible values.
    """
    tree = read_own_toml(
        path, missing="`coterie policy init` writes an example", wrong="`coterie policy init` writes an example"
    )
    try:
        policy = Policy.model_validate(tree)
        if policy.budget is not None:
            policy.opened_budget()
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise SiteError(f"{path}: `{where}`: {first['msg']}", hint="`coterie policy init` explains every key") from e
    except PrivacyError as e:
        raise SiteError(f"{path}: {e}", hint=e.hint) from e
    return policy
