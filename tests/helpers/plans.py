"""Privacy plans with noise of one's own choice, without a configuration."""

from __future__ import annotations

from typing import Any

from common.privacy import Budget, PrivacyPlan


def example_plan(**fields: Any) -> PrivacyPlan:
    """A plan that protects examples: one round of one step over a tenth of them."""
    values: dict[str, Any] = {
        "run": "r",
        "unit": "example",
        "mechanism": "independent",
        "clipping": "flat",
        "clipping_norm": 1.0,
        "target_quantile": 0.5,
        "clipping_learning_rate": 0.2,
        "noise_multiplier": 1.5,
        "dimensions": 1000,
        "sampling_rate": 0.1,
        "denominator": 8,
        "local_steps": 1,
        "clients": 1,
        "rounds": 1,
        "participations": 1,
        "min_separation": 1,
        "coefficients": (1.0,),
        "budget": Budget(epsilon=10.0, delta=1e-5, order=8),
    }
    return PrivacyPlan(**values | fields)
