"""`coterie server` that kills itself (SIGKILL) at one step: run as a program with kit, port, step and how often it
passes before.

Steps are lines of the audit log, killed just after the line was written, and two that the log does not show:
`checkpoint`, just before a round's checkpoint takes its name, and `result`, between the model and what describes it.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.cli import main
from server import results
from server.service.audit import AuditLog


def _countdown(count: int) -> Callable[[], None]:
    left = count

    def step() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return step


def arm(step: str, passes: int) -> None:
    """Let this process die the next time after `passes` times that the step is reached."""
    reached = _countdown(passes)
    if step == "checkpoint":
        replace = Path.replace

        def replaced(path: Path, target: Any) -> Path:
            if str(target).endswith(".safetensors") and "checkpoints" in str(target):
                reached()
            return replace(path, target)

        Path.replace = replaced  # type: ignore[method-assign]
    elif step == "result":
        write = results.RunFolder.write_result

        def written(folder: Any, result: Any) -> None:
            reached()
            write(folder, result)

        results.RunFolder.write_result = written  # type: ignore[method-assign]
    else:
        record = AuditLog.record

        def recorded(log: AuditLog, event: str, **facts: Any) -> Any:
            line = record(log, event, **facts)
            if event == step:
                reached()
            return line

        AuditLog.record = recorded  # type: ignore[method-assign]


if __name__ == "__main__":
    _, kit, port, step, passes = sys.argv
    arm(step, int(passes))
    main(["server", "--kit", kit, "--host", "127.0.0.1", "--port", port, "--heartbeat", "5"])
