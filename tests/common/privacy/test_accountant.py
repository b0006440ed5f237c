"""What every accountant must do, and what ours says against independent calculations."""

import math

import dp_accounting
import mpmath
import pytest
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from common.errors import LedgerError, PrivacyError
from common.privacy import NonPrivate, PoissonGaussian, spent_epsilon
from common.privacy.accountant import ORDERS, calibrate_noise
from common.privacy.events import event_from_dict, event_to_dict

DELTA = 1e-5
SETTINGS = [(2.0, 0.25, 20, 1e-6), (0.8, 0.01, 500, 1e-5), (5.0, 1.0, 30, 1e-7)]


def event(noise=1.0, rate=0.1, steps=1, server_round=1):
    return PoissonGaussian(noise_multiplier=noise, sampling_rate=rate, steps=steps, run="r", server_round=server_round)


EVENTS = st.builds(
    event, noise=st.sampled_from([0.5, 1.0, 3.0]), rate=st.sampled_from([1.0, 1.0, 0.02]), steps=st.integers(1, 40)
)


class TestContract:
    """What every accountant must do."""

    def test_nothing_released_costs_nothing(self):
        """An empty ledger is at zero."""
        assert spent_epsilon([], delta=DELTA) == 0

    @given(st.lists(EVENTS, max_size=4), EVENTS)
    @settings(deadline=None, max_examples=20)
    def test_another_event_never_lowers_what_is_spent(self, events, another):
        """Whatever came before."""
        assert spent_epsilon([*events, another], delta=DELTA) >= spent_epsilon(events, delta=DELTA)

    @given(st.lists(EVENTS, max_size=5).flatmap(lambda events: st.tuples(st.just(events), st.permutations(events))))
    @settings(deadline=None, max_examples=12)
    def test_the_order_of_events_does_not_matter(self, pair):
        """To the last bit: two parties that replay one ledger agree."""
        one, two = pair
        assert spent_epsilon(one, delta=DELTA) == spent_epsilon(two, delta=DELTA)

    def test_steps_in_one_event_or_in_many_cost_the_same(self):
        """However a run divides them among rounds."""
        together = spent_epsilon([event(steps=12)], delta=DELTA)
        assert spent_epsilon([event(server_round=r) for r in range(1, 13)], delta=DELTA) == together

    @pytest.mark.parametrize("place", [0, 1, 2])
    def test_one_release_without_noise_costs_everything(self, place):
        """At any place among the others."""
        events = [event(), event()]
        events.insert(place, NonPrivate(run="r", server_round=3))
        assert spent_epsilon(events, delta=DELTA) == math.inf

    @pytest.mark.parametrize("change", [{"noise": 0.9}, {"rate": 0.2}, {"steps": 2}])
    def test_less_noise_more_sampling_and_more_steps_cost_more(self, change):
        """Each by itself."""
        assert spent_epsilon([event(**change)], delta=DELTA) > spent_epsilon([event()], delta=DELTA)

    def test_a_smaller_delta_costs_more(self):
        """The rarer the exception, the dearer."""
        assert spent_epsilon([event()], delta=1e-9) > spent_epsilon([event()], delta=1e-3)

    @pytest.mark.parametrize("rate", [0.1, 1.0])
    @pytest.mark.parametrize("noise", [1e200, 0.0, -1.0, math.nan, math.inf])
    def test_what_cannot_be_computed_is_refused(self, noise, rate):
        """Never a number that happens to come out."""
        with pytest.raises(PrivacyError):
            spent_epsilon([event(noise=noise, rate=rate)], delta=DELTA)

    @pytest.mark.parametrize("rate", [0.1, 1.0])
    @pytest.mark.parametrize("noise", [1e-200, 1e-160, 5e-324])
    def test_hardly_any_noise_is_refused_or_costs_everything(self, noise, rate):
        """Where squares vanish."""
        try:
            assert spent_epsilon([event(noise=noise, rate=rate)], delta=DELTA) > 1e100
        except PrivacyError as e:
            assert "cannot be computed" in str(e)  # noqa: PT017 - one of two good answers


class TestAgainstIndependentCalculations:
    """Our epsilon against others' arithmetic, and against bounds that no accountant may cross."""

    @pytest.mark.parametrize(("noise", "rate", "steps", "delta"), SETTINGS)
    def test_it_is_the_renyi_bound_in_fifty_digits(self, noise, rate, steps, delta):
        """Mironov, Talwar, Zhang 2019, eq. 5 at whole orders; conversion: Canonne, Kamath, Steinke 2020, prop. 12."""
        with mpmath.workdps(50):
            best = min(
                steps * renyi_sum(order, noise, rate)
                + mpmath.log1p(-mpmath.mpf(1) / order)
                - mpmath.log(mpmath.mpf(delta) * order) / (order - 1)
                for order in map(int, ORDERS)
            )
        assert spent_epsilon([event(noise, rate, steps)], delta=delta) == pytest.approx(float(best), rel=1e-9)

    @pytest.mark.parametrize("order", [2, 7, 32])
    def test_the_renyi_divergence_is_that_of_the_mixture_itself(self, order):
        """The sum above against the integral that defines it, in both directions: adding costs more than removing."""
        noise, rate = 1.1, 0.2
        summed = float(renyi_sum(order, noise, rate))
        assert summed == pytest.approx(float(renyi_integral(order, noise, rate, add=True)), rel=1e-9)
        assert summed >= float(renyi_integral(order, noise, rate, add=False))

    @pytest.mark.parametrize(("noise", "rate", "steps", "delta"), SETTINGS[:2])
    def test_it_is_no_less_than_the_privacy_loss_distribution_says(self, noise, rate, steps, delta):
        """The tightest numerical accountant is a floor; and it is no more than a third above it."""
        accountant = PLDAccountant(value_discretization_interval=1e-3)
        one = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
        tight = accountant.compose(one, steps).get_epsilon(delta)
        assert tight <= spent_epsilon([event(noise, rate, steps)], delta=delta) <= 1.3 * tight

    @given(st.floats(0.3, 20), st.integers(1, 50), st.sampled_from([1e-9, 1e-5, 1e-2]))
    @settings(deadline=None, max_examples=100)
    def test_it_is_no_less_than_the_exact_epsilon_without_sampling(self, noise, steps, delta):
        """Composed Gaussians are one Gaussian, whose delta has a closed form (Balle, Wang 2018, theorem 8)."""
        spent = spent_epsilon([event(noise, 1.0, steps)], delta=delta)
        assert exact_gaussian_epsilon(noise / math.sqrt(steps), delta) <= spent


