"""The discrete Gaussian: its table recomputed, its trials followed bit by bit, its values put to the test.

Every statistical test here raises a false alarm with probability at most 1e-9.
"""

import hashlib
import itertools
import math
import sys
from bisect import bisect_right

import mpmath
import numpy as np
import pytest
from scipy import stats

from common.privacy.noise import SecureNoise, discrete_gaussian
from common.privacy.noise.discrete_gaussian import (
    BOUNDARY_BITS,
    CELLS,
    DISTANCE_PER_DRAW,
    GAUSSIAN_STDDEV,
    GRID_STDDEV,
    GUIDE_BITS,
    WIDTH,
    DiscreteGaussian,
    distribution_function,
    tables,
)
from common.privacy.noise.keystream import Keystream

FALSE_ALARM = 1e-9
COUNT = 400_000
DENOMINATOR = 2 * GRID_STDDEV**2


class Script:
    """A stream that gives the words it was told to, and no more."""

    def __init__(self, *words):
        self._words = list(words)

    def words(self, count):
        taken, self._words = self._words[:count], self._words[count:]
        assert len(taken) == count
        return np.array(taken, dtype=np.uint64)

    @property
    def left(self):
        return len(self._words)


def scripted(*words):
    """A sampler that draws from a script."""
    sampler = DiscreteGaussian(Keystream(bytes(32)))
    sampler._stream = Script(*words)
    return sampler


def nearest_to_zero(cell):
    """Computed otherwise than in the code."""
    return cell * WIDTH if cell >= 0 else (cell + 1) * WIDTH - 1


@pytest.fixture(scope="module")
def values():
    """int32[COUNT] from a fresh key."""
    return SecureNoise().integers(COUNT)


class TestDistance:
    """The bound that the plan adds to delta."""

    def test_the_table_is_as_near_to_the_exact_law_as_stated(self):
        """All cell probabilities anew, by mpmath with 400 bits, the cut tails included.

        Given its cell, a value's law is exact (`TestTrial`), so values are no farther from the exact law than cells
        are, but for the refusals: they weigh cells by a factor in [p, 1], where p is the share that is kept.
        """
        with mpmath.workprec(400):
            weights = [
                mpmath.exp(-(mpmath.mpf(nearest_to_zero(cell)) ** 2) / DENOMINATOR) for cell in range(-CELLS, CELLS)
            ]
            # a geometric series bounds the mass beyond: from one cell to the next weights fall at least this fast
            beyond = 2 * weights[0] * weights[0] / weights[1] / (1 - weights[0] / weights[1])
            total = mpmath.fsum(weights) + beyond
            starts = distribution_function()
            drawn = [mpmath.mpf(b - a) / 2**BOUNDARY_BITS for a, b in itertools.pairwise(starts)]
            distance = (
                mpmath.fsum(abs(d - w / total) for d, w in zip(drawn, weights, strict=True)) + beyond / total
            ) / 2
            kept = mpmath.sqrt(2 * mpmath.pi) * GRID_STDDEV / (WIDTH * total)
            assert 0.9 < kept < 1
            assert 0 < 2 * distance / kept < DISTANCE_PER_DRAW - 2.0**-200

    def test_a_rounded_continuous_gaussian_is_as_near(self):
        """The sum of the module's docstring for r = 2.7, and what it leaves of the variance."""
        with mpmath.workprec(400):
            r = mpmath.mpf("2.7")
            e = 2 * mpmath.nsum(lambda k: mpmath.exp(-2 * (mpmath.pi * r * k) ** 2), [1, mpmath.inf])
            assert e / (1 - e) < mpmath.mpf(2) ** -200
            assert mpmath.mpf(GAUSSIAN_STDDEV) ** 2 < GRID_STDDEV**2 - r**2

    def test_rounding_a_continuous_gaussian_gives_the_discrete_one(self):
        """Peikert's theorem in numbers, for small parameters: the integral against the law, at several integers."""
        with mpmath.workprec(100):
            s, r, centre = mpmath.mpf(5), mpmath.mpf("1.5"), 3
            spread = mpmath.sqrt(s**2 - r**2)

            def bell(x, width):
                return mpmath.exp(-(x**2) / (2 * width**2))

            def rounded(y):
                points = [y + mpmath.mpf(i) / 8 for i in range(-130, 131)]  # so smooth that a sum is the integral
                return mpmath.fsum(
                    bell(x - centre, spread)
                    * bell(y - x, r)
                    / mpmath.fsum(bell(int(x) + k - x, r) for k in range(-18, 19))
                    for x in points
                ) / (8 * spread * mpmath.sqrt(2 * mpmath.pi))

            total = mpmath.fsum(bell(mpmath.mpf(k), s) for k in range(-80, 81))
            e = 2 * mpmath.exp(-2 * (mpmath.pi * r) ** 2)
            for y in (3, 4, 15):
                assert abs(rounded(y) / (bell(mpmath.mpf(y - centre), s) / total) - 1) < 3 * e


