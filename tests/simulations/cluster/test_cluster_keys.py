"""Keys of clients on several machines: each in a file of its own, none in what travels."""

from __future__ import annotations

import pickle
import stat
from pathlib import Path

import pytest

from common.errors import PeerError, RunError
from common.flower import client_context
from simulations.cluster.keys import PartitionKeys
from simulations.sealing import Sealing

NAMES = ["a", "b", "c"]


@pytest.fixture
def sealing(tmp_path: Path) -> Sealing:
    """Keys of three clients in a run's folder."""
    return Sealing.for_clients(NAMES, folder=tmp_path, in_files=True)


def test_each_partition_reads_its_own(sealing: Sealing) -> None:
    """By its number alone."""
    own = [sealing.clients.of(client_context(node_id=9, partition=i)) for i in range(3)]
    assert [keys.record.name for keys in own] == NAMES
    assert sealing.clients.records == {keys.record.name: keys.record for keys in own} == sealing.records


def test_only_the_owner_reads_them(sealing: Sealing, tmp_path: Path) -> None:
    """Private keys, and the folder that they are in."""
    folder = tmp_path / "keys"
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.glob("*/private.json")} == {0o600}
    assert {stat.S_IMODE(path.stat().st_mode) for path in (folder, *(folder / str(i) for i in range(3)))} == {0o700}


def test_no_secret_travels(sealing: Sealing) -> None:
    """What goes to another machine names a folder; it finds the same keys there."""
    own = sealing.clients.of(client_context(node_id=2, partition=0))
    _ = sealing.clients.records
    sent = pickle.dumps(sealing.clients)
    assert not any(seed in sent for seed in (*own._seeds.values(), *sealing.coordinator._seeds.values()))
    copy = pickle.loads(sent)  # noqa: S301 - our own
    assert isinstance(copy, PartitionKeys)
    assert copy.of(client_context(node_id=2, partition=0)).record == own.record
    assert copy.coordinator == sealing.coordinator.record


def test_a_resumed_run_goes_on_with_them(sealing: Sealing, tmp_path: Path) -> None:
    """Also where the first process was killed while it wrote them."""
    (tmp_path / "keys" / "2" / "record.json").unlink()
    (tmp_path / "keys" / "2" / "private.json").rename(tmp_path / "keys" / "private.json")
    (tmp_path / "keys" / "2").rmdir()
    (tmp_path / "keys" / ".2.new").mkdir()
    (tmp_path / "keys" / "private.json").rename(tmp_path / "keys" / ".2.new" / "private.json")
    again = Sealing.for_clients(NAMES, folder=tmp_path, in_files=True)
    assert again.records == sealing.records
    assert again.clients.of(client_context(node_id=4, partition=2)).record == sealing.records["c"]


def test_keys_of_another_run_are_refused(sealing: Sealing, tmp_path: Path) -> None:
    """Nobody would believe what they sign."""
    (tmp_path / "parties.seed").unlink()
    with pytest.raises(RunError, match="another run"):
        Sealing.for_clients(NAMES, folder=tmp_path, in_files=True)


@pytest.mark.parametrize("partition", [3, -1])
def test_whoever_is_no_client_has_none(sealing: Sealing, partition: int) -> None:
    """A number that no partition has."""
    with pytest.raises(PeerError):
        sealing.clients.of(client_context(node_id=9, partition=partition))


def test_without_a_folder_there_are_no_files() -> None:
    """They would be on one machine."""
    with pytest.raises(RunError, match="run folder"):
        Sealing.for_clients(NAMES, in_files=True)
