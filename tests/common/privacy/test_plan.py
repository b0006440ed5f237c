"""One plan from which sampler, clipper, noise and ledger take their parameters."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import load_config
from common.errors import PrivacyError
from common.privacy import make_plan, spent
from common.privacy.accounting.accountant import ORDERS, Budget
from common.privacy.bookkeeping import SUMMATION_ERROR
from common.privacy.noise import GRID_STDDEV

EXAMPLE = ("privacy.unit=example", "training.local_steps=2", "rounds=20", "privacy.sampling_rate=1.0")
CLIENT = ("privacy.unit=client", "rounds=20")


def private(*overrides, base=EXAMPLE):
    """A private run of 20 rounds."""
    return load_config(None, [*base, *overrides]).config


def plan_of(*overrides, base=EXAMPLE, participations=20, dimensions=1000, **more):
    return make_plan(private(*overrides, base=base), participations=participations, dimensions=dimensions, **more)


def test_the_relation_between_neighbours_is_named():
    """An epsilon without it means nothing."""
    assert plan_of("privacy.noise_multiplier=4").relation == "add/remove"


@given(st.floats(0.2, 20), st.integers(1, 20), st.sampled_from([1, 1000, 10**6]))
@settings(deadline=None, max_examples=25)
def test_with_a_target_no_client_spends_more(target, participations, dimensions):
    """After as many rounds as anybody can take part in; and one round more would be too much."""
    plan = plan_of(f"privacy.target_epsilon={target}", participations=participations, dimensions=dimensions)
    assert plan.epsilon_after(participations) <= target
    assert plan.epsilon_after(participations + 1) > plan.epsilon_after(participations)
    assert (plan.budget.epsilon, plan.budget.delta) == (target, 1e-5)


def test_given_noise_is_taken_and_its_cost_is_the_budget():
    """Noise instead of a target."""
    plan = plan_of("privacy.noise_multiplier=4")
    assert plan.noise_multiplier == 4
    assert plan.epsilon_after(20) <= plan.budget.epsilon <= plan.epsilon_after(20) * (1 + 1e-6)
    others = [replace(plan, budget=replace(plan.budget, order=order)).epsilon_after(20) for order in ORDERS]
    assert plan.epsilon_after(20) == min(others)


def test_the_plan_takes_everything_from_the_configuration():
    """Sampler, clipper, noise and ledger cannot disagree."""
    overrides = ("privacy.noise_multiplier=4", "privacy.max_grad_norm=0.5", "privacy.expected_batch_size=9")
    plan, event = plan_of(*overrides), plan_of(*overrides).event(2)
    assert (plan.clipping_norm, plan.denominator, plan.local_steps) == (0.5, 9, 2)
    assert (event.clipping_norm, event.sampling_rate, event.steps) == (0.5, 1.0, 2)
    assert (event.run, event.server_round) == (private(*overrides).digest(), 2)
    assert event.noise_stddev == plan.noise_stddev
    assert event.noise_multiplier == pytest.approx(4, rel=1e-9)
    assert plan.clipper().norm == 0.5


@given(st.floats(1.0, 50), st.sampled_from([1, 34_826, 11_000_000]), st.floats(1e-3, 1e3))
@settings(deadline=None, max_examples=50)
def test_the_ledger_counts_what_rounding_to_the_grid_adds(noise, dimensions, norm):
    """Sensitivity is C + grid * sqrt(d) and what summing may add; the noise grows with it, so the multiplier stays."""
    plan = plan_of(f"privacy.noise_multiplier={noise}", f"privacy.max_grad_norm={norm}", dimensions=dimensions)
    event = plan.event(1)
    grid = event.noise_stddev / GRID_STDDEV
    assert event.sensitivity >= norm * (1 + SUMMATION_ERROR) + grid * math.sqrt(dimensions) * (1 - 1e-12)
    assert event.noise_multiplier >= noise * (1 - 1e-15)
    assert event.noise_stddev == pytest.approx(noise * event.sensitivity, rel=1e-9)
    assert 0 < event.distance < 1e-20


def test_what_a_run_costs_is_the_cost_of_its_events():
    """The number that is shown is the replay of a ledger."""
    plan = plan_of("privacy.noise_multiplier=4")
    for rounds in (0, 1, 7):
        events = [plan.event(r) for r in range(1, rounds + 1)]
        assert plan.epsilon_after(rounds) == pytest.approx(spent(events, budget=plan.budget), rel=1e-12)


class TestFromOutside:
    """What a message says of the plan is counted again by whoever gets it."""

    def test_noise_that_was_calibrated_before_is_taken(self):
        """By whoever started the run: every client then uses the same."""
        plan = plan_of("privacy.target_epsilon=3")
        again = plan_of("privacy.target_epsilon=3", noise_multiplier=plan.noise_multiplier, order=plan.budget.order)
        assert again == plan

    @pytest.mark.parametrize("factor", [0.1, 0.9, 0.0, -1.0, float("nan")])
    def test_noise_that_does_not_keep_the_target_is_refused(self, factor):
        """No message can weaken what the configuration promises."""
        plan = plan_of("privacy.target_epsilon=3")
        with pytest.raises(PrivacyError):
            plan_of(
                "privacy.target_epsilon=3", noise_multiplier=plan.noise_multiplier * factor, order=plan.budget.order
            )

    @pytest.mark.parametrize("order", [1, 0, -3, 10_000])
    def test_an_order_that_nobody_counts_with_is_refused(self, order):
        """The accounting knows a fixed set of orders."""
        with pytest.raises(PrivacyError):
            plan_of("privacy.target_epsilon=3", noise_multiplier=1e5, order=order)

    @pytest.mark.parametrize("noise", [0.001, 3.999, 0.0])
    def test_noise_cannot_replace_the_configuration_s_own(self, noise):
        """The digest names one amount of noise, and that is what is used."""
        with pytest.raises(PrivacyError):
            plan_of("privacy.noise_multiplier=4", participations=1, noise_multiplier=noise)

    @pytest.mark.parametrize("participations", [0, -1, 21, 2**62])
    def test_more_participations_than_rounds_are_refused(self, participations):
        """They would raise the budget of a run whose noise is given."""
        with pytest.raises(PrivacyError):
            plan_of("privacy.noise_multiplier=4", participations=participations)

    def test_a_run_without_privacy_has_no_plan(self):
        """It cannot be taken for a private one."""
        with pytest.raises(PrivacyError):
            make_plan(load_config(None).config, participations=1, dimensions=1)


class TestAdaptiveClipping:
    """Sum and count share the noise that was calibrated."""

    @given(st.floats(1.0, 20), st.integers(1, 2000))
    @settings(deadline=None, max_examples=40)
    def test_sum_and_count_together_cost_what_was_calibrated(self, noise, batch):
        """Andrew et al. 2021, theorem 1; and the sum's own noise grows by 4 % at most."""
        given_noise = (f"privacy.noise_multiplier={noise}", f"privacy.expected_batch_size={batch}")
        plan, flat = plan_of("privacy.clipping=adaptive", *given_noise), plan_of(*given_noise)
        assert plan.event(1).noise_multiplier == pytest.approx(noise, rel=1e-9)
        assert flat.noise_stddev <= plan.noise_stddev <= 1.04 * flat.noise_stddev

    def test_one_half_lies_on_the_grid_of_the_count_s_noise(self):
        """The count's sensitivity is exactly 1/2 after rounding, too."""
        for batch in (1, 32, 999):
            plan = plan_of(
                "privacy.clipping=adaptive", "privacy.noise_multiplier=1", f"privacy.expected_batch_size={batch}"
            )
            steps = 0.5 / (plan.count_noise_stddev / GRID_STDDEV)
            assert steps == pytest.approx(round(steps), rel=1e-12)


