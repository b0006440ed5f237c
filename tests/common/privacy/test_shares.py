"""Plans of runs in which the clients of a sum add the noise themselves."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from common.config import load_config
from common.config.participation import honest_in_sum
from common.errors import PrivacyError
from common.guarantee import UPDATE_REPLACED, against
from common.privacy import DistributedNoise, make_plan, noised_values, spent

SHARED = ("privacy.unit=client", "privacy.secure_aggregation=true", "rounds=20")
BOTH = pytest.mark.parametrize("noise", ["skellam", "discrete-gaussian"])


def run(*overrides):
    """Twenty rounds under secure aggregation."""
    return load_config(None, [*SHARED, *overrides]).config


def plan_of(*overrides, participations=20, dimensions=1000, clients=10, **more):
    return make_plan(run(*overrides), participations=participations, dimensions=dimensions, clients=clients, **more)


class TestWhatIsPromised:
    """Against whom, and compared with what."""

    def test_the_coordinator_is_not_trusted_and_records_nothing(self):
        """Each site writes the event; there is no release of the coordinator's."""
        plan = plan_of("privacy.noise_multiplier=4")
        assert (plan.trust, plan.relation, plan.central) == ("cohort", UPDATE_REPLACED, False)
        assert isinstance(plan.event(3), DistributedNoise)
        with pytest.raises(PrivacyError, match="adds no noise"):
            plan.central_event(1)

    def test_noise_of_the_coordinator_s_is_another_promise(self):
        """The same run without secure aggregation."""
        plan = plan_of("privacy.noise_multiplier=4", "privacy.secure_aggregation=false")
        assert (plan.trust, plan.relation, plan.central) == ("coordinator", "add/remove", True)
        assert (plan.shares, plan.distributed) == (None, None)

    @pytest.mark.parametrize(
        ("trust", "colluding", "words"),
        [
            ("nobody", None, "against everybody"),
            ("coordinator", None, "against everybody but the coordinator"),
            ("cohort", 2, "the coordinator too, while at most 2 of the clients"),
            ("cohort", 0, "while none of the clients"),
            ("cohort", None, "while no more than were assumed of the clients"),
        ],
    )
    def test_an_epsilon_is_shown_with_its_condition(self, trust, colluding, words):
        """It holds while few help whoever looks."""
        assert words in against(trust, colluding)


class TestWhoCounts:
    """Noise is made for the fewest honest clients of a sum, never for those that answer."""

    @pytest.mark.parametrize(
        ("overrides", "honest"),
        [
            ((), 2),
            (("secagg.honest=5",), 5),
            (("secagg.colluding=4",), 2),
            (("cohort.min_survivors=9",), 8),
            (("cohort.min_survivors=9", "secagg.colluding=3"), 6),
            (("cohort.min_survivors=2", "secagg.honest=4"), 4),
            (("secagg.group_size=5", "secagg.honest=3"), 3),
            (("secagg.group_size=5", "cohort.min_survivors=5"), 2),
        ],
        ids=str,
    )
    def test_the_fewest_honest_ones(self, overrides, honest):
        """Members refuse to open a smaller sum; what a whole round needs says nothing of a group's."""
        plan = plan_of("privacy.noise_multiplier=4", *overrides)
        assert plan.shares.honest == plan.event(1).shares == honest
        assert honest_in_sum(run("privacy.noise_multiplier=4", *overrides)) == honest

    def test_more_clients_add_noise_that_is_not_counted(self):
        """The sum of the fewest has what was calibrated, each of the others adds as much again."""
        few, many = (plan_of("privacy.target_epsilon=5", clients=n) for n in (3, 100))
        assert few.noise_multiplier == many.noise_multiplier
        assert few.event(1).noise_multiplier == pytest.approx(many.event(1).noise_multiplier, rel=1e-3)
        assert many.distributed.variance == 2 * many.distributed.share_variance

    @pytest.mark.parametrize(
        ("overrides", "clients", "most"),
        [
            ((), 10, 10),
            (("cohort.size=6",), 10, 6),
            (("secagg.group_size=3",), 10, 5),
            (("secagg.group_size=8",), 10, 10),
            (("secagg.group_size=3", "cohort.size=4"), 10, 4),
        ],
        ids=str,
    )
    def test_the_grid_leaves_room_for_the_largest_sum(self, overrides, clients, most):
        """Of a group: one less than twice its size, which is too few for two."""
        assert plan_of("privacy.noise_multiplier=4", *overrides, clients=clients).shares.clients == most

    @pytest.mark.parametrize(("overrides", "clients"), [((), 2), (("secagg.honest=10",), 10)], ids=str)
    def test_fewer_clients_than_a_sum_needs_are_refused(self, overrides, clients):
        """Before anybody is asked."""
        with pytest.raises(PrivacyError) as caught:
            plan_of("privacy.noise_multiplier=4", *overrides, clients=clients)
        assert "secagg.honest" in caught.value.hint

    def test_drawing_a_cohort_amplifies_nothing(self):
        """Its members are told of one another."""
        whole, part = (plan_of("privacy.noise_multiplier=4", f"cohort.size={size}") for size in (0, 3))
        assert part.sampling_rate == 1
        assert part.epsilon_after(20) == pytest.approx(whole.epsilon_after(20), rel=1e-3)


