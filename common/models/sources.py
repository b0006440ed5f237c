"""A site's own models: code that the site's administrator named in `site.toml`, never anything that was received."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from common.errors import SiteError
from common.models.options import Builder, nearest
from common.site import Site

ENTRY_POINT_GROUP = "coterie.models"
_EXAMPLE = 'write source = "my_models.py:build" or source = "entry:NAME"'


def load_builder(name: str, site: Site) -> Builder:
    """The builder that `site.toml` registers under `name`: `file.py:function` or `entry:NAME`.

    The file is executed once as a module of its own; it sees no other files beside it unless they are installed.

    Raises:
        SiteError: The source cannot be read, found or executed, or is not a function.
    """
    source = site.models[name].source
    where = f"site.toml: models.{name}: `{source}`"
    place, separator, attribute = source.rpartition(":")
    if not (separator and place and attribute):
        raise SiteError(f"{where} names no function", hint=_EXAMPLE)
    build = (
        _from_entry_point(attribute, where) if place == "entry" else _from_file(site.folder / place, attribute, where)
    )
    if not callable(build):
        raise SiteError(f"{where} is not a function", hint=_EXAMPLE)
    return build


def _from_entry_point(name: str, where: str) -> Builder:
    found = entry_points(group=ENTRY_POINT_GROUP)
    if name not in found.names:
        raise SiteError(
            f"{where}: no installed package offers it in the group `{ENTRY_POINT_GROUP}`",
            hint=nearest(name, found.names, none="install the package that offers it"),
        )
    try:
        builder: Builder = found[name].load()
    except Exception as e:
        raise SiteError(f"{where} cannot be imported: {e!r}", hint="import it in Python to see where it fails") from e
    return builder


def _from_file(path: Path, function: str, where: str) -> Builder:
    try:
        module = _execute(path.resolve(strict=True), path.stat().st_mtime_ns)
    except OSError as e:
        raise SiteError(f"{where} cannot be read: {e.strerror}", hint="paths are relative to site.toml") from e
    except Exception as e:
        raise SiteError(f"{where} cannot be executed: {e!r}", hint=f"run `python {path}` to see where it fails") from e
    if not hasattr(module, function):
        raise SiteError(f"{where}: the file defines no `{function}`", hint=nearest(function, _functions(module)))
    builder: Builder = getattr(module, function)
    return builder


@lru_cache(maxsize=32)
def _execute(path: Path, _modified_ns: int) -> ModuleType:
    """Execute a file as a module whose name cannot clash with an installed one; again only after it changed."""
    name = f"coterie_site_model_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
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


def _functions(module: ModuleType) -> list[str]:
    return [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
