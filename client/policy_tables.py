"""The tables of `policy.toml`: every rule with its default and what it is for; `coterie policy init` writes them."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import time
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from common.aggregation import rules_for
from common.config import RunConfig
from common.config.settings import Name

Unit = Literal["none", "example", "client"]
Metric = Literal["train_loss", "within", "num-examples"]
Compression = Literal["none", "bf16", "int8", "top-k"]

UNITS: tuple[Unit, ...] = ("none", "example", "client")
METRICS: tuple[Metric, ...] = ("train_loss", "within", "num-examples")


class Table(BaseModel):
    """Of a policy: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class BudgetTable(Table):
    """The ceiling over everything that is ever released about one data set."""

    epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(description="Ceiling of epsilon, add/remove.")
    delta: Annotated[float, Field(gt=0, lt=1)] = Field(description="Delta; below one over the number of rows.")
    order: int | None = Field(None, description="Renyi order of the accounting; not set: the best for epsilon, delta.")


class Coordinator(Table):
    """Whom this site works for."""

    key: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = Field(
        "",
        description="Key id of the one coordinator that this site works for, 64 hexadecimal digits; empty: the one in "
        "its kit.",
    )


class Operators(Table):
    """Whose runs this site joins."""

    allowed: list[Name] | None = Field(
        None, description="Operators whose runs this site joins, out of those in its kit; not set: all of them."
    )


class Allow(Table):
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


class Limits(Table):
    """What a run may ask for."""

    units: list[Unit] = Field(
        ["example"],
        description="Privacy units of the runs that this site joins: `client` trusts the coordinator with this site's "
        "clipped updates, `none` with everything; under secure aggregation with their sum alone.",
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


class Privacy(Table):
    """How strongly a run must protect, beside the budget and the units."""

    require_secure_aggregation: bool = Field(
        False, description="Join only runs in which the coordinator sees nothing but sums of updates."
    )
    least_noise_multiplier: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        0.0, description="Least noise multiplier of a private run, as it was calibrated."
    )
    largest_epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="Most epsilon that one private run may cost its privacy unit; not set: what the budget has."
    )


class SecureAggregation(Table):
    """What a sum must be like for this site's update to go into it. Rounds below it are refused by this site itself."""

    smallest_cohort: Annotated[int, Field(ge=2)] = Field(
        3, description="Fewest sites in a sum that is opened, with this one: of two, each knows the other's update."
    )
    colluding: Annotated[int, Field(ge=0)] = Field(
        1, description="Sites that may help the coordinator: a run has to assume as many, or more."
    )
    largest_clipping_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        1000.0, description="Largest clipping norm of an update: the larger, the coarser are the steps of the sum."
    )
    least_bits: Annotated[int, Field(ge=16, le=32)] = Field(
        16, description="Fewest bits of a masked value: the fewer, the coarser are the steps of the sum."
    )
    require_pins: bool = Field(
        True,
        description="Take only sites into a sum whose keys were agreed outside of the coordinator. Without it, keys "
        "that came through the coordinator count as well, and one that exchanges them sees single updates.",
    )
    most_aborts_a_day: Annotated[int, Field(ge=1)] = Field(
        20,
        description="Set-ups of keys that may fail in 24 hours: each lets the coordinator try another order of sites.",
    )

    def rules(self, config: RunConfig) -> Iterator[tuple[bool, str]]:
        """Whether each rule is broken, and what it is, for a run under secure aggregation."""
        run, table = config.secagg, "secure_aggregation"
        fewest = rules_for(config, bytes(16)).fewest
        yield fewest < self.smallest_cohort, f"a sum of {fewest} is opened: below {table}.smallest_cohort"
        yield run.colluding < self.colluding, f"secagg.colluding is below {table}.colluding"
        norm = config.privacy.clipping_norm if config.distributed else run.clipping_norm
        yield norm > self.largest_clipping_norm, f"the clipping norm is above {table}.largest_clipping_norm"
        yield run.bits < self.least_bits, f"secagg.bits are below {table}.least_bits"


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
