"""Under client-level privacy a client's update is bounded before it leaves, and nothing goes with it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from client.mods import clipping_mod, guard_mod
from client.mods.clipping import clip_update
from common.config import RunConfig
from common.errors import FailureCode, PeerError
from common.flower import (
    ARRAYS,
    CLIENTS,
    CLIPPING_NORM,
    CONFIG,
    METRICS,
    NOISE,
    ORDER,
    PARTICIPATIONS,
    ROUND,
    RUN,
    SEPARATION,
    TRAIN_LOSS,
    WEIGHT,
    WITHIN,
    arrays_of,
    client_context,
    failure_of,
    failure_reply,
    prepare_process,
    stamp,
    to_record,
    update_reply,
)
from tests.helpers.releasing import client_private, plan_of
from tests.helpers.runs import configuration

prepare_process()

START = {
    "weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "count": np.array(4),
    "bias": np.zeros(2),
    "mask": np.array([True, False]),
    "empty": np.zeros((0, 3), np.float32),
}


def request(config: RunConfig, **changes: Any) -> Message:
    """What a coordinator sends; a change replaces a key of its configuration."""
    record: dict[str, Any] = {RUN: config.canonical_json(), ROUND: 1}
    if config.privacy.unit == "client":
        plan = plan_of(config, 4, dimensions=8)
        record |= {NOISE: plan.noise_multiplier, ORDER: plan.budget.order, PARTICIPATIONS: plan.participations}
        record |= {SEPARATION: plan.min_separation, CLIENTS: plan.clients, CLIPPING_NORM: plan.clipping_norm}
    record |= {key.replace("_", "-"): value for key, value in changes.items()}
    content = RecordDict({ARRAYS: to_record(START), CONFIG: ConfigRecord(record)})
    return stamp(Message(content, 2, "train"), message_id="m1")


def answered(message: Message, trained: dict[str, Any], **metrics: float) -> Message:
    """What leaves a client that trained to these arrays and would tell these metrics."""

    def train(message: Message, _: Any) -> Message:
        return update_reply(message, {**START, **trained}, {WEIGHT: 17.0, TRAIN_LOSS: 0.3, **metrics})

    def clipped(message: Message, context: Any) -> Message:
        return clipping_mod(message, context, train)

    return guard_mod(message, client_context(node_id=2, partition=0), clipped)


def norm_of(arrays: Any) -> float:
    """L2 norm of the update over all floating-point arrays."""
    return float(
        np.sqrt(sum(((arrays[k].astype(np.float64) - v) ** 2).sum() for k, v in START.items() if v.dtype.kind == "f"))
    )


class TestUpdate:
    def test_within_the_norm_is_sent_to_the_bit(self) -> None:
        """A small update is not touched."""
        trained = {"weight": START["weight"] + np.float32(0.1), "bias": START["bias"] - 0.3}
        arrays = arrays_of(answered(request(client_private()), trained).content)
        for name, values in trained.items():
            assert arrays[name].tobytes() == values.tobytes()

    def test_beyond_the_norm_is_shortened_as_a_whole(self) -> None:
        """All arrays are scaled by one factor, so that the norm over all of them is the request's."""
        trained = {"weight": START["weight"] + np.float32(3), "bias": START["bias"] - 4}
        arrays = arrays_of(answered(request(client_private()), trained).content)
        assert norm_of(arrays) == pytest.approx(2, rel=1e-6)
        factor = 2 / norm_of({**START, **trained})
        np.testing.assert_allclose(arrays["weight"], START["weight"] + 3 * factor, rtol=1e-6)
        np.testing.assert_allclose(arrays["bias"], -4 * factor, rtol=1e-12)

    @pytest.mark.parametrize("step", [0.01, 100.0])
    def test_of_other_arrays_is_undone(self, step: float) -> None:
        """Clipped or not, counters and masks leave as they came, in the model's order, dtypes and shapes."""
        trained = {"count": np.array(9), "mask": np.array([False, True]), "bias": START["bias"] + step}
        arrays = arrays_of(answered(request(client_private()), trained).content)
        assert list(arrays) == list(START)
        for name, values in START.items():
            assert np.array_equal(arrays[name], values) is (name != "bias")
            assert (arrays[name].dtype, arrays[name].shape) == (values.dtype, values.shape)

    @settings(max_examples=60, deadline=None)
    @given(
        hnp.arrays(np.float32, (2, 3), elements=st.floats(-(2.0**100), 2.0**100, width=32)),
        hnp.arrays(np.float64, 2, elements=st.floats(-1e100, 1e100)),
        st.floats(1e-3, 1e3),
    )
    def test_never_exceeds_the_norm(self, weight: Any, bias: Any, norm: float) -> None:
        """Whatever training came to, the update that leaves is bounded, up to rounding in the model's float32."""
        arrays, within = clip_update(START, {**START, "weight": weight, "bias": bias}, norm)
        rounding = 2.0**-24 * float(np.linalg.norm(START["weight"]) + norm)
        assert norm_of(arrays) <= norm * (1 + 1e-9) + rounding
        assert within == (norm_of({**START, "weight": weight, "bias": bias}) <= norm)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_that_is_not_finite_fails(self, value: float) -> None:
        """NaN or infinity in one place is a failure of that kind, and nothing of the update leaves."""
        weight = START["weight"].copy()
        weight[1, 1] = value
        reply = answered(request(client_private()), {"weight": weight})
        assert failure_of(reply) is FailureCode.NON_FINITE_UPDATE
        assert not reply.has_content()

    @pytest.mark.parametrize("value", [np.nan, np.inf, 1e200])
    def test_that_is_not_finite_is_zero_where_clients_add_the_noise(self, value: float) -> None:
        """Who is in such a sum must not depend on the data: the coordinator would learn of it without noise."""
        config = client_private(privacy={"secure_aggregation": True})
        for bias in (np.array([value, 0]), np.zeros(2)):
            arrays = arrays_of(answered(request(config), {"bias": bias}).content)
            assert all(np.array_equal(arrays[name], values) for name, values in START.items())

    def test_too_large_for_its_square_fails(self) -> None:
        """An update whose norm is beyond float64 is not guessed at."""
        with pytest.raises(PeerError) as raised:
            clip_update(START, {**START, "bias": np.array([1e200, 0])}, 1.0)
        assert raised.value.failure is FailureCode.NON_FINITE_UPDATE


