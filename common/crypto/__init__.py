"""Identities, certificates and the sealed container.

`identity` has the records that parties pin, `keys` what is secret behind them; `header`, `envelope` and `schedule` are
the container's layout and its keys, `sealing` and `opening` its two ends; `authorization` is an operator's word for a
run; `certificates` and the `authority` that makes them are for TLS alone. Nothing here knows models, Flower or the
network.
"""

from common.crypto.authority import Authority, Issuer
from common.crypto.authorization import RunAuthorization, authorize, read_authorization
from common.crypto.certificates import (
    COORDINATOR_DNS,
    CertificateRole,
    PeerIdentity,
    TlsKey,
    decode_tls_key,
    encode_tls_key,
    generate_tls_key,
    make_csr,
    peer_identity,
    read_csr,
)
from common.crypto.envelope import ENVELOPE_BYTES, peek
from common.crypto.header import CHUNK_BYTES, KINDS, NO_ID, Direction, Header
from common.crypto.identity import PartyRecord, Role, Suite
from common.crypto.keys import PartyKeys
from common.crypto.opening import Opening, open_envelope
from common.crypto.refusal import SealError
from common.crypto.schedule import blob_size
from common.crypto.sealing import Sealed, seal

__all__ = [
    "CHUNK_BYTES",
    "COORDINATOR_DNS",
    "ENVELOPE_BYTES",
    "KINDS",
    "NO_ID",
    "Authority",
    "CertificateRole",
    "Direction",
    "Header",
    "Issuer",
    "Opening",
    "PartyKeys",
    "PartyRecord",
    "PeerIdentity",
    "Role",
    "RunAuthorization",
    "SealError",
    "Sealed",
    "Suite",
    "TlsKey",
    "authorize",
    "blob_size",
    "decode_tls_key",
    "encode_tls_key",
    "generate_tls_key",
    "make_csr",
    "open_envelope",
    "peek",
    "peer_identity",
    "read_authorization",
    "read_csr",
    "seal",
]
