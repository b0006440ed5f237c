"""`coterie enroll`: a party joins with keys that it made itself, by hand or with a token over the wire."""

import io
import json
import stat

import pytest

from common.cli import main
from common.crypto import PartyKeys
from common.enrolment import Answer, Request, Token, federation_fingerprint
from common.errors import CoterieError
from common.kit import load_kit
from common.kit_files import add_pins
from common.kit_tls import NEXT_TLS_KEY
from common.pins import Pins
from server.plane.hub import Hub
from server.plane.server import PlaneServer
from server.provisioning import Registry, make_token, sign
from server.provisioning.denied import deny
from tests.helpers.kits import copy_kits


@pytest.fixture
def at(tmp_path, monkeypatch):
    """The administrator's kits, and the folder in which commands run."""
    copy_kits(tmp_path / "kits")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def enroll(capsys):
    """Runs `coterie enroll ...`: exit code, stdout, stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        try:
            main(["enroll", *map(str, words)])
        except SystemExit as e:
            return int(e.code or 0), *capsys.readouterr()
        raise AssertionError

    return run


@pytest.fixture
def plane(at):
    """A coordinator that listens; its kit says where."""
    kit = load_kit(at / "kits/server", role="coordinator")
    with PlaneServer(kit, host="127.0.0.1", port=0, hub=Hub(kit.state)) as server:
        path = kit.folder / "kit.toml"
        path.write_text(path.read_text().replace("localhost:8471", f"127.0.0.1:{server.port}"))
        yield kit


def begun(enroll, name="west", **options):
    """A kit that waits, and the text of its request."""
    words = [word for key, value in options.items() for word in (f"--{key}", value)]
    code, out, error = enroll(name, "--federation", "study", "--out", name, *words)
    assert code == 0, error
    return out


def answered(at, whose="west", **change):
    """What the administrator answers."""
    request = Request.from_text((at / whose / "request.json").read_text())
    answer, _ = sign(Registry.open(at / "kits/server"), request)
    (at / "answer.json").write_text(answer.model_copy(update=change).to_text())
    return answer


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_token(at, name="west", **options):
    token = make_token(at / "kits/server", name, **options)
    (at / "token").write_text(token.encode())
    return token


def test_a_request_holds_no_private_key(at, enroll):
    """Neither the file nor what is printed; the keys are for their owner."""
    out = begun(enroll)
    private = [at / "west/identity/private.json", at / "west" / NEXT_TLS_KEY]
    assert {stat.S_IMODE(path.stat().st_mode) for path in private} == {0o600}
    seeds = [seed for seed in json.loads(private[0].read_text()).values() if isinstance(seed, str)]
    lines = private[1].read_text().splitlines()[1:3]  # the third holds the public key alone
    said = out + (at / "west/request.json").read_text()
    assert len(seeds) == 4
    assert [secret for secret in seeds + lines if secret in said] == []
    assert "PRIVATE" not in said


def test_an_answer_completes_the_kit(at, enroll):
    """Which then loads, and pins whom the administrator's kit pins."""
    begun(enroll)
    with pytest.raises(CoterieError, match="waits for its certificate"):
        load_kit(at / "west", role="site")
    answered(at)
    code, out, hints = enroll("--answer", "answer.json", "--kit", "west")
    assert code == 0
    kit, server = load_kit(at / "west", role="site"), load_kit(at / "kits/server", role="coordinator")
    assert kit.pins() == server.pins()
    assert kit.coordinator == server.keys.record
    assert federation_fingerprint(server.tls().root, server.pins()) in out
    assert "compare the fingerprint" in hints
    assert not (at / "west/request.json").exists()


def test_operators_enrol_too(at, enroll):
    """With their own role, and the federation's suite where it is another."""
    begun(enroll, "carol", role="operator")
    answered(at, "carol")
    assert enroll("--answer", "answer.json", "--kit", "carol")[0] == 0
    assert load_kit(at / "carol", role="operator").name == "carol"


@pytest.mark.parametrize(
    "change", [{"name": "east"}, {"federation": "other"}, {"chain": ""}, {"root": ""}, {"parties": "{}"}], ids=str
)
def test_a_wrong_answer_changes_nothing(at, enroll, change):
    """For another party, or damaged: refused, and the right one still completes the kit."""
    begun(enroll)
    right = answered(at, **change)
    before = files(at / "west")
    code, _, error = enroll("--answer", "answer.json", "--kit", "west")
    assert code in {10, 11}
    assert "hint:" in error
    assert files(at / "west") == before
    (at / "answer.json").write_text(right.to_text())
    assert enroll("--answer", "answer.json", "--kit", "west")[0] == 0


