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

All rules are constants of this file. None depends on how many rows there are now: whoever tries out values of delta or
of the batch size against such a limit would find that number by bisection.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import time
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from common.config import RunConfig
from common.config.settings import Name
from common.errors import FailureCode, PeerError, PrivacyError, SiteError
from common.flower import TRAIN_LOSS, WEIGHT, WITHIN
from common.privacy import Budget, PrivacyPlan
from common.site import read_own_toml

Unit = Literal["none", "example", "client"]
Metric = Literal["train_loss", "within", "num-examples"]
Compression = Literal["none", "bf16", "int8", "top-k"]

_UNITS: tuple[Unit, ...] = ("none", "example", "client")
_METRICS: tuple[Metric, ...] = ("train_loss", "within", "num-examples")


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BudgetTable(_Table):
    """The ceiling over everything that is ever released about one data set."""

    epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(description="Ceiling of epsilon, add/remove.")
    delta: Annotated[float, Field(gt=0, lt=1)] = Field(description="Delta; below one over the number of rows.")
    order: int | None = Field(None, description="Renyi order of the accounting; not set: the best for epsilon, delta.")


class Coordinator(_Table):
    """Whom this site works for."""

    key: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = Field(
        "",
        description="Key id of the one coordinator that this site works for, 64 hexadecimal digits; empty: the one in "
        "its kit.",
    )


class Operators(_Table):
    """Whose runs this site joins."""

    allowed: list[Name] | None = Field(
        None, description="Operators whose runs this site joins, out of those in its kit; not set: all of them."
    )


class Allow(_Table):
    """What a run may use and what may leave beside the model."""

    models: list[Name] | None = Field(None, description="Models that may be trained; not set: all.")
    data: list[Name] | None = Field(
        None,
        description="Data sets that may be trained on; not set: those of site.toml. A built-in one has to be listed.",
    )
    metrics: list[Metric] = Field(
        ["train_loss", "within"],
        description="What may leave beside the model: `train_loss` (runs without privacy), `within` (privacy unit "
        "client: whether the update lay within the clipping norm), `num-examples` (how many examples there are; runs "
        "without privacy that weigh by them). A run that needs another one is not joined.",
    )
    compression: list[Compression] = Field(
        ["none", "bf16", "int8", "top-k"], description="Ways in which updates may be compressed."
    )


class Limits(_Table):
    """What a run may ask for."""

    units: list[Unit] = Field(
        ["example"],
        description="Privacy units of the runs that this site joins: `client` trusts the coordinator with this site's "
        "clipped updates, `none` with everything.",
    )
    largest_delta: Annotated[float, Field(gt=0, lt=1)] = Field(1e-5, description="Largest target_delta of a run.")
    largest_batch_size: Annotated[int, Field(ge=1)] = Field(1 << 20, description="Largest expected_batch_size.")
    largest_sampling_rate: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="Largest sampling_rate.")
    largest_physical_batch: Annotated[int, Field(ge=1)] = Field(
        1024, description="Largest max_physical_batch: more than this site has memory for would show as a failure."
    )
    largest_rounds: Annotated[int, Field(ge=1)] = Field(10_000, description="Most rounds of a run.")
    largest_local_steps: Annotated[int, Field(ge=1)] = Field(1 << 20, description="Most local steps in a round.")
    largest_local_epochs: Annotated[int, Field(ge=1)] = Field(
        1000, description="Most passes over the data in a round that has no fixed number of steps."
    )
    largest_sequence_length: Annotated[int, Field(ge=1)] = Field(
        4096, description="Most tokens in an example of text: more than there is memory for would show as a failure."
    )
    smallest_cohort: Annotated[int, Field(ge=1)] = Field(
        2,
        description="Fewest sites of a round, with this one: the update of a site that is alone is the aggregate.",
    )
    longest_run_hours: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        720.0, description="How long after its operator signed it a run is worked on, in hours."
    )
    hours: str = Field(
        "", description='Time of day in which rounds may start, such as "20:00-06:00" in local time; empty: always.'
    )

    @field_validator("hours")
    @classmethod
    def _is_a_span(cls, text: str) -> str:
        if text:
            _span(text)
        return text

    def open_at(self, now: time) -> bool:
        """Whether a round may start at this time of day; the end is not included."""
        if not self.hours:
            return True
        begin, end = _span(self.hours)
        return begin <= now < end if begin < end else now >= begin or now < end


class Privacy(_Table):
    """How strongly a run must protect, beside the budget and the units."""

    require_secure_aggregation: bool = Field(
        False, description="Join only runs in which the coordinator sees nothing but sums. There are none yet."
    )
    least_noise_multiplier: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        0.0, description="Least noise multiplier of a private run, as it was calibrated."
    )
    largest_epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="Most epsilon that one private run may cost its privacy unit; not set: what the budget has."
    )


class Policy(_Table):
    """The site's own rules."""

    budget: BudgetTable | None = Field(None, description="Without it the site trains nothing.")
    coordinator: Coordinator = Coordinator()
    operators: Operators = Operators()
    allow: Allow = Allow()
    limits: Limits = Limits()
    privacy: Privacy = Privacy()

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
        yield self.privacy.require_secure_aggregation, "privacy.require_secure_aggregation: no run has it yet"

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
    """Names of the metrics in a run's replies that tell anything; a weight that is always 1 does not."""
    if config.privacy.unit == "none":
        return (TRAIN_LOSS, WEIGHT) if config.strategy.weighting == "examples" else (TRAIN_LOSS,)
    return (WITHIN,) if config.privacy.unit == "client" and config.privacy.clipping == "adaptive" else ()


PERMISSIVE = Policy(
    allow=Allow(metrics=list(_METRICS)),
    limits=Limits(
        units=list(_UNITS), largest_delta=0.5, largest_physical_batch=1 << 20, largest_rounds=1 << 30,
        largest_local_epochs=1 << 30, largest_sequence_length=1 << 30,
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


def _span(text: str) -> tuple[time, time]:
    """Begin and end of "20:00-06:00"."""
    begin, dash, end = text.partition("-")
    try:
        span = time.fromisoformat(begin.strip()), time.fromisoformat(end.strip())
    except ValueError:
        dash = ""
    if not dash or span[0] == span[1] or any(moment.tzinfo for moment in span):
        raise ValueError('is no span of the day such as "20:00-06:00"')
    return span
