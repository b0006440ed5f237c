"""A certificate renews itself over the connection that it still opens, with a new key each time."""

from __future__ import annotations

from datetime import UTC, datetime

from common.kit import Kit
from common.kit_files import begin_renewal, install_certificate
from common.transport.channel import PlaneCalls


def is_due(kit: Kit, *, now: datetime | None = None) -> bool:
    """Whether a third or less of the present certificate's life is left.

    Raises:
        KitError: The certificate cannot be read.
    """
    certificate = kit.certificate()
    life = certificate.not_after - certificate.not_before
    return (now or datetime.now(UTC)) >= certificate.not_after - life / 3


def renew(kit: Kit, calls: PlaneCalls) -> None:
    """Replace certificate and key; connections made from now on use them.

    Guarantee: whenever the process is killed, the kit holds a certificate with its key.

    Raises:
        grpc.RpcError: The coordinator refuses, or cannot be reached.
        KitError: What it sent is no certificate for this party, or the kit cannot be written.
    """
    answer = calls.renew(begin_renewal(kit.folder))
    install_certificate(kit.folder, answer.chain_pem)
