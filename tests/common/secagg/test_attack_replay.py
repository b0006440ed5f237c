"""A coordinator that wants one update under two masks: replayed indices, used models, rounds said to be burnt."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.secagg.member import Member
from common.secagg.messages import Statement
from common.secagg.refusal import SecAggError
from tests.helpers.secagg import site
from tests.helpers.secagg_malice import KINDS, Malice, looks_random, refused


@pytest.fixture
def malice() -> Malice:
    """Seven members, one colluding, who all masked an update at index 1."""
    made = Malice(7, colluders=[6]).set_up()
    for rank in made.everybody:
        made.train(rank, 1)
    return made


def burnt(malice: Malice, header: bytes, ranks: Iterable[int]) -> dict[int, Statement]:
    """Statements "burnt" of whoever makes one; a colluder always does."""
    said = {}
    for rank in ranks:
        try:
            honest = rank not in malice.colluders
            said[rank] = malice.burnt(rank, header) if honest else malice.forge(rank, header, ())
        except SecAggError:
            continue
    return said


class TestIndices:
    @pytest.mark.parametrize("index", [0, 1, 5, 65535])
    def test_an_index_is_used_once_and_is_of_the_epoch(self, malice: Malice, index: int) -> None:
        """Not again, not below, not beyond the epoch, with any model."""
        assert refused(lambda: malice.train(0, index, model="another")) == "index"

    def test_indices_that_were_skipped_are_gone(self, malice: Malice) -> None:
        """After index 3 nobody masks under 2."""
        malice.train(0, 3)
        assert refused(lambda: malice.train(0, 2)) == "index"

    def test_an_older_state_does_not_bring_an_index_back(self, malice: Malice) -> None:
        """A member that was copied before a round and restored after it asks its journal."""
        saved = malice.at(0).to_bytes()
        malice.train(0, 2)
        name = malice.names[0]
        malice.members[name] = Member.from_bytes(
            saved, signer=site(name), peers=malice.peers, rules=malice.rules, journal=malice.journals[name]
        )
        assert refused(lambda: malice.train(0, 2, model="another")) == "index"

    def test_a_new_process_does_not_know_the_epoch(self, malice: Malice) -> None:
        """Nor does it set up an epoch of that id again."""
        malice.members[malice.names[0]] = malice.member(malice.names[0])
        assert refused(lambda: malice.train(0, 2)) == "epoch"
        assert refused(lambda: malice.advertise(malice.epoch)) == "epoch"


class TestModels:
    def test_a_used_model_is_refused(self, malice: Malice) -> None:
        """The same model again, under the next index, in the same or another round: one update would have two masks."""
        for server_round in (1, 2):
            outcome = refused(lambda r=server_round: malice.train(0, 2, model="model 1", server_round=r))
            assert outcome == "base"

    def test_a_used_model_is_refused_in_the_next_epoch(self, malice: Malice) -> None:
        """Also by a process that has just started: its journal remembers."""
        malice.members[malice.names[0]] = malice.member(malice.names[0])
        malice.set_up(b"f" * 16)
        assert refused(lambda: malice.train(0, 1, model="model 1")) == "base"
        assert refused(lambda: malice.train(1, 1, model="model 1")) == "base"
        assert not refused(lambda: malice.train(1, 1, model="model 2"))

    def test_a_burnt_round_lets_its_model_be_used_again(self, malice: Malice) -> None:
        """And then its vectors stay noise, whatever is opened later."""
        header = malice.headers[0, 1]
        first = {rank: malice.masked[rank, 1] for rank in range(6)}
        certificate = malice.certificate(burnt(malice, header, malice.everybody))
        for rank in malice.everybody:
            malice.train(rank, 2, model="model 1", certificates=[certificate], update=malice.updates[rank])
        malice.open_round(2, malice.everybody)
        assert (malice.peel(range(6), 2) == malice.truth(range(6))).all()
        for rank in range(6):
            assert refused(lambda r=rank: malice.state(r, 1, malice.everybody)) == "index"
            assert None in {malice.secret(kind, rank, 1) for kind in KINDS}
            assert (malice.masked[rank, 1] == first[rank]).all()
            assert looks_random(malice.peel([rank], 1))
        assert looks_random(malice.peel(range(6), 1))


class TestBurning:
    def test_a_round_that_was_opened_cannot_be_burnt(self, malice: Malice) -> None:
        """The coordinator opens a round and says it was burnt: who stated survivors refuses, colluders are too few."""
        malice.open_round(1, malice.everybody)
        header = malice.headers[0, 1]
        said = burnt(malice, header, malice.everybody)
        assert set(said) == {6}
        certificate = malice.certificate(said)
        for rank in range(6):
            assert refused(lambda r=rank: malice.burnt(r, header)) == "statement"
            outcome = refused(lambda r=rank: malice.train(r, 2, model="model 1", certificates=[certificate]))
            assert outcome == "quorum"

    def test_whoever_said_burnt_states_no_survivors(self, malice: Malice) -> None:
        """Nor does it begin a round that it said was burnt before."""
        header = malice.headers[0, 1]
        malice.burnt(0, header)
        assert refused(lambda: malice.state(0, 1, malice.everybody)) == "statement"
        assert malice.burnt(0, header) == malice.burnt(0, header)

    def test_a_round_cannot_be_begun_after_it_was_burnt(self) -> None:
        """A member says burnt about a header that it never saw, and keeps to it."""
        malice = Malice(7).set_up()
        malice.train(0, 1)
        malice.burnt(1, malice.headers[0, 1])
        assert refused(lambda: malice.train(1, 1)) != ""

    def test_after_a_restart_a_member_can_say_burnt_and_nothing_else(self, malice: Malice) -> None:
        """Its journal holds what it said before; keys and shares are gone."""
        header = malice.headers[0, 1]
        malice.state(0, 1, malice.everybody)
        for rank in (0, 1):
            malice.members[malice.names[rank]] = malice.member(malice.names[rank])
        assert refused(lambda: malice.burnt(0, header)) == "statement"
        assert malice.burnt(1, header).burnt
        assert refused(lambda: malice.state(1, 1, malice.everybody)) == "epoch"

    def test_certificates_that_are_none(self, malice: Malice) -> None:
        """Too few, of another round, by others than the participants, forged: the model stays used."""
        for rank in range(6):
            malice.train(rank, 2, participants=range(6))
        first, second = malice.headers[0, 1], malice.headers[0, 2]
        said = burnt(malice, second, range(6))

        def outcome(statements: dict[int, Statement]) -> str:
            certificate = malice.certificate(statements)
            return refused(lambda: malice.train(0, 3, model="model 2", certificates=[certificate]))

        quorum = 4  # of six participants, with one colluder
        assert outcome(dict(list(said.items())[: quorum - 1])) == "quorum"
        assert outcome(burnt(malice, first, range(6))) == "base"
        stranger = dict(list(said.items())[: quorum - 1]) | {6: malice.forge(6, second, ())}
        assert outcome(stranger) == "quorum"
        forged = dict(list(said.items())[: quorum - 1]) | {5: malice.forge(6, second, ())}
        assert outcome(forged) == "signature"
        assert outcome(dict(list(said.items())[:quorum])) == ""

    def test_every_use_of_a_model_needs_its_certificate(self, malice: Malice) -> None:
        """Two burnt rounds on one model: one certificate is not enough for a third."""
        one = malice.certificate(burnt(malice, malice.headers[0, 1], malice.everybody))
        for rank in malice.everybody:
            malice.train(rank, 2, model="model 1", certificates=[one])
        two = malice.certificate(burnt(malice, malice.headers[0, 2], malice.everybody))
        for given_ones in ([], [one], [two]):
            outcome = refused(lambda g=given_ones: malice.train(0, 3, model="model 1", certificates=g))
            assert outcome == "base"
        assert not refused(lambda: malice.train(0, 3, model="model 1", certificates=[one, two]))

    @settings(deadline=None, max_examples=25)
    @given(choices=st.lists(st.sampled_from(["burnt", "all", "fewer", "nothing"]), min_size=6, max_size=6))
    def test_no_round_is_both_burnt_and_opened(self, choices: list[str]) -> None:
        """However honest members are divided, with a colluder that signs everything: one certificate at most."""
        malice = Malice(7, colluders=[6]).set_up()
        for rank in malice.everybody:
            malice.train(rank, 1)
        header, sets = malice.headers[0, 1], {"all": range(7), "fewer": range(1, 7)}
        statements: dict[str, dict[int, Statement]] = {"burnt": {}, "all": {}, "fewer": {}}
        for rank, choice in enumerate(choices):
            if choice == "burnt":
                statements[choice][rank] = malice.burnt(rank, header)
            elif choice in sets and rank in sets[choice]:
                statements[choice][rank] = malice.state(rank, 1, sets[choice])
        opened = []
        for kind, alive in sets.items():
            said = statements[kind] | {6: malice.forge(6, header, alive)}
            opened += [rank for rank in alive if not refused(lambda r=rank, a=alive, s=said: malice.unmask(r, 1, a, s))]
        certificate = malice.certificate(statements["burnt"] | {6: malice.forge(6, header, ())})
        again = [
            rank
            for rank in range(6)
            if not refused(lambda r=rank: malice.train(r, 2, model="model 1", certificates=[certificate]))
        ]
        assert not {rank for rank in opened if rank not in malice.colluders} or not again
