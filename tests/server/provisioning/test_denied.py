"""The deny list: read again at every question, and closed where it cannot be read."""

from datetime import UTC, datetime

import pytest

from common.crypto import PeerIdentity
from common.errors import KitError
from server.provisioning.denied import DENIED, Denied, allow, deny, names_serial, serial_entry

SERIAL = 0x5C28F95E4E93C9BA22210BDF5AE1446C00957A28


def identity(name="north", serial=SERIAL) -> PeerIdentity:
    now = datetime.now(UTC)
    return PeerIdentity(federation="study", role="site", name=name, serial=serial, not_before=now, not_after=now)


def test_an_entry_works_at_once(tmp_path):
    """By name all certificates of a party; the same list, without a restart, lets it in again."""
    denied = Denied(tmp_path / DENIED)
    assert not denied.refuses(identity())
    assert deny(tmp_path, "north")
    assert denied.refuses(identity(serial=1))
    assert denied.refuses_name("north")
    assert not denied.refuses(identity("south"))
    assert not deny(tmp_path, "north")
    assert allow(tmp_path, "north")
    assert not denied.refuses(identity())
    assert not allow(tmp_path, "north")


@pytest.mark.parametrize(
    "form", ["{:x}", "{:X}", "0x{:x}", "serial:{:x}", "5c:28:f9:5e:4e:93:c9:ba:22:21:0b:df:5a:e1:44:6c:00:95:7a:28"]
)
def test_a_serial_is_one_certificate(tmp_path, form):
    """However tools print it; the party's other certificates stay good."""
    denied, entry = Denied(tmp_path / DENIED), form.format(SERIAL)
    assert names_serial(entry)
    deny(tmp_path, entry)
    assert denied.refuses(identity())
    assert not denied.refuses(identity(serial=SERIAL + 1))
    assert allow(tmp_path, serial_entry(SERIAL))
    assert not denied.refuses(identity())


def test_a_name_that_looks_like_a_serial_is_shut_out_all_the_same(tmp_path):
    """What could be both counts as both."""
    deny(tmp_path, "deadbeefdeadbeef")
    assert Denied(tmp_path / DENIED).refuses(identity("deadbeefdeadbeef", serial=1))


def test_the_file_can_be_written_by_hand(tmp_path):
    """Comments, blank lines and blanks around a name; taking a name off keeps the comments."""
    (tmp_path / DENIED).write_text("# why\n\n  north  # left the study\nsouth\n")
    denied = Denied(tmp_path / DENIED)
    assert denied.refuses(identity("north"))
    assert denied.refuses(identity("south"))
    allow(tmp_path, "north")
    assert (tmp_path / DENIED).read_text() == "# why\n\nsouth\n"


def test_a_list_that_cannot_be_read_refuses_everybody(tmp_path):
    """Until it is mended; nobody slips in through a damaged file."""
    path = tmp_path / DENIED
    path.write_bytes(b"nor\xffth\n")
    denied = Denied(path)
    assert denied.refuses(identity("south"))
    assert denied.entries() is None
    with pytest.raises(KitError, match="everybody is refused"):
        deny(tmp_path, "south")
    path.write_text("north\n")
    assert not denied.refuses(identity("south"))
    path.unlink()
    path.mkdir()
    assert denied.refuses(identity("south"))


def test_a_byte_order_mark_hides_no_entry(tmp_path):
    """Some editors put one before the first line."""
    (tmp_path / DENIED).write_bytes("\ufeffnorth\n".encode())
    assert Denied(tmp_path / DENIED).refuses_name("north")
    assert not deny(tmp_path, "north")
    assert allow(tmp_path, "north")
    assert not Denied(tmp_path / DENIED).refuses_name("north")


def test_a_list_that_cannot_be_read_refuses_a_party_but_names_nobody(tmp_path):
    """Refusing can be taken back; ending a run cannot."""
    (tmp_path / DENIED).write_bytes(b"\xff\xfe")
    denied = Denied(tmp_path / DENIED)
    assert denied.refuses_name("north")
    assert not denied.names("north")