def test_a_fingerprint_that_was_read_out_is_enforced(at, enroll):
    """Another federation's answer, with the same names, is refused."""
    begun(enroll)
    answered(at)
    before = files(at / "west")
    assert enroll("--answer", "answer.json", "--kit", "west", "--fingerprint", "00" * 16)[0] == 10
    assert files(at / "west") == before


def test_an_operator_that_was_added_on_the_way_does_not_fit_the_fingerprint(at, enroll):
    """Who pins an operator accepts the runs that this one signs: what is read out covers them all."""
    begun(enroll)
    answer = answered(at)
    right = federation_fingerprint(answer.root.encode(), Pins.from_text(answer.parties))
    eve = PartyKeys.generate("eve", "operator").record
    forged = answer.model_copy(update={"parties": Pins.from_text(answer.parties).plus([eve]).to_text()})
    (at / "answer.json").write_text(forged.to_text())
    before = files(at / "west")
    assert enroll("--answer", "answer.json", "--kit", "west", "--fingerprint", right)[0] == 10
    assert files(at / "west") == before
    (at / "answer.json").write_text(answer.to_text())
    assert enroll("--answer", "answer.json", "--kit", "west", "--fingerprint", right)[0] == 0


def test_a_token_pins_whom_it_names(at, enroll, plane):
    """Who joined since is pinned by hand, as at every other site that was there before."""
    write_token(at)
    eve = PartyKeys.generate("eve", "operator").record
    add_pins(at / "kits/server", [eve])
    code, _, error = enroll("--token", "token", "--out", "west")
    assert code == 0, error
    pins = load_kit(at / "west", role="site").pins()
    assert "eve" not in pins.operators
    assert pins.plus([eve]) == plane.pins()


def test_an_answer_with_other_keys_for_this_party_is_refused(at, enroll):
    """Somebody else took the name: the kit does not pass for them."""
    begun(enroll)
    first = answered(at)
    (at / "west").rename(at / "first")
    begun(enroll)
    (at / "answer.json").write_text(first.to_text())
    code, _, error = enroll("--answer", "answer.json", "--kit", "west")
    assert code == 10
    assert "other keys" in error


def test_an_expired_certificate_is_replaced_by_hand(at, enroll):
    """With the keys that are pinned: nobody has to learn of it."""
    before = load_kit(at / "kits/north", role="site")
    serial = before.certificate().serial
    assert enroll("--kit", "kits/north")[0] == 0
    answered(at, "kits/north")
    code, out, _ = enroll("--answer", "answer.json", "--kit", "kits/north", "--json")
    assert code == 0
    assert json.loads(out)["name"] == "north"
    after = load_kit(at / "kits/north", role="site")
    assert after.keys.record == before.keys.record
    assert after.certificate().serial != serial


def test_keys_are_never_overwritten(at, enroll):
    """A folder that is there is left alone."""
    begun(enroll)
    before = files(at / "west")
    code, _, error = enroll("west", "--federation", "study", "--out", "west")
    assert code == 11
    assert "is there already" in error
    assert files(at / "west") == before


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["west"],
        ["west", "--federation", "study"],
        ["--token", "token"],
        ["--answer", "answer.json"],
        ["west", "--token", "token", "--out", "west"],
        ["--answer", "answer.json", "--kit", "west", "--out", "west"],
    ],
    ids=" ".join,
)
def test_options_that_do_not_fit_are_said(at, enroll, words):
    """As mistakes on the command line."""
    assert enroll(*words)[0] == 2


def test_a_token_enrols_over_the_wire(at, enroll, plane):
    """In one go: keys here, certificate and pins from the coordinator; the token is void then."""
    write_token(at)
    code, out, error = enroll("--token", "token", "--out", "west")
    assert code == 0, error
    kit = load_kit(at / "west", role="site")
    assert plane.reloaded().sites["west"] == kit.keys.record
    assert kit.pins() == plane.pins()
    assert "PRIVATE" not in out + error
    code, _, error = enroll("--token", "token", "--out", "again")
    assert code == 10
    assert "it was used" in error


def test_a_token_can_be_read_from_stdin(at, enroll, plane, monkeypatch):
    """So that it need not be a file here."""
    monkeypatch.setattr("sys.stdin", io.StringIO(write_token(at, role="operator").encode() + "\n"))
    code, out, error = enroll("--token", "-", "--out", "west", "--json")
    assert code == 0, error
    assert json.loads(out)["role"] == "operator"


def test_a_denied_name_does_not_enrol(at, enroll, plane):
    """Refused at the door; the kit keeps its keys, and the same token serves once the name is allowed."""
    write_token(at)
    deny(plane.folder, "west")
    assert enroll("--token", "token", "--out", "west")[0] == 10
    keys = (at / "west/identity/private.json").read_bytes()
    (plane.folder / "denied.txt").unlink()
    assert enroll("--token", "token", "--out", "west")[0] == 0
    assert (at / "west/identity/private.json").read_bytes() == keys


