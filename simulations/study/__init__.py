"""Studies: the same run under varied settings, each several times with other seeds, set side by side on one page.

    arms      from `--vary` to arms and the configuration of each of their runs
    folder    a study's folder: what was planned, and the run folders below it
    carry     does the runs that are missing, by the code of `coterie simulate`
    summary   means, ranges and differences over the repeats
    figures   the charts, out of the parts of a run's report; `page` puts them into study.html, `table` on a terminal

`simulations.study_cli` is `coterie study`; nothing else imports this.
"""
