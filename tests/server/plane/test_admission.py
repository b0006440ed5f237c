"""Who may call what: certificates, roles, pinned records and the deny list."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest

from common.crypto import Authority, CertificateRole, Issuer, generate_tls_key, peer_identity
from common.crypto.certificates import encode_tls_key
from common.kit import Tls
from common.transport import wire_pb2
from common.transport.channel import OperatorCalls, PlaneCalls, channel, server_credentials
from server.plane.admission import Admission
from server.plane.orders import Failed
from server.provisioning.denied import deny
from server.provisioning.making import replace_issuer
from tests.helpers.plane import Agent, Plane, Tap, copy_kits, cut, in_thread, kit, refused, upload

QUESTION = wire_pb2.Question(what="runs")


def leaf(issuer: Issuer, root: bytes, *, role: CertificateRole, name: str, life: timedelta | None = None) -> Tls:
    """What mutual TLS needs, freshly signed."""
    key = generate_tls_key()
    chain = issuer.issue(key.public_key(), role=role, name=name, life=life)
    return Tls(chain=chain, key=encode_tls_key(key), root=root)


@pytest.fixture
def issuer(kits: Path) -> Issuer:
    """The federation's own."""
    return Issuer.load(kits / "server" / "issuer")


def plane_methods(calls: PlaneCalls) -> dict[str, Callable[[], object]]:
    """Every method that is a site's, called as a site would."""
    hello = wire_pb2.ClientEvent(hello=wire_pb2.Hello(protocol=1, instance=b"i" * 16))
    start = wire_pb2.UploadStart(message_id=b"m" * 16, envelope=b"e", blob_bytes=1)
    return {
        "attach": lambda: calls.attach(iter([hello])),
        "fetch": lambda: calls.fetch(b"d" * 32),
        "upload": lambda: calls.upload(start, [b"x"]),
        "upload-state": lambda: calls.upload_state(b"m" * 16),
    }


def operator_methods(calls: OperatorCalls) -> dict[str, Callable[[], object]]:
    """Every method that is an operator's."""
    return {
        "submit": lambda: calls.submit(wire_pb2.SubmitRequest(config="{}")),
        "ask": lambda: calls.ask(QUESTION),
        "follow": lambda: calls.follow(QUESTION),
        "download": lambda: calls.download(QUESTION),
    }


class Silent:
    """A desk that nobody should reach."""

    def __getattr__(self, name: str):
        raise AssertionError(f"{name} was reached")


@pytest.fixture
def guarded(start: Callable[..., Plane]) -> Plane:
    """A plane whose desk must not be reached."""
    return start(desk=Silent())


def test_an_operator_can_do_nothing_that_sites_do(guarded: Plane):
    """Attaching, fetching and uploading are denied."""
    for name, call in plane_methods(guarded.calls("alice")).items():
        assert refused(call) == "denied", name
    assert not guarded.hub.attached()


def test_a_site_can_do_nothing_that_operators_do(guarded: Plane):
    """Submitting, asking, following and downloading are denied."""
    for name, call in operator_methods(guarded.operator("hospital-a")).items():
        assert refused(call) == "denied", name


def test_a_token_is_good_for_enrolling_alone(guarded: Plane, issuer: Issuer):
    """Its certificate opens nothing else, not even renewal."""
    token = leaf(issuer, guarded.tls("server").root, role="enrol", name="hospital-z")
    calls = guarded.calls(token)
    for call in (*plane_methods(calls).values(), *operator_methods(guarded.operator(token)).values()):
        assert refused(call) == "denied"
    assert refused(lambda: calls.renew(b"csr")) == "denied"
    assert refused(lambda: guarded.calls("hospital-a").enrol(wire_pb2.CertificateRequest())) == "denied"


def test_a_role_that_is_not_the_pinned_one_is_denied(guarded: Plane, issuer: Issuer):
    """A leaf that says operator does not make the site of that name one, nor the other way round."""
    root = guarded.tls("server").root
    posing = leaf(issuer, root, role="operator", name="hospital-a")
    assert refused(lambda: guarded.operator(posing).ask(QUESTION)) == "denied"
    posing = leaf(issuer, root, role="site", name="alice")
    assert refused(lambda: guarded.calls(posing).upload_state(b"m" * 16)) == "denied"


