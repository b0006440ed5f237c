"""The record of what was released about a data set, on disk before it is released.

`standing` holds the rules (what is counted, what is admitted) and knows no files; `chain` and `counter` are the two
files' formats, `found` compares them; `file` is a site's ledger, `administration` what only its administrator decides;
`simulated` is the format of a simulation's store, `partitions` its files on a cluster, `history` what many alike share.
"""

from common.privacy.ledger.file import FileLedger, Ledger

__all__ = ["FileLedger", "Ledger"]
