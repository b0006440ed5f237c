"""The site's own rules: what it takes part in, decided by constants of a file that nobody else writes."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.policy import PERMISSIVE, Policy, load_policy, released_metrics
from common.errors import FailureCode, PeerError, PrivacyError, SiteError
from tests.client.conftest import PRIVATE, plan_of, run

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
        ({"largest_sequence_length": 79}, ()),
        ({"units": []}, ()),
    ],
    ids=str,
)
def test_a_run_beyond_a_limit_is_refused(fields, overrides):
    """Each limit by itself."""
    assert not joins(limits(**fields), *PRIVATE, *overrides)


@pytest.mark.parametrize(
    ("tables", "overrides"),
    [
        ({"allow": {"models": ["lstm"]}}, ()),
        ({"allow": {"compression": ["none"]}}, ("transport.compression=top-k",)),
        ({"privacy": {"require_secure_aggregation": True}}, ()),
    ],
    ids=str,
)
def test_a_run_outside_of_what_is_allowed_is_refused(tables, overrides):
    """Models, ways of compression, sums that nobody looks behind."""
    assert not joins(Policy.model_validate(tables), *PRIVATE, *overrides)
    assert joins(Policy(), *PRIVATE, *overrides)


SUMS = ("privacy.secure_aggregation=true",)


class TestSums:
    """A site's own rules about secure aggregation, and a coordinator's weaker ones."""

    @staticmethod
    def joins(table: dict, *overrides: str) -> bool:
        return joins(Policy.model_validate({"secure_aggregation": table}), *PRIVATE, *SUMS, *overrides)

    def test_a_site_can_join_no_other_runs(self):
        """Nothing of its own then leaves but in a sum."""
        policy = Policy.model_validate({"privacy": {"require_secure_aggregation": True}})
        assert joins(policy, *PRIVATE, *SUMS)
        assert not joins(policy, *PRIVATE)

    def test_by_default_three_are_in_a_sum_and_one_of_them_colludes(self):
        """As by default in a run."""
        assert self.joins({})
        assert not self.joins({}, "secagg.colluding=0")
        assert not self.joins({}, "secagg.colluding=0", "secagg.honest=3")

    @pytest.mark.parametrize(
        ("table", "overrides", "mended"),
        [
            ({"smallest_cohort": 4}, (), ("secagg.honest=3",)),
            ({"smallest_cohort": 4}, ("secagg.honest=2",), ("cohort.min_survivors=4",)),
            ({"colluding": 2}, (), ("secagg.colluding=2",)),
            ({"largest_clipping_norm": 8.0}, (), ("secagg.clipping_norm=8",)),
            ({"least_bits": 24}, ("secagg.bits=20",), ("secagg.bits=24",)),
        ],
        ids=str,
    )
    def test_a_run_that_protects_less_is_refused(self, table, overrides, mended):
        """Each rule by itself; what mends it is enough."""
        weak = ("secagg.bits=32", *overrides)
        assert not self.joins(table, *weak)
        assert self.joins(table, *weak, *mended)

    def test_many_survivors_of_a_round_are_few_in_a_group(self):
        """With groups, the fewest of a round say nothing about a sum."""
        groups = ("secagg.group_size=6", "cohort.min_survivors=6")
        assert not self.joins({"smallest_cohort": 6}, *groups)
        assert self.joins({"smallest_cohort": 6}, *groups, "secagg.honest=5")

    def test_noise_of_the_clients_is_bounded_by_its_own_norm(self):
        """Privacy unit client: the run's clipping norm counts."""
        distributed = ("privacy.unit=client", "privacy.target_epsilon=8", "privacy.clipping_norm=2", *SUMS)
        table = {"limits": {"units": ["client"]}, "secure_aggregation": {"largest_clipping_norm": 2.0}}
        assert joins(Policy.model_validate(table), *distributed)
        table["secure_aggregation"]["largest_clipping_norm"] = 1.9
        assert not joins(Policy.model_validate(table), *distributed)

    def test_a_run_without_sums_is_not_measured_by_them(self):
        """These rules are for runs that have them."""
        assert joins(Policy.model_validate({"secure_aggregation": {"colluding": 5}}), *PRIVATE)

    @pytest.mark.parametrize("table", [{"smallest_cohort": 1}, {"colluding": -1}, {"least_bits": 8}, {"pins": True}])
    def test_what_is_no_rule_is_refused(self, tmp_path, table):
        """A sum of one is no sum."""
        text = "[secure_aggregation]\n" + "".join(f"{key} = {str(value).lower()}\n" for key, value in table.items())
        (tmp_path / "policy.toml").write_text(text)
        with pytest.raises(SiteError, match="secure_aggregation"):
            load_policy(tmp_path / "policy.toml")

    def test_simulations_join_whatever_is_valid(self):
        """Who simulates owns the data."""
        weakest = ("secagg.colluding=0", "secagg.bits=16", "secagg.clipping_norm=1000000")
        assert joins(PERMISSIVE, *PRIVATE, *SUMS, *weakest)


