"""On a GPU: workers share one device, as many at a time as fit in its memory.

Run by `make test-gpu`; skips where there is no CUDA device.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.config import RunConfig
from simulations.pool.device_share import CudaProbe, DeviceShare
from simulations.run import execute, prepare

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def config(**model: object) -> RunConfig:
    """Six clients of different sizes on the GPU."""
    return RunConfig.model_validate(
        {
            "rounds": 3,
            "model": {"name": "mlp", **model},
            "data": {"name": "digits", "partition": "size", "clients": 6},
            "training": {"device": "cuda", "local_steps": 3, "batch_size": 16, "learning_rate": 0.1},
        }
    )


@pytest.mark.parametrize("workers", [2, 4])
def test_any_number_of_workers_ends_with_the_same_model(workers: int, tmp_path: Path) -> None:
    """All of them take turns on one device."""
    alone = execute(prepare(config(), folder=tmp_path / "a"))
    together = execute(prepare(config(), folder=tmp_path / "b"), workers=workers)
    for name, values in alone.arrays.items():
        assert together.arrays[name] == pytest.approx(values, abs=1e-5)


def test_a_client_that_takes_most_of_the_memory_trains_alone(tmp_path: Path) -> None:
    """What torch has reserved is measured, given back, and decides how many train side by side."""
    device = torch.device("cuda")
    share = DeviceShare(tmp_path, workers=3, probe=CudaProbe(device))
    free = torch.cuda.mem_get_info(device)[0]
    with share.turn():
        large = torch.empty(int(free * 0.6), dtype=torch.uint8, device=device)
        del large
    measured = share._measured()
    assert measured is not None
    assert measured.need >= 0.6 * free * 0.99
    assert measured.places(3) == 1
    assert torch.cuda.mem_get_info(device)[0] > 0.9 * free


def test_small_clients_train_side_by_side(tmp_path: Path) -> None:
    """A model of kilobytes leaves room for every worker."""
    share = DeviceShare(tmp_path, workers=3, probe=CudaProbe(torch.device("cuda")))
    with share.turn():
        torch.zeros(1000, device="cuda")
    measured = share._measured()
    assert measured is not None
    assert measured.places(3) == 3
