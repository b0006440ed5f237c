"""docs/simulate.md keeps its promises: its files load, and every command it shows can be typed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
from typer.main import get_command

from common.cli import app
from common.config import load_config
from simulations.clock import read_trace
from simulations.study.arms import parse_vary, plan_arms

PAGE = (Path(__file__).parents[2] / "docs" / "simulate.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    coterie (.+)$", PAGE, re.MULTILINE)


def block(kind: str) -> str:
    found = re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(found) == 1
    return str(found[0])


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of somebody who has written the page's files."""
    monkeypatch.chdir(tmp_path)
    Path("stragglers.toml").write_text(block("toml"))
    Path("devices.jsonl").write_text(block("json"))


def parsed(words: list[str]) -> dict[str, Any]:
    """What a sub-command makes of its options; it is not run."""
    group = get_command(app)
    assert isinstance(group, click.Group)
    command = group.get_command(click.Context(group), words[0])
    assert command is not None
    return command.make_context(words[0], words[1:]).params


def test_shows_commands() -> None:
    """At least the study, its tuning, one run, and one of each kind of simulation."""
    assert len(COMMANDS) >= 10


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_can_be_typed(line: str) -> None:
    """Its options exist, its settings load, and the arms of a study are possible together."""
    options = parsed(shlex.split(line))
    source, overrides = options["source"], options["overrides"] or ()
    if line.startswith("study"):
        assert plan_arms(source, parse_vary(options["vary"]), repeats=options["repeats"], overrides=overrides)
    elif source is not None:
        assert load_config(source, overrides).config.simulation.virtual
    else:
        assert options["rerun"]


def test_the_trace_is_one() -> None:
    """Three devices, of which none is refused."""
    assert read_trace(Path("devices.jsonl"))
