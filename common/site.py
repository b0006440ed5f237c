"""`site.toml`: the local registry of a party's own models and data. It never travels.

A run's configuration names `my-net` or `icu`; this file says which code and which files those names mean here:

    [models.my-net]
    source = "my_models.py:build"          # or an entry point of group `coterie.models`: "entry:name"

    [data.icu]
    source = "csv:icu.csv"                 # csv, parquet, npz, images, text, or python ("python:file.py:function")
    label = "outcome"
    features = ["age", "heart_rate"]
    entity = "patient_id"                  # privacy protects a patient, not a row

Relative paths are relative to the file.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from common.errors import SiteError

ENTITY_KINDS = frozenset({"csv", "parquet", "npz"})
"""Formats whose rows can name an entity. A python function sets `Examples.entities` itself."""


class ModelSource(BaseModel):
    """Where a registered model's builder is found."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    source: str = Field(min_length=1, description="`file.py:function`, or `entry:NAME` for an installed entry point.")


class DataSource(BaseModel):
    """Where a registered data set's examples are, and how they are read."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    source: str = Field(pattern=r"^(csv|parquet|npz|images|text|python):.+", description="Format and path.")
    label: str = Field("label", description="Column (csv, parquet) or array (npz) that holds the class.")
    features: list[str] = Field([], description="Columns used as inputs, in this order; empty takes all numeric ones.")
    inputs: str = Field("inputs", description="Array (npz) that holds the inputs.")
    group: str = Field("", description="Column that says to which client a row belongs (natural partition).")
    entity: str = Field(
        "",
        description="Column or array that says whom a row belongs to; privacy then protects all rows of one together.",
    )
    classes: list[str] = Field([], description="All classes in their order; declared, so that nothing is counted.")
    means: list[float] = Field([], description="Public constant subtracted from each feature; empty: none.")
    scales: list[float] = Field([], description="Public constant each feature is divided by; empty: none.")
    image_size: int = Field(28, ge=8, le=1024, description="Side to which images are resized, in pixels.")
    channels: Literal[1, 3] = Field(1, description="Image channels: grey or colour.")
    tokenizer: Literal["characters", "words"] = Field("characters", description="How text becomes tokens.")
    vocabulary: str = Field("", description="File with one word a line (words), public; id 0 is unknown.")

    @field_validator("entity")
    @classmethod
    def _entity_can_be_read(cls, entity: str, info: ValidationInfo) -> str:
        """Refuse an entity that would be ignored, or learned from: epsilon would be told for what is not protected."""
        kind = info.data.get("source", "").partition(":")[0]
        if entity and kind and kind not in ENTITY_KINDS:
            raise PydanticCustomError(
                "entity_kind", "is for csv, parquet and npz; a python function sets `entities` of its Examples itself"
            )
        learned = {info.data.get("label"), *info.data.get("features", [])}
        if kind == "npz":
            learned.add(info.data.get("inputs"))
        if entity and entity in learned:
            raise PydanticCustomError("entity_column", "is also the label or an input; list it once")
        return entity


class Site(BaseModel):
    """A party's own models and data by registered name."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    models: dict[str, ModelSource] = {}
    data: dict[str, DataSource] = {}
    folder: Path = Field(Path(), exclude=True, description="What relative paths start from.")


def load_site(path: str | Path | None) -> Site:
    """Read `site.toml`; None gives an empty registry.

    Raises:
        SiteError: The file is missing, not TOML, or has unknown keys.
    """
    if path is None:
        return Site()
    path = Path(path)
    tree = read_own_toml(path, missing="name your registry with --site PATH", wrong="see docs/data.md for an example")
    if "folder" in tree:
        raise SiteError(f"{path}: unknown key `folder`", hint="paths are relative to the file itself")
    try:
        return Site.model_validate({**tree, "folder": path.parent.absolute()})
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise SiteError(f"{path}: `{where}`: {first['msg']}", hint="see docs/data.md for every key") from e


def read_own_toml(path: Path, *, missing: str, wrong: str) -> dict[str, Any]:
    """A TOML file that the site itself wrote.

    Args:
        path: The file.
        missing: Hint where it cannot be read.
        wrong: Hint where it is not TOML.

    Raises:
        SiteError: The file cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise SiteError(f"{path} cannot be read: {e.strerror}", hint=missing) from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as e:
        raise SiteError(f"{path} is not valid TOML: {e}", hint=wrong) from e
