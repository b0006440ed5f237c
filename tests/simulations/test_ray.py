"""The same apps on Flower's simulation runtime: another engine, the same model."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from safetensors.numpy import load_file

from tests.helpers.processes import coterie, members, started, wait_until
from tests.helpers.runs import SITE, tree

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")]


def on_ray(folder: Path, *words: str, **changes: Any) -> tuple[int, str, str]:
    """A run in a process of its own, because Ray starts others; all of them are gone afterwards."""
    config = folder / "tiny.toml"
    config.write_text(tomli_w.dumps(tree(rounds=2, **{"data": {"clients": 3}, **changes})))
    arguments = ["simulate", str(config), "--site", str(SITE), "--engine", "ray", "--workers", "2", *words]
    with started(arguments, folder=folder) as process:
        out, err = process.communicate()
        wait_until(lambda: not members(process.pid))
    return process.returncode, out, err


def test_model_is_that_of_the_inline_engine(tmp_path: Path) -> None:
    """Two rounds of three clients give the inline engine's model within 1e-5, one JSON document, and no leftovers."""
    code, out, err = on_ray(tmp_path, "--out", "ray", "--json")
    assert code == 0, err
    assert json.loads(out)["status"] == "completed"
    words = ["--site", SITE, "--workers", "1", "--out", tmp_path / "inline", "--quiet"]
    assert coterie("simulate", tmp_path / "tiny.toml", *words) == 0
    expected = load_file(tmp_path / "inline" / "model.safetensors")
    found = load_file(tmp_path / "ray" / "model.safetensors")
    assert list(found) == list(expected)
    assert max(float(abs(found[name] - expected[name]).max()) for name in expected) <= 1e-5


def test_error_is_the_inline_engines(tmp_path: Path) -> None:
    """What ends a run inside the runtime reaches the user as the same error, not as the runtime's."""
    changes = {"data": {"name": "one-in-trouble", "sites": ["client-01"]}, "model": {"options": {"trouble": "nan"}}}
    code, out, err = on_ray(tmp_path, "--out", "ray", **changes)
    assert (code, out) == (9, "")
    assert "error: no client sent an update" in err
    assert "Traceback" not in err
