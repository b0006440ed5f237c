"""What every accountant must do, and what each says against independent calculations."""

import math
from functools import partial

import dp_accounting
import mpmath
import pytest
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mpf

from common.errors import PrivacyError
from common.privacy.accounting.accountant import (
    ACCOUNTANTS,
    PrivacyLoss,
    Renyi,
    ReplaceOne,
    against_coordinator,
    best_order,
    calibrate_noise,
    spent,
)
from common.privacy.accounting.budget import Budget
from common.privacy.accounting.renyi import ORDERS, renyi_divergence
from tests.helpers.accountants import DELTA, Gate, every_accountant
from tests.helpers.events import matrix, non_private, sampled, shared
from tests.helpers.exact import (
    gaussian_delta,
    least_epsilon,
    renyi_moment,
    replaced_delta,
    sampled_delta,
    two_steps_delta,
)

EVENTS = st.one_of(
    st.builds(
        sampled,
        st.integers(1, 9),
        noise=st.sampled_from([0.7, 1.0, 3.0]),
        rate=st.sampled_from([1.0, 0.02]),
        steps=st.integers(1, 40),
        unit=st.sampled_from(["example", "example", "client"]),
        distance=st.sampled_from([0.0, 1e-12]),
    ),
    st.builds(
        shared,
        st.integers(1, 9),
        noise=st.sampled_from([2.0, 8.0]),
        mechanism=st.sampled_from(["skellam", "discrete-gaussian"]),
        steps=st.integers(1, 40),
        distance=st.sampled_from([0.0, 1e-12]),
    ),
)
few = settings(deadline=None, max_examples=5)


