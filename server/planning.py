"""What can refuse a run before any client is asked: its data, its model, its strategy, its noise. The same for
simulations and for separate machines.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from common.config import RunConfig
from common.data import load_federation, schema_of
from common.errors import ModelError
from common.models import check_private, initial_model
from common.privacy import PrivacyPlan, make_plan, noised_values
from common.privacy.bookkeeping import Bookkeeping
from common.schema import DataSchema, Examples
from common.secagg_plan import sums_plan
from common.site import Site
from server.cohort import min_separation, participations
from server.strategies import check_strategy


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """What a possible run starts from: the model with its starting weights, and the plan of its noise (or None)."""

    model: nn.Module
    plan: PrivacyPlan | None


def plan_run(config: RunConfig, schema: DataSchema, *, clients: int, site: Site) -> Planned:
    """Build the model and calibrate the noise.

    Args:
        config: The run.
        schema: Public facts of its data.
        clients: How many take part.
        site: This party's own models.

    Raises:
        ConfigError, ModelError, PrivacyError, SiteError: The run is not possible.
    """
    check_clients(config, clients)
    most = participations(config.cohort, clients, config.rounds)
    model = initial_model(config.model, schema, seed=config.seeds.model, site=site)
    plan = None
    if config.private:
        if config.privacy.unit == "example":
            check_private(model)
            Bookkeeping(model).detach()  # refuses what it cannot differentiate, before anybody pays
        plan = make_plan(
            config,
            dimensions=noised_values(model, config),
            participations=most,
            min_separation=min_separation(config.cohort, clients),
            clients=clients,
        )
    return Planned(model=model, plan=plan)


def check_clients(config: RunConfig, clients: int) -> None:
    """What can be said of a run before its data is known: cohorts, sums and strategy fit the number of clients.

    Raises:
        ConfigError: They do not.
    """
    group_size = 1
    if config.privacy.secure_aggregation:
        sums_plan(config, clients)
        group_size = config.secagg.group_size or 1
    check_strategy(config.strategy, config.cohort.size or clients, group_size=group_size)
    participations(config.cohort, clients, config.rounds)


def known_schema(config: RunConfig, site: Site) -> DataSchema | None:
    """Public facts of the run's data, if this party knows the data set by that name.

    Raises:
        DataError: It knows the name, but cannot read the description.
    """
    from common.data.catalogue import BUILT_IN

    if config.data.name not in BUILT_IN and config.data.name not in site.data:
        return None
    return schema_of(config.data, site=site)


def held_out_examples(config: RunConfig, site: Site) -> Examples | None:
    """This party's own held-out examples: what a simulation of the run evaluates on. None where it has none.

    Which clients there are, and how the rest is divided, does not change them.

    Raises:
        DataError: The data is there, but cannot be read.
        DataUnavailableError: It is a built-in data set that was never fetched.
    """
    if known_schema(config, site) is None:
        return None
    alone = config.data.model_copy(update={"partition": "iid", "clients": 1, "sites": [], "pooled": False})
    test = load_federation(alone, seed=config.seeds.data, site=site).test
    return test if len(test) else None


def check_fit(model: nn.Module, examples: Examples, schema: DataSchema) -> None:
    """One forward pass on one held-out example: shapes and token ids must fit.

    Raises:
        ModelError: They do not.
    """
    example = examples.inputs[:1]
    expected = (*examples.targets[:1].shape, schema.num_classes)
    try:
        with torch.no_grad():
            logits = model.eval()(example)
    except (RuntimeError, IndexError, TypeError, ValueError) as e:
        raise ModelError(
            f"the model fails on an example of shape {list(example.shape[1:])} ({type(e).__name__})",
            hint="choose a model for this kind of data; `coterie data check` shows the shape",
        ) from e
    if tuple(logits.shape) != expected:
        raise ModelError(
            f"the model answers with shape {list(logits.shape)}, {list(expected)} is needed",
            hint="a model returns one logit a class, for every target",
        )
