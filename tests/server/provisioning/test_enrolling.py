"""Enrolment and renewal: who gets a certificate for what, and that only a public key is taken from a CSR."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.crypto import PartyKeys, SealError, Suite, generate_tls_key, make_csr, peer_identity
from common.errors import KitError, RefusedError
from common.kit import load_kit, read_pins
from common.pins import Pins
from server.provisioning import Registry, enrol, make_token, renew, renew_own, sign
from server.provisioning.denied import deny, serial_entry
from server.provisioning.enrolling import MOST_CERTIFICATES
from server.provisioning.tokens import TOKENS
from tests.helpers.kits import copy_kits, request_of


@pytest.fixture
def kit(tmp_path):
    return load_kit(copy_kits(tmp_path / "kits") / "server", role="coordinator")


def token_identity(kit, name="west", **options):
    """Whom the plane sees when a token's certificate is presented."""
    return peer_identity(make_token(kit.folder, name, **options).chain.encode())


def ask(kit, identity, request=None):
    request = request or request_of(identity.name)
    return enrol(kit, identity, request.csr.encode(), request.record, bytes.fromhex(request.signature))


def greedy_csr(key=None) -> bytes:
    """A CSR that asks to be an authority, another party, the coordinator's host, and good for everything."""
    key = key or generate_tls_key()
    names = [x509.UniformResourceIdentifier("coterie://study/coordinator/server")]
    names.append(x509.DNSName("coordinator.coterie.internal"))
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE]
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "server")]))
        .add_extension(x509.BasicConstraints(ca=True, path_length=5), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .sign(key, SHA256())
        .public_bytes(Encoding.PEM)
    )


def unchanged(kit, before) -> bool:
    return before == {name: (kit.folder / name).read_bytes() for name in before}


def files(kit):
    return {name: (kit.folder / name).read_bytes() for name in ("parties.json", TOKENS)}


def test_a_token_makes_one_party(kit):
    """With its own keys, pinned at once, and everybody's records in the answer."""
    request = request_of("west")
    chain, parties = ask(kit, token_identity(kit), request)
    identity = peer_identity(chain)
    assert (identity.federation, identity.role, identity.name) == ("study", "site", "west")
    assert Pins.from_text(parties) == kit.pins()
    assert kit.reloaded().sites["west"] == request.check()


def test_a_token_is_good_once(kit):
    """Neither for another party nor for the same again."""
    identity, request = token_identity(kit), request_of("west")
    ask(kit, identity, request)
    before = files(kit)
    for again in (request, request_of("west")):
        with pytest.raises(RefusedError, match="used before"):
            ask(kit, identity, again)
    assert unchanged(kit, before)


def test_of_two_who_use_one_token_at_once_one_wins(kit):
    """Whatever the timing: one certificate, one record."""
    identity, together = token_identity(kit), threading.Barrier(2)

    def attempt(request):
        together.wait(60)
        try:
            ask(kit, identity, request)
        except RefusedError:
            return None
        return request.check()

    with ThreadPoolExecutor(2) as pool:
        won = [record for record in pool.map(attempt, [request_of("west"), request_of("west")]) if record]
    assert won == [kit.reloaded().sites["west"]]


def test_two_tokens_for_one_name_make_one_party(kit):
    """A pinned record is never replaced, by whatever token."""
    first, second = token_identity(kit), token_identity(kit)
    ask(kit, first)
    with pytest.raises(RefusedError, match="never replaced"):
        ask(kit, second)


def test_an_expired_token_is_refused(kit):
    """By its own account, whatever TLS made of the certificate."""
    identity = token_identity(kit, life=timedelta(hours=-1))
    before = files(kit)
    with pytest.raises(RefusedError, match="has expired"):
        ask(kit, identity)
    assert unchanged(kit, before)


def test_no_token_is_made_for_a_name_that_is_taken(kit):
    """Nor for one that differs in capitals, nor for one that is none; nor by another kit."""
    for name in ("north", "North", "server", "alice"):
        with pytest.raises(RefusedError, match="is a party already"):
            make_token(kit.folder, name)
    with pytest.raises(RefusedError):
        make_token(kit.folder, "../west")
    for other in ("authority", "north"):
        with pytest.raises(KitError):
            make_token(kit.folder.parent / other, "west")


