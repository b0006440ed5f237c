"""The Flower ClientApp: load the model that came, train it, answer with the new weights.

Nothing that arrives is executed: a message holds weights and a configuration of registered names, and what those names
mean is decided by this client's own `Resources`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod
from numpy.typing import NDArray
from torch import nn

from client.mods import (
    MemberResources,
    PrivacyResources,
    answer_steps,
    clipping_mod,
    compression_mod,
    guard_mod,
    privacy_mod,
    secagg_mod,
)
from client.request import TrainRequest, parse_query, parse_request, read_arrays
from client.trainer import learning_rate_at, resolve_device, train_plain, train_private, training_seed, unchanged
from common.errors import FailureCode, ModelError, PeerError
from common.flower import (
    CLIENT,
    CLIPPING_NORM,
    CONFIG,
    RUN,
    SCHEMA,
    SECAGG_TYPE,
    TRAIN_LOSS,
    WEIGHT,
    prepare_process,
    update_reply,
)
from common.models import build_model, check_private
from common.models.weights import ModelWeights
from common.privacy import NoiseSource
from common.privacy.bookkeeping import Bookkeeping
from common.schema import ClientData, DataSchema
from common.site import Site

_CLIPPING = "clipping"
"""Record of a client's own state, kept between rounds and never sent."""


class Resources(PrivacyResources, MemberResources, Protocol):
    """What a client's own machine provides: it decides what registered names mean."""

    @property
    def site(self) -> Site:
        """Registry of the client's own models and data."""

    def data(self, request: TrainRequest, context: Context) -> tuple[DataSchema, ClientData]:
        """The examples that this client trains on."""

    def noise(self, request: TrainRequest, context: Context) -> NoiseSource:
        """Where noise and Poisson samples come from."""

    def most_steps(self, request: TrainRequest, context: Context) -> int | None:
        """How many steps the client has time for, at least 1; None for all that are asked for.

        Not asked in private runs, which are accounted for with a fixed number of steps.
        """


class LoadedModel:
    """A model kept between rounds, ready to train."""

    def __init__(self, model: nn.Module, device: torch.device, *, unit: str) -> None:
        self.model = model.to(device)
        self.device = device
        self.weights = ModelWeights(self.model)
        self.bookkeeping: Bookkeeping | None = None
        if unit == "example":
            check_private(model)
            self.bookkeeping = Bookkeeping(model)

    def load(self, arrays: dict[str, NDArray[Any]]) -> None:
        """Take over the weights that came; what does not fit was asked of the wrong client."""
        try:
            self.weights.load(arrays)
        except ModelError as e:
            raise PeerError(FailureCode.INVALID_REQUEST) from e


def make_client_app(resources: Resources, *, outer: Sequence[Mod] = (), mods: Sequence[Mod] = ()) -> ClientApp:
    """The ClientApp of one site, or of all clients of a simulation.

    Args:
        resources: Data, models, rules and ledger of this machine.
        outer: Mods around every kind of message, just inside the guard (outermost): sealing, admission.
        mods: Further mods around training, between the compression of the update and the privacy mod.
    """
    prepare_process()
    app = ClientApp()

    models: dict[str, LoadedModel] = {}  # of the current run: a process works on one run at a time

    def loaded(request: TrainRequest, schema: DataSchema) -> LoadedModel:
        if request.digest not in models:
            models.clear()
            config = request.config
            model = build_model(config.model, schema, site=resources.site)
            device = resolve_device(config.training.device)
            models[request.digest] = LoadedModel(model, device, unit=config.privacy.unit)
        return models[request.digest]

    def name_of(request: TrainRequest, context: Context) -> str:
        return resources.data(request, context)[1].name

    inner = [secagg_mod(resources), compression_mod(name_of), *mods, privacy_mod(resources), clipping_mod]

    @app.train(mods=[guard_mod, *outer, *inner])
    def train(message: Message, context: Context) -> Message:
        request = parse_request(message)
        schema, data = resources.data(request, context)
        slot = loaded(request, schema)
        slot.load(read_arrays(message))
        most_steps = None if request.config.private else resources.most_steps(request, context)
        try:
            metrics = _train(slot, data, request, resources.noise(request, context), context, most_steps=most_steps)
        except BaseException:
            models.clear()  # half a step's gradients must not enter the next round's sum
            raise
        return update_reply(message, slot.weights.copy(), metrics)

    @app.query(mods=[guard_mod, *outer])
    def query(message: Message, context: Context) -> Message:
        """Answer with this client's public name and the public facts of its data, from which the model is built."""
        request = parse_query(message)
        schema, data = resources.data(request, context)
        told = ConfigRecord({CLIENT: data.name, SCHEMA: schema.to_text()})
        return Message(RecordDict({CONFIG: told}), reply_to=message)

    @app.query(SECAGG_TYPE.partition(".")[2], mods=[guard_mod, *outer])
    def secagg(message: Message, context: Context) -> Message:
        """Answer steps of secure aggregation that come without a model."""
        return answer_steps(resources, message, context)

    return app


