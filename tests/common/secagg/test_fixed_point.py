"""Updates as whole numbers in a ring: sums are exact, bounded and unbiased, and what cannot be one is refused.

Statistical tests raise a false alarm with probability at most 1e-9.
"""

import dataclasses
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from common.errors import ConfigError, NonFiniteError
from common.secagg.fixed_point import MOST_METRIC, FixedPoint
from common.secagg.packing import RINGS, pack, unpack
from common.secagg.refusal import SecAggError

FALSE_ALARM = 1e-9
SEED = bytes(range(32))


def codec(**changes):
    return FixedPoint(
        **{"bits": 24, "dimensions": 3, "clipping_norm": 2.0, "most_weight": 100, "clients": 5, "metrics": ("loss",)}
        | changes
    )


def encode(codec, update, *, weight=1.0, seed=SEED, **metrics):
    metrics = {name: metrics.get(name, 0.0) for name in codec.metrics}
    return codec.encode(np.asarray(update), weight=weight, metrics=metrics, seed=seed)


def total(codec, vectors):
    """What unmasking yields: the sum modulo the ring."""
    packed = [pack(vector, codec.bits) for vector in vectors]
    added = sum((unpack(data, codec.size, codec.bits) for data in packed), np.zeros(codec.size, np.uint32))
    return added & np.uint32((1 << codec.bits) - 1)


def clipped(update, norm):
    update = np.asarray(update, np.float64)
    return update * min(1.0, norm / max(math.sqrt(update @ update), 1e-300))


@st.composite
def sums(draw):
    """A codec and what its clients send: updates, weights, losses."""
    bits = draw(st.sampled_from(RINGS))
    clients = draw(st.integers(1, 12))
    limit = ((1 << bits - 1) - 1) // clients
    assume(limit >= 2)
    made = FixedPoint(
        bits=bits,
        dimensions=draw(st.integers(0, 6)),
        clipping_norm=draw(st.floats(1e-6, 1e6)),
        most_weight=draw(st.integers(1, min(limit, 1 << 24))),
        clients=clients,
        metrics=("loss",),
    )
    value = st.floats(-3, 3).map(lambda x: x * made.clipping_norm) | st.sampled_from([0.0, 1e30, -1e30, 5e-324])
    sent = st.tuples(
        st.lists(value, min_size=made.dimensions, max_size=made.dimensions).map(lambda v: np.array(v, np.float64)),
        st.integers(0, 2 * made.most_weight),
        st.floats(-100, 100),
    )
    return made, draw(st.lists(sent, min_size=1, max_size=clients))


@given(sums(), st.binary(min_size=32, max_size=32))
@settings(deadline=None, max_examples=120)
def test_the_decoded_mean_is_within_its_bound_of_the_exact_one(case, seed):
    """Any bits, weights, values and number of clients: the mean is that of the clipped updates, up to `bound`."""
    made, sent = case
    vectors = [
        made.encode(update, weight=weight, metrics={"loss": loss}, seed=seed[:-1] + bytes([i]))
        for i, (update, weight, loss) in enumerate(sent)
    ]
    decoded = made.decode(total(made, vectors), len(sent))
    weights = [min(weight, made.most_weight) for _, weight, _ in sent]
    assert decoded.weight == sum(weights)
    if not sum(weights):
        assert not decoded.update.any()
        assert decoded.metrics == {"loss": 0.0}
        return
    exact = sum((w * clipped(u, made.clipping_norm) for (u, _, _), w in zip(sent, weights, strict=True)))
    error = np.abs(decoded.update - exact / sum(weights))
    assert np.all(error <= made.bound(len(sent), sum(weights)))
    loss = sum(w * np.clip(v, -MOST_METRIC, MOST_METRIC) for (_, _, v), w in zip(sent, weights, strict=True))
    slack = made.bound(len(sent), sum(weights)) * MOST_METRIC / made.clipping_norm
    assert abs(decoded.metrics["loss"] - loss / sum(weights)) <= slack


