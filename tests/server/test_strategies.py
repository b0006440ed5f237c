"""Flower's strategies behave as the coordinator assumes, and resume bit for bit."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, FedXgbBagging, Strategy
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from common.config import StrategySettings
from common.errors import ConfigError, RunError
from common.flower import prepare_process, stamp
from server.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from server.strategies import (
    cast_like,
    check_strategy,
    make_strategy,
    minimum_replies,
    replies_needed,
    restore_strategy,
    strategy_state,
)

OPTIONS: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedprox": {"proximal_mu": 0.1},
    "fedavgm": {"server_momentum": 0.9, "server_learning_rate": 0.5},
    "fedadam": {"server_learning_rate": 0.1},
    "fedyogi": {"server_learning_rate": 0.1},
    "fedadagrad": {"server_learning_rate": 0.1},
    "qfedavg": {"q": 0.2},
    "fedmedian": {},
    "fedtrimmedavg": {"trim_fraction": 0.2},
    "krum": {"malicious_clients": 1},
    "multikrum": {"malicious_clients": 1, "clients_to_keep": 3},
    "bulyan": {"malicious_clients": 1},
}
MEAN = {"fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad"}
CHANGES = {
    "fedavgm": {"current_arrays", "momentum_vector"},
    "fedadam": {"current_arrays", "m_t", "v_t"},
    "fedyogi": {"current_arrays", "m_t", "v_t"},
    "fedadagrad": {"current_arrays", "m_t", "v_t"},
    "qfedavg": {"current_arrays"},
}
every_strategy = pytest.mark.parametrize("name", OPTIONS)


@pytest.fixture(autouse=True, scope="module")
def _flower() -> Iterator[None]:
    """Let this process build messages. QFedAvg and Bulyan collect garbage once a reply: keep what is imported out."""
    prepare_process()
    gc.freeze()
    yield
    gc.unfreeze()


class CohortGrid:
    """What a strategy may ask of a grid: who is there."""

    def __init__(self, nodes: Sequence[int]) -> None:
        self.nodes = nodes

    def get_node_ids(self) -> Sequence[int]:
        return self.nodes


def settings(name: str, **options: Any) -> StrategySettings:
    return StrategySettings(name=name, **{**OPTIONS[name], **options})  # type: ignore[arg-type]


def make(name: str, **options: Any) -> FedAvg:
    return make_strategy(settings(name, **options), client_learning_rate=0.1)


def record(arrays: dict[str, NDArray[Any]]) -> ArrayRecord:
    return ArrayRecord({key: Array(values) for key, values in arrays.items()})


def model() -> ArrayRecord:
    """Keys out of alphabetical order, and one array without dimensions."""
    zeros, ones = np.zeros((5, 3), np.float32), np.ones(3, np.float32)
    return record({"weight": zeros, "bias": ones, "a.scale": np.array(2, np.float32)})


def messages_of(strategy: Strategy, server_round: int, arrays: ArrayRecord, nodes: Sequence[int]) -> list[Message]:
    grid = cast(Grid, CohortGrid(nodes))
    messages = strategy.configure_train(server_round, arrays, ConfigRecord(), grid)
    return sorted(messages, key=lambda message: message.metadata.dst_node_id)


def answer(message: Message, arrays: ArrayRecord, *, examples: int = 1, loss: float = 1.0) -> Message:
    metrics = MetricRecord({"num-examples": examples, "train_loss": loss})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=stamp(message, message_id="m"))


def trained(message: Message, server_round: int) -> Message:
    """A client that moves every weight a little, in a way that depends on round and node only."""
    node = message.metadata.dst_node_id
    generator = np.random.default_rng([node, server_round])
    arrays = cast(ArrayRecord, message.content["arrays"])
    moved = {k: a.numpy() + 0.01 * generator.standard_normal(a.shape) for k, a in arrays.items()}
    return answer(message, record({k: np.asarray(v, np.float32) for k, v in moved.items()}), examples=node, loss=node)


def one_round(strategy: Strategy, server_round: int, arrays: ArrayRecord, clients: int = 10) -> ArrayRecord:
    messages = messages_of(strategy, server_round, arrays, range(2, 2 + clients))
    result, _ = strategy.aggregate_train(server_round, [trained(message, server_round) for message in messages])
    assert result is not None
    return cast_like(result, arrays)


def aggregate(name: str, values: Sequence[float], **options: Any) -> float | None:
    """What a strategy makes of clients that each send one number."""
    strategy, start = make(name, **options), record({"w": np.zeros(1, np.float32)})
    messages = messages_of(strategy, 1, start, range(2, 2 + len(values)))
    replies = [answer(m, record({"w": np.array([v], np.float32)})) for m, v in zip(messages, values, strict=True)]
    result, _ = strategy.aggregate_train(1, replies)
    return None if result is None else float(result["w"].numpy()[0])


def plain(value: Any) -> Any:
    """A value in a form that compares by bytes, dtype, shape, order and type."""
    if isinstance(value, np.ndarray | np.generic):
        return type(value).__name__, value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, ArrayRecord | dict):
        return type(value).__name__, [(key, plain(part)) for key, part in value.items()]
    if isinstance(value, Array):
        return plain(value.numpy())
    return (type(value).__name__, [plain(part) for part in value]) if isinstance(value, list) else value


class TestMaking:
    """`make_strategy`."""

    @every_strategy
    def test_each_name_makes_flowers_own_class(self, name: str) -> None:
        """A configured name stands for the Flower strategy of that name, unmodified."""
        kind = type(make(name))
        assert kind.__name__.lower() == name
        assert kind.__module__.startswith("flwr.serverapp.strategy")

    @every_strategy
    @pytest.mark.parametrize("nodes", [[], [7], [3, 1, 2]])
    def test_it_trains_on_exactly_the_nodes_it_is_shown(self, name: str, nodes: list[int]) -> None:
        """Every node of the grid gets one message to train and none to evaluate, however few there are."""
        strategy = make(name)
        messages = messages_of(strategy, 1, model(), nodes)
        assert [message.metadata.dst_node_id for message in messages] == sorted(nodes)
        assert strategy.configure_evaluate(1, model(), ConfigRecord(), cast(Grid, CohortGrid(nodes))) == []

    @every_strategy
    def test_making_one_warns_of_nothing(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Flower does not tell the user that clients never evaluate: that is by intent."""
        seen: list[logging.LogRecord] = []
        handler = logging.Handler()
        monkeypatch.setattr(handler, "emit", seen.append)
        logger = logging.getLogger("flwr")
        monkeypatch.setattr(logger, "level", logging.DEBUG)
        logger.manager._clear_cache()  # type: ignore[attr-defined]
        logger.addHandler(handler)
        try:
            make(name)
            assert seen == []
            FedAvg(fraction_evaluate=0.0)
            assert len(seen) == 1, "the same logger would have shown a warning"
        finally:
            logger.removeHandler(handler)
            logger.manager._clear_cache()  # type: ignore[attr-defined]

    @pytest.mark.parametrize(
        ("name", "option", "attribute"),
        [
            ("fedprox", "proximal_mu", "proximal_mu"),
            ("fedavgm", "server_learning_rate", "server_learning_rate"),
            ("fedavgm", "server_momentum", "server_momentum"),
            ("fedadam", "server_learning_rate", "eta"),
            ("fedadam", "beta_1", "beta_1"),
            ("fedadam", "beta_2", "beta_2"),
            ("fedyogi", "tau", "tau"),
            ("fedyogi", "beta_1", "beta_1"),
            ("fedadagrad", "server_learning_rate", "eta"),
            ("fedadagrad", "tau", "tau"),
            ("qfedavg", "q", "q"),
            ("fedtrimmedavg", "trim_fraction", "beta"),
        ],
    )
    def test_options_reach_the_strategy(self, name: str, option: str, attribute: str) -> None:
        """Each option of the configuration sets the attribute that Flower computes with."""
        assert getattr(make(name, **{option: 0.25}), attribute) == 0.25

    def test_counts_of_clients_reach_the_strategy(self) -> None:
        """How many clients are malicious, and how many are kept, is passed on; Krum keeps one."""
        multikrum = make("multikrum", malicious_clients=2, clients_to_keep=4)
        assert (multikrum.num_malicious_nodes, multikrum.num_nodes_to_select) == (2, 4)  # type: ignore[attr-defined]
        krum = make("krum", malicious_clients=2)
        assert (krum.num_malicious_nodes, krum.num_nodes_to_select) == (2, 1)  # type: ignore[attr-defined]
        assert make("bulyan", malicious_clients=2).num_malicious_nodes == 2  # type: ignore[attr-defined]

    def test_qfedavg_knows_the_clients_learning_rate(self) -> None:
        """QFedAvg estimates the Lipschitz constant from the rate that clients train with."""
        strategy = make_strategy(settings("qfedavg"), client_learning_rate=0.03)
        assert strategy.client_learning_rate == 0.03  # type: ignore[attr-defined]