def test_a_party_that_is_not_pinned_is_denied(guarded: Plane, issuer: Issuer):
    """A good certificate is not enough: whoever takes the issuer alone gets no new party in."""
    stranger = leaf(issuer, guarded.tls("server").root, role="site", name="hospital-z")
    assert Agent(guarded.calls(stranger)).end() == "denied"


def test_another_federations_certificate_does_not_get_through_tls(guarded: Plane):
    """Its root is not ours. The same names in it help nobody."""
    other = Authority.create("study")
    ours = guarded.tls("server").root
    stranger = leaf(other.issuer, ours, role="site", name="hospital-a")
    assert refused(lambda: guarded.calls(stranger).upload_state(b"m" * 16)) == "unreachable"


def test_a_federation_that_shares_the_root_is_denied_by_name(guarded: Plane, issuer: Issuer):
    """The federation stands in the certificate as well."""
    renamed = Issuer(federation="other", certificate=issuer.certificate, _key=issuer._key)
    stranger = leaf(renamed, guarded.tls("server").root, role="site", name="hospital-a")
    assert refused(lambda: guarded.calls(stranger).upload_state(b"m" * 16)) == "denied"


def test_an_expired_certificate_does_not_get_through_tls(guarded: Plane, issuer: Issuer):
    """TLS looks at the clock."""
    expired = leaf(issuer, guarded.tls("server").root, role="site", name="hospital-a", life=timedelta(hours=-1))
    assert refused(lambda: guarded.calls(expired).upload_state(b"m" * 16)) == "unreachable"


@pytest.mark.parametrize("way", ["deleted", "revoked"])
def test_a_stolen_issuer_ends(start: Callable[..., Plane], kits: Path, tmp_path: Path, way: str):
    """While it lies beside the new one what it signed is good; then new calls are refused and open streams closed."""
    plane = start(kits=copy_kits(kits, tmp_path / "kits"))
    server = plane.kits / "server"
    stolen = Issuer.load(server / "issuer")
    posing = leaf(stolen, plane.tls("server").root, role="site", name="hospital-a")
    made = replace_issuer(plane.kits / "authority", server)
    agent = Agent(plane.calls(posing))
    agent.next("welcome")
    newer = leaf(Issuer.load(made), plane.tls("server").root, role="site", name="hospital-b")
    honest = Agent(plane.calls(newer))
    honest.next("welcome")
    if way == "deleted":
        shutil.rmtree(server / "issuer.old-1")
    else:
        honest.close()
        made = replace_issuer(plane.kits / "authority", server, revoke=True)
        honest = Agent(plane.calls(leaf(Issuer.load(made), plane.tls("server").root, role="site", name="hospital-b")))
        honest.next("welcome")
    assert agent.end() == "denied"
    assert refused(lambda: plane.calls(posing).upload_state(b"m" * 16)) == "denied"
    honest.beat()
    honest.next("ping")
    honest.close()


def test_a_servers_certificate_is_not_a_clients(guarded: Plane):
    """The coordinator's own leaf has the wrong extended key usage to call anything."""
    calls = guarded.calls("server")
    assert refused(lambda: calls.upload_state(b"m" * 16)) in {"denied", "unreachable"}
    assert refused(lambda: calls.renew(b"csr")) in {"malformed", "unreachable"}


def test_without_a_certificate_nobody_is_heard(guarded: Plane):
    """The port speaks mutual TLS and nothing else."""
    root = guarded.tls("server").root
    options = [("grpc.ssl_target_name_override", "coordinator.coterie.internal")]
    bare = grpc.secure_channel(guarded.address, grpc.ssl_channel_credentials(root), options)
    plain = grpc.insecure_channel(guarded.address)
    for connection in (bare, plain):
        with connection:
            assert refused(lambda c=connection: PlaneCalls(c).upload_state(b"m" * 16)) == "unreachable"


