"""What sums cost to which clients add shares of noise: against the divergence itself, and beside Gaussians."""

import itertools
import math
from functools import cache, partial

import dp_accounting
import mpmath
import numpy as np
import pytest
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mpf

from common.errors import PrivacyError
from common.privacy.accounting.accountant import ACCOUNTANTS, ORDERS, Budget, Renyi, calibrate_noise, spent
from common.privacy.accounting.shares import divergence_of_sum
from common.privacy.accounting.tally import NoisedSum, Tally
from tests.helpers.accountants import DELTA, Gate, every_accountant
from tests.helpers.events import sampled, shared
from tests.helpers.exact import least_epsilon

BOTH = pytest.mark.parametrize("mechanism", ["skellam", "discrete-gaussian"])


@every_accountant
@BOTH
class TestContract:
    """What every accountant makes of them; the rest of the contract runs on them too, among other events."""

    def test_a_client_s_whole_update_is_covered(self, accountant, mechanism):
        """And an example at twice the sensitivity: one update in the ball becomes another."""
        near = shared(mechanism=mechanism, variance=4_000_000)
        far = shared(mechanism=mechanism, variance=4_000_000, l2_squared=4_000_000, l1=2 * near.l1)
        as_client, as_example = (accountant.epsilon([near], delta=DELTA, unit=unit) for unit in ("client", "example"))
        replaced = accountant.relation == "replace-one"  # the ball is as wide, whatever became of the example
        assert as_example == (as_client if replaced else accountant.epsilon([far], delta=DELTA, unit="client"))
        assert math.isfinite(as_client)

    def test_steps_in_one_event_or_in_many_cost_the_same(self, accountant, mechanism):
        """However a run divides them among rounds."""
        events = [shared(r, mechanism=mechanism) for r in range(1, 8)]
        together = shared(mechanism=mechanism, steps=7)
        assert accountant.epsilon(events, delta=DELTA) == accountant.epsilon([together], delta=DELTA)

    @pytest.mark.parametrize("change", [{"variance": 3_999_999}, {"steps": 2}, {"l2_squared": 1_000_001}], ids=str)
    def test_less_noise_more_rounds_and_more_sensitivity_cost_more(self, accountant, mechanism, change):
        """Each by itself."""
        cheap = {"mechanism": mechanism, "variance": 4_000_000, "l1": 8_000}
        assert accountant.epsilon([shared(**cheap | change)], delta=DELTA) > accountant.epsilon(
            [shared(**cheap)], delta=DELTA
        )

    def test_it_costs_no_less_than_a_gaussian_of_the_same_multiplier(self, accountant, mechanism):
        """Discrete noise that is shared out is at best as good, beside other releases, too."""
        sums, gaussian = shared(mechanism=mechanism), sampled(unit="client", trust="coordinator")
        for others in ([], [sampled(unit="client", rate=0.1, noise=1.0, steps=10)]):
            counted = accountant.epsilon([*others, sums], delta=DELTA, unit="client")
            assert counted >= accountant.epsilon([*others, gaussian], delta=DELTA, unit="client")

    def test_noise_that_is_not_exactly_drawn_costs_more(self, accountant, mechanism):
        """Its distance is taken out of delta."""
        exact, inexact = (shared(mechanism=mechanism, distance=distance) for distance in (0.0, DELTA / 1e6))
        cost = accountant.epsilon([inexact], delta=DELTA)
        assert accountant.epsilon([exact], delta=DELTA) < cost < math.inf

    def test_at_the_ends_of_float64_it_refuses_or_answers_on_the_safe_side(self, accountant, mechanism):
        """Much sensitivity and hardly any noise."""
        event = shared(mechanism=mechanism, l2_squared=1 << 100, variance=1, granularity=2.0**-50)
        try:
            assert accountant.epsilon([event], delta=DELTA) > 1e6
        except PrivacyError:
            assert mechanism == "discrete-gaussian"


