"""A coordinator that turns on its sites: whatever it seals and signs, a site does nothing that its own files forbid.

Each request here is genuine to the last signature of the coordinator's own keys; what is wrong with it is what it asks.
"""

import json
import pickle
from dataclasses import replace

import pytest

from common.crypto import PartyKeys, authorize
from common.errors import FailureCode
from common.flower import failure_of
from common.privacy import make_plan
from server.plane.orders import Failed
from tests.client.test_sovereignty import Bomb
from tests.helpers.agents import (
    FEDERATION,
    HOSPITALS,
    PRIVATE,
    RUN_ID,
    Asker,
    configuration,
    make_kits,
    resources_of,
    running_agent,
    start_of,
)
from tests.helpers.plane import running_plane

STRICT = """
[operators]
allowed = ["alice"]
[privacy]
largest_epsilon = 3.5
"""
REFUSED, INVALID = FailureCode.POLICY_REFUSED, FailureCode.INVALID_REQUEST


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A plane and an attached site, which has answered one honest private round."""
    folder = tmp_path_factory.mktemp("world")
    kits = make_kits(folder / "kits")
    policy = kits / "cleveland" / "policy.toml"
    policy.write_text(policy.read_text() + STRICT)
    with running_plane(kits, folder / "hub") as plane:
        resources = resources_of(plane)
        with running_agent(resources):
            asker = Asker(plane)
            assert failure_of(asker.ask(configuration(*PRIVATE))) is None
            yield asker, resources


@pytest.fixture
def asker(world):
    """The coordinator; afterwards the site's ledger must say what it said before."""
    asker, resources = world
    ledger = resources.ledgers.named("heart")
    before = ledger.path.read_bytes()
    yield asker
    assert ledger.path.read_bytes() == before
    assert len(ledger.events()) == 1


def tampered(asker, table, key, value):
    """A request whose configuration says what no configuration can say."""
    tree = json.loads(configuration(*PRIVATE).canonical_json())
    tree[table][key] = value
    return asker.request(configuration(*PRIVATE), run=json.dumps(tree))


@pytest.mark.parametrize(
    "setting",
    [
        ("model", "name", "evil.py:build"),
        ("model", "name", "os:system"),
        ("model", "source", "evil.py:build"),
        ("data", "name", "python:evil.py:load"),
        ("data", "name", "../../etc/passwd"),
        ("strategy", "name", "evil.Strategy"),
    ],
    ids=" ".join,
)
def test_code_and_import_paths_are_refused_and_nothing_runs(asker, tmp_path, monkeypatch, setting):
    """A file of that name lies where the process would find it."""
    marker = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\ndef build(*_): pass\nload = build\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert failure_of(asker.ask(configuration(), tampered(asker, *setting))) is INVALID
    assert not marker.exists()


def test_a_pickle_in_place_of_a_request_is_refused_unread(asker, tmp_path):
    """Sealed and signed as it should be."""
    content = asker.request(configuration(*PRIVATE))
    asker.order(asker.sealed(content, plaintext=pickle.dumps(Bomb(tmp_path / "ran"))))
    result = asker.plane.result()
    assert isinstance(result, Failed)
    assert result.failure is INVALID
    assert not (tmp_path / "ran").exists()


def test_a_field_that_holds_a_pickle_is_not_looked_at(asker, tmp_path):
    """Bytes beside the known fields stay bytes; the round was answered before, so that it costs nothing."""
    hook = pickle.dumps(Bomb(tmp_path / "ran"))
    assert failure_of(asker.ask(configuration(*PRIVATE), hook=hook)) is None
    assert not (tmp_path / "ran").exists()


def test_another_data_set_is_refused(asker):
    """Though it is built in, and an operator signed it: the site's policy does not list it."""
    assert failure_of(asker.ask(configuration(*PRIVATE, "data.name=fashion-mnist-10k"))) is REFUSED


def test_a_run_that_protects_less_than_the_site_wants_is_refused(asker):
    """Its plan is sound, and signed; the site's own limit is lower."""
    assert failure_of(asker.ask(configuration(*PRIVATE, "privacy.target_epsilon=3.6"))) is REFUSED


@pytest.mark.parametrize("participations", [1, 2])
def test_another_plan_in_the_middle_of_a_run_is_refused(asker, participations):
    """Each keeps the run's target, for as many rounds as it says: with the rounds before it, it would not."""
    config = configuration(*PRIVATE)
    dimensions = sum(values.size for values in start_of(config, asker.site).values())
    plan = make_plan(config, dimensions=dimensions, participations=participations, min_separation=1, clients=2)
    fields = {"noise_multiplier": plan.noise_multiplier, "renyi_order": plan.budget.order}
    reply = asker.ask(config, server_round=2, participations=participations, **fields)
    assert failure_of(reply) is FailureCode.BUDGET_EXHAUSTED


