"""`policy.toml`: what a site takes part in, and what it may spend. Nothing that arrives can change it.

    [budget]                    # of new ledgers, over all runs; `coterie ledger budget` changes one that exists
    epsilon = 10.0
    delta = 1e-6                # below one over the number of rows: `coterie policy check` compares them here

    [limits]
    units = ["example"]         # none, example, client
    largest_sampling_rate = 0.5

All limits are constants of this file. None depends on how many rows there are now: whoever tries out values of delta or
of the batch size against such a limit would find that number by bisection.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.config import RunConfig
from common.errors import FailureCode, PeerError, PrivacyError, SiteError
from common.privacy import Budget
from common.site import read_own_toml

_UNITS = ("none", "example", "client")


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BudgetTable(_Table):
    """The ceiling over everything that is ever released about one data set."""

    epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(description="Ceiling of epsilon, add/remove.")
    delta: Annotated[float, Field(gt=0, lt=1)] = Field(description="Delta; below one over the number of rows.")
    order: int | None = Field(None, description="Renyi order of the accounting; not set: the best for epsilon, delta.")


class Limits(_Table):
    """What a run may ask for."""

    units: list[Literal["none", "example", "client"]] = Field(
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


class Policy(_Table):
    """The site's own rules."""

    budget: BudgetTable | None = Field(None, description="Without it the site trains nothing that costs privacy.")
    limits: Limits = Limits()

    def check(self, config: RunConfig) -> None:
        """Refuse a run that this site does not join.

        Guarantee: The answer depends on the run's configuration and this file alone, never on the data.

        Raises:
            PeerError: The run asks for more than the policy allows; the peer learns no more than that.
        """
        limits, privacy = self.limits, config.privacy
        refused = (
            privacy.unit not in limits.units
            or (config.private and privacy.target_delta > limits.largest_delta)
            or config.training.local_steps > limits.largest_local_steps
            or config.training.max_physical_batch > limits.largest_physical_batch
            or config.rounds > limits.largest_rounds
        )
        if privacy.unit == "example":
            refused |= privacy.expected_batch_size > limits.largest_batch_size
            refused |= privacy.sampling_rate > limits.largest_sampling_rate
        if refused:
            raise PeerError(FailureCode.POLICY_REFUSED)

    def opened_budget(self) -> Budget:
        """The budget that a new ledger opens with.

        Raises:
            PrivacyError: The policy sets none.
        """
        if self.budget is None:
            raise PrivacyError("the policy sets no budget", hint="add a [budget] table with epsilon and delta")
        return Budget.opened(self.budget.epsilon, self.budget.delta, self.budget.order)


PERMISSIVE = Policy(
    limits=Limits(units=list(_UNITS), largest_delta=0.5, largest_physical_batch=1 << 20, largest_rounds=1 << 30)
)
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
