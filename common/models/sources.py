"""A site's own models: code that the site's administrator named in `site.toml`, never anything that was received."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from common.errors import SiteError
from common.models.options import Builder, nearest
from common.site import Site
from common.user_code import load_file

ENTRY_POINT_GROUP = "coterie.models"
_EXAMPLE = 'write source = "my_models.py:build" or source = "entry:NAME"'


def load_builder(name: str, site: Site) -> Builder:
    """The builder that `site.toml` registers under `name`: `file.py:function` or `entry:NAME`.

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
        module = load_file(path)
    except OSError as e:
        raise SiteError(f"{where} cannot be read: {e.strerror}", hint="paths are relative to site.toml") from e
    except Exception as e:
        raise SiteError(f"{where} cannot be executed: {e!r}", hint=f"run `python {path}` to see where it fails") from e
    if not hasattr(module, function):
        raise SiteError(f"{where}: the file defines no `{function}`", hint=nearest(function, _functions(module)))
    builder: Builder = getattr(module, function)
    return builder


def _functions(module: ModuleType) -> list[str]:
    return [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
