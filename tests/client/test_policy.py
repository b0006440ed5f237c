"""The site's own rules: what it takes part in, decided by constants of a file that nobody else writes."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.policy import PERMISSIVE, Policy, load_policy
from common.errors import FailureCode, PeerError, PrivacyError, SiteError
from tests.client.conftest import PRIVATE, run

BY_CLIENT = ("privacy.unit=client", "privacy.target_epsilon=8")


def joins(policy: Policy, *overrides: str) -> bool:
    try:
        policy.check(run(*overrides))
    except PeerError as e:
        return e.failure is not FailureCode.POLICY_REFUSED
    return True


def limits(**fields) -> Policy:
    return Policy.model_validate({"limits": fields})


def test_by_default_a_site_joins_private_runs_only():
    """Protecting examples against everybody; nothing that trusts the coordinator, nothing without noise."""
    assert joins(Policy(), *PRIVATE)
    assert not joins(Policy())
    assert not joins(Policy(), *BY_CLIENT)


@pytest.mark.parametrize(
    ("fields", "overrides"),
    [
        ({"largest_delta": 1e-6}, ()),
        ({"largest_batch_size": 99}, ()),
        ({"largest_sampling_rate": 0.5}, ()),
        ({"largest_local_steps": 1}, ()),
        ({"largest_physical_batch": 255}, ()),
        ({"largest_rounds": 4}, ()),
        ({"units": []}, ()),
    ],
    ids=str,
)
def test_a_run_beyond_a_limit_is_refused(fields, overrides):
    """Each limit by itself."""
    assert not joins(limits(**fields), *PRIVATE, *overrides)


def test_a_run_at_the_limits_is_joined():
    """Limits are the largest values that are allowed."""
    exact = limits(largest_delta=1e-5, largest_batch_size=100, largest_sampling_rate=1.0, largest_local_steps=2)
    assert joins(exact, *PRIVATE)


def test_a_simulation_s_policy_joins_every_valid_run():
    """Who simulates owns the data."""
    assert joins(PERMISSIVE)
    assert joins(PERMISSIVE, *BY_CLIENT)
    assert joins(PERMISSIVE, *PRIVATE, "privacy.target_delta=0.01")


def test_a_file_says_it_all(tmp_path):
    """Budget and limits."""
    path = tmp_path / "policy.toml"
    path.write_text('[budget]\nepsilon = 4\ndelta = 1e-6\norder = 12\n[limits]\nunits = ["example", "client"]\n')
    policy = load_policy(path)
    budget = policy.opened_budget()
    assert (budget.epsilon, budget.delta, budget.order) == (4.0, 1e-6, 12)
    assert joins(policy, *BY_CLIENT)


def test_without_a_budget_nothing_private_is_trained():
    """There is no default ceiling."""
    with pytest.raises(PrivacyError, match="no budget"):
        Policy().opened_budget()


@pytest.mark.parametrize(
    "text",
    [
        "[budget]\nepsilon = 0\ndelta = 1e-6\n",
        "[budget]\nepsilon = inf\ndelta = 1e-6\n",
        "[budget]\nepsilon = 1\ndelta = 1\n",
        "[budget]\nepsilon = 1\ndelta = 0\n",
        "[budget]\nepsilon = 1\n",
        "[budget]\nepsilon = 1\ndelta = 1e-6\norder = 1\n",
        "[budget]\nepsilon = 1e-12\ndelta = 1e-9\n",
        "[limits]\nunits = ['row']\n",
        "[limits]\nlargest_delta = 2\n",
        "[limits]\nlargest_epsilon = 2\n",
        "epsilon = 1\n",
        "[budget",
    ],
)
def test_a_wrong_file_is_refused_as_a_whole(tmp_path, text):
    """Unknown keys, impossible values, no TOML: with a hint, and nothing is guessed."""
    path = tmp_path / "policy.toml"
    path.write_text(text)
    with pytest.raises(SiteError) as caught:
        load_policy(path)
    assert caught.value.hint


def test_a_missing_file_says_how_to_make_one(tmp_path):
    """By the command that writes an example."""
    with pytest.raises(SiteError) as caught:
        load_policy(tmp_path / "policy.toml")
    assert "policy init" in caught.value.hint


@given(st.binary(max_size=200))
def test_no_bytes_crash_the_reader(tmp_path_factory, data):
    """Whatever is in the file: a policy or an error of ours."""
    path = tmp_path_factory.getbasetemp() / "policy.toml"
    path.write_bytes(data)
    with suppress(SiteError):
        load_policy(path)