def test_less_noise_than_the_run_promises_is_refused(asker):
    """The site counts the plan again by itself."""
    assert failure_of(asker.ask(configuration(*PRIVATE), noise_multiplier=0.1)) is INVALID


@pytest.mark.parametrize(
    "cohort",
    [["cleveland"], ["hungary", "switzerland"], ["cleveland", "cleveland"], []],
    ids=str,
)
def test_a_cohort_that_does_not_hide_this_site_is_refused(asker, cohort):
    """Alone, without it, counted twice, or nobody."""
    assert failure_of(asker.ask(configuration(*PRIVATE), cohort=json.dumps(cohort))) is REFUSED


def test_a_request_that_tells_no_cohort_is_refused(asker):
    """Only runs that protect whole clients may keep it secret."""
    assert failure_of(asker.ask(configuration(*PRIVATE), cohort=None)) is REFUSED


class TestTheOperatorsWord:
    """A coordinator alone cannot start a run."""

    def test_a_run_that_nobody_signed_is_refused(self, asker):
        """Nor is anything else taken for a signature."""
        for authorization in (None, "", "{}", json.dumps({"operator": "alice"})):
            assert failure_of(asker.ask(configuration(*PRIVATE), authorization=authorization)) is REFUSED

    def test_an_operator_who_is_not_pinned_is_refused(self, asker):
        """Whatever name he takes."""
        config = configuration(*PRIVATE)
        for name in ("eve", "alice"):
            keys = PartyKeys.generate(name, "operator")
            signed = authorize(keys, federation=FEDERATION, run_id=RUN_ID.hex(), config_digest=config.digest())
            assert failure_of(asker.ask(config, authorization=signed)) is REFUSED

    def test_an_operator_whom_the_policy_leaves_out_is_refused(self, asker):
        """Mallory is pinned in the kit."""
        mallory = replace(asker, operator="mallory")
        assert failure_of(mallory.ask(configuration(*PRIVATE))) is REFUSED

    def test_an_old_authorization_does_not_serve_another_configuration(self, asker):
        """One more round, and it is not what was signed."""
        old = configuration(*PRIVATE)
        assert failure_of(asker.ask(configuration(*PRIVATE, "rounds=4"), authorized=old)) is REFUSED

    def test_an_old_authorization_does_not_serve_another_run(self, asker):
        """A run id that the operator did not draw; and one that is not that of the sealed header."""
        config, other = configuration(*PRIVATE), replace(asker, run_id=bytes(16))
        old = str(asker.request(config)["config"]["authorization"])
        assert failure_of(other.ask(config, authorization=old)) is REFUSED
        assert failure_of(other.ask(config, authorization=old, run_id=RUN_ID.hex())) is INVALID

    def test_a_query_needs_it_as_well(self, asker):
        """What the data looks like is told to nobody else."""
        assert failure_of(asker.ask(configuration(*PRIVATE), kind="query", authorization=None)) is REFUSED
        assert failure_of(asker.ask(configuration(*PRIVATE), kind="query", cohort=None)) is None


def test_a_replayed_order_is_not_worked_on_twice(world, tmp_path):
    """Neither by the process that answered it nor, through another plane, by the next one."""
    asker, resources = world
    config = configuration(*PRIVATE)
    sealed = asker.sealed(asker.request(config))
    asker.order(sealed)
    assert not isinstance(asker.plane.result(), Failed)
    before = resources.ledgers.named("heart").path.read_bytes()
    with running_plane(asker.plane.kits, tmp_path / "hub") as plane:
        again = replace(resources, kit=replace(resources.kit, address=plane.address))
        with running_agent(again):
            other = replace(asker, plane=plane)
            other.order(sealed)
            result = plane.result()
            assert isinstance(result, Failed)
            assert result.failure is INVALID
            assert failure_of(other.ask(config)) is None, "it is well, and answers what is new"
    assert resources.ledgers.named("heart").path.read_bytes() == before


def test_what_a_site_says_of_a_refusal_does_not_depend_on_its_data(world):
    """Two hospitals with the same rules and other patients refuse alike."""
    asker, resources = world
    other = replace(resources_of(asker.plane, "hungary"), policy=resources.policy)
    with running_agent(other):
        for overrides in (("privacy.target_epsilon=3.6",), ("rounds=20000",), ("data.name=fashion-mnist-10k",)):
            config = configuration(*PRIVATE, *overrides)
            codes = {failure_of(replace(asker, sites=(site,)).ask(config)) for site in HOSPITALS}
            assert codes == {REFUSED}