def _train(
    slot: LoadedModel,
    data: ClientData,
    request: TrainRequest,
    source: NoiseSource,
    context: Context,
    *,
    most_steps: int | None,
) -> dict[str, float]:
    """Train in place; the metrics of the reply. With privacy these are constants of the plan, not of the data."""
    config, mu = request.config, request.proximal_mu
    rate = learning_rate_at(config.training, request.server_round, config.rounds)
    if config.privacy.unit == "example":  # a mask that somebody can foresee ties each example to its place in the batch
        _seed_torch(int(source.words(1)[0]) >> 1, slot.device)
    else:
        _seed_torch(training_seed(config.seeds.training, request.server_round, data.name), slot.device)
    examples = data.train.to(slot.device)
    if request.plan is not None and slot.bookkeeping is not None:
        if sum(p.numel() for p in slot.bookkeeping.parameters) > request.plan.dimensions:
            raise PeerError(FailureCode.INVALID_REQUEST)  # the ledger would say less than is rounded and drawn
        norm = train_private(
            slot.model,
            examples,
            config.training,
            bookkeeping=slot.bookkeeping,
            plan=request.plan,
            learning_rate=rate,
            source=source,
            proximal_mu=mu,
            clipping_norm=_kept_norm(context, request),
        )
        if config.privacy.clipping == "adaptive":
            context.state[_CLIPPING] = ConfigRecord({RUN: request.digest, CLIPPING_NORM: norm})
        return {WEIGHT: 1.0}
    if request.plan is not None:  # the whole update is bounded by `clipping_mod`
        with unchanged(slot.model):
            if len(examples):  # a client without examples sends the model as it came
                train_plain(slot.model, examples, config.training, learning_rate=rate, proximal_mu=mu)
        return {WEIGHT: 1.0}
    if config.privacy.secure_aggregation and not len(examples):  # a failure would show that there are none
        return {WEIGHT: 0.0, TRAIN_LOSS: 0.0}
    loss = train_plain(slot.model, examples, config.training, learning_rate=rate, proximal_mu=mu, most_steps=most_steps)
    if not np.isfinite(loss):
        raise PeerError(FailureCode.NON_FINITE_UPDATE)
    weight = float(len(examples)) if config.strategy.weighting == "examples" else 1.0
    return {WEIGHT: weight, TRAIN_LOSS: loss}


def _kept_norm(context: Context, request: TrainRequest) -> float | None:
    """Where adaptive clipping stood after this client's last round of the same run."""
    kept = context.state.config_records.get(_CLIPPING)
    norm = kept.get(CLIPPING_NORM) if kept is not None and kept.get(RUN) == request.digest else None
    return norm if isinstance(norm, float) else None


def _seed_torch(seed: int, device: torch.device) -> None:
    """Seed what orders examples and drops units; neither noise nor samples of a private round come from it.

    Torch's own function for all devices formats a stack trace for every kind of accelerator: ten times a small model's
    step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