class TestTables:
    """Inversion finds the part of a cell in which the drawn bits lie."""

    def test_every_entry_of_the_guide_leads_to_the_right_part(self):
        """For the least and the greatest bits that may follow, and some between, as bisection of all 208 bits does."""
        boundaries = tables().boundaries
        entries = np.arange(1 << GUIDE_BITS, dtype=np.uint32)
        for bits in (0, 1, 1 << 63, 0x123456789ABCDEF0, (1 << 64) - 1):
            values = tables().guide.numpy().copy()
            coded = int((values <= discrete_gaussian._CODE).sum())
            low = (0, 0) if bits < 1 << 63 else ((1 << 64) - 1, (1 << 64) - 1)
            at, cells = scripted(*[bits] * coded, *low * 5000)._settle(entries, values)
            rest = bits << 128 | low[0] << 64 | low[1]
            parts = np.array([bisect_right(boundaries, int(entry) << 192 | rest) for entry in entries])
            assert np.array_equal(values >> 12, (parts >> 1) - CELLS)
            assert np.array_equal(at, np.flatnonzero(parts % 2 == 0))
            assert np.array_equal(cells, parts[at] >> 1)

    @pytest.mark.parametrize("index", [0, 1, 2000, 8000, 8191, 8192, 8193, 9000, 16381, 16382])
    @pytest.mark.parametrize("step", [-1, 0, 1])
    def test_a_tie_is_decided_by_all_bits(self, index, step):
        """At each boundary itself, just below and just above it."""
        boundaries = tables().boundaries
        drawn = min(max(boundaries[index] + step, 0), (1 << BOUNDARY_BITS) - 1)
        entry, bits = drawn >> 192, drawn >> 128 & (1 << 64) - 1
        values = tables().guide.numpy()[[entry]]
        sampler = scripted(bits, drawn >> 64 & (1 << 64) - 1, drawn & (1 << 64) - 1)
        sampler._settle(np.array([entry], dtype=np.uint32), values)
        assert sampler._stream.left == 0
        assert values[0] // WIDTH == (bisect_right(boundaries, drawn) >> 1) - CELLS

    def test_a_cell_s_small_part_holds_its_whole_trial(self):
        """Its share is exactly 2^-b, and no m / 2 GRID_STDDEV^2 of the cell is larger."""
        table, starts = tables(), distribution_function()
        for index in range(2 * CELLS):
            cell, width = index - CELLS, starts[index + 1] - starts[index]
            b = int(table.shift[index]) - (64 - 41)
            assert (table.boundaries[2 * index] - starts[index]) << b == width
            ends = (cell * WIDTH) ** 2, (cell * WIDTH + WIDTH - 1) ** 2
            assert (max(ends) - min(ends)) << b <= DENOMINATOR
            assert table.nearest[index] == nearest_to_zero(cell)