def test_a_token_cannot_be_used_for_another_name_role_or_suite(kit):
    """Nor with a request that somebody else signed; the token stays good for the right one."""
    identity = token_identity(kit)
    before = files(kit)
    wrong = {
        "for another": request_of("east"),
        "the token is for site": request_of(keys=PartyKeys.generate("west", "operator")),
        "another suite": request_of(suite=Suite.ED25519_ML_DSA_65),
    }
    for said, request in wrong.items():
        with pytest.raises(RefusedError, match=said):
            ask(kit, identity, request)
    with pytest.raises(SealError):
        ask(kit, identity, request_of().model_copy(update={"csr": request_of().csr}))
    assert unchanged(kit, before)
    ask(kit, identity)


@pytest.mark.parametrize("name", ["north", "server", "alice"])
def test_only_a_token_s_certificate_enrols(kit, name):
    """A party's does not, nor a token's that this kit does not know, nor one of another federation."""
    party = load_kit(kit.folder.parent / name, role=None).certificate()
    with pytest.raises(RefusedError, match="only a token's"):
        ask(kit, party, request_of("west"))


def test_a_certificate_that_no_token_accounts_for_is_refused(kit):
    """Signed by the issuer, but not in tokens.json: by the authority, say, or before the file was deleted."""
    identity = token_identity(kit)
    (kit.folder / TOKENS).unlink()
    with pytest.raises(RefusedError, match="was not made with this kit"):
        ask(kit, identity)
    (kit.folder / TOKENS).write_text("{")
    with pytest.raises(KitError, match="is damaged"):
        ask(kit, identity)


def test_a_denied_token_is_refused(kit):
    """By name or by its certificate."""
    identity = token_identity(kit)
    deny(kit.folder, serial_entry(identity.serial))
    with pytest.raises(RefusedError, match="deny list"):
        ask(kit, identity)


