"""Runs as a person would write them."""

import pytest

from common.config import load_config

PRIVATE = ("privacy.unit=example", "privacy.target_epsilon=3", "training.local_steps=2")
"""The fewest settings that make a run private."""


@pytest.fixture
def write(tmp_path):
    """Write a configuration file; its path as text."""

    def write(text: str, name: str = "run.toml") -> str:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def config():
    """The configuration that `--set` arguments make of the defaults."""
    return lambda *overrides: load_config(None, overrides).config
