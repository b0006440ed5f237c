"""A party's record is what others pin; its keys sign for one purpose, open what is wrapped, and show nowhere."""

import json
import pickle
import stat
from dataclasses import replace

import pytest

from common.crypto import PartyKeys, PartyRecord, SealError, Suite
from common.errors import KitError, RefusedError
from tests.common.crypto import reference as ref

PARTIES = ref.parties()
SITE, SITE_PQ = PARTIES["site-a"], PARTIES["site-pq"]


def layer_of(action) -> str:
    with pytest.raises(SealError) as refused:
        action()
    return refused.value.layer


class TestRecord:
    """What is public."""

    @pytest.mark.parametrize("keys", [SITE, SITE_PQ], ids=lambda k: k.record.name)
    def test_a_record_travels_as_json(self, keys):
        """It comes back the same, with the same key id."""
        found = PartyRecord.from_document(json.loads(json.dumps(keys.record.to_document())))
        assert found == keys.record
        assert found.key_id == keys.record.key_id

    @pytest.mark.parametrize(
        "change",
        [
            {"name": "site-b"},
            {"role": "operator"},
            {"suite": Suite.ED25519},
            {"ed25519": bytes(32)},
            {"ml_dsa": b""},
            {"ml_kem": bytes(1184)},
            {"x25519": bytes(32)},
        ],
        ids=str,
    )
    def test_a_key_id_depends_on_every_field(self, change):
        """The same keys under another name, role or suite are another party."""
        assert replace(SITE_PQ.record, **change).key_id != SITE_PQ.record.key_id

    def test_fields_cannot_run_into_each_other(self):
        """What leaves one field and enters the next makes another key id."""
        one = replace(SITE.record, ml_dsa=b"ab", ml_kem=b"c")
        other = replace(SITE.record, ml_dsa=b"a", ml_kem=b"bc")
        assert one.key_id != other.key_id

    @pytest.mark.parametrize(
        "change",
        [
            {"version": 2},
            {"name": "../site"},
            {"name": "site-a\n"},
            {"name": ""},
            {"role": "root"},
            {"suite": 3},
            {"suite": 2},  # without the key that it needs
            {"ed25519": ""},
            {"ed25519": "not base64"},
            {"ed25519": "\ud800"},
            {"ml_dsa": "AAAA"},
            {"ml_kem": "AAAA"},
            {"x25519": "A" * 43 + "="},  # zeros: agrees on nothing with anybody
            {"more": 1},
            {"name": None},
        ],
        ids=str,
    )
    def test_a_damaged_record_is_refused(self, change):
        """Nothing half right is ever pinned."""
        with pytest.raises(RefusedError, match="record is damaged"):
            PartyRecord.from_document(SITE.record.to_document() | change)

    @pytest.mark.parametrize("document", [[], None, "x", {}, [[1, 2]], {1: 2}], ids=str)
    def test_what_is_no_record_is_refused(self, document):
        """JSON of any shape."""
        with pytest.raises(RefusedError, match="record is damaged"):
            PartyRecord.from_document(document)

    def test_a_record_of_ed25519_has_no_other_key(self):
        """Suite and keys say the same."""
        document = SITE_PQ.record.to_document() | {"suite": 1}
        with pytest.raises(RefusedError):
            PartyRecord.from_document(document)

    def test_keys_do_not_fill_a_log(self):
        """A record's repr is short."""
        assert repr(SITE.record) == "PartyRecord(name='site-a', role='site', suite=<Suite.ED25519: 1>)"


class TestSignatures:
    """One signature, one party, one purpose."""

    @pytest.mark.parametrize(("keys", "length"), [(SITE, 64), (SITE_PQ, 64 + 3309)])
    def test_a_signature_verifies(self, keys, length):
        """Its length is that of its suite."""
        signature = keys.sign(b"label", b"message")
        assert len(signature) == length == keys.record.suite.signature_bytes
        keys.record.verify(b"label", b"message", signature)

    @pytest.mark.parametrize("keys", [SITE, SITE_PQ], ids=lambda k: k.record.name)
    def test_it_verifies_for_nothing_else(self, keys):
        """Another purpose, another message, another spelling of the two, or a changed signature."""
        verify, signature = keys.record.verify, keys.sign(b"label", b"message")
        assert layer_of(lambda: verify(b"other", b"message", signature)) == "signature"
        assert layer_of(lambda: verify(b"label", b"another", signature)) == "signature"
        assert layer_of(lambda: verify(b"labelm", b"essage", signature)) == "signature"
        assert layer_of(lambda: verify(b"label", b"message", signature + b"\0")) == "signature"
        assert layer_of(lambda: verify(b"label", b"message", b"")) == "signature"
        for at in (0, 63, len(signature) - 1):
            assert layer_of(lambda at=at: verify(b"label", b"message", ref.flip(signature, at))) == "signature"

    def test_both_signatures_are_required(self):
        """Neither of the two stands for the other."""
        signature = SITE_PQ.sign(b"label", b"message")
        for part in (signature[:64], signature[64:], signature[:64] * 2, signature[:64] + bytes(3309)):
            assert layer_of(lambda part=part: SITE_PQ.record.verify(b"label", b"message", part)) == "signature"

    def test_the_same_keys_in_another_role_sign_something_else(self):
        """A signature is bound to the whole record: a site's says nothing for an operator with the same key."""
        signature = SITE.sign(b"label", b"message")
        operator = replace(SITE.record, role="operator")
        assert layer_of(lambda: operator.verify(b"label", b"message", signature)) == "signature"


