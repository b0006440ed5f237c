"""The ClientApp of a site under Flower's own runtime: the same as in `coterie client`, made anew for every message.

Flower starts a process for each message and keeps a client's state in the SuperNode's memory alone. What must last lies
in the kit of this machine: keys, ledgers, stored updates, and which orders were taken. Secrets of secure aggregation
lie in memory that outlives a process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import structlog
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.agent import SEEN
from client.cli import LOCK
from client.mods.sealed import ReplayGuard
from client.resources import site_resources
from client.secagg import FolderMembers, memory_folder
from client.site_app import make_site_app
from common.disk import acquire_lock, disk_errors
from common.errors import CoterieError, FailureCode
from common.flower import failure_reply, prepare_process
from common.flower_runtime import Packer, kit_folder
from common.kit import Kit, load_kit

log = structlog.get_logger()

MEMBERS = "members"
"""Folder in a site's state, where this machine has no file system in memory."""


class SiteApp(ClientApp):
    """Answers with the app of this machine's kit, which is read when the first message comes.

    Guarantee: what leaves is sealed, or a fixed code. Why the site cannot work stands in its own log alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kit: Kit | None = None
        self._app: ClientApp | None = None

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer one message."""
        prepare_process()
        try:
            kit, app = self._ready(context)
            with _alone(kit):
                return Packer().pack(app(message, context))
        except CoterieError as e:
            log.error("site_cannot_work", reason=str(e), hint=e.hint)  # noqa: TRY400 - made for people
            return failure_reply(message, FailureCode.CLIENT_FAILED)

    def _ready(self, context: Context) -> tuple[Kit, ClientApp]:
        """This machine's kit, and its app."""
        if self._kit is None or self._app is None:
            torch.set_num_threads(1)  # a client's result must not depend on how many cores it finds
            self._kit = load_kit(kit_folder(context.node_config), role="site")
            self._app = make_site_app(
                site_resources(self._kit, members=_members(self._kit)), seen=ReplayGuard(self._kit.state / SEEN)
            )
        return self._kit, self._app


def _members(kit: Kit) -> FolderMembers:
    """Where the next process finds what this one leaves of secure aggregation: in memory where that is possible."""
    return FolderMembers(memory_folder(kit.keys.record.key_id, otherwise=kit.state / MEMBERS))


@contextmanager
def _alone(kit: Kit) -> Iterator[None]:
    """Keep `coterie client` and other SuperNodes from working with this kit at the same time.

    Raises:
        RunError: One does.
    """
    with disk_errors(kit.state / LOCK):
        lock = acquire_lock(kit.state / LOCK)
    try:
        yield
    finally:
        os.close(lock)


app = SiteApp()