def test_listed_models_are_joined():
    """By their registered names."""
    assert joins(Policy.model_validate({"allow": {"models": ["linear"]}}), *PRIVATE)


class TestPlan:
    """What is known once the noise was calibrated."""

    @staticmethod
    def kept(overrides=(), **wanted) -> bool:
        policy = Policy.model_validate({"privacy": wanted})
        try:
            policy.check_plan(plan_of(run(*PRIVATE, *overrides)))
        except PeerError as e:
            return e.failure is not FailureCode.POLICY_REFUSED
        return True

    def test_less_noise_than_the_site_wants_is_refused(self):
        """Whether it was given or calibrated."""
        noise = plan_of(run(*PRIVATE)).noise_multiplier
        assert self.kept(least_noise_multiplier=noise)
        assert not self.kept(least_noise_multiplier=noise * 1.01)

    def test_more_epsilon_than_the_site_wants_is_refused(self):
        """Also where the run names its noise instead."""
        given = ("privacy.target_epsilon=", "privacy.noise_multiplier=1.0")
        assert self.kept(largest_epsilon=8.0)
        assert not self.kept(largest_epsilon=7.9)
        assert not self.kept(given, largest_epsilon=1.0)

    def test_by_default_the_budget_alone_decides(self):
        """A run of any epsilon that fits it."""
        assert self.kept(("privacy.target_epsilon=1000",))


@pytest.mark.parametrize(
    ("overrides", "metrics"),
    [
        ((), ("train_loss", "num-examples")),
        (("strategy.weighting=equal",), ("train_loss",)),
        (PRIVATE, ()),
        (BY_CLIENT, ()),
        ((*BY_CLIENT, "privacy.clipping=adaptive"), ("within",)),
    ],
    ids=str,
)
def test_what_a_run_s_replies_tell_follows_from_its_configuration(overrides, metrics):
    """So that a site can decide before anything is trained."""
    assert released_metrics(run(*overrides)) == metrics


def test_by_default_no_count_leaves():
    """A site that joins runs without privacy has to list it."""
    policy = limits(units=["none"])
    assert not joins(policy)
    assert joins(policy, "strategy.weighting=equal")


@pytest.mark.parametrize(("epochs", "joined"), [(1000, True), (1001, False)])
def test_passes_over_the_data_are_limited(epochs, joined):
    """By default to a thousand, where they decide how long a round takes."""
    policy, plain = limits(units=["none"]), ("strategy.weighting=equal", f"training.local_epochs={epochs}")
    assert joins(policy, *plain) is joined
    assert joins(policy, *plain, "training.local_steps=1"), "they are not used then"


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
        "[limits]\nhours = '20:00'\n",
        "[limits]\nhours = '20:00-20:00'\n",
        "[limits]\nhours = '25:00-06:00'\n",
        "[limits]\nhours = 'noon-night'\n",
        "[limits]\nsmallest_cohort = 0\n",
        "[coordinator]\nkey = 'abc'\n",
        "[operators]\nallowed = ['../alice']\n",
        "[allow]\nmetrics = ['accuracy']\n",
        "[allow]\ndata = ['python:evil.py:load']\n",
        "[privacy]\nlargest_epsilon = inf\n",
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
