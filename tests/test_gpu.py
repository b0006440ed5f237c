"""On a GPU: every model family, with and without privacy, in float32 and bfloat16; two clients on one device.

Run by `make test-gpu`; skips where there is no CUDA device.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.config import RunConfig
from common.privacy.noise import add_noise
from simulations.insecure import FixedNoise
from simulations.run import execute, prepare

DEVICE = "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FAMILIES = {
    "cnn": ("fashion-mnist-10k", {}),
    "resnet": ("digits", {"width": 8, "blocks": 1}),
    "inception": ("digits", {"width": 8}),
    "mlp": ("digits", {}),
    "linear": ("heart", {}),
    "lstm": ("shakespeare", {}),
    "transformer": ("shakespeare", {"width": 32, "heads": 2, "layers": 1}),
}


def config_for(model: str, **changes: dict[str, object]) -> RunConfig:
    """A short run of two clients on the GPU."""
    data, options = FAMILIES[model]
    tree: dict[str, dict[str, object]] = {
        "model": {"name": model, "options": options},
        "data": {"name": data, "partition": "iid", "clients": 2, "max_examples": 64, "sequence_length": 32},
        "training": {"device": DEVICE, "local_steps": 2, "batch_size": 16, "learning_rate": 0.1},
    }
    for table, settings in changes.items():
        tree.setdefault(table, {}).update(settings)
    return RunConfig.model_validate({"rounds": 2, **tree})


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", FAMILIES)
def test_every_family_trains(model: str, precision: str, tmp_path: Path) -> None:
    """Two clients share the device; their mean is finite and differs from the starting weights."""
    prepared = prepare(config_for(model, training={"precision": precision}), folder=tmp_path)
    start = {name: tensor.clone() for name, tensor in prepared.model.state_dict().items()}
    outcome = execute(prepared)
    assert all(torch.from_numpy(values.copy()).isfinite().all() for values in outcome.arrays.values())
    assert any(not torch.equal(torch.from_numpy(v.copy()), start[k]) for k, v in outcome.arrays.items())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", FAMILIES)
def test_every_family_trains_with_privacy(model: str, precision: str, tmp_path: Path) -> None:
    """DP-SGD runs on the device, and each client's ledger says what it spent."""
    privacy = {"unit": "example", "target_epsilon": 8.0, "sampling_rate": 0.5}
    prepared = prepare(config_for(model, training={"precision": precision}, privacy=privacy), folder=tmp_path)
    execute(prepared)
    assert all(0 < spent <= 8 for spent in prepared.spent().values())


def test_two_worker_processes_share_the_device(tmp_path: Path) -> None:
    """Clients in two processes use one GPU, and the result is that of one process."""
    config = config_for("mlp")
    alone = execute(prepare(config, folder=tmp_path / "a"))
    together = execute(prepare(config, folder=tmp_path / "b"), workers=2)
    for name, values in alone.arrays.items():
        assert values == pytest.approx(together.arrays[name], abs=1e-5)


def test_noise_is_added_on_the_device_as_on_the_processor() -> None:
    """The same integers on the same grid: equal to the bit."""
    sums = [torch.randn(1000, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)]
    here = add_noise(sums, noise_stddev=0.3, source=FixedNoise(1, "a"))
    there = add_noise([total.to(DEVICE) for total in sums], noise_stddev=0.3, source=FixedNoise(1, "a"))
    assert all(part.device.type == DEVICE for part in there)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True))
