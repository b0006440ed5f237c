"""How often, and how soon again, anybody can be asked, and how many are in a sum: what noise is calibrated to, known to
every party.
"""

from __future__ import annotations

from common.config.settings import CohortSettings, RunConfig
from common.errors import ConfigError


def participations(settings: CohortSettings, clients: int, rounds: int) -> int:
    """The most rounds of a run that any one client can take part in.

    Uniform and Poisson sampling may draw the same client every round: `rounds`. So does a cohort of everybody. In
    cyclic cohorts a client's group is asked every g-th round, g being the number of groups: ceil(r / g), which the
    first group meets. For balanced sampling of k out of n clients over r rounds it is ceil(r*k/n), because at all times
    the counts of any two clients differ by at most one. Proof by induction: let the counts lie in {m, m+1}, as they do
    at the start. A round takes the k lowest. If at least k clients are at m, only such clients move, to m+1. Otherwise
    all clients at m move to m+1 and some at m+1 move to m+2, and nobody is left at m. Either way the counts again lie
    in two neighbouring values. Now let M be the highest count after r rounds, which sum to r*k. One client has M and
    all others at least M-1, so r*k >= n*(M-1) + 1, hence r*k/n > M-1, hence ceil(r*k/n) >= M.

    Args:
        settings: Size and kind of the cohorts.
        clients: Number of clients n that cohorts are drawn from every round, 1 or more.
        rounds: Number of rounds r, 0 or more.

    Raises:
        ConfigError: The cohort is larger than the number of clients.
    """
    check_size(settings, clients)
    if settings.size == 0 or settings.sampling in {"uniform", "poisson"}:
        return rounds
    if settings.sampling == "cyclic":
        return -(-rounds // groups(settings, clients))
    return -(-rounds * settings.asked() // clients)


def min_separation(settings: CohortSettings, clients: int) -> int:
    """The fewest rounds from one participation of a client to its next: 1 where it can be asked twice in a row.

    Only cyclic cohorts keep clients apart, by the number of groups. Balanced ones do not: a client can be the last of
    one turn and the first of the next.

    Raises:
        ConfigError: The cohort is larger than the number of clients.
    """
    check_size(settings, clients)
    return groups(settings, clients) if settings.sampling == "cyclic" else 1


def groups(settings: CohortSettings, clients: int) -> int:
    """How many cyclic cohorts there are before the first comes again: as many of at least `size` clients as there can
    be. Clients that are left over join them, at most one more to each than to any other.
    """
    return clients // settings.asked() if settings.size else 1


def honest_in_sum(config: RunConfig) -> int:
    """The fewest honest clients in any sum that secure aggregation opens: every member of it refuses a smaller one.

    `cohort.min_survivors` is about a whole round, so it says nothing of a group's sum.
    """
    settings = config.secagg
    if settings.group_size:
        return settings.honest
    return max(settings.honest, config.cohort.min_survivors - settings.colluding)


def check_size(settings: CohortSettings, clients: int) -> None:
    """A cohort has to fit the clients there are."""
    if clients < 1:
        raise ConfigError("there are no clients to draw a cohort from", hint="add sites, or raise data.clients")
    if settings.asked() > clients:
        beyond = f" and {settings.asked() - settings.size} are asked beyond it" if settings.over_sampling else ""
        raise ConfigError(
            f"cohort.size is {settings.size}{beyond}, but there are only {clients} clients",
            hint=f"set it to {clients} or less; 0 asks all" if not beyond else "lower it, or cohort.over_sampling",
        )
