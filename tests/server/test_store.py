"""A run's folder has one writer, survives interruptions, and can always be listed."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import resource
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import RunConfig
from common.errors import RunError
from server import store
from server.checkpoint import Checkpoint, save_checkpoint
from server.store import RunFolder, list_runs

CONFIG = RunConfig(name="demo")
ROOT = Path(__file__).parents[2]

json_numbers = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
json_values = st.none() | st.booleans() | json_numbers | st.text(max_size=5)


@contextmanager
def disk_full_at(size_bytes: int) -> Iterator[None]:
    """No file may grow beyond this size: writes are cut short and then refused, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def checkpoint(run: RunFolder, server_round: int = 1) -> None:
    arrays = {"w": np.zeros(2, np.float32)}
    save_checkpoint(run.checkpoints, Checkpoint(server_round=server_round, config_digest="d", arrays=arrays))


class TestCreate:
    """`RunFolder.create`."""

    def test_the_default_folder_is_named_after_time_and_run(self, tmp_path: Path) -> None:
        """Runs lie in one folder, named so that they sort by time and say what they are."""
        with RunFolder.create(CONFIG, root=tmp_path / "runs") as run:
            assert run.path.parent == tmp_path / "runs"
            assert re.fullmatch(r"\d{8}T\d{6}Z-demo(-\d+)?", run.path.name)
            assert run.checkpoints.is_dir()

    def test_the_default_root_is_runs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without a word about where, a run lies under runs/ of the working directory."""
        monkeypatch.chdir(tmp_path)
        with RunFolder.create(CONFIG) as run:
            assert run.path.parent == Path("runs")

    def test_runs_of_the_same_second_get_folders_of_their_own(self, tmp_path: Path) -> None:
        """Three runs of one name started at once never share a folder."""
        paths = set()
        for _ in range(3):
            with RunFolder.create(CONFIG, root=tmp_path) as run:
                paths.add(run.path)
        assert len(paths) == 3

    @pytest.mark.parametrize(
        "values",
        [
            {},
            {"privacy": {"unit": "example", "target_epsilon": 3.0}, "training": {"local_steps": 2}},
            {"model": {"options": {"hidden": 128, "norm": True, "kind": "x"}}},
            {"data": {"partition": "natural", "sites": ["a", "b-2"]}},
            {"simulation": {"byzantine_scale": -1e-7}, "seeds": {"cohort": 2**62}},
        ],
    )
    def test_the_configuration_comes_back_with_its_digest(self, tmp_path: Path, values: dict[str, Any]) -> None:
        """run.toml holds every value: what is read is the configuration that was started."""
        config = RunConfig.model_validate(values)
        with RunFolder.create(config, tmp_path / "run") as run:
            assert run.config() == config
            assert RunFolder.open(run.path).config().digest() == config.digest()
        assert "rounds = 10" in (tmp_path / "run" / "run.toml").read_text()

    def test_an_empty_folder_is_taken(self, tmp_path: Path) -> None:
        """A folder that is there and empty will do, and so will what a process that died at once left."""
        RunFolder.create(CONFIG, tmp_path).close()
        (tmp_path / "run.toml").unlink()
        RunFolder.create(CONFIG, tmp_path).close()
        assert RunFolder.open(tmp_path).config() == CONFIG

    def test_a_folder_with_anything_else_is_refused(self, tmp_path: Path) -> None:
        """Nothing that is not a run's is mixed with a run, nor touched."""
        (tmp_path / "thesis.tex").touch()
        with pytest.raises(RunError, match="not empty and not a run"):
            RunFolder.create(CONFIG, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]

    def test_a_run_is_never_overwritten(self, tmp_path: Path) -> None:
        """Creating a run where one is says how to go on."""
        RunFolder.create(CONFIG, tmp_path).close()
        with pytest.raises(RunError, match="already holds a run") as error:
            RunFolder.create(RunConfig(name="other"), tmp_path)
        assert "resume" in error.value.hint
        assert RunFolder.open(tmp_path).config() == CONFIG

    def test_a_path_that_cannot_be_a_folder_is_an_error_of_the_run(self, tmp_path: Path) -> None:
        """What the operating system refuses is reported with the path."""
        file = tmp_path / "file"
        file.touch()
        with pytest.raises(RunError, match="file cannot be written"):
            RunFolder.create(CONFIG, file)
        with pytest.raises(RunError, match="cannot be written"):
            RunFolder.create(CONFIG, root=file)

    def test_a_failed_creation_gives_the_lock_back(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """When run.toml cannot be written the folder is free again."""

        def broken(values: object) -> str:
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(store.tomli_w, "dumps", broken)
            with pytest.raises(RunError, match="Input/output error"):
                RunFolder.create(CONFIG, tmp_path)
        RunFolder.create(CONFIG, tmp_path).close()


class TestLock:
    """One writer a run."""

    def test_two_writers_are_refused(self, tmp_path: Path) -> None:
        """While a run is being written, nobody else can go on with it; afterwards anybody can."""
        with RunFolder.create(CONFIG, tmp_path):
            with pytest.raises(RunError, match="being written by another process") as error:
                RunFolder.resume(tmp_path)
            assert error.value.hint
        RunFolder.resume(tmp_path).close()

    def test_reading_needs_no_lock_and_cannot_write(self, tmp_path: Path) -> None:
        """An opened run can be read while it is written, and refuses to be written."""
        with RunFolder.create(CONFIG, tmp_path) as run:
            run.append_round({"server_round": 1})
            reader = RunFolder.open(tmp_path)
            assert reader.rounds() == [{"server_round": 1}]
            for write in (
                lambda: reader.append_round({"server_round": 2}),
                lambda: reader.truncate_rounds(0),
                lambda: reader.write_result({}),
            ):
                with pytest.raises(RunError, match="opened for reading"):
                    write()
            assert reader.rounds() == [{"server_round": 1}]

    def test_asking_for_the_status_does_not_disturb_a_writer(self, tmp_path: Path) -> None:
        """However often a run's status is read, its lock can be taken at once."""
        RunFolder.create(CONFIG, tmp_path).close()
        for _ in range(20):
            assert RunFolder.open(tmp_path).status == "failed"
            RunFolder.resume(tmp_path).close()

    def test_a_killed_process_leaves_no_lock(self, tmp_path: Path) -> None:
        """A run whose process died at once can be resumed, and what it had appended is there."""
        code = f"""
            import os, pathlib
            from common.config import RunConfig
            from server.store import RunFolder
            run = RunFolder.create(RunConfig(), pathlib.Path({str(tmp_path)!r}))
            run.append_round({{"server_round": 1}})
            assert run.status == "running"
            os._exit(9)
        """
        assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, check=False).returncode == 9
        with RunFolder.resume(tmp_path) as run:
            assert run.rounds() == [{"server_round": 1}]

    @pytest.mark.parametrize("open_run", [RunFolder.open, RunFolder.resume])
    def test_a_folder_that_is_no_run_cannot_be_opened(self, tmp_path: Path, open_run: Any) -> None:
        """A folder without run.toml is not a run, and stays untouched."""
        with pytest.raises(RunError, match="is not a run"):
            open_run(tmp_path)
        assert list(tmp_path.iterdir()) == []