class TestReplies:
    """What a strategy does with replies."""

    @every_strategy
    def test_a_mean_is_enough_for_six(self, name: str) -> None:
        """FedAvg, FedProx, FedAvgM, FedAdam, FedYogi and FedAdagrad need the mean; the others every reply."""
        expected = "mean" if name in MEAN else "individual"
        assert replies_needed(name) == expected
        assert replies_needed(make(name)) == expected

    @every_strategy
    def test_a_declared_mean_is_the_truth(self, name: str) -> None:
        """A strategy that declares `mean` gives the same for one reply that is the mean of all."""
        values = [-1.0, 0.5, 2.0, 4.5, 1.0, 0.0, 3.0]
        each, mean = aggregate(name, values), aggregate(name, [float(np.mean(values))])
        if name in MEAN:
            assert each == pytest.approx(mean)
        else:
            assert each != pytest.approx(mean)

    def test_what_is_not_known_needs_every_reply(self) -> None:
        """A subclass, another Flower strategy, own metrics and an unknown name are all `individual`."""

        class Own(FedAvg):
            pass

        own_metrics = FedAvg(train_metrics_aggr_fn=lambda records, key: MetricRecord())
        for strategy in (Own(), FedXgbBagging(), own_metrics, "own", ""):
            assert replies_needed(strategy) == "individual"

    @every_strategy
    def test_four_strategies_empty_the_replies(self, name: str) -> None:
        """QFedAvg, FedMedian, FedTrimmedAvg and Bulyan take the arrays out of the replies they are given."""
        strategy = make(name)
        replies = [trained(message, 1) for message in messages_of(strategy, 1, model(), range(2, 12))]
        strategy.aggregate_train(1, replies)
        emptied = any(not reply.content["arrays"] for reply in replies)
        assert emptied == (name in {"qfedavg", "fedmedian", "fedtrimmedavg", "bulyan"})

    @every_strategy
    def test_two_strategies_return_float64(self, name: str) -> None:
        """FedAdam and QFedAvg widen a float32 model, which is why aggregates are cast."""
        strategy, start = make(name), model()
        replies = [trained(message, 1) for message in messages_of(strategy, 1, start, range(2, 12))]
        result, _ = strategy.aggregate_train(1, replies)
        assert result is not None
        widened = result["weight"].dtype == "float64"
        assert widened == (name in {"fedadam", "qfedavg"})
        assert [a.dtype for a in cast_like(result, start).values()] == ["float32"] * 3


