"""Pages from their templates: without scripts, escaped, and with one style for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

from jinja2 import ChoiceLoader, Environment, FunctionLoader, StrictUndefined

from server.report import words
from server.report.comparison import gain_text


def filled(template: str, values: Mapping[str, Any], *, package: str = "server.report") -> str:
    """A template with its values.

    Args:
        template: Its file.
        values: What it shows; all text is escaped.
        package: Where it is; what it is made of (`base.html`, `parts.html`) comes from here.
    """
    environment = Environment(
        loader=ChoiceLoader([FunctionLoader(_reader(package)), FunctionLoader(_reader("server.report"))]),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(
        ceiling=words.ceiling, duration=words.duration, gain=gain_text, number=words.number, percent=words.percent
    )
    return environment.get_template(template).render(values)


def _reader(package: str) -> Callable[[str], str | None]:
    def read(name: str) -> str | None:
        found = files(package).joinpath(name)
        return found.read_text(encoding="utf-8") if found.is_file() else None

    return read
