"""Whether a submitted run can be carried out here, and by whom: asked before it is queued."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from common.config import RunConfig
from common.errors import ConfigError, DataUnavailableError
from server.planning import check_clients, check_fit, held_out_examples, known_schema, plan_run
from server.provisioning import Denied
from server.provisioning.denied import DENIED
from server.service.runner import Workplace


def check_submission(config: RunConfig, *, place: Workplace, pinned: Iterable[str]) -> tuple[str, ...]:
    """Refuse a run that cannot end well; the names of the sites that take part.

    Where the coordinator knows the data set, the model is built, the noise calibrated, and one example goes through.
    Where it does not, sites are asked when the run starts.

    Raises:
        ConfigError, ModelError, PrivacyError, DataError: The run is not possible.
    """
    check_real(config)
    sites = sites_of(config, pinned=sorted(pinned), denied=Denied(place.kit.folder / DENIED))
    check_clients(config, len(sites))
    schema = known_schema(config, place.site)
    if schema is not None:
        planned = plan_run(config, schema, clients=len(sites), site=place.site)
        try:
            examples = held_out_examples(config, place.site)
        except DataUnavailableError:
            examples = None  # the sites have it: nothing is measured here
        if examples is not None:
            check_fit(planned.model, examples, schema)
    return sites


def check_real(config: RunConfig) -> None:
    """Refuse what exists in simulations only, instead of leaving it out silently.

    Raises:
        ConfigError: It asks for such.
    """
    problems = (
        (config.comparison.enabled, "comparison.enabled", "false"),
        (config.simulation.byzantine_clients > 0, "simulation.byzantine_clients", "0"),
        (config.data.pooled, "data.pooled", "false"),
    )
    for wrong, key, right in problems:
        if wrong:
            raise ConfigError(f"`{key}` is for simulations only", hint=f"submit it with --set {key}={right}")


def sites_of(config: RunConfig, *, pinned: list[str], denied: Denied) -> tuple[str, ...]:
    """Who takes part, sorted: those that the run names, or all that are not shut out.

    Raises:
        ConfigError: It names a site that is not there or is shut out, or nobody is left.
    """
    if not pinned:
        raise ConfigError("the federation has no sites yet", hint="`coterie provision` makes kits for them")
    for wanted in config.data.sites:
        if wanted not in pinned:
            near = difflib.get_close_matches(wanted, pinned, n=1, cutoff=0.4)
            hint = f"did you mean `{near[0]}`?" if near else f"there are: {', '.join(pinned)}"
            raise ConfigError(f"data.sites: the federation has no site `{wanted}`", hint=hint)
        if denied.refuses_name(wanted):
            raise ConfigError(f"data.sites: {wanted} is on the deny list", hint="leave it out of data.sites")
    if config.data.sites:
        return tuple(sorted(set(config.data.sites)))
    sites = tuple(name for name in pinned if not denied.refuses_name(name))
    if not sites:
        raise ConfigError("every site is on the deny list", hint="see denied.txt in the coordinator's kit")
    return sites
