"""Many clients on one machine: the same ServerApp and ClientApp as in production, called in this process.

From a command to a client: `cli` and `study_cli` are typed; `runner` carries a whole run out, `how` keeps its options,
`rerun` repeats it; `run` puts its parts together; `engines` chooses what calls the clients: `inline` here, `pool` in
worker processes, `cluster` and `ray_engine` on Ray; `cohort` has them trained in chunks (`chunks`, `stacking`) where
`batching` says so; `sites` is what simulated clients own, `states` and `ledgers` what they keep; `clock` gives them
virtual time. `comparison` and `study` set runs side by side; `scenarios` holds ready runs, `benchmarks` the figures,
`federation` all parties as processes of their own. May import everything; nothing imports it.
"""
