"""Sites that do no training: the real agent, seal, member and masks around an app that changes what comes a little.

Run as a process: `python -m simulations.benchmarks.secagg.peer ADDRESS KIT...` serves every kit until stdin closes.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import replace
from pathlib import Path

from flwr.app import Context, Message

from client.agent import Agent
from client.mods import answer_steps, guard_mod, secagg_mod
from client.mods.sealed import sealed_mod
from client.policy import Policy
from client.policy_tables import Limits
from client.resources import SiteResources
from common.flower import SECAGG_TYPE
from common.kit import Kit, load_kit
from common.site import load_site
from simulations.benchmarks.plane.peer import echo
from simulations.benchmarks.plane.processes import log_errors_only


def agent(kit: Kit) -> Agent:
    """A site's process, without its data and without an operator's word."""
    resources = SiteResources(kit=kit, policy=Policy(limits=Limits(units=["none"])), site=load_site(None))
    sealed = sealed_mod(lambda _context: kit.keys, kit.coordinator, folder=kit.state / "outbox")
    masked = secagg_mod(resources)

    def inner(message: Message, context: Context) -> Message:
        if message.metadata.message_type == SECAGG_TYPE:
            return answer_steps(resources, message, context)
        return masked(message, context, echo)

    def opened(message: Message, context: Context) -> Message:
        return sealed(message, context, inner)

    return Agent(kit, lambda message, context: guard_mod(message, context, opened))


def main() -> None:
    """Serve until the parent closes stdin."""
    log_errors_only()
    address, *kits = sys.argv[1:]
    for folder in kits:
        served = agent(replace(load_kit(Path(folder), role="site"), address=address))
        threading.Thread(target=served.run, daemon=True).start()
    print("ready", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
