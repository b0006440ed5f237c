"""Scenarios whose envelope is refused: no ciphertext is looked at."""

from tests.common.crypto import reference as ref
from tests.common.crypto.scenarios import OTHER_KEY, SCENARIOS, Case, forged, honest, model, refuse, scenario


@scenario
def envelope_truncated(p):
    """The last byte of the envelope is missing."""
    case = honest(p)
    case.envelope = case.envelope[:-1]
    return refuse(case, "envelope", "length")


@scenario
def envelope_trailing_byte(p):
    """A byte follows the envelope."""
    case = honest(p)
    case.envelope += b"\0"
    return refuse(case, "envelope", "length")


@scenario
def envelope_empty(p):
    """Nothing at all."""
    return Case(envelope=b"", blob=b"", refused="envelope", layer="length")


@scenario
def magic_unknown(p):
    """Another format, rightly signed."""
    return forged(p, "version", head=ref.header(p["site-a"], 95, magic=b"COTX"))


@scenario
def version_unknown(p):
    """A later version, rightly signed."""
    return forged(p, "version", head=ref.header(p["site-a"], 95, version=2))


@scenario
def suite_unknown(p):
    """A suite that does not exist."""
    return forged(p, "suite", head=ref.header(p["site-a"], 95, suite=3))


@scenario
def suite_weaker_than_pinned(p):
    """The record lists ML-DSA, but the header says Ed25519 alone and the envelope has that signature alone: whoever
    breaks Ed25519 would send this.
    """
    case = forged(p, "suite", head=ref.header(p["site-pq"], 95, suite=1), sender="site-pq", pinned="site-pq")
    case.envelope = case.envelope[: ref.SIGNED + 64]
    return case


@scenario
def suite_stronger_than_pinned(p):
    """The header names both signatures, the record only one: the suite is the record's, not the message's."""
    head = ref.header(p["site-a"], 95, suite=2)
    case = forged(p, "suite", head=head)
    case.envelope += bytes(3309)
    return case


@scenario
def ml_dsa_signature_missing(p):
    """The header names both signatures, the envelope ends after the first."""
    case = forged(p, "length", sender="site-pq", pinned="site-pq")
    case.envelope = case.envelope[: ref.SIGNED + 64]
    return case


@scenario
def ml_dsa_signature_damaged(p):
    """Ed25519 fits, ML-DSA does not: both are required."""
    case = forged(p, "signature", sender="site-pq", pinned="site-pq")
    case.envelope = ref.flip(case.envelope, -1)
    return case


@scenario
def ed25519_signature_damaged(p):
    """ML-DSA fits, Ed25519 does not: both are required."""
    case = forged(p, "signature", sender="site-pq", pinned="site-pq")
    case.envelope = ref.flip(case.envelope, ref.SIGNED)
    return case


@scenario
def chunks_of_another_size(p):
    """Chunks of 64 KiB: only one size exists."""
    return forged(p, "limits", head=ref.header(p["site-a"], 95, chunk_log2=16))


@scenario
def length_beyond_the_format(p):
    """A length that 32-bit chunk numbers cannot count."""
    return forged(p, "limits", size=2**52 + 1)


@scenario
def length_beyond_the_recipient(p):
    """An honest message, one byte longer than the recipient accepts: no key is touched."""
    case = honest(p)
    case.most_bytes = 94
    return refuse(case, "envelope", "limits")


@scenario
def direction_unknown(p):
    """A direction that does not exist."""
    return forged(p, "context", head=ref.header(p["site-a"], 95, direction=4))


@scenario
def kind_unknown(p):
    """A kind of message that does not exist."""
    return forged(p, "context", head=ref.header(p["site-a"], 95, kind=9))


@scenario
def order_that_replies(p):
    """An order answers nothing."""
    head = ref.header(p["coordinator"], 95, direction=ref.DOWN, reply_to=ref.sha256(b"order")[:16])
    return forged(p, "context", head=head, sender="coordinator", pinned="coordinator", recipient="site-a")