def test_a_coordinator_that_does_not_answer_is_said(at, enroll):
    """With exit code 12; the keys stay for another attempt."""
    token = write_token(at)
    (at / "token").write_text(token.model_copy(update={"server": "127.0.0.1:1"}).encode())
    code, _, error = enroll("--token", "token", "--out", "west")
    assert code == 12
    assert "did not answer" in error
    assert (at / "west/identity/private.json").is_file()


def test_another_coordinator_than_the_token_s_is_refused(at, enroll, plane):
    """Its own record stands in the token: TLS alone does not say who opens what is sealed."""
    token = write_token(at)
    (at / "token").write_text(token.model_copy(update={"coordinator": "00" * 32}).encode())
    code, _, error = enroll("--token", "token", "--out", "west")
    assert code == 10
    assert "another coordinator" in error


def test_a_token_does_not_take_another_s_folder(at, enroll):
    """Nor one that is complete."""
    write_token(at)
    for folder in ("kits/north", "kits/server"):
        before = files(at / folder)
        assert enroll("--token", "token", "--out", folder)[0] == 11
        assert files(at / folder) == before


@pytest.mark.parametrize("text", ["", "coterie-token-1.", "coterie-token-1.e30=", "hello"])
def test_what_is_no_token_is_said(at, enroll, text):
    """Without quoting it."""
    (at / "token").write_text(text)
    code, _, error = enroll("--token", "token", "--out", "west")
    assert code == 10
    assert "this is no enrolment token" in error
    assert not (at / "west").exists()


def test_files_of_one_kind_are_not_taken_for_another(at):
    """A request is no answer, and a token neither."""
    token = write_token(at)
    for kind in (Answer, Token):
        with pytest.raises(CoterieError):
            kind.from_text(token.encode())


class TestWhoIsAgreedOn:
    """Keys that came through the coordinator count for sums once somebody has compared them."""

    def unconfirmed(self, at):
        kit = load_kit(at / "west", role="site")
        return {record.name for record in kit.pins().records() if record.key_id in kit.unconfirmed}

    def test_an_answer_whose_fingerprint_was_read_out_is_agreed_on(self, at, enroll):
        """By people, over another way."""
        begun(enroll)
        answer = answered(at)
        right = federation_fingerprint(answer.root.encode(), Pins.from_text(answer.parties))
        assert enroll("--answer", "answer.json", "--kit", "west", "--fingerprint", right)[0] == 0
        assert self.unconfirmed(at) == set()
        kit = load_kit(at / "west", role="site")
        assert kit.agreed_sites == kit.sites

    def test_what_was_never_compared_is_not(self, at, enroll):
        """All but this party's own record; the hint says what to do."""
        begun(enroll)
        answered(at)
        code, _, error = enroll("--answer", "answer.json", "--kit", "west")
        assert code == 0
        assert "--fingerprint" in error
        assert self.unconfirmed(at) == {"server", "north", "south", "alice"}
        assert set(load_kit(at / "west", role="site").agreed_sites) == {"west"}

    @pytest.mark.usefixtures("plane")
    def test_nor_what_a_token_brought(self, at, enroll):
        """A token is made where the coordinator is."""
        write_token(at)
        assert enroll("--token", "token", "--out", "west")[0] == 0
        assert "north" in self.unconfirmed(at)

    def test_it_can_be_compared_later(self, at, enroll):
        """With what others read; another fingerprint confirms nothing."""
        begun(enroll)
        answered(at)
        assert enroll("--answer", "answer.json", "--kit", "west")[0] == 0
        before = files(at / "west")
        code, _, error = enroll("--kit", "west", "--fingerprint", "00" * 16)
        assert code == 10
        assert "who is right" in error
        assert files(at / "west") == before
        other = load_kit(at / "kits/server", role="coordinator")
        right = federation_fingerprint((other.folder / "ca.pem").read_bytes(), other.pins())
        code, out, _ = enroll("--kit", "west", "--fingerprint", right, "--json")
        assert (code, json.loads(out)["confirmed"]) == (0, True)
        assert self.unconfirmed(at) == set()

    def test_what_was_agreed_on_stays_so_with_a_new_certificate(self, at, enroll):
        """Only records that the answer adds are in doubt."""
        eve = PartyKeys.generate("eve", "site").record
        add_pins(at / "kits/server", [eve])
        assert enroll("--kit", "kits/north")[0] == 0
        answered(at, "kits/north")
        assert enroll("--answer", "answer.json", "--kit", "kits/north")[0] == 0
        kit = load_kit(at / "kits/north", role="site")
        assert kit.unconfirmed == {eve.key_id}
        assert set(kit.agreed_sites) == {"north", "south"}
