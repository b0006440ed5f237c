"""What simulated clients own goes to worker processes as settings, never as data."""

import pickle  # as multiprocessing does
from pathlib import Path

from common.config import RunConfig
from simulations.run import prepare


def test_examples_do_not_travel_to_workers(tmp_path: Path) -> None:
    """A worker loads the data itself: hundreds of tensors would be hundreds of open files."""
    config = RunConfig.model_validate(
        {"model": {"name": "linear"}, "data": {"name": "heart", "partition": "natural", "clients": 0}}
    )
    sites = prepare(config, folder=tmp_path).sites
    assert "federation" in sites.__dict__
    copy = pickle.loads(pickle.dumps(sites))  # noqa: S301 - its own bytes
    assert "federation" not in copy.__dict__
    assert copy == sites
