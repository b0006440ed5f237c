"""What a site asks of every request beside its run's configuration, and what it lets out."""

import json
from dataclasses import replace
from datetime import UTC, datetime, time, timedelta

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from client.admission import Admission, admission_mod
from client.policy import PERMISSIVE, Policy
from client.policy_tables import Limits
from common.crypto import PartyKeys, authorize
from common.errors import FailureCode, PeerError
from common.flower import (
    ARRAYS,
    CONFIG,
    MASKED,
    METRICS,
    ROUND_STEP,
    SECAGG,
    SECAGG_TYPE,
    SETUP_STEP,
    client_context,
    prepare_process,
    stamp,
    to_record,
)
from common.privacy import make_plan
from common.site import Site
from tests.helpers.agents import PRIVATE, configuration

FEDERATION, RUN = "study", "ab" * 16
ALICE = PartyKeys.generate("alice", "operator")
BUDGET = {"epsilon": 5.0, "delta": 1e-6}


def admission(now=None, **tables) -> Admission:
    """A site's own rules; without any, whatever is signed is admitted."""
    rules = PERMISSIVE.model_dump() | {"budget": BUDGET}
    rules["allow"]["data"] = ["heart"]
    for table, values in tables.items():
        rules[table] = values if values is None else {**(rules[table] or {}), **values}
    moment = now or datetime.now(UTC)
    return Admission(
        name="north",
        federation=FEDERATION,
        operators={"alice": ALICE.record},
        policy=Policy.model_validate(rules),
        site=Site(),
        now=lambda: moment,
    )


def request(*overrides, kind="train", **changes) -> Message:
    """What a coordinator asks; `changes` replace fields, or (None) remove them."""
    prepare_process()
    config = configuration(*overrides)
    record = {
        "run": config.canonical_json(),
        "server-round": 1,
        "run-id": RUN,
        "authorization": authorize(ALICE, federation=FEDERATION, run_id=RUN, config_digest=config.digest()),
        "cohort": json.dumps(["north", "south"]),
    }
    record |= {name.replace("_", "-"): value for name, value in changes.items()}
    content = RecordDict(
        {ARRAYS: to_record({}), CONFIG: ConfigRecord({k: v for k, v in record.items() if v is not None})}
    )
    return stamp(Message(content, 2, kind), message_id="m")


def admitted(rules: Admission, message: Message) -> bool:
    try:
        rules.check(message)
    except PeerError as e:
        if e.failure is not FailureCode.POLICY_REFUSED:
            raise
        return False
    return True


def test_a_request_that_an_operator_signed_is_admitted():
    """Nothing else is needed beside the rules of the policy."""
    assert admitted(admission(), request())
    assert admitted(admission(), request(kind="query", cohort=None))


class TestWhen:
    """A run is as old as its signature, by the site's own clock."""

    def test_a_run_is_worked_on_for_so_many_hours(self):
        """And not longer."""
        message, now = request(), datetime.now(UTC)
        assert admitted(admission(now + timedelta(hours=23), limits={"longest_run_hours": 24.0}), message)
        assert not admitted(admission(now + timedelta(hours=25), limits={"longest_run_hours": 24.0}), message)

    def test_clocks_may_differ_by_an_hour(self):
        """A run that is signed further ahead would be worked on for longer than the site allows."""
        now = datetime.now(UTC)
        assert admitted(admission(now - timedelta(minutes=55)), request())
        assert not admitted(admission(now - timedelta(minutes=65)), request())

    @pytest.mark.parametrize(
        ("hours", "hour", "opened"),
        [
            ("20:00-06:00", 23, True), ("20:00-06:00", 3, True), ("20:00-06:00", 6, False), ("20:00-06:00", 12, False),
            ("08:00-17:30", 8, True), ("08:00-17:30", 17, True), ("08:00-17:30", 18, False), ("", 12, True),
        ],
    )  # fmt: skip
    def test_the_span_is_in_local_time_and_may_go_over_midnight(self, hours, hour, opened):
        """Its end is not in it."""
        assert Limits(hours=hours).open_at(time(hour)) is opened

    def test_rounds_start_within_the_hours(self):
        """By the clock on the site's wall."""
        now, hour = datetime.now().astimezone(), timedelta(hours=1)
        for begin, end, opened in ((now - hour, now + hour, True), (now + hour, now + 2 * hour, False)):
            rules = admission(now, limits={"hours": f"{begin:%H:%M}-{end:%H:%M}"})
            assert admitted(rules, request()) is opened


