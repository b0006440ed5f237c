"""Shorter updates: how exact they are, how long, and what becomes of bytes that are none."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.config.settings import TransportSettings
from common.errors import RefusedError
from common.transport.compression import Compression, decode_update, encode_update, left_out, update_of
from tests.helpers.runs import as_bytes

BF16, INT8 = Compression(codec="bf16"), Compression(codec="int8")
TOP_K = Compression(codec="top-k", top_k_fraction=0.1)
CODECS = {"bf16": BF16, "int8": INT8, "top-k": TOP_K}
START = {
    "w": np.linspace(-3, 3, 60, dtype=np.float32).reshape(6, 10),
    "half": np.ones(5, np.float16),
    "wide": np.zeros((2, 2)),
    "scalar": np.array(0.5, np.float32),
    "count": np.array(7, np.int64),
    "mask": np.array([True, False]),
    "empty": np.zeros((0, 3), np.float32),
}
VALUES = hnp.arrays(np.float32, st.integers(1, 300), elements=st.floats(-1e6, 1e6, width=32))


def trained(change: float = 0.25) -> dict[str, np.ndarray]:
    """The model after training; integers count one further."""
    moved = {name: (values + change).astype(values.dtype) for name, values in START.items() if values.dtype.kind == "f"}
    return {**START, **moved, "count": np.array(8, np.int64)}


def encoded(arrays: dict[str, np.ndarray], how: Compression, seed: bytes = b"s") -> dict[str, np.ndarray]:
    return encode_update(update_of(START, arrays), arrays, how, seed=seed)


def one(values: np.ndarray, how: Compression, seed: bytes = b"s") -> np.ndarray:
    """An update of one array, encoded and decoded."""
    start = {"w": np.zeros_like(values)}
    update = update_of(start, {"w": values})
    return decode_update(start, encode_update(update, {"w": values}, how, seed=seed), how)["w"]


class TestEveryCodec:
    @pytest.mark.parametrize("name", CODECS)
    def test_gives_back_a_model_of_the_same_kind(self, name: str) -> None:
        """Names, order, shapes and dtypes are the model's; what is no floating-point number comes back to the bit."""
        found = decode_update(START, encoded(trained(), CODECS[name]), CODECS[name])
        assert [(key, v.shape, v.dtype) for key, v in found.items()] == [
            (key, v.shape, v.dtype) for key, v in START.items()
        ]
        for key in ("count", "mask", "empty"):
            assert as_bytes({key: found[key]}) == as_bytes({key: trained()[key]})
        assert all(values.flags.writeable for values in found.values())

    @pytest.mark.parametrize("name", CODECS)
    def test_no_change_is_no_change(self, name: str) -> None:
        """A model that training left alone comes back to the bit."""
        assert as_bytes(decode_update(START, encoded(START, CODECS[name]), CODECS[name])) == as_bytes(START)

    @pytest.mark.parametrize("name", CODECS)
    @given(data=st.data())
    def test_is_as_long_as_model_and_settings_say(self, name: str, data: st.DataObject) -> None:
        """The length tells nothing of the data: it is known before there is any."""
        values = data.draw(VALUES)
        how = CODECS[name]
        start = {"w": np.zeros_like(values)}
        (got,) = encode_update(update_of(start, {"w": values}), {"w": values}, how, seed=b"").values()
        assert got.dtype == np.uint8
        assert got.shape == (how.encoded_bytes(start["w"]),)

    @pytest.mark.parametrize("name", CODECS)
    def test_the_same_update_gives_the_same_bytes(self, name: str) -> None:
        """A retry sends what was sent."""
        assert as_bytes(encoded(trained(), CODECS[name])) == as_bytes(encoded(trained(), CODECS[name]))

    def test_settings_become_a_codec(self) -> None:
        """The run's own settings decide, and by default nothing is shortened."""
        assert Compression.of(TransportSettings()).codec == "none"
        assert Compression.of(TransportSettings(compression="top-k", top_k_fraction=0.5)).kept(9) == 5


