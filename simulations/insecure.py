"""Noise that can be drawn again by anyone: for simulations that must repeat to the bit, and for nothing else."""

from __future__ import annotations

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from common.privacy.noise import KeyedNoise
from common.privacy.noise.keystream import KEY_BYTES

_PURPOSE = b"coterie insecure fixed noise v1"


class FixedNoise(KeyedNoise):
    """INSECURE: noise that follows from a seed. It protects nobody: whoever knows the seed subtracts it.

    It has the distribution of secure noise, so that a simulation's accuracy is that of a private run.

    Guarantee: Equal (seed, label) give equal noise on every machine of the same byte order; different ones give
    independent noise. So results do not depend on which worker serves which client.

    Args:
        seed: What `--insecure-fixed-noise` was given.
        label: Whose noise and when, such as client/round. Two sources of one run must not share a label.
    """

    def __init__(self, seed: int, label: str) -> None:
        keys = HKDF(algorithm=SHA256(), length=2 * KEY_BYTES, salt=None, info=_PURPOSE)
        material = keys.derive(f"{seed}/{label}".encode())
        super().__init__(noise_key=material[:KEY_BYTES], mask_key=material[KEY_BYTES:])
