"""A trained model as a file that runs without Coterie."""

import json
import sys
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from common.config import ModelSettings
from common.errors import ModelError
from common.models import EXPORT_FORMATS, export_model, initial_model
from common.site import Site

CASES = [
    ("cnn", "image", {"dropout": 0.5}),
    ("mlp", "tabular", {}),
    ("lstm", "next_token", {}),
    ("transformer", "text", {"checkpointing": True, "dropout": 0.5}),
]


def make(name, schema, **options):
    return initial_model(ModelSettings(name=name, options=options), schema, seed=0, site=Site())


def draw(schema, n):
    if schema.kind == "tokens":
        return torch.randint(schema.vocabulary_size, (n, *schema.input_shape))
    return torch.randn(n, *schema.input_shape)


def predict(model, inputs):
    with torch.no_grad():
        return model.eval()(inputs)


@pytest.mark.parametrize(("name", "kind", "options"), CASES)
def test_onnx_predicts_the_same(tmp_path, name, kind, options, request):
    """An independent evaluator finds the model's logits, for one example and for several."""
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    schema = request.getfixturevalue(kind)
    model = make(name, schema, **options)
    path = export_model(model, schema, tmp_path / "model.onnx", to="onnx")
    program = onnx.load(path)
    onnx.checker.check_model(program)
    for n in (1, 5):
        inputs = draw(schema, n)
        (logits,) = ReferenceEvaluator(program).run(["logits"], {"inputs": inputs.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), predict(model, inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "kind", "options"), CASES)
def test_a_torch_program_predicts_the_same(tmp_path, name, kind, options, request):
    """`torch.export.load` runs it for any number of examples."""
    schema = request.getfixturevalue(kind)
    model = make(name, schema, **options)
    program = torch.export.load(export_model(model, schema, tmp_path / "model.pt2", to="torch")).module()
    for n in (1, 5):
        inputs = draw(schema, n)
        torch.testing.assert_close(program(inputs), predict(model, inputs))


def test_safetensors_hold_the_weights_and_the_schema(tmp_path, image):
    """Every tensor under its name, and in the metadata what the inputs look like."""
    model = make("cnn", image)
    path = export_model(model, image, tmp_path / "model.safetensors", to="safetensors")
    weights = load_file(path)
    assert all(torch.equal(weights.pop(k), v) for k, v in model.state_dict().items())
    assert weights == {}
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["schema"])["input_shape"] == [1, 12, 14]


@pytest.mark.parametrize("to", EXPORT_FORMATS)
def test_export_leaves_the_model_as_it_was(tmp_path, next_token, to):
    """Training goes on afterwards: the same modes, the same parameters, still connected to what the layers compute."""
    model = make("lstm", next_token)
    model.dropout.eval()
    modes, inputs = [layer.training for layer in model.modules()], draw(next_token, 2)
    before = model(inputs)
    export_model(model, next_token, tmp_path / "model.pt2", to=to)
    assert [layer.training for layer in model.modules()] == modes
    assert torch.equal(model(inputs), before)
    with torch.no_grad():
        model.lstm.weight_ih_l0.add_(1.0)
    assert not torch.equal(model(inputs), before)


def test_a_missing_package_is_named(tmp_path, tabular, monkeypatch):
    """ONNX is an extra; the hint is the command that installs it."""
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ModelError, match="packages that are missing") as caught:
        export_model(make("mlp", tabular), tabular, tmp_path / "model.onnx", to="onnx")
    assert caught.value.hint == "pip install 'coterie[export]'"


def test_places_and_formats_that_cannot_be_written_are_refused(tmp_path, tabular):
    """An unknown format, a missing folder, a folder in the file's place, a `torch` file with another ending."""
    model = make("mlp", tabular)
    with pytest.raises(ModelError, match="no export format `pickle`"):
        export_model(model, tabular, tmp_path / "model.pkl", to="pickle")
    with pytest.raises(ModelError, match="folder does not exist"):
        export_model(model, tabular, tmp_path / "absent" / "model.pt2", to="torch")
    with pytest.raises(ModelError, match=r"does not end in \.pt2"):
        export_model(model, tabular, tmp_path / "model.bin", to="torch")
    (tmp_path / "taken.safetensors").mkdir()
    with pytest.raises(ModelError):
        export_model(model, tabular, tmp_path / "taken.safetensors", to="safetensors")


def test_a_model_that_cannot_be_traced_is_refused(tmp_path, tabular):
    """A branch on the data has no graph; the weights can still be written."""

    class Branching(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    model = Branching(6, 2)
    with pytest.raises(ModelError, match="cannot be exported to torch") as caught:
        export_model(model, tabular, tmp_path / "model.pt2", to="torch")
    assert "safetensors" in caught.value.hint


def test_a_models_own_warnings_are_not_swallowed(tmp_path, tabular):
    """Only what the exporters say of themselves is silenced."""

    class Warning_(torch.nn.Linear):  # noqa: N801
        def forward(self, x):
            warnings.warn("mine", UserWarning, stacklevel=1)
            return super().forward(x)

    with pytest.warns(UserWarning, match="mine"):
        export_model(Warning_(6, 2), tabular, tmp_path / "model.pt2", to="torch")
