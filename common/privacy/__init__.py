"""Differential privacy: small modules that each stand alone, joined by one plan.

`plan` couples sampling, clipping, noise and accounting so that they cannot disagree; `ledger` records privacy events
before anything is released; `accounting` interprets events and nothing else; `calibration` makes the plan; `noise`
draws noise and samples from a cryptographically secure generator; `shares` and `distributed` are about noise that
clients add to a sum themselves; `bookkeeping` computes per-example gradients; `clipping` bounds them; `optimizer` joins
these into a step of DP-SGD on top of Opacus; `matrix` correlates noise over rounds.
"""

from common.privacy.accounting.accountant import Budget, spent
from common.privacy.calibration import make_plan, noised_values
from common.privacy.events import DistributedNoise, MatrixGaussian, NonPrivate, PrivacyEvent, SampledGaussian
from common.privacy.ledger import FileLedger, Ledger
from common.privacy.noise import NoiseSource, SecureNoise
from common.privacy.plan import PrivacyPlan
from common.privacy.sampling import UnitSampler

__all__ = [
    "Budget",
    "DistributedNoise",
    "FileLedger",
    "Ledger",
    "MatrixGaussian",
    "NoiseSource",
    "NonPrivate",
    "PrivacyEvent",
    "PrivacyPlan",
    "SampledGaussian",
    "SecureNoise",
    "UnitSampler",
    "make_plan",
    "noised_values",
    "spent",
]
