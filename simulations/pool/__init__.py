"""Worker processes that train simulated clients: a pool of them, what they share, and who is given to whom.

`engines` makes a `pool.WorkerPool` over `shared_data`; `sites` holds the data that was shared. Nothing else is imported
from here. This file imports nothing, because the parts are needed at different ends.
"""
