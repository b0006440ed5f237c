"""Noise from a seed, for simulations that must repeat to the bit."""

import hashlib
import itertools
import sys

import numpy as np
import pytest

from common.privacy.noise import SecureNoise
from simulations.insecure import FixedNoise


def test_equal_seeds_and_labels_give_equal_noise():
    """Integers and words, in every process."""
    one, two = FixedNoise(7, "site-1/3"), FixedNoise(7, "site-1/3")
    assert np.array_equal(one.integers(1000), two.integers(1000))
    assert np.array_equal(one.words(1000), two.words(1000))


def test_anything_else_gives_other_noise():
    """Other seeds, clients and rounds, also where seed and label run together to the same text."""
    sources = [(7, "site-1/3"), (8, "site-1/3"), (7, "site-1/4"), (7, "site-2/3"), (-7, "site-1/3"), (7, ""), (77, "")]
    sources += [(1, "1/1"), (11, "/1"), (1, "11"), (11, "1")]
    drawn = [FixedNoise(*source).integers(1000) for source in sources]
    for one, two in itertools.combinations(drawn, 2):
        assert (one == two).sum() < 20


def test_noise_and_words_have_keys_of_their_own():
    """A sampling mask says nothing about the noise."""
    source = FixedNoise(7, "a")
    assert not np.array_equal(source._noise_stream.words(100), source.words(100))


def test_its_name_says_that_it_protects_nobody():
    """In its documentation, and nothing of the seed in its text."""
    assert "protects nobody" in FixedNoise.__doc__
    assert "INSECURE" in FixedNoise.__doc__
    assert repr(FixedNoise(7, "a")) == "FixedNoise()"
    assert not isinstance(FixedNoise(7, "a"), SecureNoise)


@pytest.mark.skipif(sys.byteorder != "little", reason="words are in the order of memory")
def test_a_known_answer():
    """Recorded runs can be repeated by a later version: whoever changes the derivation must know it."""
    source = FixedNoise(7, "site-1/3")
    assert (
        hashlib.sha256(source.integers(1000).tobytes()).hexdigest()
        == "cf0f79d53675e03712e9baa7c5f0b663e9b4285f5de60e0fd46abee75e39e8ae"
    )
    assert (
        hashlib.sha256(source.words(1000).tobytes()).hexdigest()
        == "0c3a0fd51f451fb5f3f907ef21b565335600a07d478df9f6d287332211ea34c0"
    )
