"""What a real site provides: its own examples whatever a run says, one ledger a data set, updates that are kept."""

from dataclasses import replace

import pytest
import torch

from client.dry_run import dry_run
from client.resources import content_digest, load_own, site_resources
from common.data import load_federation
from common.errors import DataError, PrivacyError, SiteError
from common.kit import load_kit
from common.schema import ClientData, DataSchema, Examples
from common.site import Site
from tests.helpers.agents import POLICY, PRIVATE, configuration, copied, make_kits

TABLE = "age,sex,outcome\n" + "".join(f"{i},{i % 2},{i % 3 == 0}\n" for i in range(40))
OWN = '[data.icu]\nsource = "csv:icu.csv"\nlabel = "outcome"\nfeatures = ["age", "sex"]\nclasses = ["False", "True"]\n'


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_kits(tmp_path_factory.mktemp("made") / "kits")


@pytest.fixture
def kit(made, tmp_path):
    """A site's kit, with data of its own beside the heart data."""
    folder = copied(made, tmp_path / "kits") / "cleveland"
    (folder / "icu.csv").write_text(TABLE)
    (folder / "site.toml").write_text(OWN)
    return load_kit(folder, role="site")


def equal(one: Examples, other: Examples) -> bool:
    return torch.equal(one.inputs, other.inputs) and torch.equal(one.targets, other.targets)


class TestOwnExamples:
    """A coordinator does not choose whose examples are trained on."""

    @pytest.mark.parametrize(
        "overrides",
        [(), ("data.folds=10", "data.fold=3"), ("data.max_examples=50",), ('data.sites=["cleveland","hungary"]',),
         ('data.sites=["cleveland","hungary"]', "data.max_examples=50")],
        ids=str,
    )  # fmt: skip
    def test_they_are_those_of_the_same_client_in_a_simulation(self, overrides):
        """The same split, and the same draw of at most so many."""
        config = configuration(*overrides)
        federation = load_federation(config.data, seed=config.seeds.data, site=Site())
        simulated = next(client for client in federation.clients if client.name == "cleveland")
        _, own = load_own(config.data, seed=config.seeds.data, site=Site(), name="cleveland")
        assert equal(own.train, simulated.train)
        assert equal(own.test, simulated.test)

    @pytest.mark.parametrize(
        "overrides",
        [("data.pooled=true",), ("data.partition=iid", "data.clients=3"), ("data.clients=1",),
         ("data.partition=bootstrap", "data.clients=1000000", "data.client_examples=3")],
        ids=str,
    )  # fmt: skip
    def test_settings_of_a_simulation_change_nothing(self, overrides):
        """They say how one machine divides data that it does not have here."""
        config = configuration(*overrides)
        _, own = load_own(config.data, seed=0, site=Site(), name="hungary")
        _, plain = load_own(configuration().data, seed=0, site=Site(), name="hungary")
        assert equal(own.train, plain.train)

    def test_data_without_groups_is_all_the_site_s(self, kit):
        """Under the site's own name."""
        held = site_resources(kit).held(configuration("data.name=icu").data, seed=0)
        assert held.data.name == "cleveland"
        assert len(held.data.train) + len(held.data.test) == 40

    def test_groups_of_others_are_refused(self):
        """Of the built-in heart data there is no such hospital."""
        with pytest.raises(DataError, match="none is `west`"):
            load_own(configuration().data, seed=0, site=Site(), name="west")

    def test_they_are_read_once(self, kit):
        """And stay while another run asks for others."""
        resources = site_resources(kit)
        first = resources.held(configuration().data, seed=0)
        resources.held(configuration("data.fold=1", "data.folds=10").data, seed=0)
        assert resources.held(configuration().data, seed=0) is first


