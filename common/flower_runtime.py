"""What both ends agree on under Flower's own runtime: where a process finds its kit, and what a bundle's settings say.

There every message to a site starts a new process, and so does every run at the coordinator. A process knows its party
by the kit of its own machine alone: the bundle that came with the run names none.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from flwr.app import Array, ArrayRecord, Message, RecordDict

from common.errors import KitError, RefusedError
from common.transport.sealed import BLOB, SEALED, Blob, read_sealed

KIT_VARIABLE: Final = "COTERIE_KIT"
"""Environment variable that names the kit's folder on this machine."""
KIT_KEY: Final = "kit"
"""The same in a SuperNode's `--node-config`, where one machine has several."""
RUN_KEY, AUTHORIZATION_KEY = "run", "authorization"
"""Settings of a bundle: the run's configuration as JSON, and what an operator signed for it."""


def kit_folder(node_config: Mapping[str, Any]) -> Path:
    """The folder of this machine's kit; the node's own settings come before the environment.

    Raises:
        KitError: Neither names one.
    """
    named = node_config.get(KIT_KEY) or os.environ.get(KIT_VARIABLE)
    if not isinstance(named, str):
        raise KitError(
            "this process does not know its kit",
            hint=f"set {KIT_VARIABLE} for flower-superexec, or give the SuperNode --node-config '{KIT_KEY}=\"PATH\"'",
        )
    return Path(named)


def read_settings(settings: Mapping[str, Any]) -> tuple[str, str]:
    """Configuration and authorization as a bundle's settings hold them; nothing of them has been verified.

    Raises:
        RefusedError: One is missing, or is no text.
    """
    found = settings.get(RUN_KEY), settings.get(AUTHORIZATION_KEY)
    if not (isinstance(found[0], str) and isinstance(found[1], str)):
        raise RefusedError(
            "the bundle says neither which run it is nor who ordered it", hint="write one with `coterie flower bundle`"
        )
    return found[0], found[1]


class Packer:
    """Makes of sealed messages what Flower's own transport takes: its objects carry the name of their class, and only
    Flower's own names are known there.

    Guarantee: nothing passes that is not sealed; what several messages share is encoded once.
    """

    def __init__(self) -> None:
        self._arrays: dict[int, tuple[Blob, Array]] = {}

    def pack(self, message: Message) -> Message:
        """The same message, its ciphertext in one of Flower's own arrays; an error passes as it is.

        Raises:
            RefusedError: The message is not sealed.
        """
        if not message.has_content():
            return message
        _, blob = read_sealed(message.content)
        if id(blob) not in self._arrays:  # with the blob, so that no other takes its place in memory
            self._arrays[id(blob)] = blob, Array(blob.dtype, blob.shape, blob.stype, blob.data)
        record = ArrayRecord()
        record[BLOB] = self._arrays[id(blob)][1]
        content = RecordDict({SEALED: message.content[SEALED], BLOB: record})
        return Message(content, metadata=message.metadata)  # type: ignore[call-overload,no-any-return]
