"""From a registered name to its examples: one place that knows built-in data and a site's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import ValidationError

from common.config.settings import DataSettings
from common.data.catalogue import BuiltIn, find, source_path
from common.data.collection import Collection, slug
from common.data.readers import read
from common.data.readers.code import call_function
from common.data.readers.text import text_schema
from common.errors import DataError
from common.schema import DataSchema, Examples, Federation
from common.site import ENTITY_KINDS, DataSource, Site


class LoadedExamples(NamedTuple):
    """Examples to predict on.

    Attributes:
        schema: The schema of the data set that the model was trained on.
        examples: The examples; targets are -1 where the class is not known.
        row_ids: One name an example, by which the owner finds it again: an `id` column, a line, a file.
    """

    schema: DataSchema
    examples: Examples
    row_ids: list[str]


def load_source(settings: DataSettings, *, seed: int, site: Site, tolerant: bool = False) -> Collection | Federation:
    """All examples of the data set `settings.name`; a Federation where the site's own function builds one.

    With `tolerant` no settings make it fail because there are too few.

    Raises:
        DataError: There is no such data set, or it cannot be read.
    """
    entry = find(settings.name, site)
    if isinstance(entry, BuiltIn):
        return entry.load(settings)
    if entry.source.startswith("python:"):
        return call_function(
            entry.source.partition(":")[2], folder=site.folder, settings=settings, seed=seed, tolerant=tolerant
        )
    collection = read(_local(entry, site), source_path(entry, site.folder), settings, labelled=True, tolerant=tolerant)
    if collection.group_of is not None:
        return collection
    return replace(collection, groups=(slug(settings.name),), group_of=np.zeros(len(collection.examples), np.int64))


def schema_of(settings: DataSettings, *, site: Site) -> DataSchema:
    """Public facts of the data set `settings.name`, without reading private examples where that is possible.

    Nothing is read for built-in data, for text, and for tables and images that declare what they hold. Where a site
    declares neither `classes` nor `features`, they are read from the file: to register data that way is to declare its
    column names and the list of its classes public. An npz file is read for its shape; a python source is called.

    Raises:
        DataError: There is no such data set, or what has to be read cannot be.
    """
    entry = find(settings.name, site)
    if isinstance(entry, BuiltIn):
        return entry.schema(settings)
    kind, classes = entry.source.partition(":")[0], tuple(entry.classes)
    if kind == "text":
        return text_schema(_local(entry, site), settings)
    if kind in {"csv", "parquet"} and classes and entry.features:
        return DataSchema(
            kind="tabular",
            input_shape=(len(entry.features),),
            num_classes=len(classes),
            class_names=classes,
            feature_names=tuple(entry.features),
        )
    if kind == "images" and classes:
        shape = (entry.channels, entry.image_size, entry.image_size)
        return DataSchema(kind="image", input_shape=shape, num_classes=len(classes), class_names=classes)
    return load_source(settings, seed=0, site=site).schema


def load_examples(source: str, *, settings: DataSettings, site: Site) -> LoadedExamples:
    """Examples to predict on, encoded exactly as the data set `settings.name` that the model was trained on.

    Args:
        source: A registered name, or `kind:path` such as `csv:new_patients.csv`; a relative path starts from the
            current folder. It may come from the local command line only, never from a peer: `python:` runs code.
        settings: The data settings of the run; `name` says how the file is read, so a run on `heart` takes a csv in
            the layout of that data set.
        site: The local registry.

    Unlike for training no row is dropped, and labels may be absent.

    Raises:
        DataError: The source cannot be read, or is not of the kind that the model takes.
    """
    schema = schema_of(settings, site=site)
    kind, colon, target = source.partition(":")
    if not colon:
        loaded = _registered(source, schema, settings, site)
    elif kind == "python":
        loaded = call_function(target, folder=Path.cwd(), settings=settings, seed=0)
    else:
        loaded = _new_file(kind, Path(target), schema, settings, site)
    if isinstance(loaded, Federation):
        # The held-out part is made of the clients' own held-out parts, which are left out here.
        parts = [*((client.name, client.train) for client in loaded.clients), ("test", loaded.test)]
        row_ids = [f"{name}/{i}" for name, part in parts for i in range(len(part))]
        examples = Examples.joined([part for _, part in parts])
    else:
        row_ids, examples = list(loaded.row_ids), loaded.examples
    if loaded.schema.kind != schema.kind or loaded.schema.input_shape != schema.input_shape:
        raise DataError(
            f"{source} holds {loaded.schema.kind} examples of shape {list(loaded.schema.input_shape)}",
            hint=f"the model was trained on {settings.name}: {schema.kind} of shape {list(schema.input_shape)}",
        )
    return LoadedExamples(schema, examples, row_ids)


def _registered(name: str, schema: DataSchema, settings: DataSettings, site: Site) -> Collection | Federation:
    """A registered data set, with labels optional where the site's own file is read."""
    entry = find(name, site)
    if isinstance(entry, BuiltIn) or entry.source.startswith("python:"):
        return load_source(settings.model_copy(update={"name": name}), seed=0, site=site)
    declared = _declare(_local(entry, site), schema)
    return read(declared, source_path(entry, site.folder), settings, labelled=False)


def _new_file(kind: str, path: Path, schema: DataSchema, settings: DataSettings, site: Site) -> Collection:
    """A file that is not registered, read as the data set `settings.name` is."""
    entry = find(settings.name, site)
    if isinstance(entry, BuiltIn):
        how = entry.new.get(kind)
        if how is None:
            raise DataError(
                f"a model trained on {settings.name} takes no {kind} file",
                hint=f"give {' or '.join(f'{known}:PATH' for known in entry.new)}",
            )
        if not isinstance(how, DataSource):
            return how(kind, path)
        return read(how.model_copy(update={"source": f"{kind}:{path}"}), path, settings, labelled=False)
    try:
        entity = entry.entity if kind in ENTITY_KINDS else ""
        source = DataSource(**{**_local(entry, site).model_dump(), "source": f"{kind}:{path}", "entity": entity})
    except ValidationError:
        raise DataError(
            f"`{kind}:` is not a format that can be read", hint="csv, parquet, npz, images, text or python"
        ) from None
    return read(_declare(source, schema), path, settings, labelled=False)


def _declare(source: DataSource, schema: DataSchema) -> DataSource:
    """The source with the classes and features of the data set that the model was trained on."""
    update: dict[str, list[str]] = {}
    if not schema.per_position:
        update["classes"] = list(schema.class_names) or [str(i) for i in range(schema.num_classes)]
    if schema.feature_names:
        update["features"] = list(schema.feature_names)
    return source.model_copy(update=update)


def _local(source: DataSource, site: Site) -> DataSource:
    """The source with its vocabulary's path made to start from the site's folder."""
    if not source.vocabulary:
        return source
    return source.model_copy(update={"vocabulary": str(site.folder / source.vocabulary)})
