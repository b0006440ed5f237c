"""`coterie provision` as an administrator types it."""

import base64
import json
import re
import stat

import pytest

from common.cli import main
from common.crypto import generate_tls_key, make_csr, peer_identity
from common.enrolment import Token
from common.kit import load_kit
from server.provisioning import renew
from tests.helpers.kits import copy_kits, request_of


@pytest.fixture
def at(tmp_path, monkeypatch):
    """A folder with `kits/`, in which commands run."""
    copy_kits(tmp_path / "kits")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def coterie(capsys):
    """Runs `coterie provision ...`: exit code, stdout, stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        try:
            main(["provision", *map(str, words)])
        except SystemExit as e:
            return int(e.code or 0), *capsys.readouterr()
        raise AssertionError

    return run


def secrets_below(folder) -> list[str]:
    """Every secret of all kits, line by line, as it would look on a screen."""
    found = [path.read_text() for path in folder.rglob("*private*")]
    found += [Token.decode(path.read_text()).key.get_secret_value() for path in folder.rglob("*.token")]
    return [line for text in found for line in re.findall(r"[A-Za-z0-9+/=]{40,}", text)]


def test_from_nothing_to_kits(tmp_path, monkeypatch, coterie):
    """`init`, then the file itself as the argument; stdout holds the table, stderr what to do next."""
    monkeypatch.chdir(tmp_path)
    assert coterie("init")[0] == 0
    code, out, hints = coterie("federation.toml", "--out", "kits")
    assert code == 0
    for name in ("authority", "server", "hospital-a", "hospital-b", "alice"):
        assert name in out
        assert (tmp_path / f"kits/{name}.tar.gz").is_file()
    assert "hint: take kits/authority and its archive off the network" in hints
    assert "coterie policy init" in hints
    assert load_kit(tmp_path / "kits/server", role="coordinator").federation == "heart-study"
    code, out, hints = coterie("make", "federation.toml")
    assert code == 0
    assert "nothing is new" in hints


def test_init_overwrites_nothing(at, coterie):
    """An edited federation.toml is work."""
    (at / "federation.toml").write_text("mine")
    code, _, error = coterie("init")
    assert code == 11
    assert "is there already" in error
    assert (at / "federation.toml").read_text() == "mine"


def test_a_mistyped_command_is_told_from_a_file(at, coterie):
    """With the command that was meant."""
    code, _, error = coterie("tokn")
    assert code == 3
    assert "did you mean `coterie provision token`?" in error


def test_sign_writes_the_answer_and_shows_both_fingerprints(at, coterie):
    """So that two people can compare them; in JSON too."""
    (at / "request.json").write_text(request_of().to_text())
    code, out, hints = coterie("sign", "request.json", "--kit", "kits/server")
    assert code == 0
    assert "site west joins; the answer is in west.answer.json" in out
    assert out.count("fingerprint of the") == 2
    assert "by telephone" in hints
    code, out, _ = coterie("sign", "request.json", "--kit", "kits/server", "--json", "--out", "again.json")
    assert json.loads(out)["new"] is False


def test_sign_refuses_another_fingerprint(at, coterie):
    """Before anything is signed or pinned."""
    (at / "request.json").write_text(request_of().to_text())
    before = (at / "kits/server/parties.json").read_bytes()
    code, _, error = coterie("sign", "request.json", "--kit", "kits/server", "--fingerprint", "00" * 16)
    assert code == 10
    assert "has the fingerprint" in error
    assert (at / "kits/server/parties.json").read_bytes() == before
    assert not (at / "west.answer.json").exists()


def test_sign_needs_one_place_that_issues(at, coterie):
    """The coordinator's kit or the authority's folder; from the latter the server learns by `pin`."""
    (at / "request.json").write_text(request_of().to_text())
    assert coterie("sign", "request.json")[0] == 2
    assert coterie("sign", "request.json", "--kit", "kits/server", "--authority", "kits/authority")[0] == 2
    code, _, hints = coterie("sign", "request.json", "--authority", "kits/authority")
    assert code == 0
    assert "coterie provision pin west.answer.json --kit kits/server" in hints
    code, out, _ = coterie("pin", "west.answer.json", "--kit", "kits/server")
    assert code == 0
    assert out.startswith("pinned site west")
    assert "west" in load_kit(at / "kits/server", role="coordinator").sites


def test_pin_takes_nothing_from_elsewhere(at, coterie):
    """Another federation's records, and files that are something else."""
    other = (at / "kits/server/parties.json").read_text().replace('"study"', '"other"')
    (at / "other.json").write_text(other)
    assert coterie("pin", "other.json", "--kit", "kits/north")[0] == 10
    assert coterie("pin", "kits/north/kit.toml", "--kit", "kits/north")[0] == 10
    assert coterie("pin", "nowhere.json", "--kit", "kits/north")[0] == 10


