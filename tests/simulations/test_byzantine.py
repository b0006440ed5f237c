"""Simulated liars do exactly what the configuration says, and nobody else does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict

from common.flower import ARRAYS, CONFIG, arrays_of, to_record
from common.models.weights import ModelWeights
from simulations.engines import inline_grid
from simulations.inline import app_factory
from tests.helpers.runs import as_bytes, prepared, run


def replies(folder: Path, **changes: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The starting arrays, and what each client sends back in its first round."""
    possible = prepared(folder, **changes)
    start = ModelWeights(possible.model).copy()
    config = ConfigRecord({"run": possible.config.canonical_json(), "server-round": 1})
    content = RecordDict({ARRAYS: to_record(start), CONFIG: config})
    with inline_grid(possible, app_factory, workers=1) as grid:
        sent = [Message(content, node, "train") for node in grid.get_node_ids()]
        return start, [arrays_of(reply.content) for reply in grid.send_and_receive(sent)]


def test_the_first_clients_scale_their_update(tmp_path: Path) -> None:
    """With two liars at scale -10, the first two send the start minus ten times their update; the others are honest."""
    start, honest = replies(tmp_path)
    _, found = replies(tmp_path, simulation={"byzantine_clients": 2, "byzantine_scale": -10.0})
    for client, (arrays, truth) in enumerate(zip(found, honest, strict=True)):
        if client >= 2:
            assert as_bytes(arrays) == as_bytes(truth)
            continue
        for name in start:
            expected = start[name] - 10 * (truth[name] - start[name])
            np.testing.assert_allclose(arrays[name], expected, rtol=1e-4, atol=1e-5)
            assert arrays[name].dtype == start[name].dtype


def test_their_replies_fit_the_model(tmp_path: Path) -> None:
    """A lie is a well-formed update, so that only a robust strategy can tell: also of a model that holds integers."""
    _, log = run(
        tmp_path / "run",
        rounds=1,
        model={"name": "wide", "options": {"megabytes": 1}},
        simulation={"byzantine_clients": 1, "byzantine_scale": -0.5},
    )
    assert log.failures == [{}]


def test_failures_stay_failures(tmp_path: Path) -> None:
    """A liar that cannot train has nothing to lie about."""
    _, log = run(
        tmp_path / "run",
        model={"options": {"trouble": "raise"}},
        data={"name": "one-in-trouble"},
        simulation={"byzantine_clients": 2, "byzantine_scale": -0.5},
    )
    assert log.failures == [{"client-01": "client-failed"}] * 3