class TestTrial:
    """A value is kept with probability exp(-m / 2 GRID_STDDEV^2), exactly."""

    def test_the_parity_of_the_first_failure_decides(self):
        """Word by word: the first trial takes the top bits by the cell's shift, the k-th an integer below k times D."""
        cell, offset = 300, 4000
        value = np.array([cell * WIDTH + offset])
        index = np.array([cell + CELLS])
        m, shift = int(value[0]) ** 2 - (cell * WIDTH) ** 2, int(tables().shift[cell + CELLS])
        hit, miss = (m - 1) << shift, m << shift
        again, over = (m - 1) << 22, m << 22
        assert m < 1 << 41
        for words, refused in (
            ((miss,), False),
            ((hit, over), True),
            ((hit, again, m), False),
            ((hit, again, m - 1, m), True),
            ((hit, again, m - 1, m - 1, m), False),
        ):
            sampler = scripted(*words)
            assert sampler._refuses(value, index).tolist() == [refused]
            assert sampler._stream.left == 0

    def test_integers_below_a_bound_are_unbiased(self):
        """Words beyond the last multiple of the bound are drawn again."""
        bound = 3 << 41
        multiple = (1 << 64) // bound * bound
        assert scripted(multiple - 1)._uniform_below(bound) == bound - 1
        assert scripted(multiple, (1 << 64) - 1, 5)._uniform_below(bound) == 5

    @pytest.mark.parametrize("cell", [-CELLS, -700, -1, 0, 511, CELLS - 1])
    @pytest.mark.parametrize("offset", [0, 2000, WIDTH - 1])
    def test_it_keeps_as_many_as_it_should(self, cell, offset):
        """Refusals are binomial; an upper or lower part that were off by 3 % of itself would show in most cells."""
        trials, value = 100_000, cell * WIDTH + offset
        m = value**2 - nearest_to_zero(cell) ** 2
        share = 2.0 ** (int(tables().shift[cell + CELLS]) - 23)
        sampler = DiscreteGaussian(SecureNoise()._noise_stream)
        refused = sampler._refuses(np.full(trials, value), np.full(trials, cell + CELLS)).sum()
        assert stats.binomtest(int(refused), trials, -math.expm1(-m / DENOMINATOR) * share).pvalue > FALSE_ALARM / 18


