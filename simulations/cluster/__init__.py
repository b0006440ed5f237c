"""A run over the machines of a Ray cluster: the same apps, trained wherever there is room.

`connection` finds the cluster and looks at each of its nodes, which answer with `check`. `pool` has clients answered by
processes (`actor`), and `runtime` puts that pool into Flower's simulation runtime. Keys (`keys`) and ledgers
(`ledgers`) are files in the run's folder, one for each client. Import from the modules: this package imports none of
them, since every run looks for its ledgers and few have a cluster.
"""
