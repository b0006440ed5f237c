"""What events cost: accountants only interpret what was released.

`tally` reads events; `renyi` and `losses` compute; `budget` is a ceiling with the order that it is counted at;
`accountant` joins them into the gate (`spent`), calibration and what stands in reports.
"""

from common.privacy.accounting.accountant import ACCOUNTANTS, ORDERS, Accountant, best_order, calibrate_noise, spent
from common.privacy.accounting.budget import Budget

__all__ = ["ACCOUNTANTS", "ORDERS", "Accountant", "Budget", "best_order", "calibrate_noise", "spent"]