class TestBf16:
    @given(hnp.arrays(np.float32, st.integers(1, 100), elements=st.floats(-(2.0**126), 2.0**126, width=32)))
    @example(np.array([0x3F808000, 0x3F818000, 0xBF808000, 0x3F808001, 0], np.uint32).view(np.float32))
    def test_rounds_as_torch_does(self, values: np.ndarray) -> None:
        """To the nearest value that bfloat16 has, ties to even: torch's own conversion is the reference."""
        expected = torch.from_numpy(values).to(torch.bfloat16).float().numpy()
        np.testing.assert_array_equal(one(values, BF16), np.float32(0) + expected)

    def test_halves_what_is_sent(self) -> None:
        """Two bytes a value."""
        assert BF16.encoded_bytes(np.zeros(1000, np.float32)) == 2000


class TestInt8:
    @given(VALUES, st.binary(max_size=4))
    @example(np.array([1e-45, 0], np.float32), b"")
    @example(np.array([3e38, -3e38], np.float32), b"")
    def test_is_within_one_step(self, values: np.ndarray, seed: bytes) -> None:
        """Every value comes back within one step of the tensor's scale, the largest magnitude over 127."""
        step = float(np.abs(values).max()) / 127
        assert (np.abs(one(values, INT8, seed).astype(np.float64) - values) <= step * (1 + 1e-5) + 2e-43).all()

    def test_is_right_on_average(self) -> None:
        """The mean over many roundings is the value: the error of 20,000 of them lies within 5 standard errors.

        False-alarm rate: below 1e-5 over both values together (normal tail at 5 sigma).
        """
        values = np.full(20_001, 0.3, np.float32)
        values[1::2] = -0.71
        values[0] = 127.0  # a step of exactly 1
        got = one(values, INT8)
        for value, some in ((0.3, got[2::2]), (-0.71, got[1::2])):
            spread = abs(value % 1 * (1 - value % 1)) ** 0.5
            assert abs(float(some.mean()) - value) < 5 * spread / len(some) ** 0.5
            assert set(some.tolist()) == {float(np.floor(value)), float(np.ceil(value))}

    def test_rounding_follows_its_seed(self) -> None:
        """Another round or client rounds otherwise; so does another tensor of the same values."""
        values = np.linspace(-1, 1, 500, dtype=np.float32)
        assert one(values, INT8, b"a").tobytes() != one(values, INT8, b"b").tobytes()
        start = {"a": np.zeros_like(values), "b": np.zeros_like(values)}
        twice = encode_update(update_of(start, dict.fromkeys("ab", values)), start, INT8, seed=b"s")
        assert twice["a"].tobytes() != twice["b"].tobytes()

    def test_rounding_is_the_same_everywhere(self) -> None:
        """AES-256 in counter mode under SHA-256 of seed and name decides: no version of a library changes the bytes.

        Source of the expected steps: the cipher's blocks of the counters 0 to 2, one by one, and exact arithmetic.
        """
        values = np.linspace(-1, 1, 12, dtype=np.float32)
        got = encode_update({"w": values}, {"w": values}, INT8, seed=b"seed")["w"][4:].view(np.int8)
        assert got.tolist() == PINNED

    def test_blocks_change_nothing(self) -> None:
        """Large tensors are rounded in parts, each with its own place in the keystream."""
        values = np.tile(np.array([0.3, 127.0], np.float32), 300_000)
        got = one(values, INT8)
        parts = [got[start::2][:100_000].tobytes() for start in (0, 262_144)]
        assert parts[0] != parts[1]
        assert abs(float(got[::2].mean()) - 0.3) < 0.01


PINNED = [-127, -104, -80, -58, -35, -12, 11, 35, 58, 81, 104, 127]


