"""`python -m simulations.benchmarks NAME [--json] [--quick]`."""

from __future__ import annotations

import json
import os
import platform
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from simulations.benchmarks import engine


def _dp(*, quick: bool) -> dict[str, float]:
    from simulations.benchmarks import dp  # Opacus takes seconds to import

    return dp.figures(quick=quick)


def _plane(*, quick: bool) -> dict[str, float]:
    from simulations.benchmarks.plane import suite

    return suite.figures(quick=quick)


def _secagg(*, quick: bool) -> dict[str, float]:
    from simulations.benchmarks.secagg import suite

    return suite.figures(quick=quick)


def _cohort(*, quick: bool) -> dict[str, float]:
    from simulations.benchmarks.cohort import suite

    return suite.figures(quick=quick)


BENCHMARKS = {"engine": engine.figures, "cohort": _cohort, "dp": _dp, "plane": _plane, "secagg": _secagg}


def main(
    name: Annotated[str, typer.Argument(help=f"Which benchmark: {', '.join(BENCHMARKS)}.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Fewer pairs: engine ends within 45 s, cohort within 60 s, dp and secagg within 150 s, plane within "
            "180 s.",
        ),
    ] = False,
) -> None:
    """Measure, and print figures with the machine they were made on."""
    if name not in BENCHMARKS:
        raise typer.BadParameter(f"{name} is none of: {', '.join(BENCHMARKS)}")
    figures = BENCHMARKS[name](quick=quick)
    document = {"benchmark": name, "figures": figures, "machine": machine()}
    if as_json:
        print(json.dumps(document))
        return
    table = Table("figure", "value", box=None, header_style="dim", pad_edge=False)
    for key, value in figures.items():
        table.add_row(key, f"{value:.3f}")
    Console().print(table, document["machine"])


def machine() -> dict[str, object]:
    """What the figures were made on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    typer.run(main)
