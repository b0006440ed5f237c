"""Libraries of the `data` extra, imported where they are used: `coterie --help` stays quick, a bare install works."""

from __future__ import annotations

import importlib
from types import ModuleType

from common.errors import DataUnavailableError


def need(module: str, *, purpose: str) -> ModuleType:
    """Import a library that a bare install lacks.

    Raises:
        DataUnavailableError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise DataUnavailableError(
            f"{purpose} needs the library {module.partition('.')[0]}, which is not installed",
            hint="pip install 'coterie[data]'",
        ) from e
