"""Workers train on the examples that the run has loaded: they are in memory once, and nobody can change them."""

from __future__ import annotations

import mmap
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from common.config import DataSettings
from common.data import load_federation
from common.data.population import Population
from common.errors import DataError
from common.schema import ClientData, DataSchema, Examples, Federation
from common.site import Site
from simulations.pool.shared_data import shared_data
from simulations.run import execute, prepare
from tests.helpers.runs import as_bytes, configuration

SCHEMA = DataSchema(kind="tabular", input_shape=(3,), num_classes=2)


def loaded(**settings: Any) -> Federation:
    return load_federation(DataSettings(**settings), seed=1, site=Site())


def examples(n: int, *, seed: int = 0, entities: bool = False, width: int = 3) -> Examples:
    inputs = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    return Examples(inputs=inputs, targets=torch.arange(n) % 2, entities=torch.arange(n) // 2 if entities else None)


def own(*clients: Examples, test: Examples | None = None) -> Federation:
    """As a user's function returns it."""
    made = tuple(
        ClientData(name=f"c{i}", train=train, test=examples(i, seed=9, entities=train.entities is not None))
        for i, train in enumerate(clients)
    )
    return Federation(schema=SCHEMA, clients=made, test=examples(4) if test is None else test)


def same(one: Examples, other: Examples) -> bool:
    pairs = [(one.inputs, other.inputs), (one.targets, other.targets)]
    if one.entities is not None and other.entities is not None:
        pairs.append((one.entities, other.entities))
    alike = (one.entities is None) == (other.entities is None)
    return alike and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def copy(federation: Federation) -> list[ClientData]:
    """Every client, in tensors of its own."""
    return [
        replace(c, train=c.train.take(torch.arange(len(c.train))), test=c.test.take(torch.arange(len(c.test))))
        for c in federation.clients
    ]


FEDERATIONS = {
    "divided": lambda: loaded(name="digits", partition="iid", clients=7),
    "natural": lambda: loaded(name="heart", partition="natural", clients=0),
    "bootstrap": lambda: loaded(name="digits", partition="bootstrap", clients=50),
    "tokens": lambda: loaded(name="shakespeare", partition="natural", clients=3, max_examples=20),
    "own": lambda: own(examples(5), examples(0), examples(2, seed=3)),
    "entities": lambda: own(examples(5, entities=True), examples(3, entities=True)),
    "nothing held out": lambda: own(examples(5), test=examples(0)),
}


@pytest.mark.parametrize("name", FEDERATIONS)
def test_what_is_mapped_is_what_was_loaded(name: str) -> None:
    """Every client of every kind of population: name, examples, what is held out; also in this process, afterwards."""
    federation = FEDERATIONS[name]()
    before, held_out = copy(federation), federation.test.take(torch.arange(len(federation.test)))
    with shared_data(federation) as shared:
        assert shared is not None
        mapped = shared.federation()
    for found in (mapped, federation):
        assert found.schema == federation.schema
        assert list(found.names) == [client.name for client in before]
        assert same(found.test, held_out)
        for client, expected in zip(found.clients, before, strict=True):
            assert client.name == expected.name
            assert same(client.train, expected.train)
            assert same(client.test, expected.test)


@pytest.mark.parametrize("name", ["divided", "own"])
def test_a_client_that_writes_into_its_examples_changes_nobody_elses(name: str) -> None:
    """Not those of another process, nor what a process maps later; the file itself takes no writes."""
    federation = FEDERATIONS[name]()
    expected = copy(federation)[0]
    with shared_data(federation) as shared:
        assert shared is not None
        client = shared.federation().clients[0]
        client.train.inputs.fill_(7.0)
        assert same(shared.federation().clients[0].train, expected.train)
        assert same(federation.clients[0].train, expected.train)


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs a file in memory")
def test_the_file_is_sealed() -> None:
    """Whoever holds it can neither write to it nor map it for writing."""
    with shared_data(FEDERATIONS["own"]()) as shared:
        assert shared is not None
        descriptor = shared._descriptor
        with pytest.raises(PermissionError):
            os.pwrite(descriptor, b"x", 0)
        with pytest.raises(PermissionError):
            mmap.mmap(descriptor, 0)


def places(federation: Federation) -> set[str]:
    """The files behind the examples of this process."""
    found = set()
    tensors = [federation.test.inputs, *(client.train.inputs for client in federation.clients)]
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if any(tensor.numel() and begin <= tensor.data_ptr() < end for tensor in tensors):
            found.add(" ".join(line.split()[5:]))
    return found


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs a file in memory")
@pytest.mark.parametrize("name", ["divided", "own"])
def test_examples_are_in_memory_once(name: str) -> None:
    """The tensors of the process that shares them lie in the file, too; it has no name that could be left behind."""
    federation = FEDERATIONS[name]()
    with shared_data(federation):
        assert places(federation) == {"/memfd:coterie-data (deleted)"}


def test_what_is_trained_and_tested_on_is_written_once() -> None:
    """A client may be tested on what it trains on."""
    whole = examples(1000, width=50)
    twice = Federation(schema=SCHEMA, clients=(ClientData(name="c", train=whole, test=whole),), test=whole)
    with shared_data(twice) as shared:
        assert shared is not None
        assert os.fstat(shared._descriptor).st_size < 1.1 * 4 * whole.inputs.numel() + 8 * len(whole)
        assert same(shared.federation().clients[0].test, whole)


@pytest.mark.parametrize(
    "clients",
    [
        (examples(3), examples(3, width=4)),
        (examples(3), replace(examples(3), inputs=torch.zeros(3, 3, dtype=torch.float64))),
        (examples(3), examples(3, entities=True)),
        (examples(3), replace(examples(3), inputs=torch.zeros(3, 3).to_sparse())),
    ],
)
def test_tensors_that_do_not_fit_together_are_not_shared(clients: tuple[Examples, ...]) -> None:
    """Then every process makes its own."""
    with shared_data(own(*clients)) as shared:
        assert shared is None


def test_clients_that_a_user_makes_one_by_one_are_not_shared() -> None:
    """There is nothing to write: they are made where they train, and not before."""

    def make(index: int) -> ClientData:
        raise AssertionError(index)

    lazy = Federation(schema=SCHEMA, clients=Population(["a", "b"], make), test=examples(2))
    with shared_data(lazy) as shared:
        assert shared is None


def test_a_full_disk_costs_memory_and_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file cannot be made, every process makes its own examples."""

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("simulations.pool.shared_data._new_file", full)
    with shared_data(FEDERATIONS["own"]()) as shared:
        assert shared is None


def test_without_files_in_memory_a_temporary_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS."""
    monkeypatch.delattr(os, "memfd_create", raising=False)
    federation = FEDERATIONS["own"]()
    expected = copy(federation)
    with shared_data(federation) as shared:
        assert shared is not None
        assert same(shared.federation().clients[2].train, expected[2].train)


def test_workers_read_no_data(tmp_path: Path) -> None:
    """A run over workers ends like one in this process although its file is gone when they start."""
    site = tmp_path / "site.toml"
    site.write_text('[data.rows]\nsource = "csv:rows.csv"\nlabel = "y"\n')
    rows = tmp_path / "rows.csv"
    rows.write_text("a,b,y\n" + "".join(f"{i % 7},{i % 5},{i % 2}\n" for i in range(60)))
    config = configuration(model={"name": "linear"}, data={"name": "rows", "partition": "iid", "clients": 4})
    here = execute(prepare(config, folder=tmp_path / "here", site_file=site))
    there = prepare(config, folder=tmp_path / "there", site_file=site)
    rows.unlink()
    with pytest.raises(DataError):
        prepare(config, folder=tmp_path / "again", site_file=site)
    assert as_bytes(execute(there, workers=2).arrays) == as_bytes(here.arrays)
