"""One plan from which sampler, clipper, noise and ledger take their parameters."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import load_config
from common.errors import PrivacyError
from common.privacy import RELATION, make_plan, spent_epsilon


def private(*overrides):
    """A private run of 20 rounds with two steps each."""
    base = ("privacy.unit=example", "training.local_steps=2", "rounds=20", "privacy.sampling_rate=1.0")
    return load_config(None, [*base, *overrides]).config


def test_the_relation_between_neighbours_is_named():
    """An epsilon without it means nothing."""
    assert RELATION == "add/remove"


@given(st.floats(0.2, 20), st.integers(1, 20))
@settings(deadline=None, max_examples=25)
def test_with_a_target_no_client_spends_more(target, participations):
    """After as many rounds as anybody can take part in; and one round more would be too much."""
    plan = make_plan(private(f"privacy.target_epsilon={target}"), participations=participations)
    assert plan.epsilon_after(participations) <= target
    assert plan.epsilon_after(participations + 1) > plan.epsilon_after(participations)
    assert plan.budget == (target, 1e-5)


def test_given_noise_is_taken_and_its_cost_is_the_budget():
    """Noise instead of a target."""
    plan = make_plan(private("privacy.noise_multiplier=4"), participations=20)
    assert plan.noise_multiplier == 4
    assert plan.budget == (plan.epsilon_after(20), 1e-5)


def test_the_plan_takes_everything_from_the_configuration():
    """Sampler, clipper, noise and ledger cannot disagree."""
    config = private("privacy.noise_multiplier=4", "privacy.max_grad_norm=0.5", "privacy.expected_batch_size=9")
    plan = make_plan(config, participations=3)
    event = plan.event(2)
    assert (plan.max_grad_norm, plan.expected_batch_size, plan.local_steps) == (0.5, 9, 2)
    assert (event.noise_multiplier, event.sampling_rate, event.steps) == (4, 1.0, 2)
    assert (event.run, event.server_round) == (config.digest(), 2)


def test_what_a_run_costs_is_the_cost_of_its_events():
    """The number that is shown is the replay of a ledger."""
    plan = make_plan(private("privacy.noise_multiplier=4"), participations=20)
    for rounds in (0, 1, 7):
        events = [plan.event(r) for r in range(1, rounds + 1)]
        assert plan.epsilon_after(rounds) == spent_epsilon(events, delta=1e-5)


def test_noise_that_was_calibrated_before_is_taken():
    """By whoever started the run: every client then uses the same."""
    config = private("privacy.target_epsilon=3")
    plan = make_plan(config, participations=20)
    assert make_plan(config, participations=20, noise_multiplier=plan.noise_multiplier) == plan


@pytest.mark.parametrize("factor", [0.1, 0.9, 0.0, -1.0, float("nan")])
def test_noise_from_outside_that_does_not_keep_the_target_is_refused(factor):
    """No message can weaken what the configuration promises."""
    config = private("privacy.target_epsilon=3")
    noise = make_plan(config, participations=20).noise_multiplier
    with pytest.raises(PrivacyError):
        make_plan(config, participations=20, noise_multiplier=noise * factor)


@pytest.mark.parametrize("noise", [0.001, 3.999, 0.0])
def test_noise_from_outside_cannot_replace_the_configuration_s_own(noise):
    """The digest names one amount of noise, and that is what is used."""
    with pytest.raises(PrivacyError):
        make_plan(private("privacy.noise_multiplier=4"), participations=1, noise_multiplier=noise)


@pytest.mark.parametrize("participations", [0, -1, 21, 2**62])
def test_more_participations_than_rounds_are_refused(participations):
    """They would raise the budget of a run whose noise is given."""
    with pytest.raises(PrivacyError):
        make_plan(private("privacy.noise_multiplier=4"), participations=participations)


def test_a_run_without_privacy_has_no_plan():
    """It cannot be taken for a private one."""
    with pytest.raises(PrivacyError):
        make_plan(load_config(None).config, participations=1)