class TestTopK:
    @given(VALUES, st.floats(0.001, 1))
    def test_sends_the_largest_to_the_bit(self, values: np.ndarray, fraction: float) -> None:
        """What is sent is exact and no smaller than anything left out; the rest is zero, and waits."""
        how = Compression(codec="top-k", top_k_fraction=fraction)
        (data,) = encode_update({"w": values}, {"w": values}, how, seed=b"").values()
        got, rest = one(values, how), left_out(values, data)
        count = how.kept(values.size)
        sent = np.unique(data[: 4 * count].view("<u4"))
        assert sent.size == count == min(values.size, max(1, count))
        np.testing.assert_array_equal(got[sent], values[sent])
        others = np.setdiff1d(np.arange(values.size), sent)
        assert (got[others] == 0).all()
        assert np.abs(values[others]).max(initial=0) <= np.abs(values[sent]).min()
        np.testing.assert_array_equal(got + rest, values + np.float32(0))

    def test_of_equal_values_the_first_are_sent(self) -> None:
        """Ties are settled in one way on every machine."""
        got = one(np.array([1, -2, 2, 1, 1, 0], np.float32), Compression(codec="top-k", top_k_fraction=0.5))
        assert got.tolist() == [1, -2, 2, 0, 0, 0]


class TestDecoding:
    @pytest.mark.parametrize("name", CODECS)
    @pytest.mark.parametrize("key", ["w", "half", "count", "empty"])
    def test_another_length_is_refused(self, name: str, key: str) -> None:
        """A byte more or less than the model says is no update."""
        for change in (lambda d: d[:-1] if d.size else np.zeros(1, np.uint8), lambda d: np.append(d, d[:1] * 0 + 0)):
            data = encoded(trained(), CODECS[name])
            data[key] = change(data[key]).astype(np.uint8)
            if data[key].size == encoded(trained(), CODECS[name])[key].size:
                continue
            with pytest.raises(RefusedError, match="does not fit"):
                decode_update(START, data, CODECS[name])

    @pytest.mark.parametrize("name", CODECS)
    def test_other_arrays_are_refused(self, name: str) -> None:
        """Missing, unexpected or reordered names, other dtypes, other shapes, and an update that was not encoded."""
        data = encoded(trained(), CODECS[name])
        wrong: list[dict[str, Any]] = [
            {},
            {key: data[key] for key in reversed(data)},
            {**data, "more": data["w"]},
            {**data, "w": data["w"].view(np.int8)},
            {**data, "w": data["w"].reshape(1, -1)},
            dict(trained()),
        ]
        for arrays in wrong:
            with pytest.raises(RefusedError, match="does not fit"):
                decode_update(START, arrays, CODECS[name])

    def test_places_outside_the_tensor_or_out_of_order_are_refused(self) -> None:
        """Top-k names each place once, in order, and inside the tensor."""
        start, how = {"w": np.zeros(20, np.float32)}, TOP_K
        for places in ([3, 3], [5, 2], [0, 20], [0, 2**32 - 1]):
            data = np.concatenate([np.array(places, "<u4").view(np.uint8), np.ones(2, "<f4").view(np.uint8)])
            with pytest.raises(RefusedError):
                decode_update(start, {"w": data}, how)

    @settings(max_examples=150)
    @given(st.sampled_from(sorted(CODECS)), st.data())
    def test_any_bytes_of_the_right_length_are_values_or_refused(self, name: str, data: st.DataObject) -> None:
        """Whatever a peer sends, the outcome is a model of the right kind, finite or not, or a refusal."""
        how = CODECS[name]
        bytes_of = {
            key: np.frombuffer(data.draw(st.binary(min_size=n, max_size=n)), np.uint8)
            for key, n in ((key, how.encoded_bytes(values)) for key, values in START.items())
        }
        try:
            found = decode_update(START, bytes_of, how)
        except RefusedError:
            assert name == "top-k"
        else:
            assert {key: v.shape for key, v in found.items()} == {key: v.shape for key, v in START.items()}

    @pytest.mark.parametrize("name", CODECS)
    def test_takes_the_memory_of_one_model(self, name: str) -> None:
        """However it was encoded: an update of 8 MB takes little more than 8 MB to restore."""
        start = {"w": np.zeros(2_000_000, np.float32)}
        changed = {"w": np.linspace(0, 1, 2_000_000, dtype=np.float32)}
        data = encode_update(update_of(start, changed), changed, CODECS[name], seed=b"")
        tracemalloc.start()
        try:
            decode_update(start, data, CODECS[name])
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 8_000_000 + 2**20