def test_no_secret_is_printed(at, coterie):
    """Not by any command: kits, tokens, answers, lists, with and without --json."""
    (at / "federation.toml").write_text('name = "study"\nserver = "localhost:8471"\n[sites.east]\n')
    (at / "request.json").write_text(request_of().to_text())
    said = ""
    for words in (
        ["federation.toml"],
        ["federation.toml", "--out", "second", "--json"],
        ["sign", "request.json", "--kit", "kits/server"],
        ["token", "one", "--kit", "kits/server"],
        ["token", "two", "--kit", "kits/server", "--json"],
        ["show", "--kit", "kits/server"],
        ["show", "--kit", "kits/authority", "--json"],
        ["deny", "north", "--kit", "kits/server"],
    ):
        code, out, error = coterie(*words)
        assert code == 0
        said += out + error
    secrets = secrets_below(at)
    assert len(secrets) > 20
    assert [secret for secret in secrets if secret in said] == []
    for path in at.glob("*.token"):
        assert path.read_text().strip() not in said
        assert base64.b64encode(path.read_bytes()).decode() not in said


def test_a_token_is_a_file_for_its_owner(at, coterie):
    """0600, one line, and never over another file."""
    code, out, hints = coterie("token", "west", "--kit", "kits/server")
    assert code == 0
    assert "west.token" in out
    assert "coterie enroll --token west.token" in hints
    assert stat.S_IMODE((at / "west.token").stat().st_mode) == 0o600
    assert Token.decode((at / "west.token").read_text()).name == "west"
    assert coterie("token", "west", "--kit", "kits/server")[0] == 11
    assert coterie("token", "north", "--kit", "kits/server")[0] == 10


def test_deny_and_allow(at, coterie):
    """Names that nobody has are refused: a typing error would shut out no one."""
    code, _, error = coterie("deny", "nort", "--kit", "kits/server")
    assert code == 3
    assert "did you mean `north`?" in error
    assert coterie("deny", "north", "--kit", "kits/server")[1] == "north is shut out\n"
    assert coterie("deny", "north", "--kit", "kits/server")[1] == "north was shut out before\n"
    assert "denied" in coterie("show", "--kit", "kits/server")[1]
    assert json.loads(coterie("allow", "north", "--kit", "kits/server", "--json")[1])["changed"] is True
    assert "denied" not in coterie("show", "--kit", "kits/server")[1]
    assert coterie("deny", "north", "--kit", "kits/north")[0] == 11


def test_show_lists_everybody(at, coterie):
    """With certificates where the kit issues them; a site sees its own."""
    facts = json.loads(coterie("show", "--kit", "kits/server", "--json")[1])
    assert [(party["name"], party["role"]) for party in facts["parties"]] == [
        ("server", "coordinator"),
        ("north", "site"),
        ("south", "site"),
        ("alice", "operator"),
    ]
    held = load_kit(at / "kits/north", role="site").certificate()
    assert facts["parties"][1]["serial"] == f"{held.serial:x}"
    assert facts["parties"][1]["not_after"] == held.not_after.isoformat()
    own = json.loads(coterie("show", "--kit", "kits/north", "--json")[1])
    assert [party["name"] for party in own["parties"] if party["serial"]] == ["north"]
    assert own["fingerprint"] == facts["fingerprint"]


def test_show_lists_every_certificate_that_is_good(at, coterie):
    """Of a stolen key, the thief may have renewed the certificate: its serial must be there to be denied."""
    server, held = load_kit(at / "kits/server", role=None), load_kit(at / "kits/north", role="site").certificate()
    csr = make_csr(generate_tls_key(), federation="study", role="site", name="north")
    serials = [f"{held.serial:x}", *(f"{peer_identity(renew(server, held, csr)).serial:x}" for _ in range(2))]
    facts = json.loads(coterie("show", "--kit", "kits/server", "--json")[1])
    assert facts["parties"][1]["serials"] == serials
    out = coterie("show", "--kit", "kits/server")[1]
    for serial in serials:
        assert serial in out
        assert coterie("deny", serial, "--kit", "kits/server")[0] == 0


def test_show_tells_what_a_deny_list_does_not_do(at, coterie):
    """An entry that is nobody's name; a file that cannot be read."""
    (at / "kits/server/denied.txt").write_text("noth\n")
    assert "`noth`, which is no party" in coterie("show", "--kit", "kits/server")[2]
    (at / "kits/server/denied.txt").write_bytes(b"\xff")
    code, _, hints = coterie("show", "--kit", "kits/server")
    assert code == 0
    assert "everybody is refused" in hints
