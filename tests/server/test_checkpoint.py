"""A checkpoint is whole or not there, and brings back exactly what was saved."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from common.disk import atomic_file, disk_errors
from common.errors import RunError
from server import checkpoint as module
from server.checkpoint import Checkpoint, checkpoint_files, load_checkpoint, load_round, save_checkpoint

DIGEST = "0" * 64


def small(server_round: int, digest: str = DIGEST, **fields: Any) -> Checkpoint:
    """A checkpoint whose one weight is its round."""
    return Checkpoint(
        server_round=server_round,
        config_digest=digest,
        arrays={"w": np.full(4, server_round, np.float32)},
        **fields,
    )


def loaded(folder: Path) -> Checkpoint:
    checkpoint = load_checkpoint(folder, DIGEST)
    assert checkpoint is not None
    return checkpoint


def same(one: NDArray[Any], other: NDArray[Any]) -> bool:
    return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


dtypes = hnp.boolean_dtypes() | hnp.integer_dtypes(endianness="=") | hnp.floating_dtypes(endianness="=")
arrays = hnp.arrays(dtypes, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
named_arrays = st.dictionaries(st.text(max_size=8), arrays, max_size=4)


class TestRoundTrip:
    """What is saved is loaded."""

    @settings(max_examples=40)
    @given(named_arrays, named_arrays, st.none() | named_arrays, named_arrays)
    def test_arrays_come_back_byte_for_byte(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        model: dict[str, NDArray[Any]],
        strategy: dict[str, NDArray[Any]],
        best: dict[str, NDArray[Any]] | None,
        noise: dict[str, NDArray[Any]],
    ) -> None:
        """Any names, dtypes and shapes survive in their order, also arrays that are empty or have no dimensions."""
        folder = tmp_path_factory.mktemp("checkpoints")
        saved = Checkpoint(
            server_round=1, config_digest=DIGEST, arrays=model, strategy=strategy, best_arrays=best, noise=noise
        )
        save_checkpoint(folder, saved)
        back = loaded(folder)
        assert (back.best_arrays is None) == (best is None)
        both = ((model, back.arrays), (strategy, back.strategy), (best or {}, back.best_arrays or {}))
        for one, other in (*both, (noise, back.noise)):
            assert list(one) == list(other)
            assert all(same(one[name], other[name]) for name in one)

    def test_memory_layout_does_not_matter(self, tmp_path: Path) -> None:
        """Views, Fortran order and the other byte order are saved by value; what is loaded can be written to."""
        values = np.arange(24, dtype=np.float64).reshape(4, 6)
        odd = {"every other": values[::2, ::-1], "fortran": np.asfortranarray(values), "swapped": values.astype(">f8")}
        save_checkpoint(tmp_path, Checkpoint(server_round=1, config_digest=DIGEST, arrays=odd))
        back = loaded(tmp_path).arrays
        for name, expected in odd.items():
            assert np.array_equal(back[name], expected)
            back[name][...] = 0

    def test_the_small_things_come_back(self, tmp_path: Path) -> None:
        """Round, digest, participation counts and progress are the same, infinities included."""
        progress = {"best_round": 3, "best_accuracy": float("-inf"), "stale": 0, "note": "é", "spent": [0.1, None]}
        save_checkpoint(tmp_path, small(12, sampler={"b": 2, "a": 1}, progress=progress))
        back = loaded(tmp_path)
        assert (back.server_round, back.config_digest, back.warnings) == (12, DIGEST, ())
        assert (back.sampler, back.progress) == ({"b": 2, "a": 1}, progress)
        assert list(back.sampler) == ["b", "a"]

    def test_nothing_saved_is_nothing_loaded(self, tmp_path: Path) -> None:
        """A run without a checkpoint starts from the beginning; a missing folder is no error."""
        assert load_checkpoint(tmp_path, DIGEST) is None
        assert load_checkpoint(tmp_path / "missing", DIGEST) is None

    def test_the_file_is_no_pickle(self, tmp_path: Path) -> None:
        """An array of objects is refused, not pickled."""
        with pytest.raises(RunError, match="`model/w` cannot be saved"):
            save_checkpoint(
                tmp_path, Checkpoint(server_round=1, config_digest=DIGEST, arrays={"w": np.array([object()])})
            )
        assert list(tmp_path.iterdir()) == []


class TestHistory:
    """Which checkpoints are kept, and which one is loaded."""

    def test_the_newest_two_are_kept(self, tmp_path: Path) -> None:
        """Each save removes what is older than its predecessor, and the newest is loaded, past five digits too."""
        for server_round in (0, 1, 99_999, 100_000):
            path = save_checkpoint(tmp_path, small(server_round))
            assert path.name == f"round-{server_round:05d}.safetensors"
        assert [n for n, _ in checkpoint_files(tmp_path)] == [99_999, 100_000]
        assert len(list(tmp_path.iterdir())) == 2
        assert loaded(tmp_path).server_round == 100_000

    def test_saving_an_earlier_round_gives_later_ones_up(self, tmp_path: Path) -> None:
        """After a step back the former future is gone: it must never be resumed from."""
        for server_round in (4, 5, 3):
            save_checkpoint(tmp_path, small(server_round))
        assert [n for n, _ in checkpoint_files(tmp_path)] == [3]

    def test_other_files_are_left_alone(self, tmp_path: Path) -> None:
        """Only checkpoints and temporary files are removed."""
        (tmp_path / "notes.txt").write_text("mine")
        (tmp_path / "round-1.safetensors").write_text("mine")
        for server_round in (1, 2, 3):
            save_checkpoint(tmp_path, small(server_round))
        assert {"notes.txt", "round-1.safetensors"} < {path.name for path in tmp_path.iterdir()}

    def test_another_configuration_is_refused(self, tmp_path: Path) -> None:
        """A checkpoint is loaded only under the configuration that wrote it, even if an older one fits."""
        save_checkpoint(tmp_path, small(1))
        save_checkpoint(tmp_path, small(2, digest="f" * 64))
        with pytest.raises(RunError, match="checkpoint of another configuration") as error:
            load_checkpoint(tmp_path, DIGEST)
        assert error.value.hint

    def test_another_version_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A file of a version that is not known is not guessed at."""
        monkeypatch.setattr(module, "_VERSION", 2)
        save_checkpoint(tmp_path, small(1))
        monkeypatch.undo()
        with pytest.raises(RunError, match="another version"):
            load_checkpoint(tmp_path, DIGEST)


