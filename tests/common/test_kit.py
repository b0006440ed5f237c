"""Reading kits: what they hold, and what is said where something is missing, damaged or of another party."""

import json
import shutil
import stat

import pytest

from common import kit_tls
from common.cli import main
from common.crypto import PartyKeys, peer_identity
from common.errors import KitError
from common.kit import CHAIN, UNCONFIRMED, load_kit
from common.kit_files import begin_renewal
from common.kit_tls import NEXT_TLS_KEY, TLS_KEY
from tests.helpers.kits import copy_kits


@pytest.fixture
def kits(tmp_path):
    return copy_kits(tmp_path / "kits")


def test_a_kit_holds_its_party_s_keys_and_everybody_s_records(kits):
    """Both ends of the federation pin the same records."""
    site, server = load_kit(kits / "north", role="site"), load_kit(kits / "server", role="coordinator")
    assert (site.federation, site.name, site.role, site.address) == ("study", "north", "site", "localhost:8471")
    assert site.keys.record == server.sites["north"]
    assert site.coordinator == server.keys.record
    assert sorted(site.sites) == ["north", "south"]
    assert list(site.operators) == ["alice"]
    identity = peer_identity(site.tls().chain)
    assert (identity.federation, identity.role, identity.name) == ("study", "site", "north")
    assert site.certificate() == identity


def test_its_secrets_do_not_show(kits):
    """Neither a kit nor its TLS part prints a key."""
    kit = load_kit(kits / "north", role="site")
    shown = repr(kit) + repr(kit.tls())
    assert "PRIVATE" not in shown
    assert (kits / "north/tls/private.pem").read_text().splitlines()[1] not in shown


def test_state_is_made_when_it_is_used(kits):
    """For this user only."""
    kit = load_kit(kits / "north", role="site")
    assert not (kits / "north/state").exists()
    assert stat.S_IMODE(kit.state.stat().st_mode) == 0o700


@pytest.mark.parametrize(("name", "role"), [("north", "coordinator"), ("server", "site"), ("alice", "site")])
def test_another_role_s_kit_is_refused(kits, name, role):
    """With both roles in the message."""
    with pytest.raises(KitError, match=r"is the kit of .*, not of "):
        load_kit(kits / name, role=role)
    assert load_kit(kits / name, role=None).name == name


def test_the_authority_s_folder_is_no_kit(kits):
    """Whatever role is asked for."""
    with pytest.raises(KitError, match="kit of the authority, not of a party"):
        load_kit(kits / "authority", role=None)


FILES = ["kit.toml", "ca.pem", "parties.json", "identity/private.json", "identity/record.json", CHAIN, TLS_KEY]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    "text", [None, "", "{}", "\xff\x00", "[" * 100_000], ids=["gone", "empty", "other", "bytes", "deep"]
)
def test_what_is_missing_or_damaged_is_named(kits, file, text):
    """One error with the file, or its folder, and a hint; never a traceback."""
    path = kits / "north" / file
    path.unlink() if text is None else path.write_bytes(text.encode("latin1"))
    with pytest.raises(KitError) as caught:
        load_kit(kits / "north", role="site")
    assert str(path.parent) in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("file", ["tls", "identity", "parties.json"])
def test_parts_of_another_party_are_refused(kits, file):
    """A certificate, identity or list of records from elsewhere does not make this party another."""
    target, source = kits / "north" / file, kits / "south" / file
    if target.is_dir():
        shutil.rmtree(target)
        shutil.copytree(source, target)
    else:
        other = PartyKeys.generate("north", "site").record.to_document()["ed25519"]
        own = load_kit(kits / "north", role="site").keys.record.to_document()["ed25519"]
        target.write_text(target.read_text().replace(own, other))
    with pytest.raises(KitError, match=r"another party's|not those that"):
        load_kit(kits / "north", role="site")