@BOTH
class TestAgainstTheDivergenceItself:
    """Sums over all whole numbers, of noise that is convolved from its shares."""

    @pytest.mark.parametrize("order", [2, 5, 32])
    @pytest.mark.parametrize(("variance", "bound"), [(2, 1), (4, 4), (18, 6), (50, 9)])
    def test_no_rounded_update_tells_more_than_is_counted(self, mechanism, order, variance, bound):
        """Every vector in three dimensions that keeps the bound, in both directions."""
        dimensions, most = 3, math.isqrt(bound)
        counted = divergence_of_sum(noised(mechanism, variance, bound, dimensions), order)
        alone = {x: divergence(mechanism, variance, x, order) for x in range(-most, most + 1)}
        told = [
            sum(alone[x] for x in vector)
            for vector in itertools.product(alone, repeat=dimensions)
            if 0 < sum(x * x for x in vector) <= bound
        ]
        assert max(told) <= counted * (1 + 1e-9)

    @pytest.mark.parametrize("accountant", [Gate(), *ACCOUNTANTS], ids=lambda a: a.name)
    @pytest.mark.parametrize(("variance", "bound"), [(4, 4), (200, 100), (50, 100)])
    def test_epsilon_is_never_below_the_exact_one(self, mechanism, accountant, variance, bound):
        """Of one sum in one dimension, whose delta is a sum over the whole numbers."""
        step = math.isqrt(bound) * (2 if accountant.relation == "replace-one" else 1)
        exact = least_epsilon(partial(delta_of, mechanism, variance, step), DELTA)
        fields = {"l2_squared": bound, "l1": math.isqrt(bound), "variance": variance, "dimensions": 1}
        event = shared(mechanism=mechanism, **fields)
        counted = accountant.epsilon([event], delta=DELTA, unit="client")
        assert exact <= counted
        if not isinstance(accountant, Gate):
            assert counted <= 2 * exact + 1


class TestAgainstOthersArithmetic:
    """The gate's figure, worked out elsewhere."""

    @pytest.mark.parametrize("order", [2, 9, 64, 1024])
    @pytest.mark.parametrize("unit", ["client", "example"])
    def test_skellam_noise_in_fifty_digits(self, order, unit):
        """Agarwal, Kairouz, Liu 2021, theorem 3.5; conversion: Canonne, Kamath, Steinke 2020, proposition 12."""
        event, rounds, twice = shared(steps=20, noise=3.0, dimensions=1 << 20), 20, 2 if unit == "example" else 1
        with mpmath.workdps(50):
            l2, l1, v, a = mpf(event.l2_squared) * twice**2, mpf(event.l1) * twice, mpf(event.variance), mpf(order)
            one = a * l2 / (2 * v) + min(((2 * a - 1) * l2 + 6 * l1) / (4 * v**2), 3 * l1 / (2 * v))
            exact = rounds * one + mpmath.log1p(-1 / a) - mpmath.log(mpf(DELTA) * a) / (a - 1)
            counted = Gate(order=order).epsilon([event], delta=DELTA, unit=unit)
            assert exact <= counted <= exact + 1e-8 * (rounds * one + 1)

    def test_fine_discrete_gaussians_are_dp_accounting_s(self):
        """Shares of a thousand steps add up to a Gaussian, but for 10^-8 and less."""
        event = shared(mechanism="discrete-gaussian", noise=5.0, shares=10, steps=30)
        theirs = RdpAccountant(ORDERS).compose(dp_accounting.GaussianDpEvent(5.0), 30).rdp
        ours = [30 * divergence_of_sum(Tally([event], unit="client").sums[0][0], order) for order in ORDERS]
        assert ours == pytest.approx(list(theirs), rel=1e-8)

    def test_coarse_shares_cost_more_than_a_gaussian(self):
        """A sum of discrete Gaussians is not one, and says so."""
        costs = [
            Renyi().epsilon(
                [shared(mechanism="discrete-gaussian", l2_squared=1, variance=9, shares=shares)], delta=DELTA
            )
            for shares in (1, 4, 9)
        ]
        assert costs[0] < costs[1] < costs[2]

    def test_noise_too_small_for_any_bound_is_refused(self):
        """Rather than counted with one that does not hold."""
        with pytest.raises(PrivacyError):
            Gate().epsilon([shared(mechanism="discrete-gaussian", l2_squared=1, variance=1, shares=9)], delta=DELTA)


