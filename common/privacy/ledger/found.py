"""What is on the disk of a ledger, and whether it is what was written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.errors import LedgerError
from common.privacy.ledger.chain import Chain, read_chain
from common.privacy.ledger.counter import Counter, read_counter
from common.privacy.ledger.standing import Standing


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A ledger's file and its counter, sound or not.

    Attributes:
        data: The ledger's bytes, or None where there is no file.
        chain: Its sound lines.
        standing: What they say.
        counter: What the counter says, or None where it is missing or damaged.
        problem: Why it cannot be trusted, or empty.
    """

    data: bytes | None
    chain: Chain
    standing: Standing
    counter: Counter | None
    problem: str

    @property
    def pending(self) -> bool:
        """Whether a line was written whose counter was not: a reservation that may have been returned."""
        return self.counter is not None and len(self.chain.records) == self.counter.count + 1

    def next_counter(self) -> Counter:
        """The counter that belongs to the lines."""
        return Counter(
            ledger=self.standing.ledger,
            count=len(self.chain.records),
            head=self.chain.head,
            budget=self.standing.budget,
        )


def look(path: Path, counter_path: Path, *, new: Standing, before: Found | None = None) -> Found:
    """Read a ledger and its counter. The caller holds the lock.

    Args:
        path: The ledger.
        counter_path: The counter.
        new: Where a ledger stands that has no records.
        before: What was found sound before; lines are parsed from where that ends, if the file still begins with it.

    Raises:
        OSError: A file cannot be read.
    """
    counter, problem = None, ""
    try:
        counter = read_counter(counter_path)
    except LedgerError as e:
        problem = str(e)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        data = None
    if before is not None and before.data and data is not None and data.startswith(before.data):
        standing, chain = before.standing, read_chain(data[before.chain.size :], before.chain, before.standing.add)
    else:
        standing, chain = new, read_chain(data or b"", take=new.add)
    problem = problem or _compare(data, chain, counter, counter_path)
    if not problem and standing.simulated:
        problem = "it is a simulated ledger"
    return Found(data=data, chain=chain, standing=standing, counter=counter, problem=problem)


def _compare(data: bytes | None, chain: Chain, counter: Counter | None, counter_path: Path) -> str:
    """How a ledger differs from what its counter says was written; empty where it does not.

    Two differences are what a crash leaves, and no problem: one line more than was counted, or a line that was never
    finished where every other was counted.
    """
    if counter is None:
        return "" if data is None else f"its counter {counter_path} is missing"
    count = len(chain.records)
    crashed = count == counter.count + 1 and chain.before == counter.head and not chain.tail
    problem = ""
    if data is None and counter.count > 0:
        problem = f"it is missing, {counter.count} records were written"
    elif chain.problem:
        problem = chain.problem
    elif chain.records and chain.records[0].get("ledger") != counter.ledger:
        problem = f"it is another ledger than the one that {counter_path} belongs to"
    elif count < counter.count:
        problem = f"it holds {count} of the {counter.count} records that were written: cut short, or an older copy"
    elif count == counter.count and chain.head != counter.head:
        problem = "its last line is not the one that was written"
    elif count > counter.count and not crashed:
        problem = f"it holds {count} records, {counter_path} knows of {counter.count}: an older copy, or another hand"
    return problem
