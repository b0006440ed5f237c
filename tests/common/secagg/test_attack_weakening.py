"""A coordinator that would set a weak modulus, threshold, clipping or group size: no message can say any of them."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.policy import Policy
from client.policy_tables import SecureAggregation
from common.aggregation import codec_for, rules_for
from common.config import RunConfig
from common.errors import ConfigError, PeerError
from common.secagg import messages
from common.secagg.codec import Packed
from common.secagg.messages import Advertise, Train
from common.secagg.parameters import Rules, quorum, shape_of
from common.secagg.refusal import SecAggError
from tests.helpers.runs import tree
from tests.helpers.secagg import rules
from tests.helpers.secagg_malice import CODEC, Malice, base_of, looks_random, refused

KINDS = [kind for kind in vars(messages).values() if is_dataclass(kind) and issubclass(kind, Packed)]
RUN = bytes(16)


def config_of(**secagg: object) -> RunConfig:
    """A run of eight clients under secure aggregation."""
    return RunConfig.model_validate(
        tree(data={"clients": 8}, privacy={"secure_aggregation": True}, secagg={"colluding": 1} | secagg)
    )


class TestWhatCanBeSaid:
    def test_no_message_has_a_place_for_a_number_that_protects(self) -> None:
        """Of the numbers of a round an index is all that travels; the rest is digests, ranks, keys and signatures."""
        numbers = {f"{kind.__name__}.{f.name}" for kind in KINDS for f in fields(kind) if f.type in {"Index", "int"}}
        assert numbers == {"Train.index", "Agree.index", "Unmask.index"}

    @pytest.mark.parametrize(
        "weaker",
        [
            {"honest": 1},
            {"colluding": 0},
            {"min_survivors": 1},
            {"smallest_cohort": 2},
            {"group_size": 3},
            {"bits": 16},
            {"epoch_rounds": 64},
            {"config_digest": b"w" * 32},
            {"run_id": b"w" * 16},
        ],
        ids=lambda weaker: next(iter(weaker)),
    )
    def test_other_rules_are_refused(self, weaker: dict[str, object]) -> None:
        """The rules' digest is compared with the member's own, made from the configuration that it agreed to."""
        malice = Malice(5)
        assert replace(malice.rules, **weaker).digest != malice.rules.digest
        asked = Advertise(epoch=b"e" * 16, rules=replace(malice.rules, **weaker).digest).to_bytes()
        assert refused(lambda: malice.at(0).answer(asked)) == "rules"

    @pytest.mark.parametrize(
        ("table", "setting", "value"),
        [
            ("secagg", "clipping_norm", 1e5),
            ("secagg", "bits", 24),
            ("secagg", "group_size", 4),
            ("secagg", "colluding", 0),
            ("secagg", "honest", 3),
            ("secagg", "most_weight", 7),
            ("secagg", "noise", "discrete-gaussian"),
            ("cohort", "min_survivors", 2),
            ("training", "learning_rate", 0.5),
        ],
    )
    def test_another_configuration_is_another_set_of_rules(self, table: str, setting: str, value: object) -> None:
        """Whatever a coordinator changes in what it tells one site, that site has rules in common with nobody."""
        ours = config_of()
        changed = RunConfig.model_validate(ours.model_dump() | {table: ours.model_dump()[table] | {setting: value}})
        assert rules_for(ours, RUN).digest != rules_for(changed, RUN).digest

    def test_another_clipping_norm_gives_noise(self) -> None:
        """Two codecs that differ in it have other digests: their vectors have no masks in common."""
        template = {"weight": np.zeros(4, np.float32)}
        codecs = [
            codec_for(config_of(clipping_norm=norm), template, participants=8, plan=None, server_round=1)
            for norm in (1.0, 2.0)
        ]
        assert codecs[0].digest != codecs[1].digest
        malice = Malice(5).set_up()
        for rank in malice.everybody:
            malice.train(rank, 1, codec=codecs[rank == 0].digest)
        malice.open_round_by_force(1, malice.everybody)
        assert looks_random(malice.peel([0], 1))


class TestNumbers:
    @settings(deadline=None)
    @given(members=st.integers(3, 400), colluding=st.integers(0, 12), honest=st.integers(2, 5))
    def test_they_follow_from_the_roster(self, members: int, colluding: int, honest: int) -> None:
        """Thresholds above the colluders, quorums that share an honest member, sums with honest members enough."""
        try:
            shape = shape_of(members, rules=rules(honest=honest, colluding=colluding, smallest_cohort=3))
        except SecAggError:
            assert members <= honest + 2 * colluding + 2
            return
        near = colluding if shape.complete else 2 * (shape.least_neighbours - shape.degree // 2 - 1)
        assert near < shape.threshold <= shape.degree < members
        assert 2 * shape.quorum - members > colluding
        assert shape.fewest >= max(honest + colluding, shape.quorum)

    def test_a_round_of_few(self) -> None:
        """Participants fewer than a quorum of the group are refused, however few the rules would allow."""
        malice = Malice(12).set_up()
        for size in range(1, quorum(12, 1)):
            train = Train(epoch=malice.epoch, index=1, participants=tuple(range(size)), certificates=()).to_bytes()
            begin = malice.at(0).begin
            outcome = refused(lambda t=train, b=begin: b(t, server_round=1, base=base_of("m"), codec=CODEC))
            assert outcome == "participants"

    def test_groups_of_few(self) -> None:
        """A group that is smaller than a sum is no group: the set-up is refused."""
        malice = Malice(8, group_size=2)
        bundles = malice.advertise(b"e" * 16)
        nonces = malice.reveal(bundles)
        assert refused(lambda: malice.exchange(bundles, nonces)) in {"roster", "threshold"}


class TestSettings:
    @pytest.mark.parametrize(
        "weak",
        [
            {"honest": 1},
            {"colluding": -1},
            {"bits": 8},
            {"bits": 31},
            {"clipping_norm": 0.0},
            {"clipping_norm": float("inf")},
            {"most_weight": 0},
            {"most_weight": 1 << 25},
            {"group_size": 2},
            {"epoch_rounds": 65},
            {"epoch_rounds": 0},
            {"threshold": 1},
        ],
        ids=str,
    )
    def test_weak_ones_are_no_configuration(self, weak: dict[str, object]) -> None:
        """Refused when it is read, by every party."""
        with pytest.raises((ConfigError, ValueError)):
            config_of(**weak)

    @pytest.mark.parametrize(
        ("strict", "weak"),
        [
            (SecureAggregation(colluding=2), {"colluding": 1}),
            (SecureAggregation(smallest_cohort=5), {"honest": 2, "colluding": 1}),
            (SecureAggregation(smallest_cohort=5), {"group_size": 4}),
            (SecureAggregation(largest_clipping_norm=1.0), {"clipping_norm": 2.0}),
            (SecureAggregation(least_bits=32), {"bits": 24, "most_weight": 1000}),
        ],
        ids=["colluding", "cohort", "group", "clipping", "bits"],
    )
    def test_a_site_refuses_what_is_weaker_than_its_policy(
        self, strict: SecureAggregation, weak: dict[str, object]
    ) -> None:
        """Its own file decides, before anything is computed."""
        policy = Policy(
            secure_aggregation=strict, limits={"units": ["none"]}, allow={"metrics": ["train_loss", "num-examples"]}
        )
        with pytest.raises(PeerError):
            policy.check(config_of(**weak))
        plain = Policy(limits={"units": ["none"]}, allow={"metrics": ["train_loss", "num-examples"]})
        plain.check(config_of(**weak))

    def test_a_site_can_require_it(self) -> None:
        """Then a run without it is not joined."""
        policy = Policy(
            privacy={"require_secure_aggregation": True},
            limits={"units": ["none"]},
            allow={"metrics": ["train_loss", "num-examples"]},
        )
        policy.check(config_of())
        with pytest.raises(PeerError):
            policy.check(RunConfig.model_validate(tree(data={"clients": 8})))


def test_rules_are_what_a_configuration_says() -> None:
    """Every setting that protects is in them, beside the digest of all the others."""
    made = rules_for(config_of(honest=3, colluding=2, bits=24, most_weight=100, epoch_rounds=5), RUN)
    assert isinstance(made, Rules)
    assert (made.honest, made.colluding, made.bits, made.epoch_rounds, made.fewest) == (3, 2, 24, 5, 5)
