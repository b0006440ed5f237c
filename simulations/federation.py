"""`make federation`: a whole federation on this machine, each party a process of its own, on the heart data.

Four hospitals and a coordinator talk over loopback as they would over the internet: mutual TLS, sealed messages, keys
and policies in their own kits. The model that comes of it is compared, byte for byte, with that of a simulation. With
`--secagg` the coordinator sees sums only. Then sites round at random, and the model is that of the simulation, and of a
run without masks, but for what rounding can do.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, Final

from common.config import RunConfig, load_config
from common.errors import CoterieError, RunError
from server.remote import Coordinator
from simulations.loopback import SITES, LocalFederation

PLAIN: Final = ("comparison.enabled=false",)
"""What the scenario is changed by: the comparison is a study that only a simulation can do."""

SECURE: Final = "privacy.secure_aggregation=true"

TOLERANCE: Final = 1e-4
"""How far rounding in 32 bits may take a value of this model in all rounds; about ten times what it does."""

Say = Callable[[str], None]
"""Tells a person how far it is."""


def simulated_model(config: RunConfig, folder: Path) -> bytes:
    """The model that a simulation of the same settings ends with, as the bytes of its file."""
    from safetensors.numpy import save

    from simulations.run import execute, prepare

    outcome = execute(prepare(config, folder=folder))
    return save(dict(outcome.arrays))


def largest_difference(one: bytes, other: bytes) -> float:
    """How far any value of one model is from the other model's."""
    from safetensors.numpy import load

    mine, theirs = load(one), load(other)
    return max(float(abs(mine[name].astype("f8") - theirs[name].astype("f8")).max(initial=0.0)) for name in theirs)


def compare(folder: Path, *, overrides: Sequence[str] = (), say: Say = lambda _text: None) -> dict[str, Any]:
    """Run the heart scenario on separate processes and as a simulation; what came of both.

    Raises:
        CoterieError: A part of it failed.
    """
    loaded = load_config("heart", [*PLAIN, "privacy.unit=none", *overrides])
    config = loaded.config
    begin = perf_counter()
    with LocalFederation(folder) as federation:
        say(f"kits for a coordinator, {len(federation.sites)} sites and an operator are in {federation.kits}")
        federation.start()
        federation.wait_until_answered()
        say(f"the coordinator listens on 127.0.0.1:{federation.port}; the sites are on their way")
        with federation.operator() as coordinator:
            run = coordinator.submit(config)["run"]
            say(f"run {run} is queued")
            status = _follow(coordinator, run, say)
            if status["status"] != "completed":
                problem = (status.get("problem") or {}).get("message", "")
                raise RunError(f"the run is {status['status']}: {problem}", hint=f"see {federation.server.log}")
            fetched = folder / "fetched"
            coordinator.fetch(run, fetched)
        seconds = perf_counter() - begin
        model = (fetched / "model.safetensors").read_bytes()
    say("the processes have ended; now the same settings as a simulation")
    begin = perf_counter()
    expected = simulated_model(config, folder / "simulation")
    seconds_simulated = perf_counter() - begin
    masked = None
    if config.privacy.secure_aggregation:
        say("and once more without masks")
        plain = simulated_model(loaded.plain, folder / "plain")
        masked = {
            "largest_difference": largest_difference(model, plain),
            "from_simulation": largest_difference(model, expected),
        }
    return {
        "format": 1,
        "run": run,
        "sites": list(SITES),
        "rounds": status["rounds_done"],
        "accuracy": status["accuracy"],
        "majority_accuracy": status["majority_accuracy"],
        "model_sha256": hashlib.sha256(model).hexdigest(),
        "simulated_sha256": hashlib.sha256(expected).hexdigest(),
        "identical": model == expected,
        "agrees": max(masked.values()) <= TOLERANCE if masked else model == expected,
        "secure_aggregation": masked,
        "seconds": {"federation": seconds, "simulation": seconds_simulated},
    }


def _follow(coordinator: Coordinator, run: str, say: Say) -> dict[str, Any]:
    last: dict[str, Any] = {}
    shown = 0
    for last in coordinator.follow("status", run):
        row = last["last_round"]
        if row and row["round"] > shown:
            shown = row["round"]
            say(f"round {shown} of {last['rounds']}: {row['survivors']} sites, accuracy {row['accuracy']:.3f}")
    return last


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code is 1 where the models differ."""
    parser = argparse.ArgumentParser(prog="python -m simulations.federation", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--keep", type=Path, help="folder for kits, logs and the run; default: a temporary one")
    parser.add_argument("--secagg", action="store_true", help="secure aggregation: the coordinator sees sums only")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting")
    options = parser.parse_args(arguments)
    with ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(TemporaryDirectory(prefix="coterie-federation-")))
        folder.mkdir(parents=True, exist_ok=True)
        try:
            overrides = [*([SECURE] if options.secagg else []), *options.set]
            found = compare(folder, overrides=overrides, say=lambda text: print(text, file=sys.stderr, flush=True))
        except CoterieError as e:
            print(f"error: {e}\nhint: {e.hint}", file=sys.stderr)
            return e.exit_code
    if options.json:
        print(json.dumps(found))
    else:
        _print(found)
    return 0 if found["agrees"] else 1


def _print(found: dict[str, Any]) -> None:
    same = "identical, byte for byte" if found["identical"] else "the same, up to rounding"
    print(
        f"accuracy   {found['accuracy']:.3f} (always the most common class: {found['majority_accuracy']:.3f})\n"
        f"federation {found['model_sha256']}  {found['seconds']['federation']:.1f} s, six processes\n"
        f"simulation {found['simulated_sha256']}  {found['seconds']['simulation']:.1f} s, one process\n"
        + (f"the models are {same}" if found["agrees"] else "THE MODELS DIFFER")
    )
    if found["secure_aggregation"]:
        off = found["secure_aggregation"]["largest_difference"]
        print(f"masked     no weight is further than {off:.1e} from a run without masks (experimental)")


if __name__ == "__main__":
    sys.exit(main())