@every_accountant
class TestContract:
    """What every accountant must do, the gate included."""

    @pytest.mark.parametrize("unit", ["example", "client"])
    def test_nothing_released_costs_nothing(self, accountant, unit):
        """An empty ledger is at zero."""
        assert accountant.epsilon([], delta=DELTA, unit=unit) == 0

    @pytest.mark.parametrize("place", [0, 1, 2])
    def test_one_release_without_noise_costs_everything(self, accountant, place):
        """At any place among the others."""
        events = [sampled(), sampled()]
        events.insert(place, non_private())
        assert accountant.epsilon(events, delta=DELTA) == math.inf

    @given(st.lists(EVENTS, max_size=3), EVENTS)
    @few
    def test_another_event_never_lowers_what_is_spent(self, accountant, events, another):
        """Whatever came before."""
        assert accountant.epsilon([*events, another], delta=DELTA) >= accountant.epsilon(events, delta=DELTA)

    @given(st.lists(EVENTS, max_size=4).flatmap(lambda events: st.tuples(st.just(events), st.permutations(events))))
    @few
    def test_the_order_of_events_does_not_matter(self, accountant, pair):
        """To the last bit: two parties that replay one ledger agree."""
        one, two = pair
        assert accountant.epsilon(one, delta=DELTA) == accountant.epsilon(two, delta=DELTA)

    def test_steps_in_one_event_or_in_many_cost_the_same(self, accountant):
        """However a run divides them among rounds."""
        together = accountant.epsilon([sampled(steps=12, rate=0.1)], delta=DELTA)
        assert accountant.epsilon([sampled(r, rate=0.1) for r in range(1, 13)], delta=DELTA) == together

    @pytest.mark.parametrize(
        "change",
        [{"noise": 1.9}, {"rate": 0.2}, {"steps": 2}, {"sensitivity": 1.1}, {"count_noise_stddev": 1.0}],
        ids=str,
    )
    def test_less_noise_more_sampling_and_more_steps_cost_more(self, accountant, change):
        """Each by itself, and another noised count, too."""
        cheap = {"rate": 0.1, "steps": 1}
        assert accountant.epsilon([sampled(**cheap | change)], delta=DELTA) > accountant.epsilon(
            [sampled(**cheap)], delta=DELTA
        )

    def test_a_smaller_delta_costs_more(self, accountant):
        """The rarer the exception, the dearer."""
        assert accountant.epsilon([sampled()], delta=1e-9) > accountant.epsilon([sampled()], delta=1e-3)

    def test_noise_that_is_not_exactly_drawn_costs_more(self, accountant):
        """Its distance is taken out of delta; where that is used up, nothing is promised."""
        exact = accountant.epsilon([sampled()], delta=DELTA)
        assert exact < accountant.epsilon([sampled(distance=DELTA / 1e3)], delta=DELTA) < math.inf
        assert accountant.epsilon([sampled(distance=DELTA / 2)] * 2, delta=DELTA) == math.inf

    def test_what_protects_examples_does_not_protect_clients(self, accountant):
        """A client is not one example."""
        assert accountant.epsilon([sampled()], delta=DELTA, unit="client") == math.inf
        assert accountant.epsilon([sampled(unit="client")], delta=DELTA, unit="client") < math.inf

    def test_what_protects_clients_counts_for_examples_at_twice_the_sensitivity(self, accountant):
        """One update replaced by another within the ball, and no amplification by sampling clients."""
        event = sampled(unit="client", rate=0.1, noise=4.0, steps=3)
        twice = accountant.epsilon([sampled(rate=1.0, noise=2.0, steps=3)], delta=DELTA)
        if accountant.relation == "replace-one":  # the ball is as wide, whatever became of the example
            twice = accountant.epsilon([sampled(rate=1.0, noise=4.0, steps=3)], delta=DELTA)
        assert accountant.epsilon([event], delta=DELTA) == twice

    def test_a_run_with_correlated_noise_is_one_gaussian(self, accountant):
        """However many rounds it covers."""
        assert accountant.epsilon([matrix(noise=3.0)], delta=DELTA) == accountant.epsilon(
            [sampled(noise=3.0)], delta=DELTA
        )

    @pytest.mark.parametrize("unknown", [None, "sampled-gaussian", dp_accounting.GaussianDpEvent(1.0)], ids=str)
    def test_an_unknown_event_is_refused(self, accountant, unknown):
        """What is not understood cannot be counted, also beside what costs everything."""
        with pytest.raises(PrivacyError):
            accountant.epsilon([non_private(), unknown], delta=DELTA)

    @pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
    def test_an_impossible_delta_is_refused(self, accountant, delta):
        """It lies between 0 and 1."""
        with pytest.raises(PrivacyError):
            accountant.epsilon([sampled()], delta=delta)

    @pytest.mark.parametrize(
        "fields", [{"noise": math.nan}, {"noise": 0.0}, {"rate": 0.0}, {"steps": 0}, {"steps": 1.5}], ids=str
    )
    def test_impossible_values_are_refused(self, accountant, fields):
        """Never a number that happens to come out."""
        with pytest.raises(PrivacyError):
            accountant.epsilon([sampled(**fields)], delta=DELTA)

    @pytest.mark.parametrize("rate", [0.1, 1.0])
    @pytest.mark.parametrize("noise", [1e-3, 1e-100, 1e-200, 5e-324, 1e200])
    def test_at_the_ends_of_float64_it_refuses_or_answers_on_the_safe_side(self, accountant, noise, rate):
        """Where squares vanish or overflow."""
        try:
            epsilon = accountant.epsilon([sampled(noise=noise, rate=rate)], delta=DELTA)
        except PrivacyError:
            return
        assert epsilon > 1e4 if noise < 1 else epsilon >= 0