@given(sums(), st.binary(min_size=32, max_size=32), st.integers(0, 2**31))
@settings(deadline=None, max_examples=120)
def test_no_vector_is_longer_than_its_share_of_the_ring(case, seed, sign):
    """Each client's numbers are at most (2^(bits-1) - 1) / n in size, so no sum of n of them wraps."""
    made, sent = case
    for update, weight, loss in sent:
        largest = np.full(made.dimensions, (-1.0) ** sign * made.clipping_norm)
        for values in (update, largest):
            vector = made.encode(values, weight=weight, metrics={"loss": loss * 1e9}, seed=seed)
            assert np.abs(vector.view(np.int32).astype(np.int64)).max() * made.clients < 1 << made.bits - 1


def test_no_error_in_floating_point_makes_a_sum_wrap(monkeypatch):
    """Were the norm computed far too small, numbers would still be held to a client's share of the ring."""
    made = codec(bits=16, clients=7)
    monkeypatch.setattr(FixedPoint, "_clip", lambda _self, _update: 3.0)
    vector = encode(made, [2.0, -2.0, 0.1], weight=100)
    assert vector.view(np.int32)[:2].tolist() == [made._limit, -made._limit]
    assert made._limit * 7 < 1 << 15


def test_a_full_ring_does_not_wrap():
    """All clients at the limit of norm, weight and metric, on one coordinate: the sum is still exact."""
    for bits in (16, 24, 32):
        made = codec(bits=bits, clients=3, most_weight=1000)
        vectors = [encode(made, [-5.0, 0.0, 0.0], weight=1e9, loss=1e9, seed=bytes([i]) * 32) for i in range(3)]
        decoded = made.decode(total(made, vectors), 3)
        assert decoded.weight == 3000
        assert decoded.update[0] == pytest.approx(-2.0, abs=made.bound(3, 3000))
        assert decoded.metrics["loss"] == pytest.approx(64.0, abs=made.bound(3, 3000) * 32)


def test_rounding_is_right_on_average():
    """A value between two steps comes out above it with the probability of its fraction."""
    made = codec(dimensions=40_000, clipping_norm=1e3, most_weight=1, clients=2, bits=16, metrics=())
    for fraction in (0.01, 0.25, 0.5, 0.9):
        vector = encode(made, np.full(40_000, (fraction - 3) * made.step))[:-1].view(np.int32)
        assert set(np.unique(vector)) == {-3, -2}
        ups = int((vector == -2).sum())
        assert stats.binomtest(ups, 40_000, fraction).pvalue > FALSE_ALARM / 4


def test_rounding_follows_its_seed_alone():
    """The same seed gives the same vector, another seed another one; parts of a long update are rounded apart."""
    made = codec(dimensions=100_000, metrics=())
    update = np.full(100_000, 1.5 * made.step / 2)
    first = encode(made, update)
    assert np.array_equal(first, encode(made, update))
    assert not np.array_equal(first, encode(made, update, seed=bytes(32)))
    assert not np.array_equal(first[:32_768], first[32_768:65_536])


def test_single_precision_is_clipped_in_double():
    """An update of float32 gives the vector of its values in float64."""
    update = np.random.default_rng(0).standard_normal(3).astype(np.float32)
    made = codec()
    assert np.array_equal(encode(made, update), encode(made, update.astype(np.float64)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e200])
def test_what_is_not_finite_is_refused(bad):
    """NaN, infinity and values whose squares are infinite have no vector, wherever they stand."""
    made = codec()
    with pytest.raises(NonFiniteError):
        encode(made, [0.0, bad, 0.0])
    if not math.isfinite(bad):
        with pytest.raises(NonFiniteError):
            encode(made, [0.0, 0.0, 0.0], weight=bad)
        with pytest.raises(NonFiniteError):
            encode(made, [0.0, 0.0, 0.0], loss=bad)


