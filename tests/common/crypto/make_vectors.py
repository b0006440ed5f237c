"""Make the vectors of the sealed container anew: `python -m tests.common.crypto.make_vectors`.

Their keys are derived from fixed words, and good for nothing but this. Wraps and ML-DSA signatures are random, so every
run writes other bytes with the same meaning; the committed ones stay unless the container's version changes.
"""

import hashlib
import json

from common.crypto import Suite
from tests.common.crypto import reference as ref
from tests.common.crypto import refused_blobs, refused_envelopes  # noqa: F401  (they register scenarios)
from tests.common.crypto.scenarios import SCENARIOS, Case

_PARTIES = {
    "coordinator": ("coordinator", Suite.ED25519),
    "coordinator-pq": ("coordinator", Suite.ED25519_ML_DSA_65),
    "site-a": ("site", Suite.ED25519),
    "site-b": ("site", Suite.ED25519),
    "site-pq": ("site", Suite.ED25519_ML_DSA_65),
    "operator": ("operator", Suite.ED25519),
}
_SEEDS = {"ed25519": 32, "ml_dsa": 32, "ml_kem": 64, "x25519": 32}


def main() -> None:
    """Write `parties.json` and every scenario; scenarios that are no more are removed."""
    document = {
        name: {"role": role, "suite": int(suite), "seeds": {key: seed(name, key) for key in _SEEDS}}
        for name, (role, suite) in _PARTIES.items()
    }
    (ref.FOLDER / "parties.json").write_text(json.dumps(document, indent=1) + "\n")
    for old in ref.VECTORS.glob("*.json"):
        old.unlink()
    for name, make in SCENARIOS.items():
        text = json.dumps(to_document(make(ref.parties()), " ".join(make.__doc__.split())), indent=1)
        (ref.VECTORS / f"{name}.json").write_text(text + "\n")


def seed(party: str, key: str) -> str:
    return hashlib.shake_256(f"coterie test vectors: {party} {key}".encode()).hexdigest(_SEEDS[key])


def to_document(case: Case, description: str) -> dict:
    """A case as JSON; a ciphertext of several chunks is described, with its SHA-256."""
    if case.blob is not None:
        blob = {"hex": case.blob.hex()}
    else:
        made = ref.made_blob(case.envelope, case.content_key, case.plaintext, case.slices, case.flips)
        blob = {"slices": case.slices, "flips": case.flips, "sha256": ref.sha256(made).hex()}
    return {
        "description": description,
        "refused": case.refused,
        "layer": case.layer,
        "sender": case.sender,
        "recipient": case.recipient,
        "most_bytes": case.most_bytes,
        "plaintext": [case.plaintext[0].hex(), case.plaintext[1]],
        "content_key": case.content_key.hex(),
        "envelope": case.envelope.hex(),
        "blob": blob,
    }


if __name__ == "__main__":
    main()
