"""What every party shares: configuration, models, data, privacy, and the records that travel.

Imports nothing of `server`, `client` or `simulations`; they import it. Start with `config` (one run's settings) and
`errors` (everything that can go wrong); `models`, `data`, `privacy` and `transport` are siblings that do not know each
other.
"""
