"""A federation of two hospitals with kits on this disk, and a run on their heart data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from server.provisioning.making import provision
from server.provisioning.settings import Federation

HOSPITALS = ("cleveland", "hungary")
OPERATOR = "ada"

_POLICY = """
[budget]
epsilon = 10.0
delta = 1e-6

[allow]
data = ["heart"]

[limits]
units = ["none"]
"""

RUN = """
name = "heart"
rounds = 2

[model]
name = "mlp"
options = { hidden = 64 }

[data]
name = "heart"
partition = "natural"
clients = 0
sites = ["cleveland", "hungary"]

[training]
local_epochs = 1
batch_size = 16
learning_rate = 0.2
device = "cpu"

[strategy]
weighting = "equal"
"""


def hospital_kits(out: Path, names: Sequence[str] = HOSPITALS) -> Path:
    """Kits in `out`: `server`, `ada`, and one for each hospital, which joins runs without privacy."""
    sites: dict[str, Any] = {site: {} for site in names}
    federation = {"name": "clinics", "server": "127.0.0.1:9000", "sites": sites, "operators": {OPERATOR: {}}}
    provision(Federation.model_validate(federation), out)
    for site in names:
        (out / site / "policy.toml").write_text(_POLICY)
    return out