class TestAgainstIndependentCalculations:
    """Never below high-precision arithmetic that shares nothing with the accountants, and not absurdly above it."""

    @pytest.mark.parametrize("accountant", [Gate(), *ACCOUNTANTS], ids=lambda a: a.name)
    @pytest.mark.parametrize(
        ("noise", "steps", "delta"), [(0.4, 1, 1e-5), (1.0, 3, 1e-9), (5.0, 50, 1e-5), (30.0, 7, 1e-2)]
    )
    def test_without_sampling_it_is_one_gaussian(self, accountant, noise, steps, delta):
        """Composed Gaussians are one Gaussian, whose delta has a closed form."""
        total = noise / math.sqrt(steps) / (2 if accountant.relation == "replace-one" else 1)
        exact = least_epsilon(lambda epsilon: gaussian_delta(epsilon, total), delta)
        counted = accountant.epsilon([sampled(noise=noise, steps=steps)], delta=delta)
        assert exact <= counted
        if not isinstance(accountant, Gate):
            assert counted <= exact * (1.35 if isinstance(accountant, Renyi) else 1.001) + 0.01

    @pytest.mark.parametrize("accountant", [Gate(), Renyi(), PrivacyLoss()], ids=lambda a: a.name)
    @pytest.mark.parametrize(("noise", "rate", "delta"), [(0.6, 0.01, 1e-5), (1.0, 0.3, 1e-8), (3.0, 0.9, 1e-3)])
    def test_one_sampled_step_covers_both_directions(self, accountant, noise, rate, delta):
        """An example more, an example less."""
        adding, removing = (partial(sampled_delta, noise=noise, rate=rate, adding=adding) for adding in (True, False))
        exact = max(least_epsilon(adding, delta), least_epsilon(removing, delta))
        counted = accountant.epsilon([sampled(noise=noise, rate=rate)], delta=delta)
        assert exact <= counted
        if isinstance(accountant, PrivacyLoss):
            assert counted <= exact * 1.001 + 1e-3

    @pytest.mark.parametrize(("noise", "rate", "delta"), [(0.6, 0.01, 1e-5), (1.0, 0.3, 1e-8), (3.0, 0.9, 1e-3)])
    def test_one_sampled_step_with_a_unit_replaced(self, noise, rate, delta):
        """By its opposite: that is twice as far as one that comes or goes."""
        exact = least_epsilon(lambda epsilon: replaced_delta(epsilon, noise, rate), delta)
        assert exact <= ReplaceOne().epsilon([sampled(noise=noise, rate=rate)], delta=delta) <= exact * 1.001 + 1e-3

    def test_two_sampled_steps(self):
        """The second's delta averaged over what the first gave away."""
        noise, rate = 0.8, 0.2
        exact = least_epsilon(lambda epsilon: two_steps_delta(epsilon, noise, rate), DELTA)
        assert exact <= PrivacyLoss().epsilon([sampled(noise=noise, rate=rate, steps=2)], delta=DELTA) <= exact * 1.001

    def test_many_sampled_steps_at_a_rate_next_to_one(self):
        """Ten thousand convolutions by Fourier transform, against the closed form of the same without sampling."""
        exact = least_epsilon(lambda epsilon: gaussian_delta(epsilon, 1.0), 1e-9)
        counted = PrivacyLoss().epsilon([sampled(noise=100.0, rate=1 - 1e-12, steps=10_000)], delta=1e-9)
        assert exact <= counted <= 1.01 * exact

    @pytest.mark.parametrize(
        ("noise", "rate", "steps"), [(2.0, 0.25, 20), (0.8, 0.01, 500), (5.0, 1.0, 30), (500.0, 1e-4, 10**6)]
    )
    @pytest.mark.parametrize("order", [2, 9, 32, 1024])
    def test_the_gate_is_the_renyi_bound_in_fifty_digits(self, noise, rate, steps, order):
        """Mironov, Talwar, Zhang 2019, eq. 5; conversion: Canonne, Kamath, Steinke 2020, proposition 12."""
        with mpmath.workdps(50):
            divergence = steps * renyi_moment(order, noise, rate) / (order - 1)
            exact = divergence + mpmath.log1p(-mpf(1) / order) - mpmath.log(mpf(DELTA) * order) / (order - 1)
            counted = Gate(order=order).epsilon([sampled(noise=noise, rate=rate, steps=steps)], delta=DELTA)
            assert exact <= counted <= exact + 1e-8 * (divergence + 1)

    @pytest.mark.parametrize("rate", [1e-6, 0.02, 0.7, 1.0])
    @pytest.mark.parametrize("noise", [0.5, 2.0])
    def test_the_divergence_is_dp_accountings(self, noise, rate):
        """At every order, where that is not lost in rounding."""
        event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
        theirs = RdpAccountant(ORDERS).compose(event).rdp
        ours = [renyi_divergence(noise, rate, order) for order in ORDERS]
        assert ours == pytest.approx(list(theirs), rel=2e-9, abs=1e-12)

    @pytest.mark.parametrize(("rate", "order"), [(1.0, 2), (0.1, 2), (0.1, 7), (0.6, 15)])
    def test_noise_on_a_grid_has_the_same_divergence(self, rate, order):
        """Discrete Gaussian, deviation 3, contribution 2: sums over the integers, to the last of fifty digits."""
        with mpmath.workdps(50):
            weights = {x: mpmath.exp(-mpf(x * x) / 18) for x in range(-200, 201)}
            total = mpmath.fsum(weights.values())
            moment = mpmath.fsum(
                w / total * (1 - mpf(rate) + mpf(rate) * mpmath.exp(mpf(4 * x - 4) / 18)) ** order
                for x, w in weights.items()
            )
            exact = mpmath.log(moment) / (order - 1)
            assert exact <= renyi_divergence(1.5, rate, order) <= exact * (1 + mpf("2e-9"))

    @given(st.floats(0.5, 20), st.sampled_from([1.0, 0.1]), st.integers(1, 50), st.sampled_from([1e-9, 1e-4]))
    @settings(deadline=None, max_examples=6)
    def test_accountants_are_in_order(self, noise, rate, steps, delta):
        """Privacy loss is tightest, the best order beats a fixed one, and replacing costs no less than adding."""
        events = [sampled(noise=noise, rate=rate, steps=steps)]
        loss, renyi, replaced = (a.epsilon(events, delta=delta) for a in (PrivacyLoss(), Renyi(), ReplaceOne()))
        assert loss <= renyi * 1.001 + 1e-3
        assert renyi <= Gate().epsilon(events, delta=delta)
        assert loss <= replaced * 1.001 + 1e-6

    @given(st.floats(0.3, 20), st.integers(1, 50), st.floats(1e-16, 1e-7))
    @settings(deadline=None, max_examples=50)
    def test_the_room_for_inexact_noise_is_enough(self, noise, steps, distance):
        """Epsilon as it is told leaves distance (1 + e^epsilon) of delta."""
        told = Gate().epsilon([sampled(noise=noise, steps=steps, distance=distance)], delta=DELTA)
        left = DELTA - distance * (1 + math.exp(min(told, 700)))
        if told < math.inf:
            assert Gate().epsilon([sampled(noise=noise, steps=steps)], delta=left) <= told


