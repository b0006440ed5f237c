"""What tests of stacking share: small clients, and the same clients trained one after the other."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from client.trainer import train_plain, train_private, training_seed
from common.config import RunConfig
from common.config.settings import ModelSettings
from common.models.registry import initial_model
from common.privacy import make_plan
from common.privacy.bookkeeping import Bookkeeping
from common.schema import DataSchema, Examples
from common.site import Site
from simulations.stacking import Member, Stack

CPU = torch.device("cpu")
TABLE = DataSchema(kind="tabular", input_shape=(6,), num_classes=3)
IMAGES = DataSchema(kind="image", input_shape=(1, 12, 12), num_classes=3)
TEXT = DataSchema(kind="tokens", input_shape=(7,), num_classes=3, vocabulary_size=11)
NEXT = DataSchema(kind="tokens", input_shape=(7,), num_classes=11, vocabulary_size=11, per_position=True)
LARGEST = 1e6


def config_of(model="mlp", *, privacy=None, strategy=None, seeds=None, options=None, **training):
    """A run's configuration from training settings."""
    return RunConfig.model_validate(
        {
            "rounds": 5,
            "model": {"name": model, "options": options or {}},
            "training": {"batch_size": 4, **training},
            "privacy": privacy or {},
            "strategy": strategy or {},
            "seeds": seeds or {},
        }
    )


def private_config(model="mlp", *, clipping="flat", noise=0.5, rate=0.5, steps=3, norm=0.5, options=None, **training):
    """A configuration with privacy unit example."""
    privacy = {
        "unit": "example", "noise_multiplier": noise, "sampling_rate": rate, "expected_batch_size": 4,
        "clipping": clipping, "max_grad_norm": norm,
    }  # fmt: skip
    return config_of(model, privacy=privacy, options=options, local_steps=steps, **training)


def model_of(config, schema, *, seed=0):
    """The run's model with the weights of a seed."""
    return initial_model(
        ModelSettings(name=config.model.name, options=config.model.options), schema, seed=seed, site=Site()
    )


def examples_of(schema, count, *, seed):
    """A client's examples, with classes that can be learnt."""
    generator = torch.Generator().manual_seed(seed)
    if schema.kind == "tokens":
        shape = (count, *schema.input_shape)
        inputs = torch.randint(schema.vocabulary_size, shape, generator=generator)
        size = shape if schema.per_position else (count,)
        return Examples(inputs=inputs, targets=torch.randint(schema.num_classes, size, generator=generator))
    targets = torch.randint(schema.num_classes, (count,), generator=generator)
    noise = torch.randn((count, *schema.input_shape), generator=generator)
    return Examples(inputs=noise + targets.view(-1, *[1] * len(schema.input_shape)), targets=targets)


def maker(source):
    """What makes a source, from itself or from one that is always the same."""
    return source if callable(source) else lambda: source


def members_of(schema, counts, *, sources=None, steps=None):
    """One member for each count."""
    return [
        Member(
            name=f"client-{k}",
            examples=examples_of(schema, count, seed=k + 1),
            source=maker(sources[k]) if sources else None,
            steps=steps[k] if steps else None,
        )
        for k, count in enumerate(counts)
    ]


def weights_of(model):
    """The model's weights by name, as they come with a message: not to be written to."""
    arrays = {name: values.detach().numpy().copy() for name, values in model.state_dict().items()}
    for values in arrays.values():
        values.setflags(write=False)
    return arrays


def stacked(model, config, members, *, plan=None, mu=0.0, server_round=1, rate=0.1, largest=LARGEST):
    """What a stack makes of the members."""
    stack = Stack(copy.deepcopy(model), config, device=CPU)
    return stack.train(
        weights_of(model), members, server_round=server_round, rate=rate, plan=plan, proximal_mu=mu, largest=largest
    )


def alone(model, config, member, *, plan=None, source=None, mu=0.0, server_round=1, rate=0.1):
    """Weight, mean loss and trained weights of one member, trained as `client.app` does it."""
    model, settings = copy.deepcopy(model), config.training
    if member.steps is not None and plan is None:
        settings = settings.model_copy(update={"local_steps": steps_alone(config, member)})
    if plan is not None:
        torch.manual_seed(int(source.words(1)[0]) >> 1)
        steps = plan.local_steps if member.steps is None else min(plan.local_steps, member.steps)
        plan = plan_of(config, model, local_steps=steps)
        train_private(
            model, member.examples, settings, bookkeeping=Bookkeeping(model), plan=plan, learning_rate=rate,
            source=source, proximal_mu=mu,
        )  # fmt: skip
        return 1.0, 0.0, weights_of(model)
    torch.manual_seed(training_seed(config.seeds.training, server_round, member.name))
    loss = train_plain(model, member.examples, settings, learning_rate=rate, proximal_mu=mu)
    weight = float(len(member.examples)) if config.strategy.weighting == "examples" else 1.0
    return weight, loss, weights_of(model)


def steps_alone(config, member):
    """Steps of one member."""
    settings, count = config.training, len(member.examples)
    return min(member.steps, settings.local_steps or settings.local_epochs * -(-count // settings.batch_size))


def plan_of(config, model, *, local_steps=None):
    """The plan of a private configuration."""
    if local_steps is not None:
        training = config.training.model_copy(update={"local_steps": local_steps})
        config = config.model_copy(update={"training": training})
    return make_plan(config, dimensions=sum(p.numel() for p in model.parameters()), participations=config.rounds)


def assert_same(folded, results, *, relative=1e-5):
    """The sums are those of weights, losses and trained weights of members that trained alone."""
    weight = sum(result[0] for result in results)
    assert folded.weight == weight
    assert folded.loss == pytest.approx(sum(w * loss for w, loss, _ in results), rel=relative, abs=1e-12)
    assert list(folded.sums) == list(results[0][2])
    for name, total in folded.sums.items():
        expected = sum(w * arrays[name].astype(np.float64) for w, _, arrays in results)
        assert total.dtype == np.float64
        assert total.shape == expected.shape
        distance, length = np.linalg.norm(total - expected), np.linalg.norm(expected)
        assert distance <= relative * length, f"{name}: {distance / length:.1e}"