class TestWhatItCosts:
    """Events that are written are what is counted, and stay within the target."""

    @BOTH
    @given(
        st.floats(0.5, 10),
        st.integers(1, 20),
        st.sampled_from([1, 650, 10**6]),
        st.sampled_from([3, 50]),
        st.sampled_from([20, 24, 32]),
    )
    @settings(deadline=None, max_examples=15)
    def test_calibrated_noise_never_overspends(self, noise, target, rounds, dimensions, clients, bits):  # noqa: PLR0917
        """At each client's own ledger, and one round more would."""
        plan = plan_of(
            f"privacy.target_epsilon={target}",
            f"secagg.bits={bits}",
            f"secagg.noise={noise}",
            participations=rounds,
            dimensions=dimensions,
            clients=clients,
        )
        events = [plan.event(r) for r in range(1, rounds + 1)]
        assert spent(events, budget=plan.budget, unit="client") <= target
        assert plan.epsilon_after(rounds) == pytest.approx(spent(events, budget=plan.budget, unit="client"), rel=1e-12)
        assert plan.epsilon_after(rounds) <= plan.epsilon_after(rounds + 1)
        assert spent(events, budget=plan.site_budget) <= plan.site_budget.epsilon

    @BOTH
    def test_more_rounds_never_lower_epsilon(self, noise):
        """From none on."""
        plan = plan_of("privacy.noise_multiplier=3", f"secagg.noise={noise}")
        costs = [plan.epsilon_after(rounds) for rounds in range(21)]
        assert costs[0] == 0
        assert costs == sorted(costs)

    @BOTH
    @pytest.mark.parametrize("bits", [16, 20, 32])
    def test_event_and_codec_are_of_one_mechanism(self, noise, bits):
        """What is written is what each client does to its update."""
        plan = plan_of("privacy.noise_multiplier=4", f"secagg.bits={bits}", f"secagg.noise={noise}")
        event, shared = plan.event(2), plan.distributed
        assert (event.mechanism, event.granularity, event.l2_squared) == (noise, shared.granularity, shared.l2_squared)
        assert (event.variance, event.shares) == (shared.variance, shared.honest)
        assert (event.l1, event.dimensions, event.distance) == (shared.l1, shared.draws, shared.distance)
        assert (event.run, event.server_round, event.steps) == (plan.run, 2, 1)
        assert event.noise_multiplier >= plan.noise_multiplier
        assert replace(plan.event(7), server_round=2) == event
        event.check()

    def test_sensitivity_and_noise_are_those_of_the_rounded_sum(self):
        """In the update's own units; a coarser ring rounds more and needs more noise."""
        fine, coarse = (plan_of("privacy.noise_multiplier=4", f"secagg.bits={bits}") for bits in (32, 16))
        assert 1 < fine.sensitivity < coarse.sensitivity
        for plan in (fine, coarse):
            assert plan.noise_stddev / plan.sensitivity == pytest.approx(4, rel=1e-3)

    def test_given_noise_is_taken_and_its_cost_is_the_budget(self):
        """Noise instead of a target."""
        plan = plan_of("privacy.noise_multiplier=4")
        assert plan.epsilon_after(20) <= plan.budget.epsilon <= plan.epsilon_after(20) * (1 + 1e-6)

    def test_a_ring_too_small_for_the_noise_is_refused(self):
        """Rounding alone would take it all."""
        with pytest.raises(PrivacyError) as caught:
            plan_of("privacy.noise_multiplier=5", "secagg.bits=16", dimensions=10**7)
        assert "secagg.bits" in caught.value.hint

    def test_it_costs_about_what_the_coordinator_s_noise_would(self):
        """Nobody has to be trusted, and the fewest honest clients have as much noise together."""
        central = plan_of("privacy.target_epsilon=5", "privacy.secure_aggregation=false")
        assert plan_of("privacy.target_epsilon=5").noise_multiplier == pytest.approx(central.noise_multiplier, rel=1e-3)


class TestFromOutside:
    """A site counts again what a message says of the plan."""

    def test_a_site_makes_the_same_plan_and_codec(self):
        """From what the coordinator sends."""
        plan = plan_of("privacy.target_epsilon=3")
        again = plan_of("privacy.target_epsilon=3", noise_multiplier=plan.noise_multiplier, order=plan.budget.order)
        assert again == plan
        assert again.distributed.digest == plan.distributed.digest

    @pytest.mark.parametrize("factor", [0.1, 0.99, 0.0, -1.0, math.nan])
    def test_noise_that_does_not_keep_the_target_is_refused(self, factor):
        """No message can weaken what the configuration promises."""
        plan = plan_of("privacy.target_epsilon=3")
        with pytest.raises(PrivacyError):
            plan_of(
                "privacy.target_epsilon=3", noise_multiplier=plan.noise_multiplier * factor, order=plan.budget.order
            )

    @given(st.integers(3, 10**6), st.integers(1, 10**7))
    @settings(deadline=None, max_examples=30)
    def test_other_clients_or_values_change_the_grid_and_not_the_promise(self, clients, dimensions):
        """Whatever a message says there are."""
        plan = plan_of("privacy.target_epsilon=3")
        try:
            other = plan_of(
                "privacy.target_epsilon=3",
                noise_multiplier=plan.noise_multiplier,
                order=plan.budget.order,
                clients=clients,
                dimensions=dimensions,
            )
        except PrivacyError:
            return
        assert spent([other.event(r) for r in range(1, 21)], budget=other.budget, unit="client") <= 3


def test_all_values_of_a_model_are_in_a_masked_sum():
    """Running means, too, which only the coordinator's noise passes by."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model[0].bias.requires_grad_(False)
    assert noised_values(model, run("privacy.noise_multiplier=4")) == 12 + 4 + 4 + 4 + 4 + 4 + 1
    assert noised_values(model, run("privacy.noise_multiplier=4", "privacy.secure_aggregation=false")) == 12 + 4 + 4
