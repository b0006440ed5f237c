"""Noise that is correlated over rounds: its sensitivity is exact, and its prefix sums have less of it."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import PrivacyError
from common.privacy.matrix import choose_bands, coefficients, decode, encode, prefix_error, sensitivity


def toeplitz(column: tuple[float, ...], rounds: int) -> np.ndarray:
    """C itself, float64[rounds, rounds]."""
    matrix = np.zeros((rounds, rounds))
    for k, value in enumerate(column[:rounds]):
        matrix += value * np.eye(rounds, k=-k)
    return matrix


def patterns(rounds: int, participations: int, min_separation: int) -> list[tuple[int, ...]]:
    """Every set of rounds (from 0) in which a unit may take part."""
    return [
        chosen
        for count in range(1, participations + 1)
        for chosen in combinations(range(rounds), count)
        if all(later - earlier >= min_separation for earlier, later in pairwise(chosen))
    ]


def by_trying_all(column: tuple[float, ...], rounds: int, participations: int, min_separation: int) -> float:
    """The largest |C u| over all patterns and all signs of a unit's contributions."""
    matrix = toeplitz(column, rounds)
    largest = 0.0
    for chosen in patterns(rounds, participations, min_separation):
        signs = np.array(np.meshgrid(*[[1, -1]] * len(chosen))).reshape(len(chosen), -1)
        largest = max(largest, float(np.linalg.norm(matrix[:, chosen] @ signs, axis=0).max()))
    return largest


falling = st.lists(st.floats(0, 1), min_size=0, max_size=7).map(lambda v: (1.0, *sorted(v, reverse=True)))


class TestCoefficients:
    def test_square_is_the_prefix_sums(self) -> None:
        """The matrix times itself has ones on and below its diagonal."""
        matrix = toeplitz(coefficients(rounds=40, bands=40), 40)
        np.testing.assert_allclose(matrix @ matrix, np.tril(np.ones((40, 40))), atol=1e-13)

    def test_are_those_of_the_paper(self) -> None:
        """c_k = binom(2k, k) / 4^k."""
        expected = [math.comb(2 * k, k) / 4**k for k in range(30)]
        np.testing.assert_allclose(coefficients(rounds=30, bands=99), expected, rtol=1e-14)

    @settings(deadline=None)
    @given(st.integers(1, 50), st.integers(1, 50))
    def test_what_sensitivity_needs_holds(self, rounds: int, bands: int) -> None:
        """The first is 1, all are positive, none is larger than the one before; there are no more than bands, or
        rounds.
        """
        column = coefficients(rounds=rounds, bands=bands)
        assert len(column) == min(rounds, bands)
        assert column[0] == 1
        assert all(0 < later < earlier for earlier, later in pairwise(column))

    def test_one_band_is_independent_noise(self) -> None:
        """With one band nothing is correlated."""
        assert coefficients(rounds=9, bands=1) == (1.0,)

    @pytest.mark.parametrize(("rounds", "bands"), [(0, 1), (1, 0), (-3, 2)])
    def test_no_rounds_or_bands_are_refused(self, rounds: int, bands: int) -> None:
        """A matrix without rows or entries is a mistake."""
        with pytest.raises(PrivacyError, match="bands over"):
            coefficients(rounds=rounds, bands=bands)


class TestSensitivity:
    @settings(deadline=None)
    @given(falling, st.integers(1, 7), st.integers(1, 7), st.integers(1, 7))
    def test_is_the_largest_over_all_participations(
        self, column: tuple[float, ...], rounds: int, participations: int, separation: int
    ) -> None:
        """No pattern and no choice of signs gives more, and one gives as much: for any falling coefficients, whether or
        not columns overlap.
        """
        bound = sensitivity(column, rounds, participations, separation)
        largest = by_trying_all(column, rounds, participations, separation)
        assert largest <= bound <= largest * (1 + 1e-8)

    @settings(deadline=None)
    @given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**32 - 1))
    def test_contributions_of_any_direction_give_no_more(
        self, rounds: int, bands: int, separation: int, seed: int
    ) -> None:
        """Vectors of norm at most 1 in any directions, different ones in each round, stay within the bound."""
        generator = np.random.default_rng(seed)
        column = coefficients(rounds=rounds, bands=bands)
        possible = patterns(rounds, rounds, separation)
        chosen = possible[generator.integers(len(possible))]
        vectors = np.zeros((rounds, 3))
        vectors[list(chosen)] = generator.normal(size=(len(chosen), 3))
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1)
        changed = np.linalg.norm(toeplitz(column, rounds) @ vectors)
        assert changed <= sensitivity(column, rounds, len(chosen), separation)

    @pytest.mark.parametrize("bands", [1, 3, 5])
    def test_columns_that_do_not_overlap_add_in_squares(self, bands: int) -> None:
        """With no more bands than rounds between participations it is sqrt(participations) times a column's norm."""
        column = coefficients(rounds=100, bands=bands)
        expected = math.sqrt(10) * float(np.linalg.norm(column))
        assert sensitivity(column, 100, 10, 5) == pytest.approx(expected, rel=1e-8)

    def test_independent_noise_in_every_round(self) -> None:
        """Without correlation n participations count as the square root of n."""
        assert sensitivity((1.0,), 49, 49, 1) == pytest.approx(7)

    @pytest.mark.parametrize("column", [(), (0.0,), (1.0, -0.1), (0.5, 0.6), (1.0, math.nan), (math.inf, 1.0)])
    def test_coefficients_without_a_proof_are_refused(self, column: tuple[float, ...]) -> None:
        """Negative, growing or impossible coefficients have no bound here, so there is no number for them."""
        with pytest.raises(PrivacyError, match="no sensitivity is known"):
            sensitivity(column, 4, 2, 1)

    @pytest.mark.parametrize("arguments", [(0, 1, 1), (4, 0, 1), (4, 1, 0)])
    def test_nothing_that_happens_is_refused(self, arguments: tuple[int, int, int]) -> None:
        """Zero rounds, participations or separation make no sense."""
        with pytest.raises(PrivacyError, match="at least once"):
            sensitivity((1.0,), *arguments)