class TestAgainstTheCoordinator:
    """Where the coordinator adds the noise, it has seen what is below."""

    @every_accountant
    def test_trusted_noise_is_none(self, accountant):
        """For a sampled and for a matrix release, beside those that trust nobody."""
        for trusted in (sampled(unit="client", trust="coordinator"), matrix(unit="client", trust="coordinator")):
            assert accountant.epsilon([sampled(), trusted], delta=DELTA) < math.inf
            assert accountant.epsilon(against_coordinator([sampled(), trusted]), delta=DELTA) == math.inf

    def test_what_trusts_nobody_stays_as_it_is(self):
        """Event by event."""
        events = [sampled(), matrix(), shared(), non_private()]
        assert against_coordinator(events) == events


class TestCalibration:
    """From a budget back to the noise that keeps it."""

    @given(
        st.floats(0.3, 50),
        st.sampled_from([1e-7, 1e-5, 1e-3]),
        st.sampled_from([1.0, 0.2, 0.01]),
        st.integers(1, 500),
        st.sampled_from([0.0, 1e-3]),
    )
    @settings(deadline=None, max_examples=40)
    def test_it_never_overspends_and_wastes_almost_nothing(self, epsilon, delta, rate, rounds, inexact):
        """At the gate itself; a thousandth less noise is too little."""
        distance = inexact * delta * math.exp(-epsilon)

        def release(noise):
            return [sampled(noise=noise, rate=rate, steps=rounds, distance=distance)]

        budget = Budget.opened(epsilon, delta)
        noise = calibrate_noise(budget, release)
        assert spent(release(noise), budget=budget) <= epsilon
        assert spent(release(noise * 0.999), budget=budget) > epsilon

    def test_a_budget_that_no_noise_keeps_is_refused(self):
        """At a fixed order even hardly any release costs log(1/delta)/(order - 1)."""
        with pytest.raises(PrivacyError) as caught:
            calibrate_noise(Budget(epsilon=1.0, delta=1e-5, order=2), lambda noise: [sampled(noise=noise)])
        assert "raise epsilon" in caught.value.hint

    @pytest.mark.parametrize(("rate", "steps"), [(1.0, 10), (0.01, 1000), (0.001, 20000)])
    def test_the_best_order_needs_the_least_noise(self, rate, steps):
        """Of all orders, within what calibration is exact to."""

        def release(noise):
            return [sampled(noise=noise, rate=rate, steps=steps)]

        def noise_at(order):
            try:
                return calibrate_noise(Budget(epsilon=3.0, delta=DELTA, order=order), release)
            except PrivacyError:
                return math.inf

        best = best_order(3.0, DELTA, release)
        assert noise_at(best) <= min(map(noise_at, ORDERS)) * 1.0002


