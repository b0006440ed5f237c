"""Who belongs to a federation: kits, certificates, enrolment, one-time tokens, the deny list.

`making` turns `federation.toml` (`settings`) into an authority and kits; `registry` is where certificates are issued;
`enrolling` answers those who made their keys themselves; `tokens` are for one enrolment each; `denied` shuts out. All
of it works on folders alone, without network. The plane uses `enrol`, `renew`, `renew_own` and `Denied`.
"""

from server.provisioning.denied import Denied
from server.provisioning.enrolling import enrol, renew, renew_own, sign
from server.provisioning.making import provision
from server.provisioning.registry import Registry
from server.provisioning.settings import Federation, load_federation
from server.provisioning.tokens import make_token

__all__ = [
    "Denied",
    "Federation",
    "Registry",
    "enrol",
    "load_federation",
    "make_token",
    "provision",
    "renew",
    "renew_own",
    "sign",
]
