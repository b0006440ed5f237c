"""Which ledger is whose: a data set keeps its own, however it is edited or renamed."""

import stat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.ledgers import SiteLedgers
from common.errors import BudgetExhaustedError, LedgerError
from tests.helpers.events import non_private, sampled
from tests.helpers.ledgers import ROOMY, room_for


@pytest.fixture
def site(tmp_path):
    """A site without ledgers."""
    return SiteLedgers(tmp_path / "ledger", tmp_path / "identity", ROOMY)


def opened(site, name, content, **fields):
    return site.open(name, site.fingerprint([content]), **fields)


class TestOneLedgerADataSet:
    """Neither an edit nor a new name gives a data set a new budget."""

    def test_two_data_sets_have_two_ledgers(self, site):
        """Each with its own events."""
        opened(site, "icu", b"1").reserve(sampled(), planned=1)
        assert opened(site, "ward", b"2").events() == []
        assert site.names() == ["icu", "ward"]

    def test_an_edited_data_set_keeps_its_ledger(self, site):
        """By its name; and from then on the new content leads to it, too."""
        opened(site, "icu", b"1").reserve(sampled(), planned=1)
        assert opened(site, "icu", b"1 and more").events() == [sampled()]
        assert opened(site, "other", b"1 and more").events() == [sampled()]

    def test_a_renamed_data_set_keeps_its_ledger(self, site):
        """By its content; and from then on the new name leads to it, whatever becomes of the content."""
        opened(site, "icu", b"1").reserve(sampled(), planned=1)
        assert opened(site, "icu-2026", b"1").events() == [sampled()]
        assert opened(site, "icu-2026", b"edited").events() == [sampled()]
        assert site.names() == ["icu"]

    def test_all_names_and_fingerprints_are_on_record(self, site):
        """Once each."""
        for _ in range(2):
            opened(site, "icu", b"1")
            opened(site, "icu-2026", b"1")
        standing = opened(site, "icu", b"2").standing()
        assert standing.names == {"icu", "icu-2026"}
        assert standing.fingerprints == {site.fingerprint([b"1"]), site.fingerprint([b"2"])}
        assert len(opened(site, "icu", b"2").records()) == 3

    def test_a_data_set_that_matches_two_ledgers_is_refused(self, site):
        """The name of one, the content of another: both would have to pay."""
        opened(site, "icu", b"1")
        opened(site, "ward", b"2")
        with pytest.raises(LedgerError, match="icu and ward") as caught:
            opened(site, "icu", b"2")
        assert "register" in caught.value.hint

    def test_a_new_data_set_waits_while_a_ledger_cannot_be_read(self, site, tmp_path):
        """It might be its own, under another name; data sets that are known go on."""
        opened(site, "icu", b"1").reserve(sampled(), planned=1)
        opened(site, "ward", b"2").reserve(sampled(), planned=1)
        (tmp_path / "ledger" / "icu.jsonl").unlink()
        with pytest.raises(LedgerError, match=r"icu\.jsonl"):
            opened(site, "new", b"3")
        with pytest.raises(LedgerError, match=r"icu\.jsonl"):
            opened(site, "icu", b"1")
        assert opened(site, "ward", b"2").events() == [sampled()]
        assert site.names() == ["icu", "ward"]

    def test_a_ledger_of_rows_is_no_ledger_of_entities(self, site):
        """What was released then protects no patient with two rows."""
        opened(site, "icu", b"1")
        with pytest.raises(LedgerError, match="counts each example"):
            opened(site, "icu", b"1", unit="entity")
        assert opened(site, "patients", b"2", unit="entity").standing().unit == "entity"

    def test_a_new_ledger_opens_with_the_sites_budget_and_keeps_it(self, site, tmp_path):
        """Also when the site's rules change for ledgers to come."""
        opened(site, "icu", b"1")
        later = SiteLedgers(tmp_path / "ledger", tmp_path / "identity", room_for([sampled()]))
        assert opened(later, "icu", b"1").budget == ROOMY
        assert opened(later, "ward", b"2").budget == room_for([sampled()])

    def test_releases_without_noise_are_for_the_site_to_permit(self, site, tmp_path):
        """For all of its data sets."""
        with pytest.raises(BudgetExhaustedError):
            opened(site, "icu", b"1").reserve(non_private(), planned=1)
        open_site = SiteLedgers(tmp_path / "ledger", tmp_path / "identity", ROOMY, allow_non_private=True)
        opened(open_site, "icu", b"1").reserve(non_private(), planned=1)

    @pytest.mark.parametrize("name", ["", "../icu", "a/b", ".salt", "x" * 65, "icu\n"])
    def test_what_is_no_name_is_refused(self, site, name):
        """A name becomes part of a path."""
        with pytest.raises(LedgerError, match="no data set's name"):
            site.named(name)


class TestFingerprints:
    """Content is known by a digest that only this site can compute."""

    @settings(deadline=None)
    @given(st.binary(max_size=40), st.integers(0, 40))
    def test_chunks_leave_no_trace(self, tmp_path_factory, content, cut):
        """However the content is read."""
        folder = tmp_path_factory.mktemp("site")
        site = SiteLedgers(folder / "ledger", folder / "identity", ROOMY)
        assert site.fingerprint([content]) == site.fingerprint([content[:cut], b"", content[cut:]])

    def test_another_site_computes_another(self, site, tmp_path):
        """An exported ledger does not confirm a guess of the data."""
        other = SiteLedgers(tmp_path / "b" / "ledger", tmp_path / "b" / "identity", ROOMY)
        assert site.fingerprint([b"1"]) != other.fingerprint([b"1"])
        assert site.fingerprint([b"1"]) != site.fingerprint([b"2"])

    def test_the_salt_is_drawn_once_and_secret(self, site, tmp_path):
        """Readable by its owner alone, and in no ledger."""
        one = site.fingerprint([b"1"])
        path = tmp_path / "identity" / "ledgers" / "salt"
        salt = path.read_bytes()
        opened(site, "icu", b"1")
        assert SiteLedgers(tmp_path / "ledger", tmp_path / "identity", ROOMY).fingerprint([b"1"]) == one
        assert (len(salt), stat.S_IMODE(path.stat().st_mode)) == (32, 0o600)
        assert salt.hex().encode() not in (tmp_path / "ledger" / "icu.jsonl").read_bytes()
        assert [p.name for p in path.parent.iterdir() if ".tmp" in p.name] == []

    def test_a_salt_that_is_gone_is_not_replaced_while_there_are_ledgers(self, site, tmp_path):
        """With another one, renamed data would find a new budget."""
        opened(site, "icu", b"1")
        (tmp_path / "identity" / "ledgers" / "salt").unlink()
        with pytest.raises(LedgerError, match="missing") as caught:
            site.fingerprint([b"1"])
        assert "restore" in caught.value.hint

    def test_a_damaged_salt_is_refused(self, site, tmp_path):
        """It has 32 bytes."""
        site.fingerprint([b"1"])
        (tmp_path / "identity" / "ledgers" / "salt").write_bytes(b"short")
        with pytest.raises(LedgerError, match="damaged"):
            site.fingerprint([b"1"])

    def test_a_place_that_cannot_be_written_is_refused(self, tmp_path):
        """A file where the folder should be."""
        (tmp_path / "file").write_text("")
        site = SiteLedgers(tmp_path / "ledger", tmp_path / "file", ROOMY)
        with pytest.raises(LedgerError):
            site.fingerprint([b"1"])