class TestContent:
    """A data set is known by its examples, however they are divided."""

    SCHEMA = DataSchema(kind="tabular", input_shape=(2,), num_classes=2)

    @staticmethod
    def examples(*rows: int) -> Examples:
        values = torch.tensor([[float(i), 1.0] for i in rows]).reshape(-1, 2)
        return Examples(inputs=values, targets=torch.tensor([i % 2 for i in rows], dtype=torch.int64))

    def digest(self, train: tuple[int, ...], test: tuple[int, ...] = ()) -> bytes:
        data = ClientData(name="x", train=self.examples(*train), test=self.examples(*test))
        return content_digest(self.SCHEMA, data)

    def test_neither_order_nor_what_is_held_out_counts(self):
        """Folds of one study are one data set."""
        assert self.digest((1, 2, 3)) == self.digest((3, 1), (2,))

    def test_an_example_more_or_less_counts(self):
        """Also one that is there twice."""
        assert len({self.digest(rows) for rows in ((1, 2), (1, 2, 3), (1, 2, 2), (1,))}) == 4

    def test_every_run_of_a_study_has_one_ledger(self, kit):
        """All folds, and also where only some examples are used."""
        resources = site_resources(kit)
        overrides = ((), ("data.folds=10", "data.fold=2"), ("data.max_examples=20",), ("seeds.data=7",))
        digests = {
            resources.held(config.data, seed=config.seeds.data).content for config in map(configuration_of, overrides)
        }
        assert len(digests) == 1


def configuration_of(overrides):
    return configuration(*overrides)


class TestPins:
    """The policy has the last word on who may order."""

    def test_a_policy_that_pins_another_coordinator_is_an_error(self, kit):
        """Before anything is connected."""
        policy = kit.folder / "policy.toml"
        policy.write_text(f'{POLICY}[coordinator]\nkey = "{kit.coordinator.key_id.hex()}"\n')
        site_resources(kit)
        policy.write_text(f'{POLICY}[coordinator]\nkey = "{"0" * 64}"\n')
        with pytest.raises(SiteError, match="another coordinator"):
            site_resources(kit)

    def test_without_a_budget_there_are_no_ledgers(self, kit):
        """An administrator has to name one."""
        (kit.folder / "policy.toml").write_text("")
        with pytest.raises(PrivacyError, match="no budget"):
            _ = site_resources(kit).ledgers


class TestDryRun:
    """What a run would do here, before anybody submits it."""

    def test_a_run_that_fits_is_joined_and_nothing_is_written(self, kit):
        """Sizes, noise, and what is left of the budget."""
        before = sorted(kit.folder.rglob("*"))
        told = dry_run(configuration(*PRIVATE), site_resources(kit))
        assert told["joins"]
        assert told["reasons"] == []
        assert told["data"]["rows"] == 242
        assert told["release"]["update_bytes"] == 4 * 38
        assert told["release"]["metrics"] == []
        assert told["privacy"]["ledger"]["spent"] == 0
        assert 0 < told["privacy"]["epsilon_round"] < told["privacy"]["epsilon_run"] <= 10
        assert sorted(kit.folder.rglob("*")) == before

    @pytest.mark.parametrize(
        ("overrides", "reason"),
        [
            (("strategy.weighting=examples",), "num-examples"),
            ((*PRIVATE, "privacy.target_epsilon=30"), "spent epsilon"),
            ((*PRIVATE, "data.name=fashion-mnist-10k"), "allow.data"),
            (("privacy.unit=client", "privacy.target_epsilon=3"), "limits.units"),
            (("model.name=nonesuch",), "nonesuch"),
            (("model.name=lstm",), ""),
            (('data.sites=["hungary"]',), "data.sites"),
        ],
        ids=str,
    )  # fmt: skip
    def test_a_run_that_does_not_fit_is_refused_with_the_reason(self, kit, overrides, reason):
        """Made for people at the site; a peer learns only that it is refused."""
        told = dry_run(configuration(*overrides), site_resources(kit))
        assert not told["joins"]
        assert any(reason in said for said in told["reasons"])

    def test_compression_shortens_what_leaves(self, kit):
        """The figure is that of the encoding."""
        told = dry_run(configuration("transport.compression=int8"), site_resources(kit))
        assert told["release"]["update_bytes"] == (4 + 36) + (4 + 2)

    def test_what_was_spent_counts(self, kit):
        """By the ledger that the run would use."""
        resources, config = site_resources(kit), configuration(*PRIVATE)
        held = resources.held(config.data, seed=0)
        ledger = resources.ledgers.open("heart", resources.ledgers.fingerprint([held.content]))
        fresh = dry_run(config, resources)
        ledger.set_budget(replace(ledger.budget, epsilon=fresh["privacy"]["epsilon_run"] / 2))
        told = dry_run(config, resources)
        assert fresh["joins"]
        assert not told["joins"]