class TestRounds:
    """rounds.jsonl."""

    @given(st.lists(st.dictionaries(st.text(max_size=5), json_values, max_size=4), max_size=4))
    def test_rows_come_back_in_order(
        self, tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]
    ) -> None:
        """Whatever JSON can say about a round is read as it was appended, line breaks in texts included."""
        with RunFolder.create(CONFIG, tmp_path_factory.mktemp("run")) as run:
            numbered = [{**row, "server_round": n} for n, row in enumerate(rows, 1)]
            for row in numbered:
                run.append_round(row)
            assert run.rounds() == numbered

    def test_every_line_is_strict_json(self, tmp_path: Path) -> None:
        """NaN and infinities become null and numpy's numbers plain ones, so that any program can read the file."""
        with RunFolder.create(CONFIG, tmp_path) as run:
            run.append_round(
                {"server_round": 1, "loss": math.nan, "list": (np.float32(0.5), math.inf), "n": {"k": np.int64(3)}}
            )
            expected = {"server_round": 1, "loss": None, "list": [0.5, None], "n": {"k": 3}}
            assert json.loads((tmp_path / "rounds.jsonl").read_text(), parse_constant=pytest.fail) == expected

    def test_a_row_without_its_round_is_a_mistake(self, tmp_path: Path) -> None:
        """A record names its round, or could not be taken back on resumption."""
        with RunFolder.create(CONFIG, tmp_path) as run, pytest.raises(ValueError, match="server_round"):
            run.append_round({"loss": 1})

    def test_a_line_cut_off_is_not_a_round(self, tmp_path: Path) -> None:
        """What a killed process wrote of a line is ignored by readers and dropped on resumption."""
        with RunFolder.create(CONFIG, tmp_path) as run:
            run.append_round({"server_round": 1})
        with (tmp_path / "rounds.jsonl").open("ab") as file:
            file.write(b'{"server_round": 2')
        assert RunFolder.open(tmp_path).rounds() == [{"server_round": 1}]
        with RunFolder.resume(tmp_path) as run:
            run.append_round({"server_round": 2})
            assert run.rounds() == [{"server_round": 1}, {"server_round": 2}]

    def test_rounds_after_the_checkpoint_are_taken_back(self, tmp_path: Path) -> None:
        """Resuming after round 2 forgets rounds 3 and 4, which are done again."""
        with RunFolder.create(CONFIG, tmp_path) as run:
            for server_round in range(1, 5):
                run.append_round({"server_round": server_round})
            run.truncate_rounds(after_round=2)
            run.append_round({"server_round": 3, "again": True})
            assert [row["server_round"] for row in run.rounds()] == [1, 2, 3]
            run.truncate_rounds(after_round=0)
            assert run.rounds() == []

    @pytest.mark.parametrize("line", [b"{", b"[]", b'{"server_round": "1"}', b"\xff", b"", b"[" * 100_000])
    def test_a_damaged_line_is_named(self, tmp_path: Path, line: bytes) -> None:
        """Damage in the middle of the file is reported, not skipped."""
        with RunFolder.create(CONFIG, tmp_path) as run:
            run.append_round({"server_round": 1})
            with (tmp_path / "rounds.jsonl").open("ab") as file:
                file.write(line + b"\n")
            with pytest.raises(RunError, match=r"rounds\.jsonl.* damaged"):
                run.rounds()

    def test_a_full_disk_adds_nothing(self, tmp_path: Path) -> None:
        """A row that does not fit leaves no half line behind, and the run can go on once there is space."""
        with RunFolder.create(CONFIG, tmp_path) as run:
            run.append_round({"server_round": 1, "padding": "x" * 100_000})
            size = (tmp_path / "rounds.jsonl").stat().st_size
            with disk_full_at(size + 10), pytest.raises(RunError, match=r"rounds\.jsonl cannot be written") as error:
                run.append_round({"server_round": 2})
            assert error.value.hint
            assert (tmp_path / "rounds.jsonl").stat().st_size == size
            run.append_round({"server_round": 2})
            assert [row["server_round"] for row in run.rounds()] == [1, 2]