class TestOneRound:
    """`load_round`: a round's own checkpoint or none."""

    def test_is_that_round_and_no_other(self, tmp_path: Path) -> None:
        """An older or newer checkpoint never stands for it."""
        for server_round in (3, 4):
            save_checkpoint(tmp_path, small(server_round))
        assert [(c := load_round(tmp_path, n, DIGEST)) and c.server_round for n in (2, 3, 4, 5)] == [None, 3, 4, None]
        assert load_round(tmp_path / "missing", 1, DIGEST) is None

    def test_damaged_is_an_error(self, tmp_path: Path) -> None:
        """Where nothing may take its place, damage is not passed over."""
        path = save_checkpoint(tmp_path, small(1))
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(RunError, match="is damaged") as error:
            load_round(tmp_path, 1, DIGEST)
        assert error.value.hint

    def test_of_another_configuration_is_an_error(self, tmp_path: Path) -> None:
        """A round of another run is not taken for this one's."""
        save_checkpoint(tmp_path, small(1, digest="f" * 64))
        with pytest.raises(RunError, match="another configuration"):
            load_round(tmp_path, 1, DIGEST)


class TestDamage:
    """Files that are not what was written."""

    @pytest.mark.parametrize("damage", ["empty", "cut off", "grown", "one bit", "garbage", "no header", "folder"])
    def test_a_damaged_newest_falls_back_to_the_one_before(self, tmp_path: Path, damage: str) -> None:
        """The run goes on from the previous checkpoint, and the caller is told."""
        save_checkpoint(tmp_path, small(1))
        newest = save_checkpoint(tmp_path, small(2))
        data = newest.read_bytes()
        replacement = {
            "empty": b"",
            "cut off": data[:-1],
            "grown": data + b"\0",
            "one bit": data[:-1] + bytes([data[-1] ^ 1]),
            "garbage": b"\xff" * len(data),
            "no header": (2).to_bytes(8, "little") + b"{}",
        }.get(damage)
        newest.unlink()
        if replacement is None:
            newest.mkdir()
        else:
            newest.write_bytes(replacement)
        if damage == "folder":
            with pytest.raises(RunError, match="cannot be read"):
                load_checkpoint(tmp_path, DIGEST)
            return
        back = loaded(tmp_path)
        assert back.server_round == 1
        assert same(back.arrays["w"], small(1).arrays["w"])
        assert len(back.warnings) == 1
        assert "round-00002.safetensors is damaged" in back.warnings[0]

    def test_all_damaged_is_an_error(self, tmp_path: Path) -> None:
        """A run whose checkpoints are all damaged does not silently start anew."""
        for server_round in (1, 2):
            save_checkpoint(tmp_path, small(server_round)).write_bytes(b"")
            (tmp_path / f"round-{server_round:05d}.safetensors").write_bytes(b"")
        with pytest.raises(RunError, match="no checkpoint that is whole") as error:
            load_checkpoint(tmp_path, DIGEST)
        assert error.value.hint

    @settings(max_examples=50)
    @given(st.data())
    def test_no_damage_gets_through(self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
        """Whatever bytes replace some of a file's, it is refused as damaged or holds what was saved."""
        folder = tmp_path_factory.mktemp("checkpoints")
        path = save_checkpoint(folder, small(1, sampler={"a": 1}, progress={"best_round": 1}))
        original = path.read_bytes()
        start = data.draw(st.integers(0, len(original)))
        end = data.draw(st.integers(start, len(original)))
        path.write_bytes(original[:start] + data.draw(st.binary(max_size=40)) + original[end:])
        try:
            back = loaded(folder)
        except RunError as e:
            assert "no checkpoint that is whole" in str(e)  # noqa: PT017 - either outcome is right
        else:
            assert same(back.arrays["w"], small(1).arrays["w"])
            assert (back.server_round, back.sampler, back.progress) == (1, {"a": 1}, {"best_round": 1})

    @given(st.binary(max_size=200))
    def test_no_byte_string_crashes_the_reader(self, tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
        """Any bytes under a checkpoint's name are refused as damaged."""
        folder = tmp_path_factory.mktemp("checkpoints")
        (folder / "round-00001.safetensors").write_bytes(data)
        with pytest.raises(RunError, match="no checkpoint that is whole"):
            load_checkpoint(folder, DIGEST)


class TestAtomic:
    """`atomic_file`, and saving when something goes wrong half way."""

    def test_a_file_is_replaced_when_the_block_ends(self, tmp_path: Path) -> None:
        """The old content stays until all of the new one is written."""
        path = tmp_path / "file"
        path.write_text("old")
        with atomic_file(path) as temporary:
            temporary.write_text("new")
            assert temporary.parent == tmp_path
            assert path.read_text() == "old"
        assert path.read_text() == "new"
        assert [p.name for p in tmp_path.iterdir()] == ["file"]

    @pytest.mark.parametrize("exception", [ValueError, KeyboardInterrupt])
    def test_a_failed_block_changes_nothing(self, tmp_path: Path, exception: type[BaseException]) -> None:
        """Whatever is raised while writing, the old file stays and no temporary one is left."""
        path = tmp_path / "file"
        path.write_text("old")

        def interrupted() -> None:
            with atomic_file(path) as temporary:
                temporary.write_text("ne")
                raise exception

        with pytest.raises(exception):
            interrupted()
        assert path.read_text() == "old"
        assert [p.name for p in tmp_path.iterdir()] == ["file"]

    def test_content_is_on_the_disk_before_the_name_is(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The file is synchronised before it is renamed, the folder after."""
        events: list[str] = []
        sync, rename = os.fsync, Path.replace

        def fsync(descriptor: int) -> None:
            events.append("folder" if os.path.isdir(f"/dev/fd/{descriptor}") else "file")  # noqa: PTH112
            sync(descriptor)

        def replace(self: Path, target: Path) -> Path:
            events.append("rename")
            return rename(self, target)

        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(Path, "replace", replace)
        save_checkpoint(tmp_path, small(1))
        assert events == ["file", "rename", "folder"]

    def test_a_failure_between_write_and_rename_keeps_the_last_checkpoint(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A disk that fails at the last moment costs one round, and the error says what to do."""
        save_checkpoint(tmp_path, small(1))

        def fail(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(RunError, match="No space left on device") as error:
            save_checkpoint(tmp_path, small(2))
        assert "free some space" in error.value.hint
        assert [path.name for path in tmp_path.iterdir()] == ["round-00001.safetensors"]
        assert loaded(tmp_path).server_round == 1

    def test_a_process_killed_before_the_rename_costs_one_round(self, tmp_path: Path) -> None:
        """After a kill the last checkpoint loads; the next save removes what the dead process left."""
        save_checkpoint(tmp_path, small(1))
        code = f"""
            import os, pathlib, numpy as np
            from server.checkpoint import Checkpoint, save_checkpoint
            pathlib.Path.replace = lambda *_: os._exit(9)
            save_checkpoint(pathlib.Path({str(tmp_path)!r}),
                Checkpoint(server_round=2, config_digest={DIGEST!r}, arrays={{"w": np.zeros(4, np.float32)}}))
        """
        root = Path(__file__).parents[2]
        killed = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=root, check=False)
        assert killed.returncode == 9
        assert len(list(tmp_path.iterdir())) == 2, "the dead process left a temporary file"
        assert loaded(tmp_path).server_round == 1
        save_checkpoint(tmp_path, small(3))
        assert [n for n, _ in checkpoint_files(tmp_path)] == [1, 3]
        assert len(list(tmp_path.iterdir())) == 2

    @pytest.mark.parametrize(
        ("code", "hint"),
        [
            (errno.ENOSPC, "free some space"),
            (errno.EDQUOT, "quota"),
            (errno.EACCES, "permissions"),
            (errno.EPERM, "permissions"),
            (errno.EROFS, "read-only"),
            (errno.EIO, "check the path and the disk"),
        ],
    )
    def test_what_the_disk_refuses_comes_with_a_hint(self, code: int, hint: str) -> None:
        """Full, protected and failing disks become an error that says how to mend it."""
        with pytest.raises(RunError, match="runs/x cannot be written") as error, disk_errors(Path("runs/x")):
            raise OSError(code, os.strerror(code))
        assert hint in error.value.hint

    def test_a_folder_that_is_a_file_is_an_error_of_the_run(self, tmp_path: Path) -> None:
        """A path that cannot be a folder is reported, with the path."""
        (tmp_path / "file").touch()
        with pytest.raises(RunError, match="file"):
            save_checkpoint(tmp_path / "file", small(1))
