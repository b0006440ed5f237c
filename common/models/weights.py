"""A model's weights as named numpy arrays, and back, without a copy more than needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from common.errors import ModelError


class ModelWeights:
    """Reads and replaces the weights of a model that is kept between rounds."""

    def __init__(self, model: nn.Module) -> None:
        self._state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        self._kinds = {name: (tuple(tensor.shape), _dtype(tensor)) for name, tensor in self._state.items()}
        on_cpu = all(tensor.device.type == "cpu" for tensor in self._state.values())
        # These views share memory with the model's own tensors.
        self._views = {name: tensor.numpy() for name, tensor in self._state.items()} if on_cpu else {}

    def load(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take over all weights. Nothing changes unless every one fits.

        Raises:
            ModelError: A name, shape or dtype is not the model's.
        """
        if arrays.keys() != self._state.keys():
            raise ModelError("the weights are of another model", hint="use the configuration that the model came from")
        for name, (shape, dtype) in self._kinds.items():
            values = arrays[name]
            if values.shape != shape or not (
                values.dtype == dtype or np.can_cast(values.dtype, dtype, casting="same_kind")
            ):
                raise ModelError(
                    f"weight `{name}` is {values.dtype}{list(values.shape)}, the model's is {dtype}{list(shape)}",
                    hint="use the configuration that the model came from",
                )
        for name, tensor in self._state.items():
            if self._views:
                np.copyto(self._views[name], arrays[name], casting="same_kind")
            else:
                tensor.copy_(torch.from_numpy(np.array(arrays[name])))

    def shared(self) -> dict[str, NDArray[Any]]:
        """The weights by name, in the model's order, not to be written to; they follow the model where it is in this
        machine's own memory.
        """
        arrays = {name: view.view() for name, view in self._views.items()} or self.copy()
        for values in arrays.values():
            values.setflags(write=False)
        return arrays

    def copy(self) -> dict[str, NDArray[Any]]:
        """A copy of the weights by name, in the model's order."""
        if self._views:
            return {name: view.copy() for name, view in self._views.items()}
        return {name: tensor.cpu().numpy().copy() for name, tensor in self._state.items()}


def _dtype(tensor: torch.Tensor) -> np.dtype[Any]:
    return torch.empty(0, dtype=tensor.dtype).numpy().dtype