class TestWrap:
    """Keys for one party and one context."""

    def test_a_wrapped_key_opens_for_its_party_and_context(self):
        """And for no other."""
        wrapped = SITE.record.wrap(b"k" * 32, b"context")
        assert SITE.unwrap(wrapped, b"context") == b"k" * 32
        assert layer_of(lambda: SITE.unwrap(wrapped, b"other")) == "wrap"
        assert layer_of(lambda: SITE_PQ.unwrap(wrapped, b"context")) == "wrap"
        assert layer_of(lambda: SITE.unwrap(wrapped[:-1], b"context")) == "wrap"
        assert layer_of(lambda: SITE.unwrap(b"", b"context")) == "wrap"

    @pytest.mark.parametrize("at", [0, 1087, 1088, 1119, 1120, 1167])
    def test_both_halves_of_the_hybrid_are_needed(self, at):
        """A change in the ML-KEM part, the X25519 part or the encrypted key is noticed."""
        wrapped = ref.flip(SITE.record.wrap(b"k" * 32, b"context"), at)
        assert layer_of(lambda: SITE.unwrap(wrapped, b"context")) == "wrap"

    def test_a_key_that_agrees_on_nothing_is_refused(self):
        """All-zero X25519 keys would leave ML-KEM alone."""
        assert layer_of(lambda: replace(SITE.record, x25519=bytes(32)).wrap(b"k" * 32, b"")) == "wrap"


class TestFiles:
    """Keys on a disk."""

    @pytest.mark.parametrize("suite", Suite)
    def test_keys_are_read_as_they_were_written(self, tmp_path, suite):
        """The same record, and signatures that verify."""
        keys = PartyKeys.generate("north", "site", suite=suite)
        keys.save(tmp_path / "identity")
        found = PartyKeys.load(tmp_path / "identity")
        assert found.record == keys.record
        keys.record.verify(b"label", b"message", found.sign(b"label", b"message"))

    def test_only_their_owner_can_read_them(self, tmp_path):
        """Files 0600 in a folder 0700, also where the folder was there before."""
        folder = tmp_path / "identity"
        folder.mkdir(mode=0o755)
        SITE.save(folder)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert {path.name for path in folder.iterdir()} == {"private.json", "record.json"}
        assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}

    @pytest.mark.parametrize("left", ["private.json", "record.json"])
    def test_keys_are_never_overwritten(self, tmp_path, left):
        """A lost identity cannot be made again; neither file is touched where one is there."""
        (tmp_path / left).write_text("precious")
        with pytest.raises(KitError, match=r"already"):
            SITE.save(tmp_path)
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {left: "precious"}

    def test_a_failed_write_leaves_nothing(self, tmp_path, monkeypatch):
        """Half a key would stand in the way of a whole one."""

        def full(_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(KitError, match="No space left"):
            SITE.save(tmp_path)
        assert not list(tmp_path.iterdir())

    def test_a_folder_that_cannot_be_made_is_named(self, tmp_path):
        """The message says which path it is."""
        (tmp_path / "file").write_text("")
        with pytest.raises(KitError, match="file"):
            SITE.save(tmp_path / "file" / "identity")

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("private.json", None),
            ("record.json", None),
            ("private.json", b""),
            ("private.json", b"[]"),
            ("private.json", b"{}"),
            ("private.json", b"\xff"),
            ("private.json", b"[" * 100_000),
            ("record.json", b"{}"),
            ("record.json", json.dumps(SITE_PQ.record.to_document()).encode()),  # somebody else's
        ],
        ids=lambda value: str(value)[:20],
    )
    def test_damaged_files_are_refused(self, tmp_path, name, content):
        """Missing, empty, foreign, or of two parties."""
        SITE.save(tmp_path)
        (tmp_path / name).unlink()
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(KitError, match="missing or damaged"):
            PartyKeys.load(tmp_path)

    def test_a_name_is_a_name(self):
        """Names become parts of URIs and paths."""
        with pytest.raises(RefusedError, match="name"):
            PartyKeys.generate("../north", "site")


class TestSecrets:
    """Keys stay where they are."""

    def test_no_seed_is_in_a_repr(self):
        """Logs and tracebacks show reprs."""
        assert repr(SITE) == "PartyKeys(name='site-a', role='site')"

    def test_keys_reach_a_worker_process(self):
        """Simulations hand them to their own processes; nothing else ever pickles."""
        again = pickle.loads(pickle.dumps(SITE_PQ))  # noqa: S301
        assert again.record == SITE_PQ.record
        SITE_PQ.record.verify(b"label", b"message", again.sign(b"label", b"message"))

    def test_two_parties_never_share_keys(self):
        """Seeds come from the operating system."""
        one, other = (PartyKeys.generate("north", "site") for _ in range(2))
        assert not {one.record.ed25519, one.record.x25519} & {other.record.ed25519, other.record.x25519}
        assert one.record.ml_kem != other.record.ml_kem


def test_a_refusal_names_its_layer_and_travels():
    """Worker processes hand errors on; a peer never sees one."""
    error = pickle.loads(pickle.dumps(SealError("digest", hint="look")))  # noqa: S301
    assert (error.layer, error.hint, error.code, error.exit_code) == ("digest", "look", "seal-refused", 10)
    assert str(error) == str(SealError("digest"))
    assert str(SealError("sender", "nobody")) == "nobody"
