"""TensorBoard events, read back with TensorBoard."""

import importlib.util
import json
import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.errors import RunError
from server.report.tensorboard import EventWriter


def read(folder):
    events = EventAccumulator(str(folder / "events"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_rounds_become_scalars(sample):
    """Every measure of every round is an event at that round."""
    folder = sample("heart")
    rows = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    with EventWriter(folder) as writer:
        for row in rows:
            writer.write_round(row)
    scalars = read(folder)
    assert set(scalars) == {
        "accuracy", "loss", "epsilon_max", "survivors",
        "seconds/train", "seconds/aggregate", "seconds/evaluate", "seconds/checkpoint",
    }  # fmt: skip
    for tag, pick in (
        ("accuracy", lambda row: row["accuracy"]),
        ("epsilon_max", lambda row: max(row["epsilon"].values())),
        ("survivors", lambda row: len(row["survivors"])),
        ("seconds/train", lambda row: row["seconds"]["train"]),
    ):
        assert scalars[tag] == [(row["server_round"], pytest.approx(pick(row))) for row in rows]


def test_what_is_missing_or_not_finite_is_left_out(tmp_path):
    """A round that measured nothing, or whose loss diverged, leaves no events for it."""
    with EventWriter(tmp_path) as writer:
        writer.write_round({"server_round": 1, "accuracy": None, "loss": math.nan, "epsilon": {}, "survivors": []})
        writer.write_round({"server_round": 2})
    assert read(tmp_path) == {"survivors": [(1, 0.0), (2, 0.0)]}


def test_without_tensorboard_the_caller_decides(tmp_path, monkeypatch):
    """Without TensorBoard an optional writer does nothing, any other one says how to install it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with EventWriter(tmp_path, optional=True) as writer:
        writer.write_round({"server_round": 1, "accuracy": 0.5})
    assert not list(tmp_path.iterdir())
    with pytest.raises(RunError, match="not installed") as caught:
        EventWriter(tmp_path)
    assert "pip install" in caught.value.hint
