"""What a run would do at this site and what would leave it, found out here: nothing is sent, spent or written.

The answer is for the site's own administrator: it quotes rows, reasons and the ledger, which no peer ever learns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from client.policy import released_metrics
from client.resources import Held, SiteResources
from common.aggregation import codec_for
from common.config import RunConfig
from common.config.participation import min_separation, participations
from common.crypto import ENVELOPE_BYTES, blob_size
from common.errors import BudgetExhaustedError, ConfigError, CoterieError, ModelError, PrivacyError
from common.models import check_private, initial_model
from common.models.weights import ModelWeights
from common.privacy import NonPrivate, PrivacyEvent, PrivacyPlan, make_plan, noised_values, spent
from common.privacy.bookkeeping import Bookkeeping
from common.privacy.ledger.standing import Standing
from common.secagg.packing import packed_bytes
from common.secagg_plan import group_sizes, sums_plan
from common.transport.compression import Compression


def dry_run(config: RunConfig, resources: SiteResources) -> dict[str, Any]:
    """The whole answer as JSON values; `reasons` says why the site does not join, and is empty where it does.

    What only a request can tell is left open: who signed the run, who else is asked, and at what time.
    """
    reasons = [reason for broken, reason in resources.admission.rules(config) if broken]
    document: dict[str, Any] = {
        "format": 1,
        "site": resources.kit.name,
        "run": config.name,
        "config_digest": config.digest(),
        "joins": False,
        "reasons": reasons,
        "rounds": config.rounds,
        "data": None,
        "model": None,
        "release": None,
        "privacy": None,
    }
    try:
        held = resources.held(config.data, seed=config.seeds.data)
        document["data"] = _data_facts(config, held)
        model = _built(config, held, resources)
        document["model"] = {"name": config.model.name, "parameters": sum(p.numel() for p in model.parameters())}
        document["release"] = _release(config, model, resources)
        document["privacy"] = _privacy(config, held, model, resources, reasons)
    except CoterieError as e:
        reasons.append(f"{e} ({e.hint})" if e.hint else str(e))
    document["joins"] = not reasons
    return document


def _data_facts(config: RunConfig, held: Held) -> dict[str, Any]:
    training, rows = config.training, len(held.data.train)
    steps = training.local_steps or training.local_epochs * -(-rows // training.batch_size)
    return {"name": config.data.name, "rows": rows, "held_out": len(held.data.test), "steps_a_round": steps}


def _built(config: RunConfig, held: Held, resources: SiteResources) -> nn.Module:
    """The model, if it can be trained on this data here.

    Raises:
        ModelError: It cannot.
    """
    model = initial_model(config.model, held.schema, seed=config.seeds.model, site=resources.site)
    if config.privacy.unit == "example":
        check_private(model)
        Bookkeeping(model).detach()
    if config.training.device == "cuda" and not torch.cuda.is_available():
        raise ModelError("training.device is cuda, and there is none here", hint="the run should say auto")
    try:
        with torch.no_grad():
            model.eval()(held.data.train.inputs[:1])
    except (RuntimeError, IndexError, TypeError, ValueError) as e:
        raise ModelError(f"the model fails on an example ({type(e).__name__})", hint="see `coterie data check`") from e
    return model


def _release(config: RunConfig, model: nn.Module, resources: SiteResources) -> dict[str, Any]:
    """What leaves in each round: sizes as they travel, and every metric by name."""
    weights = ModelWeights(model).copy()
    how = Compression.of(config.transport)
    sums = _sums(config, model, resources) if config.privacy.secure_aggregation else None
    update = sums["update_bytes"] if sums else sum(how.encoded_bytes(values) for values in weights.values())
    suite = resources.kit.keys.record.suite
    return {
        "model_bytes": sum(values.nbytes for values in weights.values()),
        "compression": config.transport.compression,
        "update_bytes": update,
        "sealed_bytes": blob_size(update) + ENVELOPE_BYTES[suite],
        "metrics": list(released_metrics(config)),
        "weight": "number of examples" if "num-examples" in released_metrics(config) else "1",
        "sums": sums,
        "clear": [],
    }


def _sums(config: RunConfig, model: nn.Module, resources: SiteResources) -> dict[str, Any]:
    """Under secure aggregation: how large the masked update is, and what the coordinator can see of it at most.

    Raises:
        ConfigError: The sites that this one knows of are too few for a sum.
    """
    clients = len(config.data.sites or resources.kit.sites)
    plan = _plan(config, model, resources) if config.distributed else None
    members = max(group_sizes(config, clients))
    codec = codec_for(config, ModelWeights(model).shared(), participants=members, plan=plan, server_round=1)
    told = sums_plan(config, clients)
    return {
        "update_bytes": packed_bytes(codec.size, codec.bits),
        "fewest": told["sum"]["fewest"],
        "members": told["sum"]["members"],
        "colluding": told["sum"]["colluding"],
        "setup_bytes": told["setup"]["sent_bytes"],
        "epoch_rounds": told["setup"]["epoch_rounds"],
        "against": resources.secagg_claim,
        "not_with": resources.not_agreed,
        "warnings": told["warnings"],
    }


def _privacy(
    config: RunConfig, held: Held, model: nn.Module, resources: SiteResources, reasons: list[str]
) -> dict[str, Any]:
    """What the run costs at this site's ledger; adds the reasons why it does not fit."""
    standing = _standing(config, held, resources)
    allowed = "none" in resources.policy.limits.units
    if not config.private:
        event = NonPrivate(run=config.digest(), server_round=1)
        reasons.extend(_refusals(standing, event, planned=config.rounds, allowed=allowed))
        return {"unit": "none", "epsilon_run": None, "ledger": _ledger_facts(standing, after=math.inf)}
    plan = _plan(config, model, resources)
    reasons.extend(reason for broken, reason in resources.policy.plan_rules(plan) if broken)
    events = [plan.event(i + 1) for i in range(plan.participations)]
    reasons.extend(_refusals(standing, events[0], planned=len(events), allowed=allowed))
    after = spent([*standing.events, *events], budget=standing.budget, unit=standing.counted)
    return {
        "unit": plan.unit,
        "trust": plan.trust,
        "relation": plan.relation,
        "shares": plan.shares and asdict(plan.shares),
        "noise_multiplier": plan.noise_multiplier,
        "noise_stddev": plan.noise_stddev,
        "clipping_norm": plan.clipping_norm,
        "sampling_rate": plan.sampling_rate,
        "local_steps": plan.local_steps,
        "participations": plan.participations,
        "clients": plan.clients,
        "epsilon_calibrated": plan.budget.epsilon,
        "epsilon_round": spent(events[:1], budget=standing.budget, unit=standing.counted),
        "epsilon_run": spent(events, budget=standing.budget, unit=standing.counted),
        "ledger": _ledger_facts(standing, after=after),
    }


