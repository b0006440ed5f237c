"""Every accountant, the gate included: what the contract tests run on."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from common.privacy.accounting.accountant import ACCOUNTANTS, spent
from common.privacy.accounting.budget import Budget

DELTA = 1e-5
ORDER = 9


@dataclass(frozen=True)
class Gate:
    """The gate as an accountant: its order is fixed, its ceiling does not matter to what it counts."""

    name: str = "gate"
    relation: str = "add/remove"
    order: int = ORDER

    def epsilon(self, events, *, delta, unit="example"):
        return spent(events, budget=Budget(epsilon=1.0, delta=delta, order=self.order), unit=unit)


every_accountant = pytest.mark.parametrize("accountant", [Gate(), *ACCOUNTANTS], ids=lambda a: a.name)
