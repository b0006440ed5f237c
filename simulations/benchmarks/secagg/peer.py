"""Sites that do no training: the real agent, seal, member and masks around an app that changes what comes a little.

Run as a process: `python -m simulations.benchmarks.secagg.peer ADDRESS KIT...` serves every kit until stdin closes.
"""

from __future__ import annotations

from flwr.app import Context, Message

from client.agent import Agent
from client.mods import answer_steps, guard_mod, secagg_mod
from client.mods.sealed import sealed_mod
from client.policy import Policy
from client.policy_tables import Limits
from client.resources import SiteResources
from common.flower import SECAGG_TYPE
from common.kit import Kit
from common.site import load_site
from simulations.benchmarks.plane.peer import echo, main


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


if __name__ == "__main__":
    main(agent)
