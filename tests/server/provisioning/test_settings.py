"""federation.toml: who takes part, and what is said of mistakes."""

import pytest

from common.errors import ConfigError
from server.provisioning.settings import EXAMPLE, Federation, host_of, load_federation

LEAST = 'name = "study"\nserver = "localhost:8471"\n'


def read(tmp_path, text: str) -> Federation:
    (tmp_path / "federation.toml").write_text(text)
    return load_federation(tmp_path / "federation.toml")


def test_the_example_is_valid(tmp_path):
    """Every setting of the file is in it."""
    federation = read(tmp_path, EXAMPLE)
    assert federation.parties == {"alice": "operator", "hospital-a": "site", "hospital-b": "site"}
    assert all(f"{name} = " in EXAMPLE or f"[{name}." in EXAMPLE for name in Federation.model_fields)


@pytest.mark.parametrize(
    ("server", "host"), [("10.0.0.1:1", "10.0.0.1"), ("[::1]:8471", "::1"), ("a-b.org:80", "a-b.org")]
)
def test_addresses_are_names_or_numbers(tmp_path, server, host):
    """With IPv6 in brackets."""
    assert host_of(read(tmp_path, LEAST.replace("localhost:8471", server)).server) == host


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("[sites.a]\n[operators.A]\n", "`A` is taken"),
        ("[sites.server]\n", "`server` is taken"),
        ("[operators.Authority]\n", "`Authority` is taken"),
        ('[sites."../a"]\n', "letters, digits"),
        ('[sites.""]\n', "letters, digits"),
        ("[sites.a]\ncolour = 1\n", "sites.a.colour"),
        ("rounds = 3\n", "rounds"),
        ("[sites", "not valid TOML"),
    ],
)
def test_mistakes_are_named(tmp_path, change, said):
    """Names that are taken or would be paths, unknown keys, damage."""
    with pytest.raises(ConfigError, match=said) as caught:
        read(tmp_path, LEAST + change)
    assert "coterie provision init" in caught.value.hint


@pytest.mark.parametrize("server", ["localhost", "localhost:", ":1", "a b:1", "x:99999", "https://x:1", "x:²"])
def test_an_address_needs_host_and_port(tmp_path, server):
    """Anything else would be found out by the sites."""
    with pytest.raises(ConfigError, match="host:port"):
        read(tmp_path, LEAST.replace("localhost:8471", server))


def test_a_missing_file_is_said(tmp_path):
    """With the command that writes one."""
    with pytest.raises(ConfigError, match="cannot be read"):
        load_federation(tmp_path / "federation.toml")
