"""What a site keeps for secure aggregation: a journal on disk that no restart forgets, and the member's secrets in
memory. Used by `client/mods/secagg.py`, by a site's resources and by those of simulated clients.
"""

from client.secagg.folder import FolderMembers, memory_folder
from client.secagg.journal import FileJournal
from client.secagg.members import ContextMembers, Members, MemoryMembers, Seat

__all__ = [
    "ContextMembers",
    "FileJournal",
    "FolderMembers",
    "Members",
    "MemoryMembers",
    "Seat",
    "memory_folder",
]
