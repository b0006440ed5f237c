"""`coterie runs`, `predict` and `export`, as a user types them."""

import csv
import io
import json
import os

import pytest
import torch
import typer
from safetensors.numpy import save
from typer.testing import CliRunner

from common.config.load import parse_config
from common.data import LoadedExamples
from common.errors import CoterieError, ModelError, RunError
from common.models import initial_model
from common.models.weights import ModelWeights
from common.schema import DataSchema, Examples
from common.site import Site
from server.cli import _csv, _predict, export, find_run, predict, runs
from server.store import RunFolder

SITE = """
[data.icu]
source = "csv:icu.csv"
label = "outcome"
features = ["age", "pulse"]
classes = ["well", "ill"]
"""
SCHEMA = DataSchema(
    kind="tabular", input_shape=(2,), num_classes=2, class_names=("well", "ill"), feature_names=("age", "pulse")
)


def run_command(function, *arguments):
    """The result of a sub-command, mounted as `common.cli` does it."""
    app = typer.Typer(add_completion=False)
    app.command(function.__name__)(function)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeed(function, *arguments):
    result = run_command(function, *arguments)
    assert result.exit_code == 0, result.output
    return result


def refuse(error, function, *arguments):
    """The error that the root command would print; nothing was printed before."""
    result = run_command(function, *arguments)
    assert isinstance(result.exception, error)
    assert isinstance(result.exception, CoterieError)
    assert result.exception.hint
    assert not result.stdout
    return str(result.exception)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a registry and one finished run of a linear model that calls everybody above 50 ill."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "site.toml").write_text(SITE)
    (tmp_path / "icu.csv").write_text("age,pulse,outcome\n40,70,well\n60,90,ill\n")
    make_run("first", weight=1.0)
    return tmp_path


def make_run(name, *, weight=None, result=None, **changes):
    config = parse_config(
        json.dumps({"name": name, "model": {"name": "linear"}, "data": {"name": "icu", "partition": "iid"}, **changes})
    )
    with RunFolder.create(config, path=None) as folder:
        if weight is not None:
            folder.append_round({"server_round": 1, "accuracy": 0.75})
            folder.write_result({"accuracy": 0.75, **(result or {})})
            model = initial_model(config.model, SCHEMA, seed=0, site=Site())
            weights = [torch.tensor([[0.0, 0.0], [weight, 0.0]]), torch.tensor([0.0, -50.0 * weight])]
            with torch.no_grad():
                for parameter, value in zip(model.parameters(), weights, strict=True):
                    parameter.copy_(value)
            (folder.path / "model.safetensors").write_bytes(save(ModelWeights(model).copy()))
    os.utime(folder.path / "run.toml", (1_700_000_000 + len(name), 1_700_000_000 + len(name)))
    return folder.path


def patients(folder, *lines, header="age,pulse"):
    path = folder / "new.csv"
    path.write_text("\n".join([header, *lines]) + "\n")
    return f"csv:{path}"


def table(text):
    return list(csv.DictReader(io.StringIO(text)))


