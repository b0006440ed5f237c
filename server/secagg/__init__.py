"""The coordinator's side of secure aggregation, over the rounds of a run; the protocol itself is `common.secagg`.

`steps` carries the protocol's messages in Flower's; `set_up` makes an epoch; `sums` is one group's sum in one round;
`headers` remembers which rounds were begun; `session` keeps epochs and gives up rounds. `server.grids.secagg` does one
round, `server.asking.summed` puts all of it together.
"""
