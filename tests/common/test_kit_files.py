"""Writing kits: whole or not at all, for their owner only, and no key ever overwritten."""

import os
import stat
import tarfile

import pytest

from common.crypto import Authority, PartyKeys, generate_tls_key, peer_identity, read_csr
from common.errors import KitError, RefusedError
from common.kit import CHAIN, load_kit, read_pins
from common.kit_files import add_pins, begin_renewal, complete_kit, install_certificate, new_folder, put, write_archive
from common.kit_tls import NEXT_TLS_KEY, TLS_KEY
from server.provisioning import Registry
from tests.helpers.kits import copy_kits


@pytest.fixture
def kits(tmp_path):
    return copy_kits(tmp_path / "kits")


@pytest.fixture
def loose_umask():
    """As careless as an environment can be."""
    before = os.umask(0)
    yield
    os.umask(before)


def issued(kits, csr: bytes, name="north", role="site") -> bytes:
    return Registry.open(kits / "server").issue(read_csr(csr), role=role, name=name)


@pytest.mark.usefixtures("loose_umask")
def test_a_secret_is_for_its_owner_only(tmp_path):
    """Whatever the umask, also where a killed process left a readable file of that name behind."""
    (tmp_path / ".key.tmp").write_text("left behind")
    put(tmp_path / "key", b"secret", secret=True)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    assert (tmp_path / "key").read_bytes() == b"secret"


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    """What fails leaves nothing; what is there already is not touched."""
    with pytest.raises(KitError, match="nowhere"), new_folder(tmp_path / "kit") as folder:
        put(folder / "key" / "nowhere" / "key", b"secret", secret=True)
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "kit") as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        put(folder / "key", b"secret", secret=True)
    with pytest.raises(KitError, match="is there already"), new_folder(tmp_path / "kit"):
        pytest.fail("not entered")
    assert (tmp_path / "kit/key").read_bytes() == b"secret"


def test_a_full_disk_is_said(tmp_path):
    """Here: a file where a folder must be."""
    (tmp_path / "kits").write_text("")
    with pytest.raises(KitError, match="cannot be written"):
        put(tmp_path / "kits/key", b"")
    with pytest.raises(KitError, match="cannot be written"), new_folder(tmp_path / "kits/north"):
        pytest.fail("not entered")


def test_a_renewed_certificate_takes_the_old_one_s_place(kits):
    """With a new key; nothing of the old one stays."""
    folder = kits / "north"
    before = load_kit(folder, role="site").tls()
    install_certificate(folder, issued(kits, begin_renewal(folder)))
    after = load_kit(folder, role="site").tls()
    assert after.key != before.key
    assert peer_identity(after.chain).serial != peer_identity(before.chain).serial
    assert not (folder / NEXT_TLS_KEY).exists()


def test_an_interrupted_renewal_keeps_the_key_that_is_in_use(kits):
    """Killed between the certificate and its key: the next renewal does not overwrite that key."""
    folder = kits / "north"
    chain = issued(kits, begin_renewal(folder))
    (folder / CHAIN).write_bytes(chain)  # and no further
    in_use = load_kit(folder, role="site").tls().key
    begin_renewal(folder)
    tls = load_kit(folder, role="site").tls()
    assert (tls.chain, tls.key) == (chain, in_use)
    assert (folder / TLS_KEY).read_bytes() == in_use


def test_only_this_party_s_certificate_is_installed(kits):
    """Not one for another name, role or key, nor one from another root; the kit stays as it was."""
    folder = kits / "north"
    csr = begin_renewal(folder)
    before = load_kit(folder, role="site").tls()
    stranger = Authority.create("study").issuer.issue(read_csr(csr), role="site", name="north")
    other_key = Registry.open(kits / "server").issue(generate_tls_key().public_key(), role="site", name="north")
    cases = {
        "is for site `south`": issued(kits, csr, name="south"),
        "is for operator `north`": issued(kits, csr, role="operator"),
        "another key": other_key,
        "does not come from": stranger,
    }
    for match, chain in cases.items():
        with pytest.raises(KitError, match=match):
            install_certificate(folder, chain)
    for damaged in (b"", b"\xff", issued(kits, csr)[:900]):
        with pytest.raises(KitError, match="does not come from"):
            install_certificate(folder, damaged)
    assert load_kit(folder, role="site").tls() == before


def test_an_answer_cannot_exchange_root_or_pins(kits):
    """A kit that has them keeps them."""
    folder, kit = kits / "north", load_kit(kits / "north", role="site")
    chain = issued(kits, begin_renewal(folder))
    with pytest.raises(RefusedError, match="another root"):
        complete_kit(folder, server="x:1", root=Authority.create("study").root, chain=chain, pins=kit.pins())
    others = type(kit.pins()).of("study", [PartyKeys.generate("server", "coordinator").record, kit.keys.record])
    with pytest.raises(RefusedError, match="never replaced"):
        complete_kit(folder, server="x:1", root=kit.tls().root, chain=chain, pins=others)
    assert load_kit(folder, role="site").address == kit.address


def test_new_pins_are_added(kits):
    """And told, once."""
    west = PartyKeys.generate("west", "site").record
    assert add_pins(kits / "north", [west, *read_pins(kits / "north").records()]) == [west]
    assert add_pins(kits / "north", [west]) == []
    assert load_kit(kits / "north", role="site").sites["west"] == west


def test_an_archive_is_the_kit(kits, tmp_path):
    """Unpacked, it loads; the same kit gives the same bytes, without state, for its owner only."""
    kit = load_kit(kits / "north", role="site")
    (kit.state / "ledger").write_text("stays here")
    archive = kits / "north.tar.gz"
    first = archive.read_bytes()
    assert write_archive(kits / "north").read_bytes() == first
    assert stat.S_IMODE(archive.stat().st_mode) == 0o600
    with tarfile.open(archive) as tar:
        names = [member.name for member in tar.getmembers()]
        assert names == sorted(names)
        tar.extractall(tmp_path / "there", filter="data")
    there = load_kit(tmp_path / "there/north", role="site")
    assert there.keys.record == kit.keys.record
    assert there.tls() == kit.tls()
    assert not (tmp_path / "there/north/state").exists()
    assert stat.S_IMODE((tmp_path / "there/north" / TLS_KEY).stat().st_mode) == 0o600