def test_what_does_not_fit_the_codec_is_refused():
    """Another length, a negative weight, or a metric that is not there."""
    made = codec()
    with pytest.raises(ValueError, match="3 values"):
        encode(made, [0.0, 0.0])
    with pytest.raises(ValueError, match="negative"):
        encode(made, [0.0, 0.0, 0.0], weight=-1)
    with pytest.raises(ValueError, match="'loss'"):
        made.encode(np.zeros(3), weight=1, metrics={}, seed=SEED)


def refused(made, numbers, survivors):
    with pytest.raises(SecAggError) as caught:
        made.decode(np.array(numbers, np.int64).astype(np.uint32) & np.uint32((1 << made.bits) - 1), survivors)
    return caught.value.reason == "range"


def test_a_sum_that_cannot_be_one_is_refused():
    """Weights, norms and metrics beyond what so many clients can send; too many clients, or none; another length."""
    made = codec(metrics=())
    limit = round(made.clipping_norm * made.most_weight / made.step)
    assert refused(made, [0, 0, 0, 201], 2)
    assert refused(made, [0, 0, 0, -1], 2)
    assert refused(made, [2 * limit + 9, 0, 0, 200], 2)
    assert refused(made, [limit, limit, 0, 100], 2), "each value is small enough, but together they are too long"
    assert refused(made, [9, 0, 0, 0], 2), "weights of zero move nothing"
    assert refused(made, [0, 0, 0, 1], 0)
    assert refused(made, [0, 0, 0, 1], 6)
    assert refused(made, [0, 0, 1], 1)
    assert made.decode(np.array([limit, 0, 0, 100], np.uint32), 1).update[0] == pytest.approx(2.0)
    assert refused(codec(), [0, 0, 0, 8_000_000, 1], 1), "a metric"


def test_a_sum_that_was_not_unmasked_is_refused():
    """Random numbers are no sum of admissible vectors."""
    for bits in (16, 32):
        made = codec(bits=bits, dimensions=200, most_weight=1000)
        words = np.random.default_rng(1).integers(0, 1 << bits, made.size, np.uint32, endpoint=False)
        words[-1] = 1000
        with pytest.raises(SecAggError):
            made.decode(words, 5)


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({"bits": 16, "clients": 5, "most_weight": 6553}, True),
        ({"bits": 16, "clients": 5, "most_weight": 6554}, False),
        ({"bits": 20, "clients": 10, "most_weight": 65_536}, False),
        ({"bits": 32, "clients": 32_767, "most_weight": 65_536}, True),
        ({"bits": 32, "clients": 32_768, "most_weight": 65_536}, False),
        ({"bits": 16, "clients": 16_383, "most_weight": 1}, True),
        ({"bits": 16, "clients": 16_384, "most_weight": 1}, False),
        ({"clipping_norm": 0.0}, False),
        ({"clipping_norm": math.inf}, False),
        ({"clients": 0}, False),
        ({"bits": 33}, False),
    ],
)
def test_what_cannot_fit_is_refused_when_the_codec_is_made(changes, fits):
    """Weights are added up exactly, or the codec does not exist; the message says what to change."""
    if fits:
        codec(**changes)
    else:
        with pytest.raises(ConfigError) as caught:
            codec(**changes)
        assert caught.value.hint


def test_the_digest_names_every_parameter():
    """Two codecs that differ anywhere have different digests."""
    changes = [
        {},
        {"bits": 32},
        {"dimensions": 4},
        {"clipping_norm": 2.0000000000000004},
        {"most_weight": 99},
        {"clients": 4},
        {"metrics": ()},
        {"metrics": ("los", "s")},
    ]
    assert {name for change in changes for name in change} == {field.name for field in dataclasses.fields(FixedPoint)}
    digests = {codec(**change).digest for change in changes}
    assert len(digests) == len(changes)
    assert all(len(digest) == 32 for digest in digests)


def test_memory_is_the_vectors():
    """Encoding needs little beside the vector itself."""
    made = codec(dimensions=1 << 20, metrics=())
    update = np.ones(1 << 20, np.float32)
    encode(made, update)
    tracemalloc.start()
    encode(made, update)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * made.size + 3e6
