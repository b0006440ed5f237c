"""The federation's authority: whose certificates verify for what, and whom they name."""

import socket
import ssl
import stat
import threading
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from common.crypto import (
    COORDINATOR_DNS,
    Authority,
    Issuer,
    decode_tls_key,
    encode_tls_key,
    generate_tls_key,
    make_csr,
    peer_identity,
    read_csr,
)
from common.crypto.authority import _new_issuer
from common.errors import KitError, RefusedError

CLIENTS = ["site", "operator", "enrol"]
KEY = generate_tls_key()
PUBLIC = KEY.public_key()
SERVER_USE, CLIENT_USE = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH


def verify(root: bytes, chain: bytes, *, host: str | None = None, at: datetime | None = None) -> None:
    """As a TLS end does: as the server for clients, or as a client for the server at a host."""
    leaf, *between = x509.load_pem_x509_certificates(chain)
    builder = PolicyBuilder().store(Store(x509.load_pem_x509_certificates(root)))
    builder = builder if at is None else builder.time(at)
    if host is None:
        builder.build_client_verifier().verify(leaf, between)
    else:
        builder.build_server_verifier(x509.DNSName(host)).verify(leaf, between)


def leaf_of(chain: bytes) -> x509.Certificate:
    return x509.load_pem_x509_certificates(chain)[0]


