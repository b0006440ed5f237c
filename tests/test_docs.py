"""The documents keep their promises: links lead somewhere, and what the README says to type exists."""

from __future__ import annotations

import re
import shlex
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from common.cli import GROUP
from common.config.load import scenario_names

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("common/**/*.md")])
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(document: Path) -> None:
    """Every relative link of a document names a file of the project."""
    links = re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", document.read_text(encoding="utf-8"))
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_the_readme_is_short() -> None:
    """A newcomer reads it in one sitting."""
    assert len(README.splitlines()) < 150


def test_the_quickstart_is_what_ci_runs() -> None:
    """Each make target of the quickstart is run by .ci/run and defined in the Makefile."""
    quickstart = re.findall(r"^make (\w+)", README, re.MULTILINE)
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert set(quickstart) >= {"demo", "test"}
    for target in quickstart:
        assert f"\nmake {target}\n" in ci
        assert f"\n{target}:" in makefile


def test_every_command_of_the_readme_exists() -> None:
    """The README names sub-commands and scenarios that are there."""
    commands = {entry.name for entry in entry_points(group=GROUP)}
    lines = re.findall(r"^\.venv/bin/coterie (.+?)(?:\s+#.*)?$", README, re.MULTILINE)
    assert lines
    for words in map(shlex.split, lines):
        assert words[0] in commands
        if words[0] in {"simulate", "study"} and not words[1].endswith(".toml") and not words[1].startswith("--"):
            assert words[1] in scenario_names()


def test_every_decision_is_numbered_once() -> None:
    """Decision records are numbered in a row."""
    numbers = [int(path.name[:4]) for path in sorted((ROOT / "docs" / "decisions").glob("*.md"))]
    assert numbers == list(range(1, len(numbers) + 1))
