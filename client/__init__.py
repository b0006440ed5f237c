"""A site: receives a model, trains it on its own examples, answers with an update or with a typed failure.

`app` is the Flower ClientApp; `mods` wrap it, outermost first; `trainer` is the local training loop. Imports only
`common`.
"""
