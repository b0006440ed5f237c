"""`coterie study` as a user types it: what it leaves, what it refuses, and how it goes on after an end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from common.errors import RunError
from server.coordinator import Coordinator
from server.store import RunFolder, list_runs
from simulations.study import carry
from tests.helpers.processes import coterie, started, wait_until
from tests.helpers.runs import SITE, rows, tree
from tests.simulations.test_cli import contents

PAIR = ("--vary", "strategy.name=fedavg,fedprox")


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder."""
    monkeypatch.chdir(tmp_path)


def write(**changes: Any) -> Path:
    path = Path("tiny.toml")
    path.write_text(tomli_w.dumps(tree(**{"rounds": 2, **changes})))
    return path


def study(*arguments: str | Path) -> int:
    return coterie("study", "--site", SITE, "--workers", "1", *arguments)


class TestFolder:
    def test_holds_a_run_folder_an_arm_and_repeat(self) -> None:
        """Each is a run like any other, with a page and a result; beside them the study's own."""
        assert study(write(), *PAIR, "--repeats", "2", "--out", "here") == 0
        folder = Path("here")
        assert {path.name for path in folder.iterdir()} >= {"study.json", "result.json", "report.html", "runs"}
        runs = list_runs(folder / "runs")
        assert sorted(run.path.name for run in runs) == [
            "01-fedavg-r1", "01-fedavg-r2", "02-fedprox-r1", "02-fedprox-r2",
        ]  # fmt: skip
        assert {run.status for run in runs} == {"completed"}
        assert all((run.path / "report.html").is_file() for run in runs)
        seeds = {run.path.name: run.config.seeds.cohort for run in runs if run.config}
        assert seeds["01-fedavg-r1"] == seeds["02-fedprox-r1"] != seeds["01-fedavg-r2"]

    def test_is_a_new_one_below_the_root(self) -> None:
        """Without --out every study has a folder of its own, named after its runs."""
        for _ in range(2):
            assert study(write(rounds=1), *PAIR, "--root", "all") == 0
        names = [path.name for path in Path("all").iterdir()]
        assert len(set(names)) == 2
        assert all("-tiny" in name for name in names)

    def test_a_run_of_it_is_what_simulate_makes_of_the_same_settings(self) -> None:
        """The same code, the same bytes."""
        assert study(write(), *PAIR, "--out", "here") == 0
        words = ("--set", "strategy.name=fedprox", "--out", "alone", "--workers", "1", "--site", SITE)
        assert coterie("simulate", "tiny.toml", *words) == 0
        model = Path("here/runs/02-fedprox-r1/model.safetensors").read_bytes()
        assert model == Path("alone/model.safetensors").read_bytes()

    def test_its_command_makes_the_same_study(self, capsys: pytest.CaptureFixture[str]) -> None:
        """What the page says to type is what was typed, but for how it was carried out."""
        words = (*PAIR, "--repeats", "2", "--set", "rounds=1", "--target", "0.5", "--reseed-data")
        assert study(write(), *words, "--out", "here", "--json") == 0
        command = json.loads(capsys.readouterr().out)["command"]
        assert command == f"coterie study tiny.toml {' '.join(words)} --site {SITE}"


class TestOutput:
    def test_json_is_one_document(self, capsys: pytest.CaptureFixture[str]) -> None:
        """On stdout, with nothing on stderr, and the same as result.json."""
        assert study(write(), *PAIR, "--repeats", "2", "--out", "here", "--json") == 0
        out, err = capsys.readouterr()
        document = json.loads(out)
        assert err == ""
        assert document.pop("folder") == "here"
        assert [arm["label"] for arm in document["arms"]] == ["fedavg", "fedprox"]
        assert all(len(arm["accuracy"]["values"]) == 2 for arm in document["arms"])
        assert json.loads(Path("here/result.json").read_text()) == document

    def test_table_answers_in_words(self, capsys: pytest.CaptureFixture[str]) -> None:
        """A person reads the arms, what they say, and where the page is; no progress off-terminal."""
        assert study(write(), *PAIR, "--out", "here") == 0
        out, err = capsys.readouterr()
        assert all(word in out for word in ("fedavg", "fedprox", "accuracy", "one run", "here/report.html"))
        assert err == ""