@pytest.mark.parametrize("way", ["token", "file", "renewal"])
def test_only_the_public_key_of_a_csr_is_taken(kit, way):
    """A CSR that claims to be an authority, another party and another host gets a plain leaf of its own name."""
    key = generate_tls_key()
    csr = greedy_csr(key)
    if way == "token":
        chain, _ = ask(kit, token_identity(kit), request_of("west", csr=csr))
    elif way == "file":
        chain = sign(Registry.open(kit.folder), request_of("west", csr=csr))[0].chain.encode()
    else:
        chain = renew(kit, load_kit(kit.folder.parent / "north", role="site").certificate(), csr)
    leaf = x509.load_pem_x509_certificate(chain)
    name = "north" if way == "renewal" else "west"
    assert leaf.public_key() == key.public_key()
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    names = list(leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    assert names == [x509.UniformResourceIdentifier(f"coterie://study/site/{name}")]
    assert list(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [
        ExtendedKeyUsageOID.CLIENT_AUTH
    ]
    assert peer_identity(chain).name == name


def bad_csrs() -> dict[str, bytes]:
    csr = make_csr(generate_tls_key(), federation="study", role="site", name="north")
    p384 = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .sign(ec.generate_private_key(ec.SECP384R1()), SHA256())
        .public_bytes(Encoding.PEM)
    )
    return {"empty": b"", "bytes": b"\xff" * 64, "cut": csr[:200], "p384": p384, "large": csr + b"\n" * (1 << 20)}


@pytest.mark.parametrize("kind", ["empty", "bytes", "cut", "p384", "large"])
def test_a_csr_that_is_none_is_refused(kit, kind):
    """Before a token is used up or anything is signed."""
    csr = bad_csrs()[kind]
    identity, site = token_identity(kit), load_kit(kit.folder.parent / "north", role="site").certificate()
    before = files(kit)
    with pytest.raises(RefusedError):
        renew(kit, site, csr)
    request = request_of("west", csr=csr if csr.isascii() else b"other")
    with pytest.raises(RefusedError):
        enrol(kit, identity, csr, request.record, bytes.fromhex(request.signature))
    assert unchanged(kit, before)


def test_a_renewal_keeps_name_and_role(kit):
    """For sites, operators and the coordinator."""
    for name in ("north", "alice", "server"):
        held = load_kit(kit.folder.parent / name, role=None).certificate()
        csr = make_csr(generate_tls_key(), federation="study", role="site", name="x")
        renewed = peer_identity(renew(kit, held, csr))
        assert (renewed.name, renewed.role) == (held.name, held.role)
        assert renewed.serial != held.serial


def test_who_is_denied_or_unknown_does_not_renew(kit):
    """A denied name, a denied certificate, a token's certificate, and a party that is not pinned."""
    held = load_kit(kit.folder.parent / "north", role="site").certificate()
    csr = make_csr(generate_tls_key(), federation="study", role="site", name="north")
    with pytest.raises(RefusedError, match="no party"):
        renew(kit, token_identity(kit), csr)
    stranger = Registry.open(kit.folder).issue(generate_tls_key().public_key(), role="site", name="east")
    as_operator = Registry.open(kit.folder).issue(generate_tls_key().public_key(), role="operator", name="north")
    for chain in (stranger, as_operator):
        with pytest.raises(RefusedError, match="no party"):
            renew(kit, peer_identity(chain), csr)
    deny(kit.folder, "north")
    with pytest.raises(RefusedError, match="deny list"):
        renew(kit, held, csr)


def test_a_party_holds_so_many_certificates(kit):
    """One that renews and renews fills no disk; those that are denied do not count, and others are not affected."""
    held = load_kit(kit.folder.parent / "north", role="site").certificate()
    csr = make_csr(generate_tls_key(), federation="study", role="site", name="north")
    chains = [renew(kit, held, csr) for _ in range(MOST_CERTIFICATES - 1)]
    with pytest.raises(RefusedError, match="certificates that are good"):
        renew(kit, held, csr)
    renew(kit, load_kit(kit.folder.parent / "alice", role=None).certificate(), csr)
    deny(kit.folder, f"serial:{peer_identity(chains[0]).serial:x}")
    assert renew(kit, held, csr)


def test_the_coordinator_renews_its_own(kit):
    """When a third of its life is left, not before; with its host's name in it."""
    before = kit.certificate()
    assert not renew_own(kit, now=before.renew_at - timedelta(seconds=1))
    assert kit.certificate() == before
    assert renew_own(kit, now=before.renew_at)
    leaf = x509.load_pem_x509_certificate(kit.tls().chain)
    assert leaf.serial_number != before.serial
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["coordinator.coterie.internal", "localhost"]


def test_a_request_is_answered(kit):
    """From the coordinator's kit or the authority's folder; the record is pinned where it was signed."""
    for folder in (kit.folder, kit.folder.parent / "authority"):
        answer, new = sign(Registry.open(folder), request := request_of("west"))
        assert new
        assert read_pins(folder).find("west") == request.check()
        assert Pins.from_text(answer.parties) == read_pins(folder)
        assert peer_identity(answer.chain.encode()).role == "site"


def test_a_known_party_gets_a_new_certificate_by_request(kit):
    """Signed with the pinned keys; no pin changes. Other keys under the name are refused, and so is who is denied."""
    north, registry = load_kit(kit.folder.parent / "north", role="site"), Registry.open(kit.folder)
    pins = kit.pins()
    answer, new = sign(registry, request_of(keys=north.keys))
    assert not new
    assert peer_identity(answer.chain.encode()).name == "north"
    with pytest.raises(RefusedError, match="with other keys"):
        sign(registry, request_of("north"))
    assert kit.pins() == pins
    deny(kit.folder, "north")
    with pytest.raises(RefusedError, match="deny list"):
        sign(registry, request_of(keys=north.keys))


def test_nobody_becomes_coordinator_or_joins_by_another_federation_s_request(kit):
    """Nor does the coordinator itself get certificates this way."""
    registry = Registry.open(kit.folder)
    for keys in (PartyKeys.generate("west", "coordinator"), kit.keys):
        with pytest.raises(RefusedError, match=r"one coordinator|a party already"):
            sign(registry, request_of(keys=keys))
    other = request_of().model_copy(update={"federation": "elsewhere"})
    with pytest.raises(RefusedError, match="for federation `elsewhere`"):
        sign(registry, other)
    with pytest.raises(KitError, match="cannot issue"):
        Registry.open(kit.folder.parent / "north")


def test_every_certificate_is_accounted_for(kit):
    """With name, role, serial and end; a line that was torn is passed over."""
    identity = token_identity(kit)
    chain, _ = ask(kit, identity)
    lines = [json.loads(line) for line in (kit.folder / "issued.jsonl").read_text().splitlines()]
    assert [line["serial"] for line in lines[-2:]] == [f"{i.serial:x}" for i in (identity, peer_identity(chain))]
    with (kit.folder / "issued.jsonl").open("a") as file:
        file.write('{"name": "we')
    newest = Registry.open(kit.folder).newest()
    assert newest["west"] == peer_identity(chain)
    assert all(found.not_after > datetime.now(UTC) for found in newest.values())
