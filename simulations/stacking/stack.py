"""Trains the clients of a chunk as one computation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common.config import RunConfig
from common.errors import FailureCode, ModelError, PeerError, PrivacyError
from common.privacy import NoiseSource, PrivacyPlan
from common.schema import Examples
from simulations.stacking.batches import plain_batches, steps_of
from simulations.stacking.chunks import block_size
from simulations.stacking.dense import read_chain
from simulations.stacking.layout import Layout
from simulations.stacking.mapped import MappedBlock
from simulations.stacking.plain import DenseBlock
from simulations.stacking.private import PrivateBlock
from simulations.stacking.suitability import why_not
from simulations.stacking.updates import Updates
from simulations.stacking.verdict import Tally

log = structlog.get_logger()

_ACTIVATIONS = 16
"""Values that convolutions or attention keep for the backward pass, for each value of an example; a rough guess."""


class Member(NamedTuple):  # a round makes a thousand: a frozen dataclass takes four times as long
    """One client of a stack.

    Attributes:
        name: Its public name; with run and round it decides the order of its examples.
        examples: Its own.
        source: Makes what its noise and Poisson samples come from, with privacy. It is called for each try: after one
            that failed, noise which repeats begins anew. Secure sources may be the same for all members.
        steps: Most steps that it takes (partial work); None: all.
    """

    name: str
    examples: Examples
    source: Callable[[], NoiseSource] | None = None
    steps: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Folded:
    """What a chunk's members have trained, added up.

    Attributes:
        sums: float64 of the model's shapes, by name in the order of its state dict: sum over sound members of weight
            times the trained values. What is not trained counts with its value at the start.
        weight: Sum of the sound members' weights; 0 where there are none, and then all sums are zero.
        loss: Sum of weight times mean training loss; 0 with privacy, where no loss leaves a client.
        failures: By member; None where its result is in the sums.
    """

    sums: dict[str, NDArray[np.float64]]
    weight: float
    loss: float
    failures: list[FailureCode | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Task:
    """What one call of `train` asks for, the same for all members."""

    start: Tensor
    server_round: int
    rate: float
    plan: PrivacyPlan | None
    proximal_mu: float


@dataclass(frozen=True, kw_only=True, slots=True)
class _Block:
    """Members that are computed at a time, those with most steps first.

    Attributes:
        places: Of each in the chunk.
        members: They.
        counts: How many examples each has.
        steps: How many steps each takes, one or more.
    """

    places: list[int]
    members: list[Member]
    counts: list[int]
    steps: list[int]

    def part(self, first: int, last: int) -> _Block:
        """Those from `first` to `last`."""
        own = slice(first, last)
        return _Block(
            places=self.places[own], members=self.members[own], counts=self.counts[own], steps=self.steps[own]
        )


class Stack:
    """Trains chunks of clients of one run, in one process."""

    def __init__(self, model: nn.Module, config: RunConfig, *, device: torch.device) -> None:
        """Prepare.

        Args:
            model: Of the run; its own weights do not matter.
            config: Of the run.
            device: Where to train; several clients share it in one stack.

        Raises:
            ModelError: `why_not` says so.
        """
        if (reason := why_not(model, config)) is not None:
            raise ModelError(f"clients cannot be stacked: {reason}", hint="train them one by one: --batching off")
        self._model = model.to(device).train()
        self._config, self._device = config, device
        self._layout, self._chain = Layout(model), read_chain(model)
        self._width = 1

    def train(
        self,
        start: Mapping[str, NDArray[Any]],
        members: Sequence[Member],
        *,
        server_round: int,
        rate: float,
        plan: PrivacyPlan | None,
        proximal_mu: float,
        largest: float,
    ) -> Folded:
        """Train all members from the same weights and add up what they trained.

        Args:
            start: The model's weights by name.
            members: In an order that does not depend on machine or workers: sums are rounded in it.
            server_round: From 1.
            rate: Local learning rate of this round (`client.trainer.learning_rate_at`).
            plan: With privacy unit `example`; else None.
            proximal_mu: Pull towards the start (FedProx); 0 for none.
            largest: Values beyond it, and beyond twice the array's own largest at the start, are unsound.

        Guarantee: A member's share of the sums is what `client.app` would have answered, within 1e-5 relative.
        A member that fails changes nothing but its own entry of `failures`: NON_FINITE_UPDATE for values or a loss
        that are not finite or too large, CLIENT_FAILED for one without steps (no examples, without privacy) or whose
        examples do not fit.

        Raises:
            PeerError: The weights do not fit the model, or the plan was made for fewer parameters.
            PrivacyError: There is a plan and the run has no privacy, or the other way round, or a member has no source
                of noise. Nothing was drawn.
        """
        self._layout.check(start)
        self._check_plan(plan, members)
        self._width = next((m.examples.inputs[0].numel() for m in members if len(m.examples)), 1)
        self._layout.load_fixed(self._model, start)
        row = torch.from_numpy(self._layout.read(start)).to(self._device)
        task = _Task(start=row, server_round=server_round, rate=rate, plan=plan, proximal_mu=proximal_mu)
        tally = Tally(self._layout, self._layout.limits(start, largest), self._device)
        failures: list[FailureCode | None] = [FailureCode.CLIENT_FAILED] * len(members)
        everybody, first = self._in_order(members, plan), 0
        while first < len(everybody.places):
            last = first + self._block_size(everybody.counts[first], everybody.steps[first])
            block = everybody.part(first, last)
            for place, failure in zip(block.places, self._train(task, block, tally), strict=True):
                failures[place] = failure
            first = last
        total = tally.total.cpu().numpy()
        return Folded(
            sums=self._layout.write(total, start, tally.weight),
            weight=tally.weight,
            loss=tally.loss,
            failures=failures,
        )

    def _check_plan(self, plan: PrivacyPlan | None, members: Sequence[Member]) -> None:
        if (plan is not None) != (self._config.privacy.unit == "example"):
            raise PrivacyError("the run's privacy and its plan do not agree")
        if plan is None:
            return
        if self._layout.size > plan.dimensions:
            raise PeerError(FailureCode.INVALID_REQUEST)  # the ledger would say less than is rounded and drawn
        if any(member.source is None for member in members):
            raise PrivacyError("a member of a stack has no source of noise")

    def _in_order(self, members: Sequence[Member], plan: PrivacyPlan | None) -> _Block:
        """Those who have any steps to take; those who go on longest first, so that the others drop out from the end."""
        counts = [member.examples.targets.size(0) for member in members]  # len() of a tensor takes ten times as long
        if plan is not None:
            steps = [plan.local_steps] * len(members)
        else:
            known = {count: steps_of(count, self._config.training) if count else 0 for count in set(counts)}
            steps = [known[count] for count in counts]
        if any(member.steps is not None for member in members):
            steps = [
                own if member.steps is None else min(own, member.steps)
                for own, member in zip(steps, members, strict=True)
            ]
        places = [place for place, own in enumerate(steps) if own > 0]
        if len(places) == len(members) and len(set(steps)) <= 1 and len(set(counts)) <= 1:
            return _Block(places=places, members=list(members), counts=counts, steps=steps)
        places.sort(key=lambda place: (-steps[place], -counts[place]))
        return _Block(
            places=places,
            members=[members[place] for place in places],
            counts=[counts[place] for place in places],
            steps=[steps[place] for place in places],
        )

    def _block_size(self, count: int, steps: int) -> int:
        """Members that are computed at a time, from the examples and steps of the largest."""
        settings, chain = self._config.training, self._chain is not None
        private = self._config.privacy.unit == "example"
        taken = count if private else min(count, settings.batch_size)
        kept = self._layout.size if steps > 1 or not chain else 0
        return block_size(kept + taken * self._width * (1 if chain else _ACTIVATIONS), self._device)

    def _train(self, task: _Task, block: _Block, tally: Tally) -> list[FailureCode | None]:
        """What became of each member; where a whole block fails, by halves, so that only those fail who must."""
        before = tally.copy()
        try:
            return [None if sound else FailureCode.NON_FINITE_UPDATE for sound in self._run(task, block, tally)]
        except Exception as e:  # noqa: BLE001 - as at a client: nothing may pass
            tally.restore(before)
            size = len(block.places)
            if size == 1:
                log.error("client_failed", error=type(e).__name__)  # noqa: TRY400 - a trace can quote data
                return [FailureCode.CLIENT_FAILED]
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        halves = block.part(0, size // 2), block.part(size // 2, size)
        return [failure for half in halves for failure in self._train(task, half, tally)]

    def _run(self, task: _Task, block: _Block, tally: Tally) -> list[bool]:
        """Whether each member's result was sound."""
        examples, steps = [member.examples for member in block.members], block.steps
        weights = torch.ones(len(steps), dtype=torch.float64)
        if task.plan is None and self._config.strategy.weighting == "examples":
            weights = torch.tensor(block.counts, dtype=torch.float64)
        weights = weights.to(self._device)
        updates = Updates(self._config.training, rate=task.rate, proximal_mu=task.proximal_mu, start=task.start)
        if task.plan is not None and self._chain is not None:
            sources = [member.source() for member in block.members if member.source is not None]
            private = PrivateBlock(self._chain, self._layout, task.start, updates=updates, tally=tally, plan=task.plan)
            return private.train(examples, block.counts, sources, steps, weights)
        batches = plain_batches(
            [member.name for member in block.members],
            examples,
            block.counts,
            steps,
            self._config,
            server_round=task.server_round,
            device=self._device,
        )
        if self._chain is None:
            mapped = MappedBlock(self._model, self._layout, task.start, updates=updates, tally=tally)
            return mapped.train(batches, steps, weights)
        with torch.no_grad():
            dense = DenseBlock(self._chain, self._layout, task.start, updates=updates, tally=tally)
            return dense.train(batches, steps, weights)
