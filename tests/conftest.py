"""What every test starts from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import structlog
from hypothesis import HealthCheck, settings

# A loaded machine fails nothing: how long an example takes is no property of the code.
settings.register_profile("coterie", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("coterie")


@pytest.fixture(autouse=True)
def _plain_log() -> Iterator[None]:
    """A command line directs the process's log; the next test starts without that."""
    yield
    structlog.reset_defaults()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say where a test had to do with less than it would have liked: `record_property("note", ...)`."""
    for reports in terminalreporter.stats.values():
        for report in reports:
            for key, text in getattr(report, "user_properties", ()):
                if key == "note" and report.when == "call":
                    terminalreporter.write_line(f"note: {report.nodeid}: {text}")
