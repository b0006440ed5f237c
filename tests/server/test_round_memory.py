"""How many models a coordinator holds at once: a few, however many sites there are."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from flwr.app import Message
from torch import nn

from common.crypto import PartyKeys
from common.flower import arrays_of
from common.models.weights import ModelWeights
from common.transport.sealed import Blob, sealed_content
from server.coordinator import Coordinator, Job
from server.grids import SealedGrid
from server.store import RunFolder
from tests.helpers.grids import update
from tests.helpers.masked import RUN_ID as MASKED_RUN
from tests.helpers.masked import Members, masked
from tests.helpers.runs import configuration
from tests.helpers.sealing import COORDINATOR, RUN_ID, Nodes, opened, sealed_up

LAYERS, SIDE = 8, 512
MODEL_BYTES = LAYERS * SIDE * SIDE * 4


class Peak:
    """The most memory that the coordinator held at once, beyond what it had at the start; a site's own is left out."""

    def __init__(self) -> None:
        self.bytes = 0
        self._start = tracemalloc.get_traced_memory()[0]

    def look(self) -> None:
        self.bytes = max(self.bytes, tracemalloc.get_traced_memory()[1] - self._start)

    def go_on(self) -> None:
        tracemalloc.reset_peak()


def peak_models(folder: Path, sites: int) -> float:
    """Two rounds of FedAvg with sealed replies on disk; the peak, in models."""
    keys = [PartyKeys.generate(f"site-{i}", "site") for i in range(sites)]
    config = configuration(evaluation={"every": 0}, rounds=2)
    model = nn.Sequential(*[nn.Linear(SIDE, SIDE, bias=False) for _ in range(LAYERS)])
    before = ModelWeights(model).copy()
    files = folder / "sent"
    files.mkdir(parents=True)

    def script(orders: list[Message]) -> Iterator[Message]:
        for i, (order, site) in enumerate(zip(orders, keys, strict=True)):
            peak.look()
            start = arrays_of(opened(order, site)[1])
            trained = {name: values + np.float32(i) for name, values in start.items()}
            envelope, ciphertext = sealed_up(order, site, update(trained, 1.0 + i, train_loss=0.5))
            (path := files / f"{i}").write_bytes(ciphertext)
            size = len(ciphertext)
            del start, trained, ciphertext
            peak.go_on()
            yield Message(sealed_content(envelope, Blob.of_file(path, size)), reply_to=order)

    (blobs := folder / "blobs").mkdir()
    grid = SealedGrid(
        Nodes(script, [site.record.name for site in keys]),
        keys=COORDINATOR,
        records={site.record.name: site.record for site in keys},
        run_id=RUN_ID,
        config_digest=bytes.fromhex(config.digest()),
        folder=blobs,
    )
    with RunFolder.create(config, folder / "run") as run:
        tracemalloc.start()
        try:
            peak = Peak()
            outcome = Coordinator(Job(config=config, model=model, held_out=None, plan=None, folder=run)).run(grid)
            peak.look()
        finally:
            tracemalloc.stop()
    moved = 2 * sum((1.0 + i) * i for i in range(sites)) / sum(1.0 + i for i in range(sites))
    assert all(np.allclose(values, before[name] + moved, atol=1e-3) for name, values in outcome.arrays.items())
    return peak.bytes / MODEL_BYTES


def masked_peak_models(sites: int) -> float:
    """Two rounds under secure aggregation; the coordinator's peak, in models."""

    class Watched(Members):
        """Members whose own memory is left out."""

        def _reply(self, name: str, message: Message, steps: dict[str, bytes], server_round: int) -> Message:
            peak.look()
            reply = super()._reply(name, message, steps, server_round)
            self.updates.clear()
            peak.go_on()
            return reply

    config = masked(rounds=2, evaluation={"every": 0}, secagg={"epoch_rounds": 1})
    model = nn.Sequential(*[nn.Linear(SIDE, SIDE, bias=False) for _ in range(LAYERS)])
    grid = Watched(config, sites)
    tracemalloc.start()
    try:
        peak = Peak()
        Coordinator(Job(config=config, model=model, run_id=MASKED_RUN.hex(), sites=grid.records)).run(grid)
        peak.look()
    finally:
        tracemalloc.stop()
    return peak.bytes / MODEL_BYTES


def test_a_masked_round_holds_few_models_whatever_the_number_of_sites() -> None:
    """One accumulator and one masked update while they come; then the sum, and in double precision the mean that it
    stands for, which becomes the strategy's one reply.
    """
    three, nine = masked_peak_models(3), masked_peak_models(9)
    assert three < 4.7
    assert abs(nine - three) < 0.3


def test_a_round_holds_few_models_whatever_the_number_of_sites(tmp_path: Path) -> None:
    """Beside the model in torch: the sum in double precision, and the one reply that is added: 3 models."""
    two, eight = peak_models(tmp_path / "2", 2), peak_models(tmp_path / "8", 8)
    assert two < 3.7
    assert abs(eight - two) < 0.3
