"""Each party on a host of its own, in a network whose cables can be pulled."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from common.config import load_config
from server.provisioning import Federation, provision
from server.service.audit import AUDIT, read_lines
from simulations.federation import PLAIN, simulated_model
from simulations.loopback import OPERATOR, POLICY, free_port
from tests.helpers.hosts import Host, hosts
from tests.helpers.processes import PATIENCE_SECONDS, wait_until

SITES = ("cleveland", "hungary")
CUT_SECONDS = 60
"""For so long the cable is out: longer than a lost packet is repeated quickly, and than a silent peer is noticed."""


@contextmanager
def coterie_on(host: Host, arguments: Sequence[str | Path], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`coterie ARGUMENTS` on a host, gone when the block ends."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*host.prefix, sys.executable, "-m", "common.cli", *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def ask(host: Host, *arguments: str | Path) -> dict[str, object]:
    """What a command on a host prints."""
    done = subprocess.run(
        [*host.prefix, sys.executable, "-m", "common.cli", *map(str, arguments), "--json"],
        capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    document = json.loads(done.stdout)
    assert isinstance(document, dict)
    return document


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_link_that_is_cut_for_a_minute_costs_time_and_nothing_else(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """A site vanishes in the middle of a run, without a word; the run waits for it, and ends with the same model."""
    sites = f"data.sites={json.dumps(SITES)}"
    settings = [*PLAIN, "privacy.unit=none", "rounds=60", sites]
    port, kits = free_port(), tmp_path / "kits"
    with hosts(["coordinator", *SITES, OPERATOR]) as network, ExitStack() as stack:
        if not network["coordinator"].prefix:
            record_property("note", "no network namespaces: one host, a stopped process for a cut link")
        address = network["coordinator"].address
        federation = Federation.model_validate(
            {
                "name": "network",
                "server": f"{address}:{port}",
                "sites": {s: {} for s in SITES},
                "operators": {OPERATOR: {}},
            }
        )
        provision(federation, kits)
        server = ["server", "--kit", kits / "server", "--host", address]
        stack.enter_context(coterie_on(network["coordinator"], server, tmp_path / "server.log"))
        agents = {}
        for site in SITES:
            (kits / site / "policy.toml").write_text(POLICY.format(data='["heart"]'))
            client = ["client", "--kit", kits / site]
            agents[site] = stack.enter_context(coterie_on(network[site], client, tmp_path / f"{site}.log"))
        audit = kits / "server" / "state" / AUDIT
        wait_until(lambda: audit.exists() and _count(audit, "site-attached") >= len(SITES))
        words = [word for setting in settings for word in ("--set", setting)]
        run = str(ask(network[OPERATOR], "submit", "heart", *words, "--kit", kits / OPERATOR)["run"])
        wait_until(lambda: _count(audit, "round-ended") >= 5)
        cut = network["hungary"]
        _cut_for_a_minute(cut, agents["hungary"])
        wait_until(lambda: _count(audit, "run-ended") == 1)
        status = ask(network[OPERATOR], "status", run, "--kit", kits / OPERATOR)
        assert status["status"] == "completed"
        ask(network[OPERATOR], "fetch", run, "--kit", kits / OPERATOR, "--out", tmp_path / "fetched")
    rows = [json.loads(line) for line in (tmp_path / "fetched" / "rounds.jsonl").read_text().splitlines()]
    assert [row["survivors"] for row in rows] == [list(SITES)] * 60
    config = load_config("heart", settings).config
    expected = simulated_model(config, tmp_path / "simulation")
    assert (tmp_path / "fetched" / "model.safetensors").read_bytes() == expected


def _cut_for_a_minute(host: Host, process: subprocess.Popen[bytes]) -> None:
    """Pull the cable; on loopback, where there is none, the process is stopped instead: it says nothing either."""
    minute = threading.Event()
    if host.prefix:
        host.cut()
        minute.wait(CUT_SECONDS)
        host.mend()
        return

    process.send_signal(signal.SIGSTOP)
    minute.wait(CUT_SECONDS)
    process.send_signal(signal.SIGCONT)


def _count(audit: Path, event: str) -> int:
    return sum(1 for line in read_lines(audit) if line["event"] == event)