class TestMinimumReplies:
    """`minimum_replies` and `check_strategy`."""

    @pytest.mark.parametrize(
        ("name", "options", "expected"),
        [
            ("fedavg", {"malicious_clients": 9}, 1),
            ("fedmedian", {}, 1),
            ("qfedavg", {}, 1),
            ("krum", {"malicious_clients": 0}, 3),
            ("krum", {"malicious_clients": 2}, 7),
            ("multikrum", {"malicious_clients": 0, "clients_to_keep": 5}, 5),
            ("multikrum", {"malicious_clients": 2, "clients_to_keep": 3}, 7),
            ("multikrum", {"malicious_clients": 2, "clients_to_keep": 5}, 9),
            ("bulyan", {"malicious_clients": 0}, 3),
            ("bulyan", {"malicious_clients": 2}, 11),
            ("fedtrimmedavg", {"trim_fraction": 0.0}, 1),
            ("fedtrimmedavg", {"trim_fraction": 0.2}, 5),
            ("fedtrimmedavg", {"trim_fraction": 0.19999999999999998}, 6),  # 5 times that is below 1
            ("fedtrimmedavg", {"trim_fraction": 5e-324}, 1_000_000_000),
        ],
    )
    def test_bounds_are_those_of_the_papers(self, name: str, options: dict[str, Any], expected: int) -> None:
        """Krum needs 2f+3 replies, MultiKrum m+f+2 as well, Bulyan 4f+3, a trimmed mean enough to cut one."""
        assert minimum_replies(settings(name, **options)) == expected

    @given(st.floats(1e-6, 0.49))
    def test_a_trimmed_mean_cuts_from_its_minimum_on(self, fraction: float) -> None:
        """The minimum is the least number of replies of which Flower cuts any."""
        fewest = minimum_replies(settings("fedtrimmedavg", trim_fraction=fraction))
        assert int(fraction * fewest) >= 1
        assert int(fraction * (fewest - 1)) == 0

    @pytest.mark.parametrize("name", ["krum", "multikrum", "bulyan", "fedtrimmedavg"])
    def test_one_attacker_is_resisted_from_the_minimum_on(self, name: str) -> None:
        """With as many replies as required, one wild reply does not move the aggregate."""
        needed = minimum_replies(settings(name))
        result = aggregate(name, [*np.linspace(0.9, 1.1, needed - 1), -1e4])
        assert result == pytest.approx(1, abs=0.2)

    def test_below_the_minimum_a_trimmed_mean_resists_nobody(self) -> None:
        """One reply less and Flower's trimmed mean is a plain mean: hence the minimum."""
        result = aggregate("fedtrimmedavg", [1.0, 1.0, 1.0, -1e4])
        assert result is not None
        assert result < -1000

    def test_below_the_minimum_bulyan_returns_nothing(self) -> None:
        """One reply less and Flower's Bulyan leaves the round out."""
        assert aggregate("bulyan", [1.0] * 6) is None

    @every_strategy
    def test_a_cohort_of_the_minimum_is_accepted_and_no_smaller(self, name: str) -> None:
        """A run is refused before it starts if even a full cohort cannot serve its strategy."""
        chosen = settings(name)
        needed = minimum_replies(chosen)
        check_strategy(chosen, needed)
        if needed > 1:
            with pytest.raises(ConfigError, match=f"needs {needed} replies") as error:
                check_strategy(chosen, needed - 1)
            assert f"at least {needed} clients" in error.value.hint


