"""The Flower ClientApp: load the model that came, train it, answer with the new weights.

Nothing that arrives is executed: a message holds weights and a configuration of registered names, and what those names
mean is decided by this client's own `Resources`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod
from numpy.typing import NDArray
from torch import nn

from client.mods import guard_mod, privacy_mod
from client.request import TrainRequest, parse_query, parse_request
from client.trainer import learning_rate_at, resolve_device, train_plain, train_private
from common.config import RunConfig
from common.errors import FailureCode, ModelError, PeerError
from common.flower import CLIENT, CONFIG, TRAIN_LOSS, WEIGHT, arrays_of, prepare_process, update_reply
from common.models import build_model, check_private
from common.models.weights import ModelWeights
from common.privacy import Ledger, SecureNoise
from common.schema import ClientData, DataSchema
from common.site import Site


class Resources(Protocol):
    """What a client's own machine provides: it decides what registered names mean."""

    @property
    def site(self) -> Site:
        """Registry of the client's own models and data."""

    def data(self, request: TrainRequest, context: Context) -> tuple[DataSchema, ClientData]:
        """The examples that this client trains on."""

    def ledger(self, request: TrainRequest, context: Context) -> Ledger:
        """Where this client records privacy events."""


class LoadedModel:
    """A model kept between rounds, ready to train."""

    def __init__(self, model: nn.Module, device: torch.device, *, private: bool) -> None:
        self.model = model.to(device)
        self.device = device
        self.weights = ModelWeights(self.model)
        if private:  # Opacus takes seconds to import
            from opacus.grad_sample import GradSampleHooks

            from common.privacy.per_sample import register_samplers

            check_private(model)
            register_samplers(model)
            self.hooks = GradSampleHooks(model, batch_first=True, loss_reduction="sum", strict=True)

    def load(self, arrays: dict[str, NDArray[Any]]) -> None:
        """Take over the weights that came; what does not fit was asked of the wrong client."""
        try:
            self.weights.load(arrays)
        except ModelError as e:
            raise PeerError(FailureCode.INVALID_REQUEST) from e


def make_client_app(resources: Resources, *, mods: Sequence[Mod] = ()) -> ClientApp:
    """The ClientApp of one site, or of all clients of a simulation.

    Args:
        resources: Data, models and ledger of this machine.
        mods: Further mods, between the guard (outermost) and the privacy mod.
    """
    prepare_process()
    source = SecureNoise()
    privacy = privacy_mod(resources.ledger)
    app = ClientApp()

    models: dict[str, LoadedModel] = {}  # of the current run: a process works on one run at a time

    def loaded(request: TrainRequest, schema: DataSchema) -> LoadedModel:
        if request.digest not in models:
            models.clear()
            config = request.config
            model = build_model(config.model, schema, site=resources.site)
            models[request.digest] = LoadedModel(model, resolve_device(config.training.device), private=config.private)
        return models[request.digest]

    @app.train(mods=[guard_mod, *mods, privacy])
    def train(message: Message, context: Context) -> Message:
        request = parse_request(message)
        schema, data = resources.data(request, context)
        slot = loaded(request, schema)
        slot.load(_arrays(message))
        try:
            metrics = _train(slot, data, request, source)
        except BaseException:
            models.clear()  # half a step's gradients must not enter the next round's sum
            raise
        return update_reply(message, slot.weights.copy(), metrics)

    @app.query(mods=[guard_mod])
    def query(message: Message, context: Context) -> Message:
        """Answer with this client's public name."""
        request = parse_query(message)
        _, data = resources.data(request, context)
        return Message(RecordDict({CONFIG: ConfigRecord({CLIENT: data.name})}), reply_to=message)

    return app


def _arrays(message: Message) -> dict[str, NDArray[Any]]:
    """The weights that came; never unpickled."""
    try:
        return arrays_of(message.content)
    except Exception as e:
        raise PeerError(FailureCode.INVALID_REQUEST) from e


def _train(slot: LoadedModel, data: ClientData, request: TrainRequest, source: SecureNoise) -> dict[str, float]:
    """Train in place; the metrics of the reply. With privacy these are constants of the plan, not of the data."""
    config = request.config
    rate = learning_rate_at(config.training, request.server_round, config.rounds)
    _seed_training(config, request.server_round, data.name, slot.device)
    examples = data.train.to(slot.device)
    if request.plan is not None:
        train_private(
            slot.model,
            examples,
            config.training,
            plan=request.plan,
            learning_rate=rate,
            source=source,
            proximal_mu=request.proximal_mu,
        )
        return {WEIGHT: 1.0}
    loss = train_plain(slot.model, examples, config.training, learning_rate=rate, proximal_mu=request.proximal_mu)
    if not np.isfinite(loss):
        raise PeerError(FailureCode.NON_FINITE_UPDATE)
    weight = float(len(examples)) if config.strategy.weighting == "examples" else 1.0
    return {WEIGHT: weight, TRAIN_LOSS: loss}


def _seed_training(config: RunConfig, server_round: int, client: str, device: torch.device) -> None:
    """Make example order and dropout depend on nothing but run, round and client.

    Not by `torch.manual_seed`, which formats a stack trace for every kind of accelerator: 4 ms, ten times a small
    model.
    """
    text = f"{config.seeds.training}/{server_round}/{client}".encode()
    seed = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