class TestChains:
    """What verifies, and what does not."""

    @pytest.mark.parametrize("role", CLIENTS)
    def test_a_client_verifies_as_a_client_only(self, authority, role):
        """It names no host, so that it cannot pose as the coordinator."""
        chain = authority.issuer.issue(PUBLIC, role=role, name="north")
        verify(authority.root, chain)
        with pytest.raises(VerificationError, match="subjectAltName"):
            verify(authority.root, chain, host=COORDINATOR_DNS)

    @pytest.mark.parametrize("host", [COORDINATOR_DNS, "fl.example.org"])
    def test_a_coordinator_verifies_as_a_server_only(self, authority, host):
        """Under the name that only it has, and under its own."""
        chain = authority.issuer.issue(PUBLIC, role="coordinator", name="hub", hosts=["fl.example.org", "127.0.0.1"])
        verify(authority.root, chain, host=host)
        with pytest.raises(VerificationError, match="required EKU not found"):
            verify(authority.root, chain)
        with pytest.raises(VerificationError, match="subjectAltName"):
            verify(authority.root, chain, host="another.example.org")

    def test_another_federation_does_not_verify(self, authority):
        """Not even one of the same name."""
        foreign = Authority.create("clinics").issuer.issue(PUBLIC, role="site", name="north")
        with pytest.raises(VerificationError, match="signature does not match"):
            verify(authority.root, foreign)

    def test_a_self_made_certificate_does_not_verify(self, authority):
        """A leaf signs no leaf: whoever holds one can make nobody else."""
        key = generate_tls_key()
        own = authority.issuer.issue(key.public_key(), role="site", name="north")
        posing = Issuer(federation="clinics", certificate=leaf_of(own).public_bytes(Encoding.PEM), _key=key)
        with pytest.raises(VerificationError, match="cA must be asserted"):
            verify(authority.root, posing.issue(PUBLIC, role="operator", name="boss") + authority.issuer.certificate)

    def test_an_issuer_makes_no_other_issuer(self, authority):
        """The root forbids it, and so does the issuer's own path length."""
        upper = x509.load_pem_x509_certificate(authority.issuer.certificate)
        assert upper.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0
        lower = _new_issuer("lower", upper, authority.issuer._key)
        chain = lower.issue(PUBLIC, role="site", name="north") + authority.issuer.certificate
        with pytest.raises(VerificationError, match="path length"):
            verify(authority.root, chain)

    def test_it_is_valid_a_day_back_and_thirty_days_on(self, authority):
        """Clocks of organisations differ; lost keys end by themselves."""
        chain, now = authority.issuer.issue(PUBLIC, role="site", name="north"), datetime.now(UTC)
        for days in (-0.9, 29.9):
            verify(authority.root, chain, at=now + timedelta(days=days))
        for days in (-1.1, 30.1):
            with pytest.raises(VerificationError, match="not valid at"):
                verify(authority.root, chain, at=now + timedelta(days=days))

    def test_a_token_lasts_a_day(self, authority):
        """Whoever has to enrol has that long."""
        chain, now = authority.issuer.issue(PUBLIC, role="enrol", name="north"), datetime.now(UTC)
        verify(authority.root, chain, at=now + timedelta(hours=23.9))
        with pytest.raises(VerificationError, match="not valid at"):
            verify(authority.root, chain, at=now + timedelta(hours=24.1))

    def test_no_leaf_outlives_its_issuer(self, authority):
        """A chain whose middle has expired verifies nowhere."""
        chain = authority.issuer.issue(PUBLIC, role="site", name="north", life=timedelta(days=9999))
        leaf, issuer = x509.load_pem_x509_certificates(chain)
        assert leaf.not_valid_after_utc == issuer.not_valid_after_utc

    def test_an_expired_issuer_says_so(self, authority, monkeypatch):
        """Instead of making certificates that nobody accepts."""
        monkeypatch.setattr("common.crypto.authority._ISSUER_LIFE", timedelta(seconds=-1))
        with pytest.raises(KitError, match="expired"):
            authority.with_new_issuer().issuer.issue(PUBLIC, role="site", name="north")

    def test_a_new_issuer_is_trusted_under_the_same_root(self, authority):
        """Nobody's kit changes when an issuer is replaced."""
        other = authority.with_new_issuer()
        assert (other.root, other.federation) == (authority.root, authority.federation)
        assert other.issuer.certificate != authority.issuer.certificate
        verify(authority.root, other.issuer.issue(PUBLIC, role="site", name="north"))

    def test_openssl_accepts_both_ends(self, authority, tmp_path):
        """A mutual TLS 1.3 handshake, with the library that gRPC's peers may have."""
        contexts = {}
        for role, purpose in (("coordinator", ssl.PROTOCOL_TLS_SERVER), ("site", ssl.PROTOCOL_TLS_CLIENT)):
            key = generate_tls_key()
            (tmp_path / f"{role}.pem").write_bytes(
                encode_tls_key(key) + authority.issuer.issue(key.public_key(), role=role, name="x")
            )
            context = contexts[role] = ssl.SSLContext(purpose)
            context.load_cert_chain(tmp_path / f"{role}.pem")
            context.load_verify_locations(cadata=authority.root.decode())
            context.verify_mode = ssl.CERT_REQUIRED
            context.verify_flags |= ssl.VERIFY_X509_STRICT
        with socket.create_server(("127.0.0.1", 0)) as listener:
            seen = []

            def serve() -> None:
                accepted, _ = listener.accept()
                with contexts["coordinator"].wrap_socket(accepted, server_side=True) as server:
                    seen.append(ssl.DER_cert_to_PEM_cert(server.getpeercert(binary_form=True)))
                    server.sendall(b"hello")

            thread = threading.Thread(target=serve)
            thread.start()
            with (
                socket.create_connection(listener.getsockname(), timeout=60) as raw,
                contexts["site"].wrap_socket(raw, server_hostname=COORDINATOR_DNS) as client,
            ):
                assert client.recv(5) == b"hello"
            thread.join(60)
        assert peer_identity(seen[0].encode()).role == "site"


