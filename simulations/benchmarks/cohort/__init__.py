"""The benchmark of simulation at scale: `suite` has the figures, `loop` those that are held against the plain loop,
`population` and `workers` run in processes of their own.
"""