class TestWithWhom:
    """A round of one hides nothing."""

    @pytest.mark.parametrize(
        ("buffer_size", "fewest", "welcome"), [(1, 1, False), (2, 2, False), (3, 3, True), (3, 2, False), (0, 1, True)]
    )
    def test_the_smallest_cohort_bounds_the_updates_of_a_step(self, buffer_size, fewest, welcome):
        """However many are at work: a step of an asynchronous run is made of so many updates as its buffer holds, and
        of no fewer than `cohort.min_survivors` where others fail on purpose.
        """
        rules = admission(limits={"smallest_cohort": 3})
        cohort = json.dumps(["east", "north", "south", "west"])
        settings = f"asynchronous.buffer_size={buffer_size}", f"cohort.min_survivors={fewest}"
        message = request(*settings, cohort=cohort)
        assert admitted(rules, message) is welcome

    def test_the_smallest_cohort_counts_different_names(self):
        """This site among them."""
        rules = admission(limits={"smallest_cohort": 3})
        assert admitted(rules, request(cohort='["east","north","south"]'))
        for cohort in ('["north","south"]', '["north","south","south"]', '["east","south","west"]', None):
            assert not admitted(rules, request(cohort=cohort))

    @pytest.mark.parametrize("cohort", ["", "[", "1", '"north"', '{"north":1}', '["north",1]', "[" * 100_000])
    def test_what_is_no_list_of_names_is_refused(self, cohort):
        """Whatever it is."""
        assert not admitted(admission(), request(cohort=cohort))

    def test_where_the_cohort_is_secret_the_number_that_noise_was_made_for_counts(self):
        """Privacy unit client: it divides the sum that the coordinator releases."""
        overrides = ("privacy.unit=client", "privacy.target_epsilon=8", "cohort.size=2", "cohort.sampling=poisson")
        config = configuration(*overrides)
        plan = make_plan(config, dimensions=1, participations=config.rounds, min_separation=1, clients=20)
        fields = {"noise_multiplier": plan.noise_multiplier, "renyi_order": plan.budget.order, "clients": plan.clients}
        fields |= {"participations": plan.participations, "min_separation": 1, "clipping_norm": plan.clipping_norm}
        message = request(*overrides, cohort=None, **fields)
        assert admitted(admission(limits={"smallest_cohort": 2}), message)
        assert not admitted(admission(limits={"smallest_cohort": 3}), message)


class TestWhat:
    """The data sets of site.toml, and those that the policy lists."""

    def test_built_in_data_has_to_be_listed(self):
        """Own data not."""
        plain = admission(allow={"data": None})
        assert not admitted(plain, request())
        own = Site.model_validate({"data": {"heart": {"source": "csv:a.csv", "label": "x"}}})
        assert admitted(replace(plain, site=own), request())
        assert not admitted(replace(admission(allow={"data": []}), site=own), request())

    def test_a_site_that_the_run_leaves_out_stays_out(self):
        """`data.sites` names who takes part."""
        assert not admitted(admission(), request('data.sites=["south","west"]'))
        assert admitted(admission(), request('data.sites=["north","south"]'))

    def test_without_a_budget_nothing_is_admitted(self):
        """Also no run without privacy, which costs all of it."""
        assert not admitted(admission(budget=None), request())


SUMS = ("privacy.secure_aggregation=true",)
MASK = np.zeros(9, np.uint8)


class TestWhatLeavesForASum:
    """Nothing in clear; and nothing masked where there is no sum."""

    @staticmethod
    def leaves(content: dict, *, kind="train", overrides=SUMS) -> bool:
        try:
            TestWhatLeaves.answer(admission(), content, *overrides, kind=kind)
        except PeerError as e:
            if e.failure is not FailureCode.POLICY_REFUSED:
                raise
            return False
        return True

    def test_training_is_answered_with_a_masked_vector(self):
        """And with a step of the next set-up, if one came along."""
        masked = {ARRAYS: to_record({MASKED: MASK})}
        assert self.leaves(masked)
        assert self.leaves(masked | {SECAGG: to_record({SETUP_STEP: MASK})})

    @pytest.mark.parametrize(
        "content",
        [
            {},
            {ARRAYS: to_record({})},
            {ARRAYS: to_record({"weight": MASK})},
            {ARRAYS: to_record({MASKED: MASK, "weight": MASK})},
            {ARRAYS: to_record({MASKED: MASK.astype(np.float32)})},
            {ARRAYS: to_record({MASKED: MASK.reshape(3, 3)})},
            {ARRAYS: to_record({MASKED: MASK}), METRICS: MetricRecord({"num-examples": 1.0})},
            {ARRAYS: to_record({MASKED: MASK}), "more": to_record({MASKED: MASK})},
            {ARRAYS: to_record({MASKED: MASK}), SECAGG: to_record({})},
            {ARRAYS: to_record({MASKED: MASK}), SECAGG: to_record({ROUND_STEP: MASK})},
            {ARRAYS: ConfigRecord({"client": "north"})},
            {CONFIG: ConfigRecord({"client": "north"})},
            {SECAGG: to_record({SETUP_STEP: MASK})},
        ],
        ids=range(13),
    )
    def test_and_with_nothing_else(self, content):
        """No weights, no metric, not even a weight of 1."""
        assert not self.leaves(content)

    def test_steps_are_answered_with_steps(self):
        """Of the round, of a set-up, or both."""
        assert self.leaves({SECAGG: to_record({ROUND_STEP: MASK})}, kind=SECAGG_TYPE)
        assert self.leaves({SECAGG: to_record({ROUND_STEP: MASK, SETUP_STEP: MASK})}, kind=SECAGG_TYPE)
        for content in (
            {ARRAYS: to_record({MASKED: MASK})},
            {SECAGG: to_record({"more": MASK})},
            {SECAGG: to_record({ROUND_STEP: MASK}), ARRAYS: to_record({MASKED: MASK})},
            {CONFIG: ConfigRecord({"client": "north", "schema": "{}"})},
        ):
            assert not self.leaves(content, kind=SECAGG_TYPE)

    def test_a_query_is_answered_as_ever(self):
        """With public facts."""
        assert self.leaves({CONFIG: ConfigRecord({"client": "north", "schema": "{}"})}, kind="query")
        assert not self.leaves({SECAGG: to_record({ROUND_STEP: MASK})}, kind="query")

    def test_other_runs_have_no_steps(self):
        """What looks like noise could be anything."""
        assert not self.leaves({ARRAYS: to_record({}), SECAGG: to_record({ROUND_STEP: MASK})}, overrides=())


