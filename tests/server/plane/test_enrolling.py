"""Certificates over the wire: renewal of everybody's, and a new party's first."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from common.crypto import PartyKeys, generate_tls_key, make_csr, peer_identity
from common.crypto.certificates import encode_tls_key
from common.enrolment import Request, Token
from common.kit import Tls
from common.pins import Pins
from common.transport import wire_pb2
from server.provisioning import make_token, renew_own
from server.provisioning.denied import deny
from tests.helpers.plane import BOUND, Agent, Plane, copy_kits, kit, refused


@pytest.fixture
def plane(start: Callable[..., Plane], kits: Path, tmp_path: Path) -> Plane:
    """A plane with kits of its own: certificates are issued here."""
    return start(kits=copy_kits(kits, tmp_path / "kits"))


def tls_of(token: Token) -> Tls:
    return Tls(chain=token.chain.encode(), key=token.key.get_secret_value().encode(), root=token.root.encode())


def request_of(keys: PartyKeys, tls_key, *, federation: str = "study") -> wire_pb2.CertificateRequest:
    """What a new party asks with."""
    csr = make_csr(tls_key, federation=federation, role=keys.record.role, name=keys.record.name)
    request = Request.of(keys, federation=federation, csr_pem=csr)
    return wire_pb2.CertificateRequest(csr_pem=csr, record=request.record, signature=bytes.fromhex(request.signature))


@pytest.mark.parametrize("name", ["hospital-a", "alice"])
def test_a_party_renews_its_certificate(plane: Plane, name: str):
    """The new one is for the key of the request, and for the caller's own name and role, whatever the CSR says."""
    key = generate_tls_key()
    csr = make_csr(key, federation="elsewhere", role="coordinator", name="mallory")
    chain = plane.calls(name).renew(csr).chain_pem
    before, after = peer_identity(plane.tls(name).chain), peer_identity(chain)
    assert (after.name, after.role, after.federation) == (before.name, before.role, before.federation)
    assert after.serial != before.serial
    renewed = Tls(chain=chain, key=encode_tls_key(key), root=plane.tls(name).root)
    assert refused(lambda: plane.calls(renewed).renew(b"csr")) == "malformed"  # it is let in
    plane.seen.wait_for("renewed", party=name)


def test_a_request_that_is_no_csr_is_malformed(plane: Plane):
    """It is refused before anything is signed."""
    assert refused(lambda: plane.calls("hospital-a").renew(b"not a csr")) == "malformed"
    assert "renewed" not in plane.seen.kinds()


def test_a_denied_party_cannot_renew(plane: Plane):
    """A new certificate would only carry on."""
    deny(plane.kits / "server", "hospital-a")
    csr = make_csr(generate_tls_key(), federation="study", role="site", name="hospital-a")
    assert refused(lambda: plane.calls("hospital-a").renew(csr)) == "denied"


def test_a_token_makes_a_party_that_can_attach_at_once(plane: Plane):
    """The new record is pinned while the server runs; the token is good once."""
    token = make_token(plane.kits / "server", "hospital-z")
    keys, key = PartyKeys.generate("hospital-z", "site"), generate_tls_key()
    answer = plane.calls(tls_of(token)).enrol(request_of(keys, key))
    pins = Pins.from_text(answer.parties)
    assert pins.sites["hospital-z"] == keys.record
    assert pins.coordinator == kit(plane.kits, "hospital-a").coordinator
    agent = Agent(plane.calls(Tls(chain=answer.chain_pem, key=encode_tls_key(key), root=token.root.encode())))
    agent.next("welcome")
    agent.close()
    assert refused(lambda: plane.calls(tls_of(token)).enrol(request_of(keys, key))) == "denied"
    plane.seen.wait_for("enrolled", party="hospital-z")


def test_a_token_is_for_its_name_role_and_signature(plane: Plane):
    """Another name, another role, a record whose keys did not sign: each is denied, and the token stays good."""
    calls = plane.calls(tls_of(make_token(plane.kits / "server", "hospital-z")))
    key, keys = generate_tls_key(), PartyKeys.generate("hospital-z", "site")
    for wrong in (PartyKeys.generate("hospital-y", "site"), PartyKeys.generate("hospital-z", "operator")):
        assert refused(lambda wrong=wrong: calls.enrol(request_of(wrong, key))) == "denied"
    forged = request_of(keys, key)
    forged.signature = request_of(PartyKeys.generate("hospital-z", "site"), key).signature
    assert refused(lambda: calls.enrol(forged)) == "denied"
    forged.record = json.dumps({"name": "hospital-z"})
    assert refused(lambda: calls.enrol(forged)) == "denied"
    forged.csr_pem = b"-----BEGIN CERTIFICATE REQUEST-----"
    assert refused(lambda: calls.enrol(forged)) == "malformed"
    assert calls.enrol(request_of(keys, key)).chain_pem


def test_the_coordinators_renewed_certificate_is_used_without_a_restart(plane: Plane, tmp_path: Path):
    """New connections see the new leaf; open streams go on."""
    agent = plane.attach("hospital-a")
    server = kit(plane.kits, "server")
    before = _leaf_served(plane)
    assert renew_own(server, now=datetime.now(UTC) + timedelta(days=25))
    assert _leaf_served(plane) != before
    assert _leaf_served(plane) == peer_identity(kit(plane.kits, "server").tls().chain).serial
    agent.beat()
    agent.next("ping")
    plane.attach("hospital-b")


def test_a_damaged_kit_does_not_end_the_service(plane: Plane):
    """While the files cannot be read, the certificate before is used."""
    before = _leaf_served(plane)
    chain = plane.kits / "server" / "tls" / "chain.pem"
    shutil.copy(chain, chain.with_suffix(".kept"))
    chain.write_bytes(b"damaged")
    assert _leaf_served(plane) == before
    shutil.copy(chain.with_suffix(".kept"), chain)
    plane.attach("hospital-a")


def _leaf_served(plane: Plane) -> int:
    """Serial number of the certificate that a new connection is shown."""
    tls = plane.tls("hospital-a")
    folder = plane.kits / "probe"
    folder.mkdir(exist_ok=True)
    (folder / "chain.pem").write_bytes(tls.chain)
    (folder / "key.pem").write_bytes(tls.key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=tls.root.decode())
    context.load_cert_chain(folder / "chain.pem", folder / "key.pem")
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", plane.server.port), timeout=BOUND) as raw,
        context.wrap_socket(raw, server_hostname="coordinator.coterie.internal") as connection,
    ):
        return peer_identity(ssl.DER_cert_to_PEM_cert(connection.getpeercert(binary_form=True)).encode()).serial
