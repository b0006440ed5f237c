"""From federation.toml to kits: once for everybody, later for those who are new."""

import shutil
import stat
import tarfile

import pytest

from common.crypto import Authority, PartyKeys, Suite, read_csr
from common.errors import ConfigError, KitError
from common.kit import load_kit, read_pins
from common.kit_files import add_pins, begin_renewal, install_certificate
from common.kit_tls import verify_chain
from server.provisioning import Registry, making, provision
from server.provisioning.making import replace_issuer
from tests.helpers.kits import copy_kits, federation_of

ROLES = {"server": "coordinator", "north": "site", "south": "site", "alice": "operator"}


@pytest.fixture
def kits(tmp_path):
    return copy_kits(tmp_path / "kits")


def contents(folder):
    """Every file below a folder, with its bytes."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_party_has_a_kit(tmp_path):
    """That loads, for its role; the authority's folder holds the root."""
    done = provision(federation_of(), tmp_path / "kits")
    assert {made.name: made.role for made in done.made} == {"authority": "authority", **ROLES}
    for name, role in ROLES.items():
        assert load_kit(tmp_path / "kits" / name, role=role).certificate().name == name
    assert Authority.load(tmp_path / "kits/authority").root == done.root


def test_only_the_authority_has_the_root_key_and_only_it_and_the_server_an_issuer(kits):
    """A site's kit can sign nothing but its own messages."""
    assert [path.parent.name for path in sorted(kits.rglob("root-private.pem"))] == ["authority"]
    assert sorted(path.parent.name for path in kits.rglob("issuer")) == ["authority", "server"]


def test_secrets_are_for_their_owner(kits):
    """Every private key and archive 0600, every kit 0700."""
    secrets = [path for path in kits.rglob("*") if "private" in path.name or path.name.endswith(".tar.gz")]
    assert len(secrets) == 3 + 2 * 4 + 5
    assert {stat.S_IMODE(path.stat().st_mode) for path in secrets} == {0o600}
    assert {stat.S_IMODE((kits / name).stat().st_mode) for name in (*ROLES, "authority")} == {0o700}


def test_no_kit_holds_another_s_secret(kits):
    """Each private file's bytes occur in one folder; the issuer's in two, the authority's and the server's."""
    found: dict[bytes, set[str]] = {}
    for path in kits.rglob("*private*"):
        found.setdefault(path.read_bytes(), set()).add(path.relative_to(kits).parts[0])
    assert [owners for owners in found.values() if len(owners) > 1] == [{"authority", "server"}]


@pytest.mark.parametrize("name", ["authority", *ROLES])
def test_an_archive_is_its_kit(kits, tmp_path, name):
    """File by file."""
    with tarfile.open(kits / f"{name}.tar.gz") as tar:
        tar.extractall(tmp_path / "there", filter="data")
    assert contents(tmp_path / "there" / name) == contents(kits / name)


def test_a_site_can_be_added(kits):
    """Only the new kit is made; the server's pins and archive know it, everybody else's kit stays as it was."""
    before = {name: contents(kits / name) for name in ROLES}
    done = provision(federation_of(sites=("north", "south", "west")), kits)
    assert [made.name for made in done.made] == ["west"]
    assert list(done.kept) == ["alice", "north", "south"]
    assert sorted(load_kit(kits / "west", role="site").sites) == ["north", "south", "west"]
    assert sorted(load_kit(kits / "server", role="coordinator").sites) == ["north", "south", "west"]
    assert Registry.open(kits / "server").newest()["west"] == load_kit(kits / "west", role=None).certificate()
    for name in ("north", "south", "alice"):
        assert contents(kits / name) == before[name]
    changed = {path.name for path, data in contents(kits / "server").items() if before["server"].get(path) != data}
    assert changed == {"parties.json", "issued.jsonl"}
    with tarfile.open(kits / "server.tar.gz") as tar:
        assert tar.extractfile("server/parties.json").read() == (kits / "server/parties.json").read_bytes()


def test_run_again_nothing_happens(kits):
    """Also where the kits were handed over and deleted here."""
    shutil.rmtree(kits / "north")
    (kits / "north.tar.gz").unlink()
    before = contents(kits)
    assert not provision(federation_of(), kits).made
    assert contents(kits) == before


