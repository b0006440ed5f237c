"""One run under Flower's own runtime: from what a bundle says to a run folder in the coordinator's kit."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Final

import structlog
from flwr.app import Context
from flwr.serverapp import Grid
from torch import nn

from common.config import RunConfig
from common.config.load import parse_config
from common.crypto import read_authorization
from common.errors import DataError, RefusedError, RunError
from common.kit import Kit
from common.privacy import FileLedger, PrivacyPlan
from common.schema import DataSchema, Examples
from common.site import Site, load_site
from server.app import make_server_app
from server.coordinator import Outcome
from server.grids import SealedGrid
from server.grids.superlink import SuperLinkGrid
from server.job import Job, Observer
from server.planning import check_clients, check_fit, held_out_examples, known_schema, plan_run
from server.provisioning.denied import DENIED, Denied
from server.results import Observers, RoundKeeper, complete_folder, describe_privacy, describe_run
from server.roster import ask_schema
from server.service.admission import check_real, sites_of
from server.service.ledgers import coordinators_ledger, spent_by_run
from server.store import RunFolder

log = structlog.get_logger()

RUNS, SITE_FILE = "runs", "site.toml"
"""Names in the kit's state, and in the kit: the same as those of `coterie server`."""
WAIT_SECONDS: Final = 300.0
"""How long a run waits for all its sites; after that it begins with those that are there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """A run that an operator of this federation signed.

    Attributes:
        config: The run.
        run_id: 32 hexadecimal digits.
        authorization: What was signed; sites read it, too.
        sites: Names of those that take part, sorted.
        operator: Who signed.
    """

    config: RunConfig
    run_id: str
    authorization: str
    sites: tuple[str, ...]
    operator: str


def read_order(kit: Kit, *, text: str, authorization: str) -> Order:
    """Check what came in a bundle.

    Raises:
        RefusedError: No operator whom this kit pins, and does not shut out, signed exactly this run.
        ConfigError: It is no run for real sites.
    """
    config = parse_config(text)
    signed = read_authorization(authorization, federation=kit.federation, operators=kit.operators)
    if signed.config_digest != config.digest():
        raise RefusedError(
            "the operator signed another configuration", hint="settings of a bundle cannot be changed: write a new one"
        )
    _refuse_denied(kit, signed.operator)
    check_real(config)
    sites = sites_of(config, pinned=sorted(kit.sites), denied=Denied(kit.folder / DENIED))
    check_clients(config, len(sites))
    return Order(
        config=config, run_id=signed.run_id, authorization=authorization, sites=sites, operator=signed.operator
    )


def _refuse_denied(kit: Kit, operator: str) -> None:
    if Denied(kit.folder / DENIED).refuses_name(operator):
        raise RefusedError(
            f"operator denied: {operator} is on the deny list", hint="another operator can write a bundle for the run"
        )


def carry_out(order: Order, kit: Kit, grid: Grid, context: Context) -> None:
    """Do a run over Flower's grid, or go on with it, to its end.

    Guarantee: only ciphertext reaches the grid; a run that was killed goes on after its last checkpoint.

    Raises:
        RunError: It has ended already, another process does it, or no site sent anything.
        RefusedError: The operator who signed it was shut out meanwhile.
        CoterieError: It is not possible.
    """
    begin, path = perf_counter(), kit.state / RUNS / order.run_id
    with RunFolder.resume(path) if (path / "run.toml").exists() else RunFolder.create(order.config, path) as folder:
        if folder.read_result() is not None:
            raise RunError(
                f"run {order.run_id} has ended; its result is in {path}",
                hint="`coterie flower bundle` writes a bundle for a new run",
            )
        superlink = SuperLinkGrid(grid, order.sites, refuses=Denied(kit.folder / DENIED).refuses_name)
        superlink.wait_for_sites(seconds=WAIT_SECONDS)
        sealed = SealedGrid(
            superlink,
            keys=kit.keys,
            records=kit.sites,
            run_id=bytes.fromhex(order.run_id),
            config_digest=bytes.fromhex(order.config.digest()),
        )
        prepared = _prepare(order, kit, sealed)
        outcome = _train(order, prepared, sealed, folder, context, kit=kit)
        result = _describe(order, prepared, folder, outcome, seconds=perf_counter() - begin)
        complete_folder(folder, outcome, result)
    log.info("run_ended", run=order.run_id, folder=str(path))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Prepared:
    """A run that is known to be possible."""

    schema: DataSchema
    model: nn.Module
    plan: PrivacyPlan | None
    ledger: FileLedger | None
    held_out: Examples | None


def _prepare(order: Order, kit: Kit, sealed: Grid) -> _Prepared:
    """Build the model and calibrate the noise, for data that this party knows or the sites describe."""
    config, file = order.config, kit.folder / SITE_FILE
    site = load_site(file if file.exists() else None)
    schema = known_schema(config, site)
    if schema is None:
        schema = ask_schema(sealed, config, run_id=order.run_id, authorization=order.authorization)
    planned = plan_run(config, schema, clients=len(order.sites), site=site)
    held_out = _held_out(config, site)
    if held_out is not None:
        check_fit(planned.model, held_out, schema)
    ledger = coordinators_ledger(config, planned.plan, state=kit.state, kit=kit.folder)
    return _Prepared(schema=schema, model=planned.model, plan=planned.plan, ledger=ledger, held_out=held_out)


def _held_out(config: RunConfig, site: Site) -> Examples | None:
    """This party's own examples; a run trains also where nothing can be measured."""
    try:
        return held_out_examples(config, site)
    except DataError as e:
        log.warning("no_held_out_examples", reason=str(e))
        return None


