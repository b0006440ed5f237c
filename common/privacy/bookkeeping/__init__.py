"""Fast DP-SGD: per-example gradient norms and clipped sums from a single backward pass.

`Bookkeeping` watches a model; after a backward pass it gives `PerExample`: squared norms, rounded up by proved bounds,
and weighted sums in float64. `opacus_mode` (imported on its own, because Opacus takes seconds to import) offers the
same to Opacus's `PrivacyEngine`. Nothing here knows of clipping norms, noise or budgets; the optimizer joins them.
"""

from common.privacy.bookkeeping.engine import Bookkeeping, PerExample
from common.privacy.bookkeeping.rounding import (
    MAX_EXAMPLES,
    MAX_PHYSICAL_BATCH,
    MAX_POSITIONS,
    SUMMATION_ERROR,
    summation_error,
)

__all__ = [
    "MAX_EXAMPLES",
    "MAX_PHYSICAL_BATCH",
    "MAX_POSITIONS",
    "SUMMATION_ERROR",
    "Bookkeeping",
    "PerExample",
    "summation_error",
]
