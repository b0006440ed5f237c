"""One TOML a run: `RunConfig` is the same validated object at the coordinator, at a site and in a simulation.

`settings` declares every setting once, with its default, unit and help; `load` reads a file, applies the `[dp]` table
and `--set` overrides, and remembers where each value came from; `render` writes it back; `cli` is `coterie config`.
"""

from common.config.load import LoadedConfig, find_scenario, load_config
from common.config.settings import (
    CohortSettings,
    DataSettings,
    EvaluationSettings,
    ModelSettings,
    PrivacySettings,
    RunConfig,
    StrategySettings,
    TrainingSettings,
)

__all__ = [
    "CohortSettings",
    "DataSettings",
    "EvaluationSettings",
    "LoadedConfig",
    "ModelSettings",
    "PrivacySettings",
    "RunConfig",
    "StrategySettings",
    "TrainingSettings",
    "find_scenario",
    "load_config",
]