def _plan(config: RunConfig, model: nn.Module, resources: SiteResources) -> PrivacyPlan:
    """The plan as the coordinator would make it for the sites that this one knows of.

    Raises:
        PrivacyError: There is none.
    """
    clients = len(config.data.sites or resources.kit.sites)
    try:
        return make_plan(
            config,
            dimensions=noised_values(model, config),
            participations=participations(config.cohort, clients, config.rounds),
            min_separation=min_separation(config.cohort, clients),
            clients=clients,
        )
    except ConfigError as e:
        raise PrivacyError(str(e), hint=e.hint) from e


def _standing(config: RunConfig, held: Held, resources: SiteResources) -> Standing:
    ledger = resources.ledgers.look(config.data.name, [held.content], unit=held.unit)
    return Standing(budget=resources.policy.opened_budget(), unit=held.unit) if ledger is None else ledger.standing()


def _refusals(standing: Standing, event: PrivacyEvent, *, planned: int, allowed: bool) -> Iterator[str]:
    try:
        standing.admit(event, planned=planned, allow_non_private=allowed)
    except BudgetExhaustedError as e:
        yield str(e)


def _ledger_facts(standing: Standing, *, after: float) -> dict[str, Any]:
    before = standing.spent
    return {
        "budget": asdict(standing.budget),
        "spent": _finite(before),
        "left": _finite(max(0.0, standing.budget.epsilon - before)),
        "spent_after": _finite(after),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