class _OperatorCheck(Observer):
    """Ends a run before its next round once its operator is shut out."""

    def __init__(self, kit: Kit, operator: str) -> None:
        self._kit, self._operator = kit, operator

    def round_started(self, server_round: int, cohort: list[str]) -> None:
        """See `Observer`."""
        del server_round, cohort
        _refuse_denied(self._kit, self._operator)


def _train(
    order: Order, prepared: _Prepared, sealed: Grid, folder: RunFolder, context: Context, *, kit: Kit
) -> Outcome:
    """All rounds that are still to be done, by the same ServerApp as under any other engine."""
    keeper = RoundKeeper(folder, spent=lambda _: _spent(order, prepared), plan=prepared.plan)
    job = Job(
        config=order.config,
        model=prepared.model,
        held_out=prepared.held_out,
        plan=prepared.plan,
        folder=folder,
        observer=Observers([_OperatorCheck(kit, order.operator), keeper]),
        ledger=prepared.ledger,
        run_id=order.run_id,
        authorization=order.authorization,
        sites=kit.sites,
    )
    outcomes: list[Outcome] = []
    with closing(keeper):
        make_server_app(job, outcomes.append)(sealed, context)
    return outcomes[0]


def _spent(order: Order, prepared: _Prepared) -> dict[str, float]:
    """What the coordinator's own releases of this run cost each client."""
    return dict(spent_by_run(prepared.ledger, prepared.plan, clients=order.sites, run=order.config.digest()))


def _describe(
    order: Order, prepared: _Prepared, folder: RunFolder, outcome: Outcome, *, seconds: float
) -> dict[str, Any]:
    """What `result.json` says."""
    plan, own = prepared.plan, prepared.ledger is not None
    privacy = (
        None
        if plan is None
        else describe_privacy(
            order.config,
            plan,
            epsilon=_spent(order, prepared),
            taken=dict.fromkeys(order.sites, plan.rounds) if own else {},
            examples_epsilon={},
            epsilon_is="spent by the coordinator's releases over the whole run, for each client"
            if own
            else "not known here: each site's own ledger says what was spent of its examples",
        )
    )
    return describe_run(
        order.config,
        outcome,
        folder.rounds(),
        schema=prepared.schema,
        model=prepared.model,
        held_out=prepared.held_out,
        clients={name: {} for name in order.sites},
        privacy=privacy,
        seconds=seconds,
        simulated=False,
    ) | {"comparison": None, "run": order.run_id}