@scenario
def result_as_update(p):
    """The kind of a result, in the direction of an update."""
    return forged(p, "context", head=ref.header(p["site-a"], 95, kind=4))


@scenario
def flag_unknown(p):
    """The broadcast flag is neither 0 nor 1."""
    return forged(p, "context", flag=2)


@scenario
def direct_with_a_digest(p):
    """A direct message has no digest: two spellings of one message would be one too many."""
    return forged(p, "context", blob_digest=ref.sha256(b"blob"))


@scenario
def site_that_gives_orders(p):
    """A site seals an order to another site: only a coordinator gives orders."""
    head = ref.header(p["site-b"], 95, direction=ref.DOWN)
    return forged(p, "context", head=head, sender="site-b", pinned="site-b", recipient="site-a")


@scenario
def order_reflected(p):
    """A site sends an order of its own to the coordinator, as if it were an update."""
    return forged(p, "context", head=ref.header(p["site-a"], 95, direction=ref.DOWN))


@scenario
def sender_another(p):
    """An honest message of site-b where site-a was asked."""
    case = honest(p, sender="site-b")
    case.sender = "site-a"
    return refuse(case, "envelope", "sender")


@scenario
def sender_claimed(p):
    """Site-b signs, and claims site-a's key id."""
    head = ref.header(p["site-b"], 95, sender=p["site-a"].record.key_id)
    return forged(p, "signature", head=head, sender="site-b")


@scenario
def recipient_another(p):
    """A model for site-a comes to site-b."""
    case = model(p)
    case.recipient = "site-b"
    return refuse(case, "envelope", "recipient")


@scenario
def recipient_rewritten(p):
    """A model for site-a, whose recipient somebody changed to site-b."""
    case = model(p)
    case.envelope = ref.replaced(case.envelope, "recipient", p["site-b"].record.key_id)
    case.recipient = "site-b"
    return refuse(case, "envelope", "signature")


@scenario
def wrap_for_another(p):
    """The sender signs site-b as recipient over a key that was wrapped for site-a."""
    head = ref.header(p["coordinator"], 95, direction=ref.DOWN)
    ours = {"sender": "coordinator", "pinned": "coordinator", "head": head}
    wrapped = forged(p, "wrap", recipient="site-a", **ours).envelope[ref.FIELDS["wrapped"][0] : ref.SIGNED]
    return forged(p, "wrap", recipient="site-b", wrapped=wrapped, **ours)


def changed_field(name):
    """A scenario in which one bit of a field of an honest envelope is changed."""

    def make(p):
        case = model(p, broadcast=True)
        case.envelope = ref.flip(case.envelope, ref.FIELDS[name][0] + ref.FIELDS[name][1] - 1)
        return refuse(case, "envelope", "signature")

    make.__doc__ = f"One bit of the field {name} is changed."
    SCENARIOS[f"bit-of-{name.replace('_', '-')}"] = make


for _name in ("run_id", "server_round", "manifest", "commitment", "blob_digest", "wrapped", "signature"):
    changed_field(_name)


@scenario
def header_of_another_run(p):
    """The header of one run over the rest of another's envelope."""
    case, other = honest(p), honest(p, run_id=ref.sha256(b"another run")[:16])
    case.envelope = other.envelope[: ref.HEADER] + case.envelope[ref.HEADER :]
    return refuse(case, "envelope", "signature")


@scenario
def header_of_another_run_signed(p):
    """The same, signed anew by the sender: the wrap is bound to the header."""
    wrapped = honest(p).envelope[ref.FIELDS["wrapped"][0] : ref.SIGNED]
    head = ref.header(p["site-a"], 95, run_id=ref.sha256(b"another run")[:16])
    return forged(p, "wrap", head=head, wrapped=wrapped)


@scenario
def commitment_to_another_key(p):
    """The sender commits to one key and wraps another: AES-GCM alone would let one ciphertext open to two models under
    two keys ("invisible salamander").
    """
    head = ref.header(p["site-a"], 95)
    return forged(p, "commitment", head=head, commitment=ref.keys(OTHER_KEY, head)[2])
