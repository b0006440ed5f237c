"""python: a site's own function that builds a `Federation`.

This runs code. The file is named by the site's own `site.toml` or command line, never by a run's configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from common.config.settings import DataSettings
from common.data.entities import check_entities
from common.data.population import Population
from common.errors import CoterieError, DataError
from common.names import sorted_names
from common.schema import ClientData, DataSchema, Examples, Federation
from common.user_code import load_file


def call_function(
    target: str, *, folder: Path, settings: DataSettings, seed: int, tolerant: bool = False
) -> Federation:
    """What `file.py:function(settings, seed)` returns, checked.

    Args:
        target: File and function; a relative file starts from `folder`.
        folder: Folder of `site.toml`, or of the command line.
        settings: The run's data settings.
        seed: The run's data seed.
        tolerant: Whether clients may be without training examples.

    Raises:
        DataError: File or function is missing, it fails, or what it returns is not a sound Federation.
    """
    file, colon, name = target.rpartition(":")
    if not colon or not name.isidentifier():
        raise DataError(f"python:{target} names no function", hint="write python:file.py:function")
    path = (folder / file).resolve()
    if path.suffix != ".py":
        raise DataError(f"{path.name} is not a Python file", hint="name a file that ends in .py")
    if not path.is_file():
        raise DataError(f"{path} does not exist", hint="the path starts from the folder of site.toml")
    try:
        function = getattr(load_file(path), name, None)
        if not callable(function):
            raise DataError(f"{path.name} has no function `{name}`", hint="check the name after the colon")
        federation = cast("Callable[[DataSettings, int], object]", function)(settings, seed)
    except CoterieError:
        raise
    except Exception as e:
        # The kind only: its text can quote data. The chained exception keeps it for a debugger.
        raise DataError(
            f"{target} failed with {type(e).__name__}", hint="call the function by itself to see why"
        ) from e
    if not isinstance(federation, Federation):
        raise DataError(f"{target} returned a {type(federation).__name__}", hint="return a common.schema.Federation")
    _check(federation, where=target, tolerant=tolerant)
    if isinstance(federation.clients, tuple | list):
        return federation
    return replace(federation, clients=_checked_later(federation, where=target, tolerant=tolerant))


def _check(federation: Federation, *, where: str, tolerant: bool) -> None:
    """Refuse a Federation that has no or an empty client, does not fit its schema, or divides an entity."""
    if not len(federation.clients):
        raise DataError(f"{where}: there are no clients", hint="return at least one ClientData")
    try:
        sorted_names(federation.names)
    except ValueError as e:
        raise DataError(f"{where}: two clients have the same name", hint="give each client a name of its own") from e
    _fit_examples(federation.test, federation.schema, where=f"{where}: the held-out part")
    if not isinstance(federation.clients, tuple | list):
        return
    for client in federation.clients:
        _check_client(client, federation.schema, where=where, tolerant=tolerant)
    parts = [part for client in federation.clients for part in (client.train, client.test)]
    if len({part.entities is None for part in (*parts, federation.test) if len(part)}) > 1:
        raise DataError(
            f"{where}: some parts have entities and some have none",
            hint="set `entities` in all of them, to numbers of their own for examples that stand alone",
        )
    check_entities(federation, where=where)


def _checked_later(federation: Federation, *, where: str, tolerant: bool) -> Population:
    """Clients that are made as they are asked for: the first is checked now, each of them whenever it is made.

    Whether an entity belongs to two of them could be told only by looking at all.
    """

    def client(index: int) -> ClientData:
        made = federation.clients[index]
        if made.name != federation.names[index]:
            raise DataError(
                f"{where}: client {index} is called {made.name} when it is made, and {federation.names[index]} before",
                hint="give each client the name that stands in its place of `names`",
            )
        if made.train.entities is not None or made.test.entities is not None:
            raise DataError(
                f"{where}: client {made.name} has entities, and clients are made as they are asked for",
                hint="return a tuple of clients, which are looked at together",
            )
        _check_client(made, federation.schema, where=where, tolerant=tolerant)
        return made

    population = Population(federation.names, client)
    population.client(0)
    return population


def _check_client(client: ClientData, schema: DataSchema, *, where: str, tolerant: bool) -> None:
    """Check both parts of a client."""
    if len(client.train) == 0 and not tolerant:
        raise DataError(f"{where}: client {client.name} has no training examples", hint="leave it out")
    _fit_examples(client.train, schema, where=f"{where}: client {client.name}, train")
    _fit_examples(client.test, schema, where=f"{where}: client {client.name}, test")


def _fit_examples(examples: Examples, schema: DataSchema, *, where: str) -> None:
    """Check shapes, types and ranges against the schema."""
    n = len(examples)
    input_type = torch.int64 if schema.kind == "tokens" else torch.float32
    target_shape = (n, *schema.input_shape) if schema.per_position else (n,)
    if tuple(examples.inputs.shape) != (n, *schema.input_shape) or examples.inputs.dtype != input_type:
        raise DataError(
            f"{where}: inputs are {examples.inputs.dtype}{list(examples.inputs.shape)}",
            hint=f"the schema says {input_type}{[n, *schema.input_shape]}",
        )
    if tuple(examples.targets.shape) != target_shape or examples.targets.dtype != torch.int64:
        raise DataError(
            f"{where}: targets are {examples.targets.dtype}{list(examples.targets.shape)}",
            hint=f"the schema says torch.int64{list(target_shape)}",
        )
    if n and not (examples.targets.min() >= 0 and examples.targets.max() < schema.num_classes):
        raise DataError(f"{where}: targets lie outside 0..{schema.num_classes - 1}", hint="raise schema.num_classes")
    if n and not torch.isfinite(examples.inputs).all():
        raise DataError(f"{where}: inputs are not all finite", hint="replace missing values")
    if (entities := examples.entities) is None:
        return
    if tuple(entities.shape) != (n,) or entities.dtype != torch.int64:
        raise DataError(
            f"{where}: entities are {entities.dtype}{list(entities.shape)}", hint=f"give torch.int64{[n]}, or None"
        )
    if n and entities.min() < 0:
        raise DataError(
            f"{where}: {int((entities < 0).sum())} entities are negative",
            hint="number them from 0, and leave out examples of which it is not known whose they are",
        )