class TestResult:
    """result.json."""

    def test_a_result_comes_back(self, tmp_path: Path) -> None:
        """A run without a result has none; a written one says `completed` and replaces the former."""
        with RunFolder.create(CONFIG, tmp_path) as run:
            assert run.read_result() is None
            run.write_result({"accuracy": 0.5, "loss": math.nan})
            assert run.read_result() == {"status": "completed", "accuracy": 0.5, "loss": None}
            run.write_result({"status": "failed", "error": "config-invalid"})
            assert run.read_result() == {"status": "failed", "error": "config-invalid"}

    def test_a_full_disk_keeps_the_former_result(self, tmp_path: Path) -> None:
        """Writing a result is all or nothing."""
        with RunFolder.create(CONFIG, tmp_path) as run:
            run.write_result({"accuracy": 0.5})
            with disk_full_at(100_000), pytest.raises(RunError, match=r"result\.json cannot be written"):
                run.write_result({"padding": "x" * 200_000})
            assert run.read_result() == {"status": "completed", "accuracy": 0.5}
            assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints", "result.json", "run.lock", "run.toml"]

    def test_a_full_disk_keeps_the_former_checkpoint(self, tmp_path: Path) -> None:
        """Nor does a checkpoint that does not fit leave anything behind."""
        with RunFolder.create(CONFIG, tmp_path) as run:
            checkpoint(run)
            large = Checkpoint(server_round=2, config_digest="d", arrays={"w": np.zeros(100_000)})
            with disk_full_at(100_000), pytest.raises(RunError, match="cannot be written"):
                save_checkpoint(run.checkpoints, large)
            assert [path.name for path in run.checkpoints.iterdir()] == ["round-00001.safetensors"]

    def test_a_damaged_result_is_an_error(self, tmp_path: Path) -> None:
        """A result that cannot be read is reported with its path."""
        with RunFolder.create(CONFIG, tmp_path) as run:
            (tmp_path / "result.json").write_text("{")
            with pytest.raises(RunError, match=r"result\.json is damaged"):
                run.read_result()