class TestDraw:
    """What comes out is what the theory assumes."""

    def test_the_variance_is_right(self, values):
        """Chi-square, two-sided: what an epsilon is computed from."""
        assert not scale_refuted(values)

    @pytest.mark.parametrize("factor", [0.2, 0.98, 1.02])
    def test_a_wrong_scale_would_be_found(self, values, factor):
        """At this number of draws 2 % stand 17 standard deviations off: missed with probability below 1e-20."""
        assert scale_refuted(values * factor)

    def test_the_mean_is_zero(self, values):
        """Within six standard errors."""
        assert 2 * stats.norm.sf(abs(values.mean()) / GRID_STDDEV * math.sqrt(COUNT)) > FALSE_ALARM

    def test_the_shape_is_right(self, values):
        """Chi-square over 1000 bins of the exact law: the normal distribution function at x + 1/2, up to 1e-12."""
        edges = np.round(stats.norm.ppf(np.arange(1, 1000) / 1000) * GRID_STDDEV).astype(np.int64)
        bounds = np.concatenate(([0.0], stats.norm.cdf((edges - 0.5) / GRID_STDDEV), [1.0]))
        seen = np.bincount(np.searchsorted(edges, values, side="right"), minlength=1000)
        assert stats.chisquare(seen, np.diff(bounds) * COUNT).pvalue > FALSE_ALARM

    def test_the_tails_are_there(self, values):
        """As many beyond four standard deviations as there should be."""
        beyond = int((np.abs(values) > 4 * GRID_STDDEV).sum())
        assert stats.binomtest(beyond, COUNT, 2 * stats.norm.sf(4)).pvalue > FALSE_ALARM

    def test_it_is_symmetric(self, values):
        """Signs are even, and both sides have one distribution."""
        signs = int((values > 0).sum())
        assert stats.binomtest(signs, int((values != 0).sum()), 0.5).pvalue > FALSE_ALARM / 2
        assert stats.ks_2samp(values[values > 0], -values[values < 0]).pvalue > FALSE_ALARM / 2

    @pytest.mark.parametrize("modulus", [2, 3, 100, WIDTH, 3 * WIDTH])
    def test_it_fills_every_residue_alike(self, values, modulus):
        """Chi-square: so a sum on the grid plus this noise tells nothing modulo any such number."""
        assert stats.chisquare(np.bincount(values % modulus, minlength=modulus)).pvalue > FALSE_ALARM / 5

    @pytest.mark.parametrize("lag", [1, 2, 1 << 17, COUNT // 2])
    def test_values_do_not_depend_on_one_another(self, values, lag):
        """Neighbours, those of two blocks, and their sizes."""
        for x in (values.astype(float), np.abs(values.astype(float)), (values % WIDTH).astype(float)):
            assert stats.pearsonr(x[:-lag], x[lag:]).pvalue > FALSE_ALARM / 12

    def test_two_streams_do_not_depend_on_one_another(self, values):
        """Nor do they share more values than chance makes them."""
        other = SecureNoise().integers(COUNT)
        assert stats.pearsonr(values, other).pvalue > FALSE_ALARM
        assert (values == other).sum() < 30  # 0.1 are expected

    @pytest.mark.parametrize("count", [0, 1, 2, 3, 255, 256, (1 << 17) - 1, (1 << 17) + 1])
    def test_any_number_can_be_drawn(self, count):
        """None, odd numbers, and more than one block."""
        drawn = SecureNoise().integers(count)
        assert (drawn.shape, drawn.dtype) == ((count,), np.int32)
        assert (np.abs(drawn, dtype=np.int64) <= CELLS * WIDTH).all()

    def test_what_is_refused_is_not_handed_out(self, monkeypatch):
        """Also where more is refused than there are spare proposals: drawn anew until all places are filled."""
        honest, refused_value = DiscreteGaussian._propose, 2**30
        generator = np.random.default_rng(0)

        def wasteful(self, values):
            honest(self, values)
            refused = np.flatnonzero(generator.random(len(values)) < 0.6)
            values[refused] = refused_value
            return refused

        monkeypatch.setattr(DiscreteGaussian, "_propose", wasteful)
        drawn = SecureNoise().integers(200_000)
        assert drawn.max() < refused_value
        assert len(np.unique(drawn)) > 150_000

    def test_every_refusal_counts(self, monkeypatch):
        """If each trial that is due refused, all values of small parts would be drawn anew."""
        due = []

        def refuse(self, values, cells):
            due.append(len(cells))
            return np.ones(len(cells), dtype=np.bool_)

        monkeypatch.setattr(DiscreteGaussian, "_refuses", refuse)
        refused = DiscreteGaussian(Keystream(bytes(32)))._propose(np.empty(100_000, dtype=np.int32))
        assert len(np.unique(refused)) == sum(due) > 0

    @pytest.mark.skipif(sys.byteorder != "little", reason="words are in the order of memory")
    def test_a_known_answer(self):
        """For a fixed key, over several blocks: whoever changes the mapping from bits to values must know it."""
        drawn = DiscreteGaussian(Keystream(bytes(range(32)))).draw(300_000)
        assert drawn[:6].tolist() == [581874, 940330, -224343, 7901, 495088, 1325386]
        assert (
            hashlib.sha256(drawn.tobytes()).hexdigest()
            == "5f2a083a57922ec18e7a75d4b822fe12c847ee64323d5c433622f1af1cc6f1bf"
        )


def scale_refuted(values):
    """Whether the sum of squares contradicts the standard deviation; falsely with probability 1e-9."""
    squares = np.square(values / GRID_STDDEV).sum()
    tail = FALSE_ALARM / 2
    return not stats.chi2.ppf(tail, len(values)) < squares < stats.chi2.isf(tail, len(values))
