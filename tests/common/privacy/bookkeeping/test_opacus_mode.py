"""Opacus's engine, with book-keeping for its per-example gradients."""

import copy

import pytest
import torch
from opacus import PrivacyEngine
from opacus.grad_sample import GradSampleModule
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from common.errors import PrivacyError
from common.privacy.bookkeeping.opacus_mode import BookkeepingModule, BookkeepingOptimizer, register_mode

X = torch.randn(24, 4, generator=torch.Generator().manual_seed(2))
Y = torch.arange(24) % 3

pytestmark = [
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:Optimal order is the"),
]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))


def private(mode, *, noise=0.0, clipping="flat", sampling=False, **options):
    register_mode()
    model = net()
    return PrivacyEngine(accountant="rdp").make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
        data_loader=DataLoader(TensorDataset(X, Y), batch_size=8),
        noise_multiplier=noise,
        max_grad_norm=0.05,
        poisson_sampling=sampling,
        clipping=clipping,
        grad_sample_mode=mode,
        noise_generator=torch.Generator().manual_seed(5),
        **options,
    )


def trained(mode, *, reduction="mean", memory=None, **options):
    """Parameters after one epoch, and the engine's parts."""
    model, optimizer, loader = private(mode, loss_reduction=reduction, **options)
    criterion = nn.CrossEntropyLoss(reduction=reduction)

    def epoch(batches):
        for x, y in batches:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()

    if memory:
        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=memory, optimizer=optimizer) as parts:
            epoch(parts)
    else:
        epoch(loader)
    return [p.detach().clone() for p in model.parameters()], model, optimizer


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_training_equals_opacus_hooks(noise, reduction):
    """With the same batches, clipping and noise generator every parameter ends where Opacus's own mode ends."""
    mine, model, optimizer = trained("bookkeeping", noise=noise, reduction=reduction)
    opacus, _, _ = trained("hooks", noise=noise, reduction=reduction)
    assert isinstance(model, BookkeepingModule)
    assert isinstance(optimizer, BookkeepingOptimizer)
    for a, b, start in zip(mine, opacus, net().parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert not torch.equal(a, start)


def test_physical_batches_add_up():
    """Opacus's memory manager splits a batch, and the step is that of the whole."""
    whole, _, _ = trained("bookkeeping")
    parts, _, _ = trained("bookkeeping", memory=3)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_poisson_batches_may_be_empty():
    """The step is taken with noise only."""
    model, optimizer, _ = private("bookkeeping", noise=1.0, sampling=True)
    before = [p.detach().clone() for p in model.parameters()]
    nn.CrossEntropyLoss(reduction="sum")(model(X[:0]), Y[:0]).backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_gradient_that_is_not_finite_contributes_nothing():
    """In Opacus's own modes it makes every parameter NaN."""
    model, optimizer, _ = private("bookkeeping")
    x = X[:8].clone()
    x[3] = float("nan")
    nn.CrossEntropyLoss()(model(x), Y[:8]).backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_wrapped_model_can_be_had_back():
    """Opacus's own way out leaves no trace on the model."""
    model, _, _ = private("bookkeeping")
    bare = model.to_standard_module()
    assert not any(vars(layer).get("forward") for layer in bare.modules())
    assert not any(hasattr(p, "grad_sample") for p in bare.parameters())
    copy.deepcopy(bare)(X)


def test_other_modes_stay_opacus_own():
    """Registering, once or again, changes no other mode."""
    register_mode()
    model, optimizer, _ = private("hooks")
    assert type(model) is GradSampleModule
    assert not isinstance(optimizer, BookkeepingOptimizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"clipping": "per_layer"}, "clips flat"), ({"batch_first": False}, "must be the first dimension")],
)
def test_what_the_mode_cannot_do_is_refused(options, message):
    """Clipping per layer, and batches in the second dimension."""
    with pytest.raises(PrivacyError, match=message) as caught:
        private("bookkeeping", **options)
    assert caught.value.hint


def test_optimizers_of_other_parameters_are_refused():
    """Clipping by a part of the gradient would not bound the whole."""
    register_mode()
    model = net()
    wrapped = BookkeepingModule(model, loss_reduction="sum")
    optimizer = BookkeepingOptimizer(
        torch.optim.SGD(list(model.parameters())[:2], lr=0.1), noise_multiplier=0.0, max_grad_norm=1.0,
        expected_batch_size=8,
    )  # fmt: skip
    wrapped(X).sum().backward()
    with pytest.raises(PrivacyError, match="not those of one book-kept model"):
        optimizer.step()