class TestIdentity:
    """Whom a certificate names."""

    @pytest.mark.parametrize("role", ["coordinator", *CLIENTS])
    def test_it_names_federation_role_and_party(self, authority, role):
        """With its number and its times, of the first certificate of a chain."""
        chain = authority.issuer.issue(PUBLIC, role=role, name="north")
        identity, leaf = peer_identity(chain), leaf_of(chain)
        assert (identity.federation, identity.role, identity.name) == ("clinics", role, "north")
        assert identity.serial == leaf.serial_number
        assert (identity.not_before, identity.not_after) == (leaf.not_valid_before_utc, leaf.not_valid_after_utc)
        assert identity.not_before < identity.renew_at < identity.not_after

    def test_renewal_is_due_when_a_third_is_left(self, authority):
        """Early enough for a coordinator that is away for a week."""
        identity = peer_identity(authority.issuer.issue(PUBLIC, role="site", name="north"))
        assert identity.not_after - identity.renew_at == timedelta(days=31) / 3

    @pytest.mark.parametrize(
        ("uris", "usages", "authority_flag"),
        [
            ([], [CLIENT_USE], False),
            (["coterie://clinics/site/north", "coterie://clinics/operator/boss"], [CLIENT_USE], False),
            (["coterie://clinics/site/north"], [SERVER_USE], False),
            (["coterie://clinics/site/north"], [CLIENT_USE, SERVER_USE], False),
            (["coterie://clinics/coordinator/hub"], [CLIENT_USE], False),
            (["coterie://clinics/site/north"], [CLIENT_USE], True),
            (["coterie://clinics/site/north/more"], [CLIENT_USE], False),
            (["coterie://clinics/root/north"], [CLIENT_USE], False),
            (["https://clinics/site/north"], [CLIENT_USE], False),
            (["coterie://clinics/site/"], [CLIENT_USE], False),
            (["coterie://clinics/site/north\n"], [CLIENT_USE], False),
        ],
        ids=str,
    )
    def test_a_certificate_that_says_more_or_less_is_refused(self, uris, usages, authority_flag):
        """Exactly one URI, exactly the usage of its role, and no authority."""
        with pytest.raises(RefusedError, match="which party"):
            peer_identity(self.made(uris, usages, authority_flag=authority_flag))

    def test_a_certificate_without_extensions_is_refused(self):
        """It could be for anything."""
        with pytest.raises(RefusedError, match="which party"):
            peer_identity(self.builder().sign(KEY, SHA256()).public_bytes(Encoding.PEM))

    @pytest.mark.parametrize("name", ["root", "issuer"])
    def test_the_authorities_are_no_parties(self, authority, name):
        """They sign; they do not speak."""
        pem = authority.root if name == "root" else authority.issuer.certificate
        with pytest.raises(RefusedError, match="which party"):
            peer_identity(pem)

    @staticmethod
    def builder() -> x509.CertificateBuilder:
        name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")]), datetime.now(UTC)
        builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(PUBLIC).serial_number(7)
        return builder.not_valid_before(now).not_valid_after(now + timedelta(days=1))

    def made(self, uris, usages, *, authority_flag) -> bytes:
        names = [x509.UniformResourceIdentifier(uri) for uri in uris] or [x509.DNSName("x")]
        builder = self.builder().add_extension(x509.SubjectAlternativeName(names), critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        builder = builder.add_extension(x509.BasicConstraints(authority_flag, None), critical=True)
        return builder.sign(KEY, SHA256()).public_bytes(Encoding.PEM)


class TestRequests:
    """Only the public key is taken from a request."""

    def test_a_request_carries_a_key(self):
        """The names in it are for people."""
        pem = make_csr(KEY, federation="clinics", role="coordinator", name="n" * 64)
        assert read_csr(pem) == PUBLIC
        assert x509.load_pem_x509_csr(pem).is_signature_valid

    def test_what_a_request_asks_for_is_not_granted(self, authority):
        """A site that asks to be the coordinator is certified as what it is."""
        greedy = (
            x509.CertificateSigningRequestBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "hub")]))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([SERVER_USE]), critical=False)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(COORDINATOR_DNS)]), critical=False)
            .sign(KEY, SHA256())
            .public_bytes(Encoding.PEM)
        )
        chain = authority.issuer.issue(read_csr(greedy), role="site", name="north")
        assert peer_identity(chain).role == "site"
        assert COORDINATOR_DNS.encode() not in leaf_of(chain).public_bytes(Encoding.DER)

    def test_a_request_of_another_key_type_is_refused(self):
        """P-256 only: there are no options."""
        for key, algorithm in ((ec.generate_private_key(ec.SECP384R1()), SHA256()), (_ed25519(), None)):
            pem = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, algorithm)
            with pytest.raises(RefusedError, match="request"):
                read_csr(pem.public_bytes(Encoding.PEM))

    def test_a_request_signed_by_another_key_is_refused(self, csr_pem):
        """Who asks must hold the key."""
        der = bytearray(x509.load_pem_x509_csr(csr_pem).public_bytes(Encoding.DER))
        der[-1] ^= 1
        forged = x509.load_der_x509_csr(bytes(der)).public_bytes(Encoding.PEM)
        with pytest.raises(RefusedError, match="request"):
            read_csr(forged)

    @pytest.mark.parametrize("pem", [b"", b"x", b"x" * 100_000], ids=len)
    def test_what_is_no_request_is_refused(self, pem):
        """Nor is it parsed where it is far too long."""
        with pytest.raises(RefusedError, match="request"):
            read_csr(pem)


