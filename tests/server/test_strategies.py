"""Flower's strategies behave as the coordinator assumes."""

from __future__ import annotations

import logging
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import ConfigRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, FedXgbBagging
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigError, RunError
from server.strategies import cast_like, check_strategy, make_strategy, minimum_replies, replies_needed
from tests.helpers.strategies import (
    CohortGrid,
    aggregate,
    every_strategy,
    make,
    messages_of,
    model,
    record,
    settings,
    trained,
)

MEAN = {"fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad"}


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

    def test_counts_groups_where_it_sees_groups(self) -> None:
        """Under secure aggregation in groups of four, Krum against one bad client needs five groups: 20 clients."""
        chosen = settings("krum").model_copy(update={"malicious_clients": 1})
        check_strategy(chosen, 20, group_size=4)
        with pytest.raises(ConfigError, match="19 clients make fewer groups") as error:
            check_strategy(chosen, 19, group_size=4)
        assert "at least 20 clients" in error.value.hint


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
