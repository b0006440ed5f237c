"""Runs a Python file that the site's own administrator named in `site.toml`; never one that was received."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from functools import lru_cache
from pathlib import Path
from types import ModuleType


def load_file(path: Path) -> ModuleType:
    """The file as a module under a name of its own, so that it shadows no installed one; run again once it changed.

    It sees no files beside it unless they are installed.

    Raises:
        OSError: The file cannot be read.
        ImportError: It is not a Python file.
        Exception: Whatever the file itself raises.
    """
    path = path.resolve(strict=True)
    return _execute(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=32)
def _execute(path: Path, _modified_ns: int) -> ModuleType:
    name = f"coterie_site_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path.name} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