def test_who_enrolled_meanwhile_is_known(kits):
    """A party that the server has learned of keeps its keys, whatever federation.toml says later."""
    west = PartyKeys.generate("west", "site").record
    add_pins(kits / "server", [west])
    done = provision(federation_of(sites=("north", "west", "east")), kits)
    assert [made.name for made in done.made] == ["east"]
    assert read_pins(kits / "authority").find("west") == west


@pytest.mark.parametrize("name", ["server", "west", "west.tar.gz"])
def test_nothing_is_overwritten(tmp_path, kits, name):
    """A folder or archive that is in the way stops everything, before anything is made."""
    out = kits if name != "server" else tmp_path / "other"
    (out / name).mkdir(parents=True)
    before = contents(out)
    with pytest.raises(KitError, match="is there already"):
        provision(federation_of(sites=("east", "west")), out)
    assert contents(out) == before
    assert not (out / "east").exists()


@pytest.mark.parametrize("again", [False, True])
def test_a_failure_leaves_nothing_behind(tmp_path, kits, monkeypatch, again):
    """The disk fills up at the last kit: those made before it are taken back."""
    out = kits if again else tmp_path / "new"
    before = contents(out) if again else {}
    made = making._make_kit

    def fail(folder, *rest):
        if folder.name == "west":
            raise KitError("the disk is full")
        made(folder, *rest)

    monkeypatch.setattr(making, "_make_kit", fail)
    with pytest.raises(KitError, match="the disk is full"):
        provision(federation_of(sites=("east", "north", "west")), out)
    after = {path: data for path, data in contents(out).items() if path.name != "issued.jsonl"}
    assert after == {path: data for path, data in before.items() if path.name != "issued.jsonl"}
    assert not (out / "east").exists()


@pytest.mark.parametrize(
    ("federation", "said"),
    [
        (federation_of(name="other"), "is of federation `study`"),
        (federation_of(server="elsewhere:1"), "server is at localhost:8471"),
        (federation_of(suite="ed25519+ml-dsa-65"), "suite"),
        (federation_of(sites=("alice",), operators=()), "was made as operator"),
        (federation_of(sites=("North",)), "`North` is taken"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_contradicts_the_kits_is_refused(kits, federation, said):
    """What kits hold already cannot be changed by editing the file."""
    before = contents(kits)
    with pytest.raises(ConfigError, match=said):
        provision(federation, kits)
    assert contents(kits) == before


def test_the_suite_stands_in_every_record(tmp_path):
    """Also in that of a site that comes later."""
    provision(federation_of(suite="ed25519+ml-dsa-65"), tmp_path)
    provision(federation_of(sites=("west",), suite="ed25519+ml-dsa-65"), tmp_path)
    assert {record.suite for record in read_pins(tmp_path / "server").records()} == {Suite.ED25519_ML_DSA_65}


def test_an_issuer_can_be_replaced(kits):
    """What it signs fits the same root, and so does what the old one signed; another federation's is refused."""
    north = load_kit(kits / "north", role="site")
    old = north.tls().chain
    replace_issuer(kits / "authority", kits / "server")
    registry = Registry.open(kits / "server")
    assert registry.issuer.certificate == Registry.open(kits / "authority").issuer.certificate
    assert registry.issuer.certificate not in old
    install_certificate(
        kits / "north", registry.issue(read_csr(begin_renewal(kits / "north")), role="site", name="north")
    )
    assert registry.issuer.certificate in load_kit(kits / "north", role="site").tls().chain
    verify_chain(old, north.tls().root)
    assert (kits / "server/issuer.old-1/private.pem").is_file()
    with pytest.raises(KitError, match="authority's folder"):
        replace_issuer(kits / "authority", kits / "authority")


def test_another_federation_s_authority_is_refused(kits, tmp_path):
    """Before either folder changes."""
    provision(federation_of(), tmp_path / "other")
    before = contents(kits)
    with pytest.raises(KitError, match="another federation"):
        replace_issuer(tmp_path / "other/authority", kits / "server")
    assert contents(kits) == before
