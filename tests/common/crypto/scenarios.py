"""What the vectors show: one function a scenario, its docstring is the vector's description.

A scenario gets the fixed parties and gives a `Case`. Honest messages are sealed by the real code, dishonest ones are
put together with `reference`.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass, field

from common.crypto import Header
from common.crypto.sealing import _seal
from tests.common.crypto import reference as ref

KEY, OTHER_KEY = ref.sha256(b"content key"), ref.sha256(b"another content key")
CHUNK, SEALED_CHUNK = ref.CHUNK, ref.CHUNK + 16
TEXT = (b"a model's weights. ", 5)


@dataclass(kw_only=True)
class Case:
    """One message, who should open it, and what must come of it.

    Attributes:
        envelope: As it arrives.
        blob: As it arrives; or None: made of `slices` of the honest ciphertext, with the bytes at `flips` changed.
        refused: Which half is refused (`envelope`, `blob`), or None.
        layer: The layer that must refuse it.
        plaintext: Bytes, and how often they are repeated.
        content_key: Under which the honest ciphertext is made.
        sender: The pinned party it must be from.
        recipient: Who opens it.
        most_bytes: Most plaintext that the recipient accepts.
    """

    envelope: bytes
    blob: bytes | None = None
    refused: str | None = None
    layer: str | None = None
    plaintext: tuple[bytes, int] = TEXT
    content_key: bytes = KEY
    sender: str = "site-a"
    recipient: str = "coordinator"
    most_bytes: int = 4 * CHUNK
    slices: list[tuple[int, int]] = field(default_factory=list)
    flips: list[int] = field(default_factory=list)


SCENARIOS: dict[str, Callable[[dict], Case]] = {}


def scenario(function):
    """Register a scenario under its name."""
    SCENARIOS[function.__name__.replace("_", "-")] = function
    return function


def honest(p, *, sender="site-a", recipient="coordinator", plaintext=TEXT, broadcast=False, **changes) -> Case:
    """A message that the real code sealed."""
    data = plaintext[0] * plaintext[1]
    head = ref.header(p[sender], len(data), **changes)
    sink = io.BytesIO()
    sealed = _seal([data], Header.from_bytes(head), sender=p[sender], sink=sink, broadcast=broadcast, content_key=KEY)
    envelope = sealed.envelope_for(p[recipient].record)
    return Case(envelope=envelope, blob=sink.getvalue(), plaintext=plaintext, sender=sender, recipient=recipient)


def large(p, slices, flips=(), *, broadcast=True, refused="blob", layer="chunk") -> Case:
    """A model of two chunks and five bytes, whose ciphertext is described and not stored."""
    case = model(p, broadcast=broadcast, plaintext=(b"w", 2 * CHUNK + 5))
    case.blob, case.slices, case.flips = None, slices, list(flips)
    case.refused, case.layer = refused, layer
    return case


def model(p, **options) -> Case:
    """An order with a model from the coordinator to site-a."""
    return honest(p, **{"sender": "coordinator", "recipient": "site-a", "direction": ref.DOWN, **options})


def refuse(case: Case, refused: str, layer: str) -> Case:
    case.refused, case.layer = refused, layer
    return case


def forged(
    p, layer, *, head=None, sender="site-a", pinned="site-a", recipient="coordinator", size=95, **changes
) -> Case:
    """An envelope put together by hand and signed by a sender, refused before any key is opened or by the wrap."""
    head = ref.header(p[sender], size) if head is None else head
    envelope = ref.envelope(p[sender], p[recipient].record, KEY, head, **changes)
    return Case(envelope=envelope, blob=b"", refused="envelope", layer=layer, sender=pinned, recipient=recipient)


@scenario
def opens_update(p):
    """An update, signed with Ed25519, for the coordinator alone."""
    return honest(p)


@scenario
def opens_update_ml_dsa(p):
    """An update, signed with Ed25519 and ML-DSA-65, for a coordinator of the same suite."""
    return honest(p, sender="site-pq", recipient="coordinator-pq")


@scenario
def opens_update_between_suites(p):
    """The suite is the sender's: an Ed25519 site writes to a coordinator that itself signs with both."""
    return honest(p, recipient="coordinator-pq")


@scenario
def opens_broadcast(p):
    """A model for several sites: the envelope holds the digest of the ciphertext."""
    return model(p, broadcast=True)


@scenario
def opens_broadcast_ml_dsa(p):
    """A broadcast by a coordinator that signs with Ed25519 and ML-DSA-65."""
    return model(p, sender="coordinator-pq", broadcast=True)


@scenario
def opens_broadcast_of_several_chunks(p):
    """Two chunks and five bytes, in broadcast."""
    return large(p, [(0, 2 * SEALED_CHUNK + 21)], refused=None, layer=None)


@scenario
def opens_several_chunks(p):
    """Two chunks and five bytes, for one recipient."""
    return large(p, [(0, 2 * SEALED_CHUNK + 21)], broadcast=False, refused=None, layer=None)


@scenario
def opens_exactly_one_chunk(p):
    """A plaintext of one full chunk has one chunk, which is the last."""
    case = honest(p, plaintext=(b"w", CHUNK))
    case.blob, case.slices = None, [(0, SEALED_CHUNK)]
    return case


@scenario
def opens_empty(p):
    """An empty plaintext is one empty last chunk: a tag."""
    return honest(p, plaintext=(b"", 0))


@scenario
def opens_empty_broadcast(p):
    """An empty plaintext in broadcast."""
    return model(p, plaintext=(b"", 0), broadcast=True)


@scenario
def opens_result(p):
    """The result of a run, from the coordinator to an operator."""
    changes = {"direction": ref.RESULT, "kind": 4, "server_round": 2**64 - 1, "attempt": 2**32 - 1}
    return honest(p, sender="coordinator", recipient="operator", **changes)


@scenario
def opens_at_the_limit(p):
    """A plaintext exactly as long as the recipient accepts."""
    case = honest(p)
    case.most_bytes = 95
    return case
