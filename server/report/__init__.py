"""The report of a run: one self-contained page and TensorBoard events, both made from what a run folder holds.

`write_report` turns `run.toml`, `rounds.jsonl` and `result.json` into `report.html`; `report.tensorboard.EventWriter`
writes the same rounds as events. Whoever runs the rounds calls them (the coordinator, a simulation); nothing else here
is meant to be imported.

    record      reads the files, tolerating what a run that was interrupted had not written yet
    svg         a plot's frame, its scales and marks
    rounds, clients, comparison     the figures
    words       numbers and sentences for people; `privacy` those about the guarantee
    page        puts them into page.html
"""

from server.report.page import write_report

__all__ = ["write_report"]
