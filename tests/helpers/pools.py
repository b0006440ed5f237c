"""Clients that count, and a process that owns a pool of them; kept small, because every worker imports it."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from common.flower import ARRAYS, CONFIG, METRICS, to_record
from simulations.chunks import COHORT_TYPE
from simulations.inline import InlineGrid
from simulations.pool.pool import WorkerPool
from tests.simulations.site_fixtures.parts import TROUBLES

NAMES = [f"client-{i}" for i in range(4)]


def counting_app() -> ClientApp:
    """Answers with how often this client was asked, and by which process."""
    app = ClientApp()

    def answer(message: Message, context: Context) -> Message:
        kept = context.state.metric_records
        count = int(kept["calls"]["count"]) + 1 if "calls" in kept else 1  # type: ignore[arg-type]
        context.state["calls"] = MetricRecord({"count": count})
        config = message.content.config_records.get(CONFIG, ConfigRecord())
        if config.get("trouble"):
            (TROUBLES | {"memory": run_out_of_memory})[str(config["trouble"])]()
        arrays = message.content.array_records
        total = float(sum(a.numpy().astype(np.float64).sum() for a in arrays[ARRAYS].values())) if arrays else 0.0
        content = RecordDict({METRICS: MetricRecord({"count": count, "process": os.getpid(), "total": total})})
        for name, record in message.content.array_records.items():
            content[name] = record
        return Message(content, reply_to=message)

    app.query()(answer)
    app.train(COHORT_TYPE.partition(".")[2])(answer)
    return app


def run_out_of_memory() -> None:
    """Take more memory than this process is allowed, page by page."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), before[1]))
    try:
        kept = []
        while True:
            kept.append(bytearray(16 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def app_unless(flag: str) -> ClientApp:
    """None where there is such a file."""
    if Path(flag).exists():
        os._exit(1)
    return counting_app()


def broken_app() -> ClientApp:
    os._exit(1)


def queries(grid: InlineGrid, trouble: dict[int, str] | None = None, arrays: Any = None) -> list[Message]:
    messages = []
    for place, node in enumerate(grid.get_node_ids()):
        content = RecordDict({CONFIG: ConfigRecord({"trouble": (trouble or {}).get(place, "")})})
        if arrays is not None:
            content[ARRAYS] = arrays
        messages.append(Message(content, node, "query"))
    return messages


def own_a_pool(connection: Any, trouble: str) -> None:
    pool = WorkerPool(counting_app, 2)
    grid = InlineGrid(pool, NAMES)
    next(grid.stream(queries(grid, {0: trouble}, to_record({"w": np.ones(3)}))))
    connection.send(({worker.process.pid for worker in pool._workers}, pool._mailbox.folders[0]))
    connection.recv()