class TestRuns:
    def test_lists_what_is_known_of_each_run_newest_first(self, place):
        """The list shows finished, private and broken runs, and a warning for what cannot be read."""
        privacy = {"unit": "example", "target_epsilon": 3.0}
        make_run("private-one", weight=1.0, privacy=privacy, training={"local_steps": 1},
                 result={"privacy": {"epsilon": {"a": 2.971, "b": 1.0}}})  # fmt: skip
        (make_run("a-much-longer-name") / "run.toml").write_text("rounds = 0")
        result = succeed(runs)
        lines = result.stdout.splitlines()
        assert " ".join(lines[0].split()) == "name folder status model data rounds accuracy epsilon started (UTC)"
        assert [line.split()[1].rsplit("Z-", 1)[-1] for line in lines[1:]] == [
            "a-much-longer-name", "private-one", "first",
        ]  # fmt: skip
        assert "2.98" in lines[2]
        assert all(word in lines[3] for word in ("completed", "linear", "icu", "75.0 %", "none", "2023-11-14"))
        assert "warning: " in result.stderr

    def test_json_is_one_document(self, place):
        """With --json the list is one document, with null where nothing is known."""
        make_run("unfinished")
        document = json.loads(succeed(runs, "--json").stdout)
        assert [(r["name"], r["status"], r["accuracy"]) for r in document["runs"]] == [
            ("unfinished", "failed", None), ("first", "completed", 0.75),
        ]  # fmt: skip

    def test_epsilon_without_bound_is_not_shown_as_the_others(self, place):
        """A client whose epsilon is null leaves the run's epsilon unknown."""
        make_run("unbounded", weight=1.0, result={"privacy": {"epsilon": {"a": 2.0, "b": None}}})
        assert json.loads(succeed(runs, "--json").stdout)["runs"][0]["epsilon"] is None

    @pytest.mark.parametrize("wrong", [{"accuracy": "x"}, {"privacy": {"epsilon": [1]}}, {"privacy": 3}])
    def test_one_damaged_result_leaves_the_others_listed(self, place, wrong):
        """What cannot be read of it is told as a warning."""
        make_run("damaged", weight=1.0, result=wrong)
        result = succeed(runs)
        assert "75.0 %" in result.stdout
        assert "is damaged" in result.stderr

    def test_a_configuration_nested_without_end_is_only_damaged(self, place):
        """It is listed with a warning, as any file that is no TOML."""
        (make_run("deep") / "run.toml").write_text("a = " + "[" * 100_000)
        assert "warning: " in succeed(runs).stderr

    def test_empty_folder_is_no_error(self, tmp_path):
        """Without runs there is a hint on stderr and nothing on stdout, or an empty list as JSON."""
        result = succeed(runs, "--root", tmp_path)
        assert result.stdout == ""
        assert "coterie simulate" in result.stderr
        assert json.loads(succeed(runs, "--root", tmp_path, "--json").stdout)["runs"] == []


class TestFindRun:
    def test_run_is_found_by_path_name_or_age(self, place):
        """A run is named by its folder, its name below the root, or as the latest."""
        path = next((place / "runs").iterdir())
        newer = make_run("second")
        root = place / "runs"
        assert find_run(str(path), place).path == path
        assert find_run(path.name, root).path == path
        assert find_run("latest", root).path.name == newer.name

    def test_unknown_run_is_refused_with_the_nearest_name(self, place):
        """A name that is nearly right is answered with the right one."""
        name = next((place / "runs").iterdir()).name
        with pytest.raises(RunError, match="there is no run") as caught:
            find_run(name[:-1], place / "runs")
        assert name in caught.value.hint
        with pytest.raises(RunError, match="there are no runs"):
            find_run("latest", place / "nowhere")