class TestStatus:
    """`RunFolder.status` and `list_runs`."""

    def test_a_runs_life(self, tmp_path: Path) -> None:
        """Running while its lock is held, interrupted with a checkpoint, failed or completed with a result."""
        with RunFolder.create(CONFIG, tmp_path) as run:
            assert run.status == RunFolder.open(tmp_path).status == "running"
        assert run.status == "failed", "there is nothing to resume from"
        with RunFolder.resume(tmp_path) as run:
            checkpoint(run)
        assert run.status == "interrupted"
        with RunFolder.resume(tmp_path) as run:
            run.write_result({"status": "failed"})
        assert run.status == "failed"
        with RunFolder.resume(tmp_path) as run:
            run.write_result({})
            assert run.status == "running"
        assert run.status == "completed"

    def test_a_copied_run_without_its_lock_has_a_status(self, tmp_path: Path) -> None:
        """A folder that was copied without run.lock is not running, and asking does not make the file."""
        RunFolder.create(CONFIG, tmp_path).close()
        (tmp_path / "run.lock").unlink()
        assert RunFolder.open(tmp_path).status == "failed"
        assert not (tmp_path / "run.lock").exists()

    def test_runs_are_listed_newest_first(self, tmp_path: Path) -> None:
        """Each run is summarised with what it has; other things in the folder are no runs."""
        for number, name in enumerate(["first", "second", "third"]):
            with RunFolder.create(RunConfig(name=name), tmp_path / f"{9 - number}-{name}") as run:
                run.append_round({"server_round": number + 1})
                if name == "second":
                    run.write_result({"accuracy": 0.9})
            os.utime(run.path / "run.toml", (1000 + number, 1000 + number))
        (tmp_path / "not-a-run").mkdir()
        (tmp_path / "file").touch()
        listed = list_runs(tmp_path)
        assert [run.config.name for run in listed if run.config] == ["third", "second", "first"]
        assert [run.status for run in listed] == ["failed", "completed", "failed"]
        assert [run.last_round for run in listed] == [3, 2, 1]
        assert [run.result and run.result["accuracy"] for run in listed] == [None, 0.9, None]
        assert listed[0].created.isoformat() == "1970-01-01T00:16:42+00:00"
        assert {run.problem for run in listed} == {""}

    @pytest.mark.parametrize("name", ["run.toml", "result.json", "rounds.jsonl"])
    @pytest.mark.parametrize("content", [b"", b"{\n", b"\xff\xfe\n", b"x = 1\n"])
    def test_a_damaged_run_is_still_listed(self, tmp_path: Path, name: str, content: bytes) -> None:
        """One damaged file costs what it holds, not the list."""
        for folder in ("whole", "damaged"):
            with RunFolder.create(CONFIG, tmp_path / folder) as run:
                run.append_round({"server_round": 4})
                run.write_result({"accuracy": 0.9})
        (tmp_path / "damaged" / name).write_bytes(content)
        summaries = {run.path.name: run for run in list_runs(tmp_path)}
        damaged = summaries["damaged"]
        assert summaries["whole"].problem == ""
        legal = content == b"" and name in {"run.toml", "rounds.jsonl"}  # an empty TOML file is all defaults
        assert (damaged.problem == "") == legal
        assert name in damaged.problem or legal
        if name != "rounds.jsonl":
            assert damaged.last_round == 4
        if name != "result.json":
            assert damaged.status == "completed"

    def test_no_folder_is_no_runs(self, tmp_path: Path) -> None:
        """Before the first run the list is empty."""
        assert list_runs(tmp_path / "runs") == []
