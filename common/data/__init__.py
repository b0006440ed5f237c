"""Data sets: reading them, describing them, and dividing them among clients.

`load_federation` gives a simulation its clients, `schema_of` what a model has to know, `load_examples` what a trained
model predicts on, `data_sets` and `check_data` what `coterie data` shows.

Inside: `builtin` and `files` hold the data sets that come with Coterie, `readers` a site's own formats; `fetch`,
`origins` and `pinned` bring files and check their hash; `split` and `partition` divide; `entities` keeps together what
belongs to one person; `tokens` turns text into ids.
Used by the coordinator, the agents and simulations; imports only errors, plain types and settings.
"""

from common.data.catalogue import DataSetInfo, data_sets
from common.data.check import DataReport, check_data
from common.data.federation import load_federation
from common.data.fetch import fetch_data
from common.data.loading import LoadedExamples, load_examples, schema_of

__all__ = [
    "DataReport",
    "DataSetInfo",
    "LoadedExamples",
    "check_data",
    "data_sets",
    "fetch_data",
    "load_examples",
    "load_federation",
    "schema_of",
]
