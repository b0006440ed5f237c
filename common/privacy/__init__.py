"""Differential privacy: small modules that each stand alone, joined by one plan.

`plan` couples sampling, clipping, noise and accounting so that they cannot disagree; `ledger` records privacy events
before anything is released; `accountant` interprets events and nothing else; `noise` draws noise and samples from a
cryptographically secure generator; `optimizer` and `per_sample` extend Opacus where version 1.6.0 is wrong or missing.
"""

from common.privacy.accountant import spent_epsilon
from common.privacy.events import NonPrivate, PoissonGaussian, PrivacyEvent
from common.privacy.ledger import FileLedger, Ledger
from common.privacy.noise import NoiseSource, SecureNoise
from common.privacy.plan import RELATION, PrivacyPlan, make_plan

__all__ = [
    "RELATION",
    "FileLedger",
    "Ledger",
    "NoiseSource",
    "NonPrivate",
    "PoissonGaussian",
    "PrivacyEvent",
    "PrivacyPlan",
    "SecureNoise",
    "make_plan",
    "spent_epsilon",
]
