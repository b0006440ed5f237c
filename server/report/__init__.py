"""The report of a run: one self-contained page and TensorBoard events, both made from what a run folder holds.

`write_report` turns `run.toml`, `rounds.jsonl` and `result.json` into `report.html`; `report.tensorboard.EventWriter`
writes the same rounds as events. Whoever runs the rounds calls them (the coordinator, a simulation). A study's page
(`simulations.study`) is made of the same parts; tables on a terminal take their words and measures from here.

    record      reads the files, tolerating what a run that was interrupted had not written yet
    measures    what rounds and clients amount to: time to an accuracy, wasted work, staleness, fairness
    svg         a plot's frame, its scales and marks
    rounds, virtual, clients, fairness, comparison     the figures
    words       numbers and sentences for people; `privacy` those about the guarantee
    template    the style and parts that all pages share (base.html, parts.html)
    page        puts them into page.html
"""

from server.report.page import write_report

__all__ = ["write_report"]
