"""Flower's strategies resume bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.serverapp.strategy import FedAvg, Strategy
from numpy.typing import NDArray

from common.errors import RunError
from server.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from server.strategy_state import restore_strategy, strategy_state
from tests.helpers.strategies import (
    every_strategy,
    make,
    model,
    one_round,
    plain,
    record,
)

CHANGES = {
    "fedavgm": {"current_arrays", "momentum_vector"},
    "fedadam": {"current_arrays", "m_t", "v_t"},
    "fedyogi": {"current_arrays", "m_t", "v_t"},
    "fedadagrad": {"current_arrays", "m_t", "v_t"},
    "qfedavg": {"current_arrays"},
}


class Keeper(FedAvg):
    """A strategy that keeps one of everything that can be saved."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0
        self.clip: float | None = None
        self.flag, self.note = False, ""
        self.bare: NDArray[Any] | None = None
        self.lone: np.generic | None = None
        self.by_name: dict[str, Any] = {}
        self.series: list[Any] = []


class TestState:
    """`strategy_state` and `restore_strategy`."""

    @every_strategy
    def test_all_that_rounds_change_is_known(self, name: str) -> None:
        """Flower's strategies keep these attributes between rounds and no others; a new one would show here."""
        strategy, arrays = make(name), model()
        before = {key: plain(value) for key, value in vars(strategy).items()}
        for server_round in (1, 2):
            arrays = one_round(strategy, server_round, arrays)
        changed = {key for key, value in vars(strategy).items() if plain(value) != before.get(key)}
        assert changed == CHANGES.get(name, set())

    @every_strategy
    @pytest.mark.parametrize("rounds", [0, 3])
    def test_a_restored_strategy_equals_the_saved_one(self, name: str, rounds: int) -> None:
        """Every attribute is restored exactly: bytes, dtype, shape, order and type."""
        strategy, fresh, arrays = make(name), make(name), model()
        for server_round in range(1, rounds + 1):
            arrays = one_round(strategy, server_round, arrays)
        restore_strategy(fresh, strategy_state(strategy))
        assert {k: plain(v) for k, v in vars(fresh).items()} == {k: plain(v) for k, v in vars(strategy).items()}

    @every_strategy
    def test_a_resumed_run_ends_with_the_same_bytes(self, name: str, tmp_path: Path) -> None:
        """Six rounds in one go, and three rounds, a checkpoint, a fresh strategy and three more, are the same."""
        strategy, arrays = make(name), model()
        for server_round in range(1, 7):
            arrays = one_round(strategy, server_round, arrays)
        uninterrupted = plain({key: array.numpy() for key, array in arrays.items()})

        strategy, arrays = make(name), model()
        for server_round in range(1, 4):
            arrays = one_round(strategy, server_round, arrays)
        save_checkpoint(
            tmp_path,
            Checkpoint(
                server_round=3,
                config_digest="d",
                arrays={key: array.numpy() for key, array in arrays.items()},
                strategy=strategy_state(strategy),
            ),
        )
        loaded = load_checkpoint(tmp_path, "d")
        assert loaded is not None
        strategy, arrays = make(name), record(dict(loaded.arrays))
        restore_strategy(strategy, loaded.strategy)
        for server_round in range(loaded.server_round + 1, 7):
            arrays = one_round(strategy, server_round, arrays)
        assert plain({key: array.numpy() for key, array in arrays.items()}) == uninterrupted

    @pytest.mark.parametrize("name", sorted(CHANGES.keys() - {"qfedavg"}))
    def test_the_state_matters(self, name: str) -> None:
        """Without its state a strategy with memory goes elsewhere, so the test before this one can fail."""
        strategy, arrays = make(name), model()
        for server_round in range(1, 4):
            arrays = one_round(strategy, server_round, arrays)
        forgetful = one_round(make(name), 4, arrays)
        assert plain(forgetful["weight"]) != plain(one_round(strategy, 4, arrays)["weight"])

    def test_one_of_everything_survives(self) -> None:
        """Numbers, texts, None, arrays, numpy scalars, and dicts and lists of them come back as they were."""
        strategy, fresh = Keeper(), Keeper()
        strategy.steps, strategy.clip, strategy.flag, strategy.note = 7, float("inf"), True, "é"
        strategy.bare, strategy.lone = np.array([[True], [False]]), np.float32(0.1)
        strategy.by_name = {"z/ä": np.float64(1), "a": np.array(2.5), "": np.zeros((0, 2), np.int8)}
        strategy.series = [np.arange(3)[::2], np.uint8(3)]
        restore_strategy(fresh, strategy_state(strategy))
        assert {k: plain(v) for k, v in vars(fresh).items()} == {k: plain(v) for k, v in vars(strategy).items()}

    def test_a_restored_strategy_shares_nothing(self) -> None:
        """Writing to the snapshot later does not reach the strategy."""
        strategy, fresh = Keeper(), Keeper()
        strategy.bare = np.zeros(2)
        state = strategy_state(strategy)
        restore_strategy(fresh, state)
        state["bare/"][:] = 1
        assert fresh.bare is not None
        assert fresh.bare.tolist() == [0, 0]

    @pytest.mark.parametrize(
        "value",
        [
            {1, 2},
            [1.0],
            (np.zeros(1),),
            {"a": 1.0},
            {1: np.zeros(1)},
            np.array([object()]),
            np.array(["text"]),
            np.zeros(1, complex),
            np.random.default_rng(0),
            FedAvg(),
            lambda: 0,
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_what_cannot_be_saved_stops_the_run(self, value: object) -> None:
        """An attribute of an unknown kind is named, never dropped; a plain function is a setting and passes."""
        strategy = make("fedavg")
        strategy.secret_sauce = value  # type: ignore[attr-defined]
        if callable(value) and not isinstance(value, Strategy):
            strategy_state(strategy)
            return
        with pytest.raises(RunError, match=r"FedAvg\.secret_sauce \(\w+\) cannot be saved"):
            strategy_state(strategy)

    @pytest.mark.parametrize("damage", ["other", "missing", "extra", "no layout", "layout", "kind", "attribute"])
    def test_a_state_that_does_not_fit_changes_nothing(self, damage: str) -> None:
        """State of another strategy, with arrays missing or too many, or garbled, is refused before anything is set."""
        strategy, arrays = make("fedadam"), model()
        arrays = one_round(strategy, 1, arrays)
        state = strategy_state(strategy)
        layout = state["layout.json"].tobytes()

        def changed(old: bytes, new: bytes) -> NDArray[np.uint8]:
            assert old in layout
            return np.frombuffer(layout.replace(old, new), np.uint8)

        match damage:
            case "other":
                state = strategy_state(make("fedyogi"))
            case "missing":
                del state["v_t/bias"]
            case "extra":
                state["v_t/more"] = np.zeros(1)
            case "no layout":
                del state["layout.json"]
            case "layout":
                state["layout.json"] = state["layout.json"][:-3]
            case "kind":
                state["layout.json"] = changed(b'"dict"', b'"pickle"')
            case "attribute":
                state["layout.json"] = changed(b'"beta_1"', b'"beta_9"')
        fresh = make("fedadam")
        before = {key: plain(value) for key, value in vars(fresh).items()}
        with pytest.raises(RunError, match="does not fit the strategy FedAdam"):
            restore_strategy(fresh, state)
        assert {key: plain(value) for key, value in vars(fresh).items()} == before