class TestPredict:
    def test_prints_a_line_for_each_row(self, place):
        """Without labels each row gets its class, the class's name and its probability."""
        result = succeed(predict, "latest", "--data", patients(place, "30,70", "52,80"), "--site", "site.toml")
        rows = table(result.stdout)
        assert [(row["class"], row["class_name"], row["label"]) for row in rows] == [
            ("0", "well", ""),
            ("1", "ill", ""),
        ]
        assert float(rows[1]["probability"]) == pytest.approx(1 / (1 + torch.tensor(-2.0).exp().item()), abs=1e-6)
        assert result.stderr == ""

    def test_labels_give_the_accuracy(self, place):
        """With labels the accuracy is told, beside the results on stderr."""
        data = patients(place, "30,70,well", "60,80,well", "60,80,", header="age,pulse,outcome")
        result = succeed(predict, "latest", "--data", data, "--site", "site.toml")
        assert [row["label"] for row in table(result.stdout)] == ["0", "0", ""]
        assert "accuracy: 50.0 % of 2 labelled predictions" in result.stderr

    def test_registered_data_can_be_predicted_on(self, place):
        """The name of a registered data set stands for its file."""
        rows = table(succeed(predict, "latest", "--data", "icu", "--site", "site.toml").stdout)
        assert [row["class_name"] for row in rows] == ["well", "ill"]

    def test_out_takes_the_lines_and_is_not_replaced_unasked(self, place):
        """--out writes the same lines to a file, which is replaced with --force only."""
        arguments = ("latest", "--data", patients(place, "30,70"), "--site", "site.toml", "--out", "p.csv")
        assert "1 predictions are in p.csv" in succeed(predict, *arguments).stdout
        written = (place / "p.csv").read_text()
        assert len(table(written)) == 1
        assert "exists already" in refuse(RunError, predict, *arguments)
        succeed(predict, *arguments, "--force")
        assert "cannot be written" in refuse(RunError, predict, *arguments[:-1], "no/such/folder.csv")

    def test_json_is_one_document(self, place):
        """With --json the predictions, or the file that holds them, are part of one document."""
        data = patients(place, "30,70,well", header="age,pulse,outcome")
        arguments = ("latest", "--data", data, "--site", "site.toml", "--json")
        document = json.loads(succeed(predict, *arguments).stdout)
        assert (document["rows"], document["labelled"], document["accuracy"]) == (1, 1, 1.0)
        assert document["predictions"][0]["class_name"] == "well"
        document = json.loads(succeed(predict, *arguments, "--out", "p.csv").stdout)
        assert document["out"] == "p.csv"
        assert "predictions" not in document

    def test_next_token_data_has_a_line_for_each_position(self):
        """Where every position has a target, row and position together say what was predicted."""
        schema = DataSchema(
            kind="tokens",
            input_shape=(3,),
            num_classes=4,
            vocabulary_size=4,
            per_position=True,
            class_names=tuple("abcd"),
        )
        tokens = torch.tensor([[0, 1, 2], [3, 3, 3]])
        examples = Examples(inputs=tokens, targets=torch.tensor([[1, 2, 3], [0, -1, 0]]))
        model = torch.nn.Embedding.from_pretrained(torch.eye(4).roll(1, dims=1) * 9)  # says: the next letter
        rows = _predict(model.requires_grad_(), LoadedExamples(schema, examples, ["x", "y"]), batch_size=1)
        assert [(row["row"], row["position"], row["class_name"], row["label"]) for row in rows] == [
            ("x", 0, "b", 1), ("x", 1, "c", 2), ("x", 2, "d", 3),
            ("y", 0, "a", 0), ("y", 1, "a", None), ("y", 2, "a", 0),
        ]  # fmt: skip
        assert _csv(rows, per_position=True).startswith("row,position,class,class_name,probability,label\nx,0,1,b,")

    def test_run_without_a_usable_model_is_refused(self, place):
        """A run that has no model, a damaged one or another run's is refused with the reason."""
        path = find_run("latest", place / "runs").path
        arguments = ("latest", "--data", patients(place, "30,70"), "--site", "site.toml")
        (path / "model.safetensors").write_bytes(save({"other": torch.zeros(1).numpy()}))
        assert "another model" in refuse(ModelError, predict, *arguments)
        (path / "model.safetensors").write_bytes(b"\xff" * 20)
        assert "cannot be read" in refuse(RunError, predict, *arguments)
        (path / "model.safetensors").unlink()
        assert "has no model: the run is completed" in refuse(RunError, predict, *arguments)

    def test_unregistered_data_is_refused(self, place):
        """Without the registry a run on the site's own data cannot be used."""
        assert "icu" in refuse(CoterieError, predict, "latest", "--data", patients(place, "30,70"))


class TestExport:
    @pytest.mark.parametrize(("to", "name"), [("torch", "model.pt2"), ("safetensors", "model-with-schema.safetensors")])
    def test_writes_into_the_runs_folder(self, place, to, name):
        """An export lies in the run's folder under a name that leaves the run's own model alone."""
        path = find_run("latest", place / "runs").path
        own = (path / "model.safetensors").read_bytes()
        document = json.loads(succeed(export, "latest", "--to", to, "--site", "site.toml", "--json").stdout)
        assert document["out"].endswith(name)
        assert (path / name).stat().st_size == document["bytes"] > 0
        assert (path / "model.safetensors").read_bytes() == own

    def test_exported_program_predicts_alike(self, place):
        """The torch program gives the logits of the run's model, without Coterie's code."""
        succeed(export, "latest", "--to", "torch", "--site", "site.toml", "--out", "m.pt2")
        logits = torch.export.load("m.pt2").module()(torch.tensor([[52.0, 1.0], [30.0, 1.0], [50.0, 0.0]]))
        assert (logits[:, 1] - logits[:, 0]).tolist() == pytest.approx([2.0, -20.0, 0.0])

    def test_nothing_is_replaced_unasked(self, place):
        """An existing file is replaced with --force only, the run's own model never."""
        arguments = ("latest", "--to", "safetensors", "--site", "site.toml")
        assert "the model is in" in succeed(export, *arguments).stdout
        assert "exists already" in refuse(RunError, export, *arguments)
        succeed(export, *arguments, "--force")
        own = find_run("latest", place / "runs").path / "model.safetensors"
        assert "own model" in refuse(RunError, export, *arguments, "--force", "--out", own)

    def test_unknown_format_is_a_mistake_on_the_command_line(self, place):
        """A format that does not exist exits with 2 and names those that do."""
        result = run_command(export, "latest", "--to", "pickle")
        assert result.exit_code == 2
        assert "safetensors" in result.stderr