class TestRefusals:
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("--vary", "strategy.nmae=a,b"), "did you mean `strategy.name`"),
            (("--vary", "rounds=5"), "one value is nothing to compare"),
            ((), "nothing is varied"),
            ((*PAIR, "--target", "80"), "a share between 0 and 1"),
            ((*PAIR, "--workers", "many"), "--workers many"),
            ((*PAIR, "--trace", "nowhere.jsonl"), "nowhere.jsonl"),
            (("--vary", "model.name=tiny,nonsense"), "arm `nonsense`"),
            (("--vary", "cohort.size=2,9"), "arm `size 9`"),
        ],
    )
    def test_come_before_any_folder_and_any_run(
        self, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """An arm that is not possible is named, and nothing was trained for the others."""
        assert study(write(), *words, "--out", "here") != 0
        err = capsys.readouterr().err
        assert message in err
        assert "hint: " in err
        assert not Path("here").exists()

    def test_a_folder_with_something_in_it_stays_as_it_is(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Another study's, or anything else's."""
        assert study(write(rounds=1), *PAIR, "--out", "here") == 0
        before = contents(Path("here"))
        assert study(write(rounds=1), *PAIR, "--out", "here") == 9
        assert "go on with --resume here" in capsys.readouterr().err
        assert contents(Path("here")) == before
        Path("other").mkdir()
        Path("other/letter.txt").write_text("dear")
        assert study(write(rounds=1), *PAIR, "--out", "other") == 9

    def test_resume_takes_a_study_as_it_was(self, capsys: pytest.CaptureFixture[str]) -> None:
        """No source, no settings, no repeats."""
        for words in (["tiny.toml"], ["--set", "rounds=9"], PAIR, ["--repeats", "3"], ["--out", "x"]):
            assert coterie("study", "--resume", "here", *words) == 3
        assert coterie("study", "--resume", "nowhere") == 9
        assert "is not a study" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("old", "new"), [('"format": 1', '"format": 7'), ('"runs/01', '"../../01'), ('"rounds": 2', '"rounds": 0')]
    )
    def test_a_damaged_plan_is_named(self, old: str, new: str, capsys: pytest.CaptureFixture[str]) -> None:
        """A later format, a folder elsewhere, a configuration that is none."""
        assert study(write(), *PAIR, "--out", "here") == 0
        plan = Path("here/study.json")
        assert old in plan.read_text()
        plan.write_text(plan.read_text().replace(old, new))
        assert coterie("study", "--resume", "here") == 9
        assert "study.json is damaged" in capsys.readouterr().err


class TestResume:
    def interrupt(self, monkeypatch: pytest.MonkeyPatch, *, after: int, error: BaseException) -> None:
        """End the study when so many rounds have been judged, over all its runs."""
        real, judged = Coordinator._judge, 0

        def judge(self: Coordinator, server_round: int) -> Any:
            nonlocal judged
            judged += 1
            if judged == after:
                monkeypatch.setattr(Coordinator, "_judge", real)
                raise error
            return real(self, server_round)

        monkeypatch.setattr(Coordinator, "_judge", judge)

    @pytest.mark.parametrize("after", [1, 2, 3, 4, 5])
    def test_goes_on_where_an_interruption_left_it(
        self, after: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """In the first run or a later one, at a round's middle: the same study as without; nothing done twice."""
        assert study(write(), *PAIR, "--out", "whole") == 0
        self.interrupt(monkeypatch, after=after, error=KeyboardInterrupt())
        capsys.readouterr()
        assert study(write(), *PAIR, "--out", "here") in {0, 130}
        told = capsys.readouterr().err
        assert after == 5 or "coterie study --resume here" in told
        done = {path: path.stat().st_mtime_ns for path in Path("here/runs").glob("*/result.json")}
        assert coterie("study", "--resume", "here", "--workers", "1") == 0
        assert all(path.stat().st_mtime_ns == time for path, time in done.items())
        for name in ("01-fedavg-r1", "02-fedprox-r1"):
            assert rows(Path(f"here/runs/{name}")) == [1, 2]
            one, other = (Path(f"{folder}/runs/{name}/model.safetensors").read_bytes() for folder in ("here", "whole"))
            assert one == other

    def test_needs_nothing_of_the_source_any_more(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What was planned is in the folder: the file may have changed, or be gone."""
        self.interrupt(monkeypatch, after=3, error=KeyboardInterrupt())
        assert study(write(), *PAIR, "--out", "here") == 130
        Path("tiny.toml").unlink()
        assert coterie("study", "--resume", "here", "--workers", "1") == 0
        assert RunFolder.open(Path("here/runs/02-fedprox-r1")).status == "completed"

    def test_a_complete_study_is_only_told_again(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Its runs stay as they are, to the byte, and its page too."""
        assert study(write(), *PAIR, "--out", "here") == 0
        before = contents(Path("here"))
        capsys.readouterr()
        assert coterie("study", "--resume", "here") == 0
        assert "fedprox" in capsys.readouterr().out
        assert contents(Path("here")) == before

    def test_a_run_that_fails_ends_the_study_and_is_named(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """What the others have done is kept."""
        self.interrupt(monkeypatch, after=3, error=RunError("the disk is full", hint="free some space"))
        assert study(write(), *PAIR, "--out", "here") == 9
        assert "arm `fedprox`: the disk is full" in capsys.readouterr().err
        assert RunFolder.open(Path("here/runs/01-fedavg-r1")).status == "completed"

    def test_a_killed_study_goes_on(self, tmp_path: Path) -> None:
        """`kill -9` in the middle of a run, as the installed command, and then --resume."""
        words = ["study", str(write(rounds=30)), *PAIR, "--site", str(SITE), "--workers", "1", "--out", "here"]
        with started(words, folder=tmp_path) as process:
            wait_until(lambda: len(rows(tmp_path / "here/runs/01-fedavg-r1")) > 2, process=process)
            process.kill()
            process.wait()
        assert coterie("study", "--resume", "here", "--workers", "1", "--quiet") == 0
        assert rows(Path("here/runs/02-fedprox-r1")) == list(range(1, 31))

    def test_two_processes_do_not_carry_out_one_study(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The second is refused while the first holds it."""
        real = carry._carry_out_run
        codes: list[int] = []

        def meanwhile(*arguments: Any) -> None:
            if not codes:
                codes.append(coterie("study", "--resume", "here"))
            real(*arguments)

        monkeypatch.setattr(carry, "_carry_out_run", meanwhile)
        assert study(write(), *PAIR, "--out", "here") == 0
        assert codes == [9]
        assert "being written by another process" in capsys.readouterr().err