class TestIssuing:
    """What an issuer refuses to sign."""

    @pytest.mark.parametrize("name", ["", "a/b", "..", "north\n", "n" * 65, "nörd"])
    def test_a_name_that_is_none(self, authority, name):
        """It would be read as another party, or not at all."""
        with pytest.raises(RefusedError, match="no certificate"):
            authority.issuer.issue(PUBLIC, role="site", name=name)

    def test_a_role_that_is_none(self, authority):
        """Roles are four."""
        with pytest.raises(RefusedError, match="no certificate"):
            authority.issuer.issue(PUBLIC, role="root", name="north")

    def test_a_key_of_another_curve(self, authority):
        """P-256 only."""
        with pytest.raises(RefusedError, match="no certificate"):
            authority.issuer.issue(ec.generate_private_key(ec.SECP384R1()).public_key(), role="site", name="north")

    @pytest.mark.parametrize("role", CLIENTS)
    def test_hosts_for_another_than_the_coordinator(self, authority, role):
        """A site is no server."""
        with pytest.raises(RefusedError, match="hosts"):
            authority.issuer.issue(PUBLIC, role=role, name="north", hosts=[COORDINATOR_DNS])

    def test_a_host_that_is_none(self, authority):
        """International names have an ASCII form."""
        with pytest.raises(RefusedError, match="host name"):
            authority.issuer.issue(PUBLIC, role="coordinator", name="hub", hosts=["höst.example.org"])

    def test_a_federation_that_is_none(self):
        """Its name stands in every URI."""
        with pytest.raises(RefusedError, match="federation"):
            Authority.create("a/b")

    def test_names_may_be_as_long_as_allowed(self):
        """X.509 subjects are shorter than our longest names together."""
        authority = Authority.create("f" * 64)
        identity = peer_identity(authority.issuer.issue(PUBLIC, role="site", name="n" * 64))
        assert (identity.federation, identity.name) == ("f" * 64, "n" * 64)


class TestFiles:
    """An authority on a disk."""

    def test_it_is_read_as_it_was_written(self, authority, tmp_path):
        """The whole of it at who provisions, the issuer alone at a coordinator."""
        authority.save(tmp_path / "authority")
        authority.issuer.save(tmp_path / "kit")
        found = Authority.load(tmp_path / "authority")
        assert (found.federation, found.root) == ("clinics", authority.root)
        for issuer in (found.issuer, found.with_new_issuer().issuer, Issuer.load(tmp_path / "kit")):
            assert issuer.federation == "clinics"
            verify(authority.root, issuer.issue(PUBLIC, role="site", name="north"))

    def test_only_its_owner_can_read_it(self, authority, tmp_path):
        """Whoever reads the issuer's key can pose as any party to TLS."""
        authority.save(tmp_path / "authority")
        modes = {p.is_dir(): stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "authority").rglob("*")}
        assert modes == {True: 0o700, False: 0o600}

    def test_it_is_never_overwritten(self, authority, tmp_path):
        """A lost root means new kits for everybody."""
        authority.save(tmp_path)
        with pytest.raises(KitError, match="already"):
            Authority.create("clinics").save(tmp_path)
        assert Authority.load(tmp_path).root == authority.root

    @pytest.mark.parametrize("name", ["root.pem", "root-private.pem", "issuer/private.pem", "issuer/certificate.pem"])
    @pytest.mark.parametrize(
        "content", [None, b"", b"x", encode_tls_key(KEY)], ids=["missing", "empty", "x", "other key"]
    )
    def test_damaged_files_are_refused(self, authority, tmp_path, name, content):
        """Missing, damaged, or of another authority."""
        authority.save(tmp_path)
        (tmp_path / name).unlink()
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(KitError):
            Authority.load(tmp_path)

    def test_keys_are_in_no_repr(self, authority):
        """Logs and tracebacks show reprs."""
        assert "_key" not in repr(authority)
        assert "_key" not in repr(authority.issuer)

    def test_a_tls_key_is_read_as_it_was_written(self):
        """And anything else is refused."""
        assert decode_tls_key(encode_tls_key(KEY)).public_key() == PUBLIC
        other = encode_tls_key(ec.generate_private_key(ec.SECP384R1()))
        for pem in (b"", b"x", other):
            with pytest.raises(KitError, match="TLS key"):
                decode_tls_key(pem)


def _ed25519() -> ed25519.Ed25519PrivateKey:
    return ed25519.Ed25519PrivateKey.generate()