class TestBudget:
    """A ceiling, and the order in which it is counted."""

    @pytest.mark.parametrize(
        ("epsilon", "delta", "order"),
        [(0.0, 1e-5, 8), (-1.0, 1e-5, 8), (math.inf, 1e-5, 8), (math.nan, 1e-5, 8), ("3", 1e-5, 8), (True, 1e-5, 8),
         (3.0, 0.0, 8), (3.0, 1.0, 8), (3.0, -0.1, 8), (3.0, math.nan, 8), (3.0, 1e-5, 1), (3.0, 1e-5, 2.5),
         (3.0, 1e-5, 65), (3.0, 1e-5, 2048), (3.0, 1e-5, None)],
    )  # fmt: skip
    def test_impossible_values_are_refused_with_a_hint(self, epsilon, delta, order):
        """Whoever opens it, from wherever it was read."""
        with pytest.raises(PrivacyError) as caught:
            Budget(epsilon=epsilon, delta=delta, order=order)
        assert caught.value.hint

    @pytest.mark.parametrize(("epsilon", "delta"), [(0.1, 1e-5), (1.0, 1e-6), (3.0, 1e-5), (10.0, 1e-9), (100.0, 1e-3)])
    def test_it_opens_with_the_order_that_leaves_most_room_for_gaussians(self, epsilon, delta):
        """From epsilon and delta alone: no other order needs less noise for one of them."""

        def noise_at(order):
            try:
                return calibrate_noise(
                    Budget(epsilon=epsilon, delta=delta, order=order), lambda noise: [sampled(noise=noise)]
                )
            except PrivacyError:
                return math.inf

        assert noise_at(Budget.opened(epsilon, delta).order) <= min(map(noise_at, ORDERS)) * 1.0002

    def test_a_given_order_is_kept(self):
        """The administrator may know the runs to come."""
        assert Budget.opened(3.0, 1e-5, 6) == Budget(epsilon=3.0, delta=1e-5, order=6)

    def test_an_epsilon_without_room_for_anything_is_refused(self):
        """Below what any order costs at once."""
        with pytest.raises(PrivacyError, match="no noise keeps"):
            Budget.opened(1e-4, 1e-9)
