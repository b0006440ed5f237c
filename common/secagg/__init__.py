"""Secure aggregation: a coordinator learns sums of vectors, and no vector. Pure: bytes in, bytes out, no network.

A site's end: `member` (`member_setup`, `member_round`, `member_state`, `mask`). The coordinator's: `setup`,
`coordinator` and `round` (`recovery`, `burning`). What both compute: `roster`, `agreement`, `escrow`. What passes
between them: `messages`, in the form of `codec`. The numbers: `parameters`, `graph`. The primitives: `shamir`, `masks`,
`packing`, `keys`. Updates as vectors: `fixed_point`.

Nothing here knows models, Flower or the rest of `common`: who uses it hands in identities, pinned records and a journal
(`parties`).
"""

from common.secagg.burning import Burning
from common.secagg.coordinator import Group
from common.secagg.mask import Mask
from common.secagg.member import Member
from common.secagg.messages import kind_of
from common.secagg.parameters import Rules
from common.secagg.parties import Journal, Record, Signer, Use
from common.secagg.refusal import REASONS, Reason, SecAggError
from common.secagg.round import Round
from common.secagg.setup import Setup

__all__ = [
    "REASONS",
    "Burning",
    "Group",
    "Journal",
    "Mask",
    "Member",
    "Reason",
    "Record",
    "Round",
    "Rules",
    "SecAggError",
    "Setup",
    "Signer",
    "Use",
    "kind_of",
]
