"""The coordinator's one port: sites attach and are sent orders, updates come up, operators ask, certificates renew.

`orders` and `hub` are plain values and state without a network; a run reaches sites through them
(`server.grids.plane`). `desk` is what operators' calls are answered by. Everything else is gRPC, used only by
`PlaneServer`.
"""