class TestCalibration:
    """From a target back to the noise that keeps it."""

    @given(
        st.floats(0.05, 50),
        st.sampled_from([1e-7, 1e-5, 1e-3]),
        st.sampled_from([1.0, 1.0, 1.0, 0.01]),
        st.integers(1, 500),
    )
    @settings(deadline=None, max_examples=12)
    def test_it_never_overspends_and_wastes_almost_nothing(self, target, delta, rate, steps):
        """What it costs is at most the target, by the gate's own accountant; a thousandth less noise is too little."""
        noise = calibrate_noise(target_epsilon=target, target_delta=delta, sampling_rate=rate, steps=steps)
        assert spent_epsilon([event(noise, rate, steps)], delta=delta) <= target
        assert spent_epsilon([event(noise * 0.999, rate, steps)], delta=delta) > target

    def test_a_target_that_no_noise_reaches_is_refused(self):
        """At a finite number of orders the bound does not fall below a floor."""
        with pytest.raises(PrivacyError) as caught:
            calibrate_noise(target_epsilon=1e-6, target_delta=1e-5, sampling_rate=1.0, steps=10**6)
        assert "target_epsilon" in caught.value.hint


class TestEvents:
    """Events are records; one that is not understood cannot be counted, so it is never skipped."""

    @pytest.mark.parametrize("one", [event(0.7, 0.25, 3, 9), NonPrivate(run="r", server_round=2)], ids=lambda e: e.KIND)
    def test_an_event_survives_being_written(self, one):
        """With its kind and version."""
        assert event_from_dict(event_to_dict(one)) == one

    @pytest.mark.parametrize(
        "change",
        [
            {"version": 2},
            {"version": None},
            {"kind": "laplace"},
            {"kind": None},
            {"extra": 1},
            {"steps": 0},
            {"steps": -1},
            {"steps": 1.5},
            {"steps": True},
            {"steps": "3"},
            {"noise_multiplier": 0},
            {"noise_multiplier": -1.0},
            {"noise_multiplier": math.nan},
            {"noise_multiplier": math.inf},
            {"noise_multiplier": "1"},
            {"noise_multiplier": None},
            {"sampling_rate": 0.0},
            {"sampling_rate": 1.01},
            {"sampling_rate": math.nan},
            {"sampling_rate": []},
        ],
        ids=str,
    )
    def test_an_event_that_is_not_understood_is_refused(self, change):
        """Unknown kinds, versions and fields, and values that mean nothing."""
        with pytest.raises(LedgerError):
            event_from_dict(event_to_dict(event()) | change)

    @pytest.mark.parametrize("field", ["version", "kind", "steps", "noise_multiplier", "sampling_rate", "run"])
    def test_an_event_without_a_field_is_refused(self, field):
        """No value is made up."""
        record = event_to_dict(event())
        del record[field]
        with pytest.raises(LedgerError):
            event_from_dict(record)


def renyi_sum(order: int, noise: float, rate: float):
    """Renyi divergence of one sampled Gaussian at a whole order, by the binomial sum."""
    q, variance = mpmath.mpf(rate), mpmath.mpf(noise) ** 2
    moment = mpmath.fsum(
        mpmath.binomial(order, k) * (1 - q) ** (order - k) * q**k * mpmath.exp(k * (k - 1) / (2 * variance))
        for k in range(order + 1)
    )
    return mpmath.log(moment) / (order - 1)


def renyi_integral(order: int, noise: float, rate: float, *, add: bool):
    """The same by integrating the two densities, with the example or without it in the first place."""
    q, variance = mpmath.mpf(rate), mpmath.mpf(noise) ** 2

    def integrand(x):
        without = mpmath.npdf(x, 0, noise)
        ratio = (1 - q) + q * mpmath.exp((2 * x - 1) / (2 * variance))
        return without * (ratio**order if add else ratio ** (1 - order))

    edge = 12 * noise
    moment = mpmath.quad(integrand, [-edge, 0, order / 2, order, order + edge])
    return mpmath.log(moment) / (order - 1)


def exact_gaussian_epsilon(noise: float, delta: float) -> float:
    """The smallest epsilon of one Gaussian with sensitivity 1."""

    def delta_of(epsilon):
        a, b = 1 / (2 * noise), epsilon * noise
        return norm.cdf(a - b) - math.exp(epsilon + norm.logcdf(-a - b))

    if delta_of(0.0) <= delta:
        return 0.0
    return brentq(lambda epsilon: delta_of(epsilon) - delta, 0.0, 1000.0, xtol=1e-9) - 1e-8
