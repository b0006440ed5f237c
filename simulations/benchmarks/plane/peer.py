"""Sites that do no training: the real agent, around an app that changes what comes a little and sends it back.

Run as a process: `python -m simulations.benchmarks.plane.peer ADDRESS KIT...` serves every kit until stdin closes.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from flwr.app import Context, Message

from client.agent import Agent
from client.mods import guard_mod
from client.mods.sealed import sealed_mod
from common.flower import TRAIN_LOSS, WEIGHT, arrays_of, update_reply
from common.kit import Kit, load_kit
from simulations.benchmarks.plane.processes import log_errors_only


def echo(message: Message, context: Context) -> Message:  # noqa: ARG001 - Flower's signature
    """Every value a little larger: distinct from what came, as an update is."""
    arrays = {name: values + np.float32(1e-3) for name, values in arrays_of(message.content).items()}
    return update_reply(message, arrays, {WEIGHT: 1.0, TRAIN_LOSS: 0.5})


def agent(kit: Kit) -> Agent:
    """A site's process, without its data."""
    sealed = sealed_mod(lambda _context: kit.keys, kit.coordinator, folder=kit.state / "outbox")

    def opened(message: Message, context: Context) -> Message:
        return sealed(message, context, echo)

    return Agent(kit, lambda message, context: guard_mod(message, context, opened))


def main(make: Callable[[Kit], Agent] = agent) -> None:
    """Serve until the parent closes stdin."""
    log_errors_only()
    address, *kits = sys.argv[1:]
    for folder in kits:
        served = make(replace(load_kit(Path(folder), role="site"), address=address))
        threading.Thread(target=served.run, daemon=True).start()
    print("ready", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
