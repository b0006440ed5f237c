"""What a site's administrator decides where a ledger cannot be trusted, and what that leaves on record.

Nothing is deleted: what was found is kept beside the ledger under another name, and an `accepted` record says for ever
what was expected, what was found and what was assumed about the rest.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from common.disk import sync
from common.errors import LedgerError
from common.privacy.accounting.budget import Budget
from common.privacy.ledger.chain import Chain, Record, line_after, read_chain
from common.privacy.ledger.counter import commit_counter, prepare_counter, write_whole
from common.privacy.ledger.file import FileLedger, now
from common.privacy.ledger.found import Found
from common.privacy.ledger.standing import Standing, event_record

Assumption = Literal["spent", "nothing-lost"]


def findings(ledger: FileLedger) -> dict[str, Any]:
    """What is wrong with a ledger, as JSON values; `problem` is empty where nothing is.

    Raises:
        LedgerError: It cannot be read at all.
    """
    with ledger.locked(writing=False):
        return _findings(ledger.look())


def accept(ledger: FileLedger, *, assume: Assumption, budget: Budget | None = None) -> Record:
    """Go on from those first lines of a ledger that are sound; the record of that decision.

    Args:
        ledger: A ledger that cannot be trusted.
        assume: `spent`: whatever cannot be read had spent the whole budget, so one event is added that does; only what
            the budget is raised by from then on can be spent. `nothing-lost`: all that was released is in the lines
            that can be read.
        budget: The budget that was in force, where neither the ledger nor its counter tells.

    Guarantee: Killed at any step, the ledger is refused as before or the decision is complete.

    Raises:
        LedgerError: There is nothing to decide, or it cannot be read or written, or the budget is not known.
    """
    with ledger.locked():
        found = ledger.look()
        if not found.problem:
            raise LedgerError(f"{ledger.path} can be trusted: there is nothing to decide", hint="go on as it is")
        if found.standing.simulated:
            raise LedgerError(f"{ledger.path} is a simulated ledger", hint="keep it out of a site's state folder")
        in_force = found.counter.budget if found.counter else found.standing.budget if found.chain.records else budget
        if in_force is None:
            raise LedgerError(
                f"the budget of {ledger.path} is not known any more",
                hint="say what it was with --epsilon, --delta and, if it was set, --order",
            )
        kept = [_keep(path) for path in (ledger.path, ledger.counter) if path.exists()]
        builder = _Builder((found.data or b"")[: found.chain.size], in_force)
        if not builder.chain.records:
            builder.add(ledger.opening(found.counter.ledger if found.counter else secrets.token_hex(16), in_force))
        if builder.standing.budget != in_force:
            builder.add({"record": "budget", "budget": asdict(in_force)})
        decision = {"record": "accepted", **_findings(found), "assumed": assume, "kept": [path.name for path in kept]}
        builder.add(decision)
        filling = builder.standing.filling() if assume == "spent" else None
        if filling is not None:
            builder.add(event_record(filling))
        _replace(ledger, builder)
        return decision


class _Builder:
    """A ledger's new content."""

    def __init__(self, data: bytes, budget: Budget) -> None:
        self.data = data
        self.standing = Standing(budget=budget)
        self.chain: Chain = read_chain(data, take=self.standing.add)

    def add(self, record: Record) -> None:
        line = line_after(self.chain, {**record, "time": now()})
        self.chain = read_chain(line, self.chain, self.standing.add)
        self.data += line


def _findings(found: Found) -> dict[str, Any]:
    data, counter = found.data, found.counter
    return {
        "problem": found.problem,
        "expected": None if counter is None else {"records": counter.count, "head": counter.head},
        "found": {
            "records": len(found.chain.records),
            "head": found.chain.head,
            "bytes": None if data is None else len(data),
            "sha256": None if data is None else hashlib.sha256(data).hexdigest(),
        },
    }


def _keep(path: Path) -> Path:
    """Copy a file beside itself under a name that is free, and wait until it is on the disk."""
    number = 1
    while (kept := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    write_whole(kept, path.read_bytes())
    sync(kept.parent)
    return kept


def _replace(ledger: FileLedger, builder: _Builder) -> None:
    temporary = ledger.path.with_name(f".{ledger.path.name}.tmp")
    try:
        write_whole(temporary, builder.data)
        temporary.replace(ledger.path)
        sync(ledger.path.parent)
    finally:
        temporary.unlink(missing_ok=True)
    found = Found(data=builder.data, chain=builder.chain, standing=builder.standing, counter=None, problem="")
    commit_counter(prepare_counter(ledger.counter, found.next_counter()), ledger.counter)
