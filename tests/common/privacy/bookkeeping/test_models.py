"""Every built-in model has exact gradients, unchanged names and unchanged predictions."""

import pytest
import torch

from common.config import ModelSettings
from common.models import check_private, initial_model
from common.privacy.bookkeeping import Bookkeeping
from common.schema import DataSchema
from common.site import Site
from tests.common.privacy.bookkeeping.helpers import assert_exact, loss_of, taped

IMAGE = DataSchema(kind="image", input_shape=(2, 12, 12), num_classes=3)
TABULAR = DataSchema(kind="tabular", input_shape=(6,), num_classes=2)
TEXT = DataSchema(kind="tokens", input_shape=(7,), num_classes=3, vocabulary_size=11)
NEXT = DataSchema(kind="tokens", input_shape=(7,), num_classes=11, vocabulary_size=11, per_position=True)
CASES = [
    pytest.param(name, schema, options, id=f"{name}-{schema.kind}-{'next' if schema.per_position else 'class'}")
    for name, schema, options in (
        ("cnn", IMAGE, {"hidden": 5}),
        ("resnet", IMAGE, {"width": 4, "blocks": 1}),
        ("inception", IMAGE, {"width": 4}),
        ("linear", TABULAR, {}),
        ("mlp", IMAGE, {"layers": 2}),
        ("lstm", NEXT, {"embedding": 5, "hidden": 6}),
        ("lstm", TEXT, {"embedding": 5, "hidden": 6, "layers": 2, "bidirectional": True}),
        ("transformer", NEXT, {"width": 8, "heads": 2}),
        ("transformer", TEXT, {"width": 8, "heads": 2, "checkpointing": True}),
    )
]
EVERY = pytest.mark.parametrize(("name", "schema", "options"), CASES)


def make(name, schema, options):
    return initial_model(ModelSettings(name=name, options=options), schema, seed=0, site=Site())


def draw(schema, n):
    generator = torch.Generator().manual_seed(n)
    if schema.kind == "tokens":
        return torch.randint(schema.vocabulary_size, (n, *schema.input_shape), generator=generator)
    return torch.randn(n, *schema.input_shape, generator=generator)


@EVERY
@pytest.mark.parametrize("n", [1, 4])
def test_every_built_in_model_has_exact_gradients(name, schema, options, n):
    """All parameters of all seven models, for batches of one and of several."""
    model = make(name, schema, options)
    check_private(model)
    assert_exact(model, draw(schema, n), relative=3e-5)  # deep models: float32 itself is no nearer to float64


@EVERY
def test_an_empty_batch_has_gradients_without_rows(name, schema, options):
    """Poisson sampling draws empty batches; the step is taken all the same, with noise only."""
    model = make(name, schema, options)
    gradients = taped(Bookkeeping(model), draw(schema, 0))
    sums = gradients.weighted_sums(torch.zeros(0, dtype=torch.float64))
    assert [total.shape for total in sums] == [p.shape for p in model.parameters()]
    assert not any(total.any() for total in sums)


@EVERY
def test_privacy_changes_neither_names_nor_predictions(name, schema, options):
    """Watched and afterwards the model's state and logits are those of a model that never was."""
    model, inputs = make(name, schema, options), draw(schema, 3)
    state, logits = {k: v.clone() for k, v in model.state_dict().items()}, model(inputs)
    bookkeeping = Bookkeeping(model)
    for _ in range(2):
        found = model.state_dict()
        assert list(found) == list(state)
        assert all(torch.equal(found[k], state[k]) for k in state)
        torch.testing.assert_close(model(inputs), logits)
        bookkeeping.detach()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@EVERY
def test_a_device_gives_the_same_sums(name, schema, options, precision):
    """On CUDA, with TF32 allowed elsewhere and with or without autocast, sums and norms are those of the CPU."""
    model, inputs = make(name, schema, options), draw(schema, 4)
    factors = torch.tensor([1.0, 0.0, 0.5, 0.25], dtype=torch.float64)
    results = []
    torch.backends.cudnn.allow_tf32 = False  # of the forward pass
    for device in ("cpu", "cuda"):

        def loss(model, x, device=device):
            with torch.autocast(device, dtype=precision or torch.bfloat16, enabled=precision is not None):
                total = loss_of(model, x)
            return total.float()

        gradients = taped(Bookkeeping(own := make(name, schema, options).to(device)), inputs.to(device), loss)
        assert next(own.parameters()).device.type == device
        results.append((gradients.squared_norms, gradients.weighted_sums(factors.to(device))))
    (norms, sums), (norms_there, sums_there) = results
    within = 1e-3 if precision is None else 0.2
    assert ((norms_there.cpu().sqrt() - norms.sqrt()).norm() <= within * norms.sqrt().norm()).all()
    for here, there in zip(sums, sums_there, strict=True):
        assert there.device.type == "cuda"
        assert (here - there.cpu()).norm() <= within * here.norm() + 1e-9
    del model
