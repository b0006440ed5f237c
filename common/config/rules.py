"""Rules between settings: what contradicts what, and how to mend it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from common.config.settings import RunConfig

_MOST_CORRELATED = 5000
_NEEDS_EACH_REPLY = frozenset({"qfedavg", "fedmedian", "fedtrimmedavg", "krum", "multikrum", "bulyan"})

Rule = tuple[bool, str, str, str]
"""Whether a rule between settings is broken; the setting to name; what is wrong; how to mend it."""


def all_rules(config: RunConfig) -> tuple[Rule, ...]:
    """Every rule, broken or not."""
    return (
        *_data(config),
        *_training(config),
        *_asynchronous(config),
        *_devices(config),
        *_sums(config),
        *_privacy(config),
    )


def _data(config: RunConfig) -> Iterator[Rule]:
    d, natural = config.data, config.data.partition == "natural"
    yield d.clients == 0 and not natural, "data.clients", "is 0, which only the natural partition fills", "raise it"
    yield bool(d.sites) and not natural, "data.sites", "needs data.partition = 'natural'", "set it, or remove sites"
    yield d.folds == 1, "data.folds", "must be 0 or at least 2", "set data.folds = 0 for one held-out part"
    yield config.comparison.enabled and not d.folds, "comparison.enabled", "needs data.folds", "set data.folds = 10"
    yield d.fold > 0 and d.fold >= d.folds, "data.fold", "must lie below data.folds", "folds count from 0"


def _training(config: RunConfig) -> Iterator[Rule]:
    t, e, c = config.training, config.evaluation, config.cohort
    yield (
        t.local_epochs == 0 and t.local_steps == 0,
        "training.local_epochs", "is 0 and so is training.local_steps: nothing to do", "set one of them",
    )  # fmt: skip
    yield t.momentum > 0 and t.optimizer != "sgd", "training.momentum", "belongs to optimizer = 'sgd'", "remove it"
    yield e.patience > 0 and not e.every, "evaluation.patience", "needs evaluation.every >= 1", "set it to 1"
    yield 0 < c.size < c.min_survivors, "cohort.min_survivors", "is more than cohort.size", "lower it"
    yield (
        c.over_sampling > 0 and not c.size,
        "cohort.over_sampling", "needs cohort.size: who asks all has nobody left to ask", "set cohort.size",
    )  # fmt: skip


def _asynchronous(config: RunConfig) -> Iterator[Rule]:
    """Asynchronous aggregation: what needs whole cohorts."""
    size, c = config.asynchronous.buffer_size, config.cohort
    on = size > 0
    yield (
        on and 0 < c.size < size,
        "asynchronous.buffer_size", "is more than cohort.size, the clients that are at work at a time", "lower it",
    )  # fmt: skip
    yield (
        on and c.min_survivors > size,
        "cohort.min_survivors", "is more than asynchronous.buffer_size, the updates of a step", "lower it",
    )  # fmt: skip
    yield (
        on and config.strategy.name in _NEEDS_EACH_REPLY,
        "strategy.name", f"{config.strategy.name} compares updates to one model, asynchronous.buffer_size mixes more",
        "use fedavg, fedprox, fedavgm, fedadam, fedyogi or fedadagrad",
    )  # fmt: skip
    yield (
        on and (config.privacy.secure_aggregation or config.privacy.unit == "client"),
        "asynchronous.buffer_size", "is not for whole cohorts, as privacy.secure_aggregation and unit = 'client' are",
        "set it to 0, or use privacy.unit = 'example'",
    )  # fmt: skip
    yield (
        on and c.sampling != "uniform",
        "cohort.sampling", "must be uniform with asynchronous.buffer_size: who is idle cannot be planned", "set it",
    )  # fmt: skip
    yield (
        on and c.over_sampling > 0,
        "cohort.over_sampling", "is for whole cohorts: asynchronous.buffer_size waits for nobody", "set it to 0",
    )  # fmt: skip
    yield (
        on and config.transport.compression == "top-k",
        "transport.compression", "top-k adds what another model's update left out with asynchronous.buffer_size",
        "use none, bf16 or int8",
    )  # fmt: skip


def _devices(config: RunConfig) -> Iterator[Rule]:
    """Virtual time: what would have no effect, or would tell something."""
    d, c = config.simulation.devices, config.cohort
    virtual = config.simulation.virtual
    needs = d.download_mbit or d.upload_mbit or d.availability < 1 or d.dropout or d.stragglers or d.partial_work
    yield (
        not virtual and bool(needs),
        "simulation.devices.examples_per_second", "is 0: there is no virtual time for the other settings of devices",
        "for example --set simulation.devices.examples_per_second=100",
    )  # fmt: skip
    yield (
        d.partial_work and not c.deadline_seconds,
        "simulation.devices.partial_work", "needs cohort.deadline_seconds", "set it, in virtual seconds",
    )  # fmt: skip
    yield (
        d.partial_work and config.private,
        "simulation.devices.partial_work", "changes how many steps a client takes, which is fixed with privacy",
        "set it to false",
    )  # fmt: skip
    yield (
        virtual and c.sampling != "uniform" and (d.availability < 1 or bool(d.trace)),
        "cohort.sampling", "must be uniform where devices are away at times: who can be asked cannot be planned",
        "set it",
    )  # fmt: skip


def _sums(config: RunConfig) -> Iterator[Rule]:
    """Secure aggregation: what needs more than sums, and sums that would be too small."""
    on, s, c = config.privacy.secure_aggregation, config.secagg, config.cohort
    fewest = s.honest + s.colluding
    yield (
        on and config.strategy.name == "qfedavg",
        "strategy.name", "qfedavg needs each client's training loss, which privacy.secure_aggregation does not tell",
        "use fedavg",
    )  # fmt: skip
    yield (
        on and not s.group_size and config.strategy.name in _NEEDS_EACH_REPLY,
        "strategy.name", "compares single updates, of which privacy.secure_aggregation shows only sums",
        "set secagg.group_size, so that it compares the groups' means, or use fedavg",
    )  # fmt: skip
    yield (
        on and 0 < s.group_size < fewest,
        "secagg.group_size", "is less than secagg.honest + secagg.colluding", f"set it to {fewest} or more",
    )  # fmt: skip
    yield (
        on and 0 < c.size < max(fewest, s.group_size),
        "cohort.size", "is less than secagg.honest + secagg.colluding, or than secagg.group_size",
        f"set it to {max(fewest, s.group_size)} or more",
    )  # fmt: skip
    yield (
        on and c.sampling == "poisson",
        "cohort.sampling", "poisson can draw fewer clients than a sum of privacy.secure_aggregation needs",
        "use uniform, balanced or cyclic",
    )  # fmt: skip
    yield (
        on and c.over_sampling > 0,
        "cohort.over_sampling", "would take the slower clients for lost at every step of secure aggregation",
        "set it to 0; cohort.deadline_seconds bounds how long a round waits",
    )  # fmt: skip
    yield (
        on and config.transport.compression != "none",
        "transport.compression", "cannot shorten what is masked by privacy.secure_aggregation",
        "set it to none; fewer secagg.bits make updates shorter",
    )  # fmt: skip
    weighted = config.strategy.weighting == "examples" and not config.private
    yield (
        on and weighted and fewest * s.most_weight >= 1 << (s.bits - 1),
        "secagg.bits", "are too few to add up weights as large as secagg.most_weight",
        "set strategy.weighting = 'equal', lower secagg.most_weight, or take more bits",
    )  # fmt: skip
    yield (
        config.distributed and config.privacy.mechanism == "matrix",
        "privacy.mechanism", "matrix is for noise that the coordinator adds, without privacy.secure_aggregation",
        "use independent",
    )  # fmt: skip
    yield (
        config.distributed and config.privacy.clipping == "adaptive",
        "privacy.clipping", "adaptive is for noise that the coordinator adds, without privacy.secure_aggregation",
        "use flat",
    )  # fmt: skip


def _privacy(config: RunConfig) -> Iterator[Rule]:
    p = config.privacy
    yield (
        config.private and p.target_epsilon is None and p.noise_multiplier is None,
        "privacy.target_epsilon", "is needed in a private run, or privacy.noise_multiplier",
        "for example --set privacy.target_epsilon=3",
    )  # fmt: skip
    yield (
        config.private and p.target_epsilon is not None and p.noise_multiplier is not None,
        "privacy.noise_multiplier", "and privacy.target_epsilon are both set: one follows from the other",
        "leave one out; `--set privacy.target_epsilon=` takes it out of a file or scenario",
    )  # fmt: skip
    yield (
        p.unit == "example" and config.training.local_steps == 0,
        "training.local_steps", "must be fixed with privacy: epochs depend on the private number of rows",
        "for example --set training.local_steps=1",
    )  # fmt: skip
    yield (
        config.private and config.strategy.name == "qfedavg",
        "strategy.name", "qfedavg needs every client's training loss, which a private run does not release",
        "use fedavg, or privacy.unit = 'none'",
    )  # fmt: skip

    client, adaptive = p.unit == "client", p.clipping == "adaptive"
    yield (
        config.central and config.strategy.name in _NEEDS_EACH_REPLY,
        "strategy.name", f"{config.strategy.name} needs each client's update, privacy.unit = 'client' gives it a sum",
        "use fedavg, fedprox, fedavgm, fedadam, fedyogi or fedadagrad",
    )  # fmt: skip
    yield (
        config.central and config.cohort.min_survivors > 1,
        "cohort.min_survivors", "would tell without noise how many answered, if privacy.unit = 'client'",
        "set it to 1: every round is used",
    )  # fmt: skip
    yield (
        client and config.cohort.over_sampling > 0,
        "cohort.over_sampling", "would let those who answer first decide, if privacy.unit = 'client'",
        "set it to 0: noise is made for everybody who is asked",
    )  # fmt: skip
    yield (
        client and config.transport.compression == "top-k",
        "transport.compression", "top-k adds what was left out before, beyond the norm of privacy.unit = 'client'",
        "use none, bf16 or int8",
    )  # fmt: skip
    yield (
        config.cohort.sampling == "poisson" and config.cohort.over_sampling > 0,
        "cohort.over_sampling", "is for cohorts of a fixed size", "use uniform, balanced or cyclic",
    )  # fmt: skip
    yield (
        client and p.clipping == "per-layer",
        "privacy.clipping", "per-layer is for privacy.unit = 'example'", "use flat or adaptive",
    )  # fmt: skip
    yield (
        p.mechanism == "matrix" and p.unit == "example",
        "privacy.mechanism", "matrix is for privacy.unit = 'client'", "use independent",
    )  # fmt: skip
    yield (
        client and p.mechanism == "matrix" and config.cohort.size > 0 and config.cohort.sampling != "cyclic",
        "privacy.mechanism", "matrix needs a fixed schedule", "set cohort.sampling = 'cyclic', or cohort.size = 0",
    )  # fmt: skip
    yield (
        client and p.mechanism == "matrix" and config.rounds > _MOST_CORRELATED,
        "rounds", f"are more than the {_MOST_CORRELATED} that noise can be correlated over", "lower them",
    )  # fmt: skip
    yield (
        client and p.mechanism == "matrix" and adaptive,
        "privacy.mechanism", "matrix needs a clipping norm that stays", "set privacy.clipping = 'flat'",
    )  # fmt: skip
    yield (
        config.cohort.sampling == "poisson" and not client and config.private,
        "cohort.sampling", "poisson gains nothing for privacy.unit = 'example'", "use balanced",
    )  # fmt: skip
    yield (
        p.unit == "example" and 0 < config.data.max_examples < p.expected_batch_size,
        "privacy.expected_batch_size", "is more than any step can sample of data.max_examples",
        "lower it: about the sampling rate times a typical client's examples",
    )  # fmt: skip