class TestClients:
    """Unit client: the coordinator adds the noise, and each side has a ledger of its own."""

    def test_sampling_counts_only_where_cohorts_are_drawn_at_random(self):
        """A cohort that the configuration's seed draws is known to everybody who has the configuration."""
        noise, cohort = "privacy.noise_multiplier=1", "cohort.size=10"
        fixed = plan_of(noise, cohort, base=CLIENT, clients=100)
        secret = plan_of(noise, cohort, "cohort.sampling=poisson", base=CLIENT, clients=100)
        assert (fixed.sampling_rate, secret.sampling_rate) == (1.0, 0.1)
        assert secret.epsilon_after(20) < fixed.epsilon_after(20) / 2
        assert (fixed.denominator, secret.denominator) == (10, 10)

    @pytest.mark.parametrize("mechanism", ["independent", "matrix"])
    @given(target=st.floats(1, 20))
    @settings(deadline=None, max_examples=10)
    def test_the_coordinator_s_events_keep_the_target(self, mechanism, target):
        """All rounds together cost what one does where cohorts are fixed."""
        plan = plan_of(f"privacy.target_epsilon={target}", f"privacy.mechanism={mechanism}", base=CLIENT, clients=50)
        events = [plan.central_event(r) for r in range(1, plan.rounds + 1)]
        assert spent(events, budget=plan.budget, unit="client") <= target

    def test_poisson_cohorts_are_recorded_round_by_round(self):
        """As many events as rounds, together within the target."""
        plan = plan_of(
            "privacy.target_epsilon=5", "cohort.size=10", "cohort.sampling=poisson", base=CLIENT, clients=100
        )
        events = [plan.central_event(r) for r in range(1, plan.rounds + 1)]
        assert len(events) == 20
        assert spent(events, budget=plan.budget, unit="client") <= 5

    def test_examples_at_a_site_cost_more_than_clients(self):
        """An update can move by twice the norm when one example changes; and against the coordinator nothing holds."""
        plan = plan_of("privacy.target_epsilon=5", base=CLIENT, clients=50)
        events = [plan.event(r) for r in range(1, 21)]
        assert all(event.trust == "coordinator" for event in events)
        assert spent(events, budget=plan.budget) > 5
        assert spent(events, budget=plan.site_budget) <= plan.site_budget.epsilon

    def test_a_run_that_asks_each_client_less_often_costs_it_less(self):
        """Fixed groups in turn: participations count, not rounds."""
        often = plan_of("privacy.noise_multiplier=2", base=CLIENT, clients=50)
        rarely = plan_of("privacy.noise_multiplier=2", base=CLIENT, clients=50, participations=2)
        assert rarely.budget.epsilon < often.budget.epsilon

    def test_correlated_noise_covers_the_run_in_one_event(self):
        """A site records it once, however often it takes part."""
        cyclic = ("privacy.mechanism=matrix", "cohort.size=10", "cohort.sampling=cyclic")
        plan = plan_of(
            "privacy.noise_multiplier=2", *cyclic, base=CLIENT, clients=50, participations=4, min_separation=5
        )
        assert len(plan.coefficients) > 1
        assert plan.event(1).noise_multiplier == pytest.approx(2, rel=1e-9)


def test_a_budget_s_order_is_the_one_that_noise_was_calibrated_with():
    """Calibrating with one accountant and gating with another stops a run early."""
    plan = plan_of("privacy.target_epsilon=3")
    assert plan.budget == Budget(epsilon=3.0, delta=1e-5, order=plan.budget.order)
    assert spent([plan.event(r) for r in range(1, 21)], budget=plan.budget) <= 3


@pytest.mark.parametrize("noise", [1e-3, 0.1])
def test_noise_that_protects_nobody_is_refused(noise):
    """An epsilon that cannot be told from infinity is no plan."""
    with pytest.raises(PrivacyError, match="protects nobody"):
        plan_of(f"privacy.noise_multiplier={noise}")


def test_a_model_too_large_for_the_grid_is_refused():
    """Rounding alone would need all the noise."""
    with pytest.raises(PrivacyError, match="grid"):
        plan_of("privacy.noise_multiplier=100", dimensions=10**9)
