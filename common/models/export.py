"""A trained model as one file that runs, or can be read, without Coterie."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from common.errors import ModelError
from common.schema import DataSchema

ExportFormat = Literal["onnx", "torch", "safetensors"]
EXPORT_FORMATS: tuple[ExportFormat, ...] = get_args(ExportFormat)
OPSET = 18
"""ONNX operator set: read by every runtime since 2023, and holds all that the built-in models need."""


def export_model(model: nn.Module, schema: DataSchema, path: str | Path, *, to: ExportFormat) -> Path:
    """Write `model`, as it predicts, for any number of examples at once.

    - `onnx`: graph and weights, input `inputs`, output `logits`; needs the extra `coterie[export]`.
    - `torch`: a `.pt2` program for `torch.export.load(path).module()`, without any of Coterie's code.
    - `safetensors`: the weights under their names, the schema as JSON in the metadata `schema`.

    The model itself stays as it was, training mode included.

    Returns:
        The path written.

    Raises:
        ModelError: An unknown format, a missing extra, a model that cannot be traced, or a path that cannot be written.
    """
    path = Path(path)
    if to not in EXPORT_FORMATS:
        raise ModelError(f"there is no export format `{to}`", hint=f"choose one of {', '.join(EXPORT_FORMATS)}")
    if not path.parent.is_dir():
        raise ModelError(f"{path} cannot be written: its folder does not exist", hint=f"create {path.parent} first")
    if to == "torch" and path.suffix != ".pt2":
        raise ModelError(f"{path} does not end in .pt2, as torch.export.load wants", hint="name it `model.pt2`")
    write = {"onnx": _write_onnx, "torch": _write_torch, "safetensors": _write_safetensors}[to]
    try:
        with _predicting(model), _quiet(), torch.no_grad():
            write(model, schema, path)
    except ModelError:
        raise
    except OSError as e:
        raise ModelError(f"{path} cannot be written: {e.strerror}", hint="choose another path") from e
    except Exception as e:  # the exporters raise many kinds; all mean the same to a user
        raise ModelError(f"the model cannot be exported to {to}: {e}", hint="safetensors takes any model") from e
    return path


def _write_onnx(model: nn.Module, schema: DataSchema, path: Path) -> None:
    try:
        import onnx  # noqa: F401  # both are needed by torch.onnx, which names only one of them when it fails
        import onnxscript  # noqa: F401
    except ImportError as e:
        raise ModelError("export to ONNX needs packages that are missing", hint="pip install 'coterie[export]'") from e
    program = torch.onnx.export(
        model, (_blank(model, schema),), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False,
        input_names=["inputs"], output_names=["logits"], opset_version=OPSET,
    )  # fmt: skip
    if program is None:
        raise ModelError("torch made no ONNX program", hint="export to `torch` instead")
    program.save(str(path))


def _write_torch(model: nn.Module, schema: DataSchema, path: Path) -> None:
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (_blank(model, schema),), dynamic_shapes=({0: batch},), strict=False)
    torch.export.save(program, path)


def _write_safetensors(model: nn.Module, schema: DataSchema, path: Path) -> None:
    weights = {name: value.detach().clone().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, path, metadata={"schema": json.dumps(asdict(schema), sort_keys=True)})


def _blank(model: nn.Module, schema: DataSchema) -> Tensor:
    """Two blank examples: tracing would take a batch of one for a constant."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    dtype = torch.int64 if schema.kind == "tokens" else torch.float32
    return torch.zeros(2, *schema.input_shape, dtype=dtype, device=device)


@contextmanager
def _predicting(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and every layer in its former mode afterwards."""
    modes = [(layer, layer.training) for layer in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for layer, training in modes:
            layer.training = training


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch's exporters say of their own code, and nothing else."""
    registry = logging.getLogger("torch.onnx._internal.exporter._registration")  # lists what torchvision would add
    level = registry.level
    registry.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)", category=FutureWarning)
            warnings.filterwarnings("ignore", message=r"_check_is_size will be removed", category=FutureWarning)
            warnings.filterwarnings("ignore", message=r"The tensor attributes? .*_flat_weights", category=UserWarning)
            yield
    finally:
        registry.setLevel(level)
