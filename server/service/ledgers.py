"""What the coordinator itself releases, under client-level privacy: one ledger a data set, over all runs and restarts.

    state/ledger/icu.jsonl          the ledger
    identity/ledgers/icu.json       its counter, beside the identity key

It opens with the first run's budget and is never reset: the next run on the same data spends from the same ceiling,
which only the coordinator's administrator raises (`coterie ledger`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from common.config import RunConfig
from common.privacy import FileLedger, PrivacyPlan, spent

_LEDGERS, _IDENTITY = "ledger", "identity"


def coordinators_ledger(config: RunConfig, plan: PrivacyPlan | None, *, state: Path, kit: Path) -> FileLedger | None:
    """The ledger of a run's data set; None where the coordinator adds no noise."""
    if plan is None or not plan.central:
        return None
    name = config.data.name
    return FileLedger(
        state / _LEDGERS / f"{name}.jsonl",
        counter=kit / _IDENTITY / "ledgers" / f"{name}.json",
        budget=plan.budget,
        unit="client",
        names=[name],
    )


def spent_by_run(
    ledger: FileLedger | None, plan: PrivacyPlan | None, *, clients: Sequence[str], run: str
) -> Mapping[str, float]:
    """Epsilon that one run's releases cost, the same for every client; empty where no ledger here says.

    Raises:
        LedgerError: The ledger cannot be trusted or read.
    """
    if ledger is None or plan is None:
        return {}
    events = [event for event in ledger.events() if event.run == run]
    return dict.fromkeys(clients, spent(events, budget=plan.budget, unit="client"))
