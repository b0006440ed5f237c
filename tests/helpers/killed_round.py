"""A site that is killed at every step of a round, and started again: run as a program with a folder as its argument.

Each site is a process of its own. The first is killed (SIGKILL, by itself) just before its n-th look at or change of a
file; the second answers the same request. Prints one JSON document: what each site released and what the ledger held.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import torch
from flwr.app import Message
from sklearn.datasets import load_digits

from common.errors import FailureCode
from common.flower import failure_of
from common.schema import Examples
from common.site import Site
from common.transport.records import encode_records
from tests.client.conftest import PRIVATE, Client, run, train_message

STEPS = {"open", "os.rename", "os.mkdir", "os.remove", "os.truncate", "os.listdir", "os.scandir", "shutil.rmtree"}


def answer(folder: Path, examples: Examples, message: Message, *, kill_at: int | None) -> None:
    """Answer one request; leave a digest of what was released in `folder / "released"`, a line each."""
    site = Client(examples, folder, Site(), spools=True)
    if kill_at is not None:
        _arm(folder, kill_at)
    reply = site.answer(message)
    failure = failure_of(reply)
    content = b"" if failure else b"".join(encode_records(reply.content))
    line = failure.slug if isinstance(failure, FailureCode) else hashlib.sha256(content).hexdigest()
    os.write(int((folder / "descriptor").read_text()), f"{line}\n".encode())


def _arm(folder: Path, kill_at: int) -> None:
    """Count steps on files below `folder`, and flushes; die before the one that was asked for."""
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1
        if steps == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple[object, ...]) -> None:
        if event in STEPS and str(folder) in str(arguments[0]) and "descriptor" not in str(arguments[0]):
            step()

    flush = os.fsync

    def fsync(descriptor: int) -> None:
        step()
        flush(descriptor)

    os.fsync = fsync
    sys.addaudithook(audit)


def _folder(path: Path) -> Path:
    path.mkdir()
    (path / "descriptor").write_text(str(os.open(os.devnull, os.O_WRONLY)))
    return path


def in_process(folder: Path, examples: Examples, message: Message, *, kill_at: int | None) -> bool:
    """Answer in a process of its own; whether it lived."""
    released = os.open(folder / "released", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    (folder / "descriptor").write_text(str(released))
    child = os.fork()
    if child == 0:
        answer(folder, examples, message, kill_at=kill_at)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    os.close(released)
    return os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0


def main(root: Path) -> None:
    """Kill at the first step, the second, and so on, until a site lives through its round."""
    torch.set_num_threads(1)
    inputs, targets = load_digits(return_X_y=True)
    examples = Examples(inputs=torch.tensor(inputs[:50] / 16, dtype=torch.float32), targets=torch.tensor(targets[:50]))
    message = train_message(run(*PRIVATE))
    answer(_folder(root / "0"), examples, message, kill_at=None)  # what is imported and computed here is not in a child
    courses = []
    for kill_at in range(1, 1000):
        folder = _folder(root / str(kill_at))
        lived = in_process(folder, examples, message, kill_at=kill_at)
        again = in_process(folder, examples, message, kill_at=None)
        released = (folder / "released").read_text().split()
        lines = (folder / "ledger.jsonl").read_text().splitlines()
        events = sum("sampled-gaussian" in line for line in lines)
        courses.append({"lived": lived, "again": again, "released": released, "events": events})
        if lived:
            break
    print(json.dumps(courses))  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
