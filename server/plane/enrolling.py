"""`Renew` and `Enrol`: certificates over the wire."""

from __future__ import annotations

from common.crypto import peer_identity, read_csr
from common.errors import RefusedError
from common.kit import Kit
from common.transport import wire_pb2
from common.transport.wire import Refusal
from server.plane.attaching import read_message
from server.plane.files import Files
from server.plane.guard import Call, Context
from server.plane.hub import Hub
from server.plane.refusals import RefusedCallError
from server.provisioning import enrol, renew


class Enrolling:
    """The handlers; what may be signed is `server.provisioning`'s decision."""

    def __init__(self, kit: Kit, hub: Hub, files: Files) -> None:
        self._kit, self._hub, self._files = kit, hub, files

    async def renew(self, call: Call, request: bytes, _context: Context) -> bytes:
        """A new certificate for the caller's own name and role, and the key of the request."""
        asked = read_message(wire_pb2.CertificateRequest, request)
        _check_csr(asked.csr_pem)
        try:
            chain = await self._files.run(renew, self._kit, call.identity, asked.csr_pem)
        except RefusedError as e:
            raise RefusedCallError(Refusal.DENIED) from e
        self._hub.note("renewed", call.identity.name, detail=f"{peer_identity(chain).serial:x}")
        return wire_pb2.CertificateAnswer(chain_pem=chain).SerializeToString()

    async def enrol(self, call: Call, request: bytes, _context: Context) -> bytes:
        """A first certificate for the holder of a token, and the records that it pins."""
        asked = read_message(wire_pb2.CertificateRequest, request)
        _check_csr(asked.csr_pem)
        try:
            chain, parties = await self._files.run(
                enrol, self._kit, call.identity, asked.csr_pem, asked.record, asked.signature
            )
        except RefusedError as e:
            raise RefusedCallError(Refusal.DENIED) from e
        self._hub.note("enrolled", call.identity.name, detail=f"{peer_identity(chain).serial:x}")
        return wire_pb2.CertificateAnswer(chain_pem=chain, parties=parties).SerializeToString()


def _check_csr(csr_pem: bytes) -> None:
    try:
        read_csr(csr_pem)
    except RefusedError as e:
        raise RefusedCallError(Refusal.MALFORMED) from e