def test_a_party_does_not_talk_to_another_party_that_poses_as_the_coordinator(kits: Path, guarded: Plane):
    """Only the coordinator's leaf has the name that clients ask for; a site's, of the same federation, does not."""
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_secure_port("127.0.0.1:0", server_credentials(kit(kits, "hospital-b").tls))
    server.start()
    try:
        with channel(f"127.0.0.1:{port}", guarded.tls("hospital-a")) as connection:
            assert refused(lambda: PlaneCalls(connection).upload_state(b"m" * 16)) == "unreachable"
    finally:
        server.stop(0).wait()


@pytest.fixture
def changing(start: Callable[..., Plane], kits: Path, tmp_path: Path) -> Plane:
    """A plane whose kit the test may change, and which looks often."""
    return start(kits=copy_kits(kits, tmp_path / "kits"), watch_seconds=0.02)


def test_a_denied_party_loses_its_open_stream(changing: Plane):
    """Without a restart; and it does not come back."""
    agent, other = changing.attach("hospital-a"), changing.attach("hospital-b")
    deny(changing.kits / "server", "hospital-a")
    assert agent.end() == "denied"
    assert Agent(changing.calls("hospital-a")).end() == "denied"
    assert refused(lambda: agent.calls.upload_state(b"m" * 16)) == "denied"
    other.beat()
    other.next("ping")
    changing.seen.wait_for("denied", party="hospital-a")


def test_a_denied_party_loses_an_upload_and_its_orders(changing: Plane):
    """Its orders fail at once, those that come later too, and nothing of it stays."""
    order, calls, tap = changing.order("hospital-a"), changing.calls("hospital-a"), Tap(cut(secrets.token_bytes(9)))
    with in_thread(lambda: upload(calls, order, b"123456789", frames=tap)) as done:
        tap.put(b"1234")
        while calls.upload_state(order.message_id).received < 4:
            pass
        deny(changing.kits / "server", "hospital-a")
        assert done.get() == "denied"
        tap.end()
    later = changing.order("hospital-a")
    for expected in (order, later):
        result = changing.result()
        assert isinstance(result, Failed)
        assert (result.message_id, result.failure.slug) == (expected.message_id, "client-lost")
    assert not list((changing.hub.blobs.parent / "uploads").iterdir())


def test_one_certificate_can_be_denied(changing: Plane, issuer: Issuer):
    """A stolen leaf is shut out by its serial number; the party comes in with another."""
    agent = changing.attach("hospital-a")
    deny(changing.kits / "server", f"serial:{peer_identity(changing.tls('hospital-a').chain).serial:x}")
    assert agent.end() == "denied"
    changing.seen.wait_for("detached")
    newer = leaf(issuer, changing.tls("server").root, role="site", name="hospital-a")
    assert refused(lambda: changing.calls(newer).upload_state(b"m" * 16)) == "unknown-order"


def test_a_refusal_that_repeats_is_noted_once(guarded: Plane):
    """A peer cannot fill the audit log with its own refusals."""
    calls = guarded.calls("alice")
    for _ in range(20):
        assert refused(lambda: calls.upload_state(b"m" * 16)) == "denied"
    assert guarded.seen.kinds("alice") == ["refused"]


def test_a_stream_does_not_outlive_its_certificate(kits: Path):
    """A certificate that was good when the stream was opened is looked at again while it is open."""
    clock = [datetime.now(UTC)]
    admission = Admission(kit(kits, "server"), now=lambda: clock[0])
    identity = peer_identity(kit(kits, "hospital-a").tls().chain)
    assert admission.current(identity)
    clock[0] = identity.not_after
    assert not admission.current(identity)
    assert admission.expired(identity)


def test_a_denied_party_that_does_not_read_loses_its_fetch_too(changing: Plane):
    """What was on the way may still arrive; the rest does not, and the server waits for nobody."""
    order = changing.order("hospital-a", bytes(256 << 20))
    stream = changing.calls("hospital-a").fetch(order.blob_digest)
    next(stream)
    deny(changing.kits / "server", "hospital-a")
    changing.seen.wait_for("denied", party="hospital-a")
    assert refused(lambda: stream) == "denied"