class TestTally:
    """How events are read."""

    def test_equal_sums_are_counted_together_whoever_writes_them(self):
        """Neither clipping norm nor step matter beside the sensitivity in steps."""
        tally = Tally([shared(1), shared(2, clipping_norm=2.0, granularity=2e-3, run="s", colluding=4)], unit="client")
        ((noised_sum, count),) = tally.sums
        assert (noised_sum.l2_squared, noised_sum.l1, count) == (1_000_000, 8_000, 2)
        assert not tally.empty

    @pytest.mark.parametrize(
        ("unit", "relation", "twice"),
        [("client", "add/remove", 1), ("client", "replace-one", 2), ("example", "add/remove", 2),
         ("example", "replace-one", 2)],
    )  # fmt: skip
    def test_sensitivities_are_those_of_the_relation(self, unit, relation, twice):
        """An update that is zero instead, or another one of the ball."""
        ((noised_sum, _),) = Tally([shared()], unit=unit, relation=relation).sums
        assert (noised_sum.l2_squared, noised_sum.l1) == (twice**2 * 1_000_000, twice * 8_000)

    def test_another_total_leaves_this_one_as_it_is(self):
        """What would be spent is asked before anything is."""
        tally = Tally([shared()])
        assert tally.plus(shared(), 3).sums[0][1] == 4
        assert tally.sums[0][1] == 1


@BOTH
@given(st.floats(0.3, 30), st.sampled_from([1e-7, 1e-4]), st.integers(1, 300), st.sampled_from([1, 1 << 24]))
@settings(deadline=None, max_examples=20)
def test_calibrated_noise_never_overspends(mechanism, epsilon, delta, rounds, dimensions):
    """And a thousandth less of it is too little."""

    def release(noise):
        return [shared(mechanism=mechanism, noise=noise, steps=rounds, dimensions=dimensions, l2_squared=1 << 40)]

    budget = Budget.opened(epsilon, delta)
    noise = calibrate_noise(budget, release, unit="client")
    assert spent(release(noise), budget=budget, unit="client") <= epsilon
    assert spent(release(noise * 0.999), budget=budget, unit="client") > epsilon


def noised(mechanism, variance, bound, dimensions):
    l1 = min(bound, math.isqrt(dimensions * bound))
    return NoisedSum(mechanism, variance, 2, bound, l1, dimensions)


@cache
def noise(mechanism, variance):
    """float64[2k + 1]: probabilities of -k to k, of two shares together."""
    reach = 12 * math.isqrt(variance) + 40
    x = np.arange(-reach, reach + 1)
    if mechanism == "skellam":  # of two Poisson variables, or of four: convolved all the same
        counts = np.arange(2 * reach + 1)
        mean = variance / 4
        poisson = np.exp(counts * math.log(mean) - mean - np.array([math.lgamma(k + 1) for k in counts]))
        share = np.correlate(poisson, poisson, "full")[reach : 3 * reach + 1]
    else:
        share = np.exp(-(x**2) / variance)  # the parameter of a share is half the variance
    total = np.convolve(share, share, "same")
    return total / total.sum()


def shifted(mechanism, variance, step):
    """The probabilities, and those of the neighbour, where both can be told from nothing."""
    one = noise(mechanism, variance)
    other = np.roll(one, step)
    inside = slice(abs(step), len(one) - abs(step))
    return one[inside], other[inside]


def divergence(mechanism, variance, step, order):
    """Renyi divergence of one coordinate that moves by `step`."""
    if step == 0:
        return 0.0
    one, other = shifted(mechanism, variance, step)
    kept = (one > 1e-280) & (other > 1e-280)
    logs = order * np.log(other[kept]) - (order - 1) * np.log(one[kept])
    return float(np.logaddexp.reduce(logs)) / (order - 1)


def delta_of(mechanism, variance, step, epsilon):
    """Delta of one coordinate that moves by `step`."""
    one, other = shifted(mechanism, variance, step)
    return float(np.maximum(other - math.exp(epsilon) * one, 0).sum())