class TestSteps:
    """Messages without a model are admitted like those with one."""

    def test_an_operator_has_to_have_signed_the_run(self):
        """And the cohort has to be told."""
        assert admitted(admission(), request(*SUMS, kind=SECAGG_TYPE))
        assert not admitted(admission(), request(*SUMS, kind=SECAGG_TYPE, authorization=None))
        assert not admitted(admission(), request(*SUMS, kind=SECAGG_TYPE, cohort=None))
        assert not admitted(admission(), request(*SUMS, kind=SECAGG_TYPE, cohort='["north"]'))
        assert not admitted(admission(), request(*SUMS, kind=SECAGG_TYPE, run_id="cd" * 16))

    def test_a_round_that_has_begun_may_end_after_hours(self):
        """Or all that were trained late would be lost."""
        now, hour = datetime.now().astimezone(), timedelta(hours=1)
        rules = admission(now, limits={"hours": f"{now + hour:%H:%M}-{now + 2 * hour:%H:%M}"})
        assert admitted(rules, request(*SUMS, kind=SECAGG_TYPE))
        assert not admitted(rules, request(*SUMS))

    def test_with_noise_of_the_clients_the_cohort_is_told(self):
        """It is no secret among those who share masks."""
        overrides = ("privacy.unit=client", "privacy.target_epsilon=8", *SUMS)
        assert admitted(admission(), request(*overrides, kind=SECAGG_TYPE))
        assert not admitted(admission(), request(*overrides, kind=SECAGG_TYPE, cohort=None))


class TestWhatLeaves:
    """Beside the model: the run's metrics that the policy allows, and no others."""

    @staticmethod
    def answer(rules: Admission, content: dict, *overrides, kind="train"):
        """What leaves when the app answers with this content."""
        message = request(*overrides, kind=kind)
        return admission_mod(rules)(
            message, client_context(node_id=2, partition=0), lambda m, _: Message(RecordDict(content), reply_to=m)
        )

    def sent(self, metrics, *overrides, **allow) -> bool:
        try:
            self.answer(admission(allow=allow), {ARRAYS: to_record({}), METRICS: MetricRecord(metrics)}, *overrides)
        except PeerError as e:
            if e.failure is not FailureCode.POLICY_REFUSED:
                raise
            return False
        return True

    def test_a_run_s_own_metrics_pass(self):
        """And a weight that is always 1."""
        assert self.sent({"num-examples": 1.0, "train_loss": 0.5})

    def test_a_count_passes_where_the_run_weighs_by_it_and_the_policy_lists_it(self):
        """Both are needed."""
        by_examples = ("strategy.weighting=examples",)
        assert self.sent({"num-examples": 300.0, "train_loss": 0.5}, *by_examples)
        assert not self.sent({"num-examples": 300.0, "train_loss": 0.5})

    @pytest.mark.parametrize("metrics", [{"accuracy": 0.9}, {"within": 1.0}, {"num-examples": 300.0}, {"w": [1.0]}])
    @pytest.mark.parametrize("overrides", [(), PRIVATE], ids=["plain", "private"])
    def test_no_other_passes(self, metrics, overrides):
        """Whatever a model's own code or a fault puts there."""
        assert not self.sent({"num-examples": 1.0} | metrics, *overrides)

    def test_a_private_run_tells_no_loss(self):
        """Though the policy allows it to runs without privacy."""
        assert not self.sent({"num-examples": 1.0, "train_loss": 0.5}, *PRIVATE)

    def test_an_answer_to_a_query_holds_name_and_schema(self):
        """Nothing else fits in."""
        rules = admission()
        self.answer(rules, {CONFIG: ConfigRecord({"client": "north", "schema": "{}"})}, kind="query")
        with pytest.raises(PeerError):
            self.answer(rules, {CONFIG: ConfigRecord({"client": "north", "rows": 300})}, kind="query")

    def test_a_run_that_needs_a_metric_that_may_not_leave_is_not_joined(self):
        """Before anything is trained or paid for."""
        assert not admitted(admission(allow={"metrics": []}), request())
        assert not admitted(admission(allow={"metrics": ["train_loss"]}), request("strategy.weighting=examples"))
