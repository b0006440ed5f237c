"""The coordinator: asks clients to train, combines their updates, keeps checkpoints, writes the run folder.

`app` is the Flower ServerApp; `coordinator` the round loop over a Flower strategy; `grids` what lies between a
strategy and the clients; `store` the run folder; `report` what a person reads afterwards. Imports only `common`.
"""