class TestMetrics:
    @pytest.mark.parametrize("step", [0.01, 100.0])
    def test_are_the_weight_1_and_nothing_else(self, step: float) -> None:
        """Neither count, loss nor norm leaves, whether the update was clipped or not."""
        reply = answered(request(client_private()), {"bias": START["bias"] + step}, norm=3.0)
        assert dict(reply.content[METRICS]) == {WEIGHT: 1.0}
        assert sorted(reply.content) == [ARRAYS, METRICS]

    @pytest.mark.parametrize(("step", "within"), [(0.01, 1.0), (100.0, 0.0)])
    def test_say_whether_it_was_within_where_the_norm_adapts(self, step: float, within: float) -> None:
        """With adaptive clipping one bit more leaves: it is counted with noise."""
        config = client_private(privacy={"clipping": "adaptive"})
        reply = answered(request(config), {"bias": START["bias"] + step})
        assert dict(reply.content[METRICS]) == {WEIGHT: 1.0, WITHIN: within}


class TestRequest:
    def test_of_another_unit_passes(self) -> None:
        """Without client-level privacy update and metrics are as the client made them."""
        trained = {"bias": START["bias"] + 100}
        reply = answered(request(configuration()), trained)
        assert np.array_equal(arrays_of(reply.content)["bias"], trained["bias"])
        assert dict(reply.content[METRICS]) == {WEIGHT: 17.0, TRAIN_LOSS: 0.3}

    def test_for_another_norm_than_the_runs_is_refused(self) -> None:
        """The coordinator cannot weaken what everybody agreed on; where the norm adapts, it may."""
        reply = answered(request(client_private(), clipping_norm=50.0), {})
        assert failure_of(reply) is FailureCode.INVALID_REQUEST
        adaptive = client_private(privacy={"clipping": "adaptive"})
        arrays = arrays_of(answered(request(adaptive, clipping_norm=0.5), {"bias": START["bias"] + 9}).content)
        assert norm_of(arrays) == pytest.approx(0.5)

    @pytest.mark.parametrize("norm", [0.0, -1.0, float("nan"), float("inf"), "2", 1])
    def test_for_a_norm_that_is_none_is_refused(self, norm: Any) -> None:
        """Nothing is trained for a bound that bounds nothing."""
        config = client_private(privacy={"clipping": "adaptive"})
        assert failure_of(answered(request(config, clipping_norm=norm), {})) is FailureCode.INVALID_REQUEST

    def test_that_fails_further_in_keeps_its_reason(self) -> None:
        """A refusal of the ledger or the policy passes as it is."""

        def refuse(message: Message, _: Any) -> Message:
            return failure_reply(message, FailureCode.BUDGET_EXHAUSTED)

        reply = clipping_mod(request(client_private()), client_context(node_id=2, partition=0), refuse)
        assert failure_of(reply) is FailureCode.BUDGET_EXHAUSTED