class TestCastLike:
    """`cast_like`."""

    def test_order_dtypes_and_shapes_are_the_templates(self) -> None:
        """The aggregate takes the model's key order, dtypes and shapes."""
        template = record({"b": np.zeros((2, 1), np.float16), "a": np.array(1, np.int64), "c": np.zeros(0, np.float32)})
        given_arrays = record({"a": np.array(8.9999), "c": np.zeros(0), "b": np.array([[0.5], [1.5]])})
        result = cast_like(given_arrays, template)
        assert list(result) == ["b", "a", "c"]
        assert [(a.dtype, a.shape) for a in result.values()] == [("float16", (2, 1)), ("int64", ()), ("float32", (0,))]
        assert result["b"].numpy().tolist() == [[0.5], [1.5]]

    def test_integers_are_rounded_not_cut_off(self) -> None:
        """A mean of counters just below a whole number becomes that number."""
        result = cast_like(record({"n": np.array([8.9999, -8.9999])}), record({"n": np.zeros(2, np.int64)}))
        assert result["n"].numpy().tolist() == [9, -9]

    def test_arrays_that_fit_are_passed_on(self) -> None:
        """Nothing is copied that has the right type already."""
        arrays = model()
        result = cast_like(arrays, model())
        assert all(result[key] is arrays[key] for key in arrays)

    @pytest.mark.parametrize("keys", [["a"], ["a", "b", "c"], ["a", "c"]])
    def test_other_keys_are_refused(self, keys: list[str]) -> None:
        """A missing or unexpected array is named, not ignored."""
        with pytest.raises(RunError, match="does not hold the model's arrays"):
            cast_like(record(dict.fromkeys(keys, np.zeros(1))), record({"a": np.zeros(1), "b": np.zeros(1)}))

    def test_other_shapes_are_refused(self) -> None:
        """Nothing is broadcast."""
        with pytest.raises(RunError, match=r"`a` has shape \(1,\), the model's \(2,\)"):
            cast_like(record({"a": np.zeros(1)}), record({"a": np.zeros(2)}))

    @pytest.mark.parametrize(
        ("value", "dtype"), [(1e300, np.float32), (1e5, np.float16), (np.nan, np.int64), (np.inf, np.int64)]
    )
    def test_values_without_a_place_are_refused(self, value: float, dtype: type[np.generic]) -> None:
        """An overflow, or NaN where the model counts, stops the run instead of becoming some number."""
        with pytest.raises(RunError, match="holds values that"):
            cast_like(record({"a": np.array([value])}), record({"a": np.zeros(1, dtype)}))

    def test_nan_stays_nan(self) -> None:
        """Infinities and NaN of a floating-point model pass through, for others to judge."""
        result = cast_like(record({"a": np.array([np.nan, -np.inf])}), record({"a": np.zeros(2, np.float32)}))
        assert result["a"].numpy().tobytes() == np.array([np.nan, -np.inf], np.float32).tobytes()


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
