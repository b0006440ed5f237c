"""A run's result as one archive, which `coterie fetch` brings to an operator: the coordinator packs, they unpack.

What is in it is an ordinary run folder, for `coterie predict`, `coterie export` and `coterie runs`. Where the
coordinator adds the noise it says neither who was asked nor who answered: that was not paid for, and the archive leaves
the coordinator. Where the clients add it, all of them know who took part, and their noise does not count on it.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from os import SEEK_END
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, Final

from common.disk import disk_errors, sync
from common.errors import RefusedError
from server.report import write_report
from server.store import RunFolder

FILES: Final = ("run.toml", "rounds.jsonl", "result.json", "model.safetensors", "report.html")
_WITHHELD: Final[dict[str, Any]] = {"cohort": [], "survivors": [], "failures": {}}


def pack(folder: Path, sink: BinaryIO) -> None:
    """Write a finished run's files as a tar archive.

    Raises:
        RunError: The folder is not that of a finished run, or cannot be read.
    """
    run = RunFolder.open(folder)
    config = run.config()
    with disk_errors(folder, "read"), TemporaryDirectory() as scratch:
        source = folder
        if config.central:
            source = Path(scratch)
            _without_names(run, source)
        with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for name in FILES:
                path = source / name if (source / name).exists() else folder / name
                facts = tarfile.TarInfo(name)
                facts.size, facts.mode = path.stat().st_size, 0o644
                with path.open("rb") as file:
                    archive.addfile(facts, file)


def unpack(source: BinaryIO, folder: Path) -> None:
    """Make a run folder of an archive.

    Guarantee: nothing but `FILES`, each once, as plain files, is written, and no more than the archive's own size; the
    folder appears whole or not at all.

    Raises:
        RefusedError: It is not such an archive.
        RunError: The folder exists, or cannot be written.
    """
    part = folder.with_name(f".{folder.name}.part")
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
    try:
        found = _extract(source, part)
        if found != set(FILES):
            raise RefusedError("the archive is not that of a run", hint="both sides must run the same version")
        (part / "checkpoints").mkdir()
        with disk_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            part.rename(folder)
            sync(folder.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _extract(source: BinaryIO, part: Path) -> set[str]:
    found: set[str] = set()
    left = source.seek(0, SEEK_END)
    source.seek(0)
    try:
        with tarfile.open(fileobj=source, mode="r:") as archive:
            for member in archive:
                # A sparse member unfolds to any size: a few bytes would fill the disk.
                content = archive.extractfile(member) if member.isreg() and not member.issparse() else None
                left -= member.size
                if member.name not in FILES or member.name in found or content is None or left < 0:
                    raise RefusedError("the archive holds what no run has", hint="ask the coordinator's administrator")
                found.add(member.name)
                with disk_errors(part), (part / member.name).open("xb") as file:
                    shutil.copyfileobj(content, file, 1 << 20)
                    file.flush()
                sync(part / member.name)
    except (tarfile.TarError, EOFError, ValueError) as e:
        raise RefusedError("the archive is damaged", hint="fetch it again") from e
    return found


def _without_names(run: RunFolder, scratch: Path) -> None:
    """The same run without who was asked, who answered and how many did not; its report is made of that."""
    rows = [json.dumps({**row, **_WITHHELD}) for row in run.rounds()]
    result = {**(run.read_result() or {}), "missing": {}}
    (scratch / "run.toml").write_bytes((run.path / "run.toml").read_bytes())
    (scratch / "rounds.jsonl").write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    (scratch / "result.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
    write_report(scratch)
