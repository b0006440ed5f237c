"""Many clients on one machine: the same ServerApp and ClientApp as in production, called in this process.

`inline` is the Flower Grid that calls them, `workers` its pool of processes, `sites` what simulated clients own;
`run` puts a run together, `comparison` sets it beside its alternatives, `cli` is `coterie simulate`; `scenarios`
holds ready runs and `benchmarks` the figures. May import everything; nothing imports it.
"""