class TestStreaming:
    @settings(deadline=None)
    @given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32 - 1))
    def test_decoding_undoes_encoding(self, rounds: int, bands: int, seed: int) -> None:
        """Row by row, C^-1 C x is x, with no more of the past at hand than the bands reach."""
        generator = np.random.default_rng(seed)
        column, x = coefficients(rounds=rounds, bands=bands), generator.normal(size=(rounds, 4))
        past: list[np.ndarray] = []
        back: list[np.ndarray] = []
        reach = len(column) - 1
        for row in x:
            encoded = encode(column, row, past[len(past) - reach :] if reach else [])
            back.append(decode(column, encoded, back[len(back) - reach :] if reach else []))
            past.append(row)
        np.testing.assert_allclose(back, x, atol=1e-12)
        np.testing.assert_allclose(
            [encode(column, row, list(x[:t])) for t, row in enumerate(x)], toeplitz(column, rounds) @ x, atol=1e-12
        )

    def test_noise_comes_out_as_the_inverse_says(self) -> None:
        """What is decoded from C x + z is x + C^-1 z."""
        generator = np.random.default_rng(3)
        column, x, z = coefficients(rounds=20, bands=6), generator.normal(size=(20, 2)), generator.normal(size=(20, 2))
        released: list[np.ndarray] = []
        for t in range(20):
            released.append(decode(column, encode(column, x[t], list(x[:t])) + z[t], released))
        np.testing.assert_allclose(released - x, np.linalg.solve(toeplitz(column, 20), z), atol=1e-12)


class TestError:
    @settings(deadline=None)
    @given(falling, st.integers(1, 12))
    def test_is_that_of_the_inverse(self, column: tuple[float, ...], rounds: int) -> None:
        """The root mean square over prefixes is what inverting the whole matrix gives."""
        noise = np.tril(np.ones((rounds, rounds))) @ np.linalg.inv(toeplitz(column, rounds))
        expected = math.sqrt(float((noise**2).sum()) / rounds)
        assert prefix_error(column, rounds) == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize(("rounds", "separation"), [(100, 100), (100, 10), (60, 3), (50, 2), (400, 16)])
    def test_prefix_sums_have_less_noise_than_independent_ones_at_equal_privacy(
        self, rounds: int, separation: int
    ) -> None:
        """Where participations lie apart, correlated noise wins, and by more the further apart they lie."""
        participations = -(-rounds // separation)

        def noise(bands: int) -> float:
            column = coefficients(rounds=rounds, bands=bands)
            return sensitivity(column, rounds, participations, separation) * prefix_error(column, rounds)

        assert noise(separation) < noise(1) * {100: 0.34, 10: 0.43, 3: 0.67, 2: 0.76, 16: 0.36}[separation]
        best = choose_bands(rounds=rounds, participations=participations, min_separation=separation)
        assert noise(best) <= min(noise(1), noise(min(separation, 64)))

    def test_everybody_every_round_gains_nothing(self) -> None:
        """Where a unit may take part in every round, independent noise is best, and is chosen."""
        full, independent = coefficients(rounds=100, bands=100), coefficients(rounds=100, bands=1)
        assert sensitivity(full, 100, 100, 1) * prefix_error(full, 100) > 1.6 * math.sqrt(100) * prefix_error(
            independent, 100
        )
        assert choose_bands(rounds=100, participations=100, min_separation=1) == 1

    @settings(deadline=None)
    @given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 20), st.integers(1, 30))
    def test_chosen_bands_fit(self, rounds: int, participations: int, separation: int, most: int) -> None:
        """There are never more bands than rounds, or than there is memory for."""
        chosen = choose_bands(rounds=rounds, participations=participations, min_separation=separation, most=most)
        assert 1 <= chosen <= min(rounds, most)