@pytest.mark.parametrize("secret", ["identity/private.json", TLS_KEY])
def test_a_secret_that_everybody_can_read_is_refused(kits, secret):
    """A copy that lost its permissions; a group may read, since services often run as a user of their own."""
    path = kits / "north" / secret
    path.chmod(0o640)
    load_kit(kits / "north", role="site")
    path.chmod(0o644)
    with pytest.raises(KitError, match="everybody on this machine") as caught:
        load_kit(kits / "north", role="site")
    assert caught.value.hint == f"chmod -R o= {kits / 'north'}"


def test_a_renewal_can_be_interrupted_anywhere(kits):
    """Before the new certificate comes the old one serves; between its two files, the new one with its key."""
    folder = kits / "north"
    before = load_kit(folder, role="site").tls()
    begin_renewal(folder)
    assert load_kit(folder, role="site").tls() == before
    (folder / TLS_KEY).replace(folder / NEXT_TLS_KEY)  # as after a kill: the chain is of the key that is still `next`
    assert load_kit(folder, role="site").tls().key == before.key


def test_a_key_that_moves_while_it_is_looked_for_is_found(kits, monkeypatch):
    """A renewal ends in another thread: the next key takes its place between two looks."""
    folder = kits / "north"
    before = load_kit(folder, role="site").tls()
    begin_renewal(folder)
    asked = (folder / NEXT_TLS_KEY).read_bytes()
    (folder / TLS_KEY).replace(folder / NEXT_TLS_KEY)  # the chain is of the key that is still `next`
    (folder / TLS_KEY).write_bytes(asked)
    belongs = kit_tls._belongs

    def moved(text, path, chain):
        found = belongs(text, path, chain)
        if (folder / NEXT_TLS_KEY).exists():
            (folder / NEXT_TLS_KEY).replace(folder / TLS_KEY)
        return found

    monkeypatch.setattr(kit_tls, "_belongs", moved)
    assert kit_tls.read_tls(folder) == before


def test_keys_and_certificate_belong_together(kits):
    """A certificate without its key is damage."""
    (kits / "north" / TLS_KEY).write_bytes((kits / "south" / TLS_KEY).read_bytes())
    with pytest.raises(KitError, match="is not the key of"):
        load_kit(kits / "north", role="site")


def test_the_command_line_ends_with_11(kits, capsys):
    """And says which folder, and what makes kits."""
    with pytest.raises(SystemExit) as caught:
        main(["provision", "show", "--kit", str(kits / "nobody")])
    assert caught.value.code == 11
    assert "there is no folder" in (error := capsys.readouterr().err)
    assert "hint: `coterie provision`" in error


class TestUnconfirmed:
    """Which pins came through the coordinator, and were not compared since."""

    def test_nobody_in_a_kit_that_was_provisioned(self, tmp_path):
        """Its maker knew everybody."""
        kit = load_kit(copy_kits(tmp_path / "kits") / "north", role="site")
        assert kit.unconfirmed == frozenset()
        assert kit.agreed_sites == kit.sites

    def test_is_read_with_the_pins(self, tmp_path):
        """Also by a process that has the kit already."""
        kits = copy_kits(tmp_path / "kits")
        kit = load_kit(kits / "north", role="site")
        key_id = kit.sites["south"].key_id
        (kits / "north" / UNCONFIRMED).write_text(json.dumps({"format": 1, "key_ids": [key_id.hex()]}))
        for read in (load_kit(kits / "north", role="site"), kit.reloaded()):
            assert read.unconfirmed == {key_id}
            assert set(read.agreed_sites) == {"north"}

    @pytest.mark.parametrize("text", ["", "{}", "[]", '{"format":2,"key_ids":[]}', '{"format":1,"key_ids":["x"]}'])
    def test_a_damaged_list_is_an_error(self, tmp_path, text):
        """Nobody is trusted because a file cannot be read."""
        kits = copy_kits(tmp_path / "kits")
        (kits / "north" / UNCONFIRMED).write_text(text)
        with pytest.raises(KitError, match="damaged"):
            load_kit(kits / "north", role="site")
