"""Local training on real digits, plain and private."""

import copy
from dataclasses import replace

import pytest
import torch
from scipy import stats
from torch import nn

from client.trainer import example_losses, learning_rate_at, mean_loss, train_plain, train_private
from common.config import TrainingSettings
from common.errors import PrivacyError
from common.privacy import SecureNoise
from common.privacy.bookkeeping import Bookkeeping
from common.schema import Examples
from tests.helpers.noise import Silence
from tests.helpers.plans import example_plan


class Watched(nn.Module):
    """A linear model that remembers its inputs batch by batch, and keeps a statistic of them as batch norm does."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 10)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.seen = []
        self.register_buffer("mean", torch.zeros(64))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x):
        self.seen.append(x.detach().clone())
        with torch.no_grad():
            self.mean.add_(x.mean(0))
            self.frozen.add_(x.mean())
        return self.linear(x)


def plan(**fields):
    values = {"noise_multiplier": 1.0, "sampling_rate": 0.2, "local_steps": 3, "denominator": 40, "dimensions": 650}
    return example_plan(**values | fields)


def train(model, examples, settings=None, *, source=None, chosen=None, learning_rate=0.1, **more):
    """A private round of a model, as the app runs it."""
    bookkeeping = Bookkeeping(model)
    try:
        return train_private(
            model,
            examples,
            settings or TrainingSettings(),
            bookkeeping=bookkeeping,
            plan=chosen or plan(),
            learning_rate=learning_rate,
            source=source or SecureNoise(),
            **more,
        )
    finally:
        bookkeeping.detach()


def accuracy(model, examples):
    with torch.no_grad():
        return (model(examples.inputs).argmax(1) == examples.targets).double().mean().item()


@pytest.fixture
def few(digits):
    return digits.take(torch.arange(50))


class TestPlain:
    """Without privacy."""

    def test_it_learns_digits(self, digits):
        """A linear model of 1500 digits knows most of the other 297."""
        torch.manual_seed(0)
        model = Watched()
        settings = TrainingSettings(local_epochs=5, batch_size=32)
        first = train_plain(model, digits.take(torch.arange(1500)), settings, learning_rate=0.5)
        last = train_plain(model, digits.take(torch.arange(1500)), settings, learning_rate=0.5)
        assert last < first
        assert accuracy(model, digits.take(torch.arange(1500, 1797))) > 0.85

    def test_the_loss_is_the_mean_over_steps(self, few):
        """Each step counts once, before it moves the weights: log 10 for a model that knows nothing."""
        settings = TrainingSettings(local_steps=1, batch_size=50)
        assert train_plain(Watched(), few, settings, learning_rate=0.1) == pytest.approx(torch.tensor(10).log().item())

    @pytest.mark.parametrize(
        ("fields", "sizes"),
        [
            ({"local_epochs": 1}, [20, 20, 10]),
            ({"local_epochs": 2}, [20, 20, 10, 20, 20, 10]),
            ({"local_steps": 2}, [20, 20]),
            ({"local_steps": 5}, [20, 20, 10, 20, 20]),
            ({"local_steps": 1, "local_epochs": 9}, [20]),
        ],
        ids=str,
    )
    def test_epochs_or_a_fixed_number_of_steps(self, few, fields, sizes):
        """A fixed number wins, and goes round as often as needed."""
        model = Watched()
        train_plain(model, few, TrainingSettings(batch_size=20, **fields), learning_rate=0.1)
        assert [len(batch) for batch in model.seen] == sizes

    @pytest.mark.parametrize(("most", "steps"), [(None, 6), (1, 1), (4, 4), (6, 6), (9, 6)])
    def test_it_ends_after_the_most_steps_there_is_time_for(self, few, most, steps):
        """The first ones of the round, to the bit: what is left out changes nothing before it."""
        whole, part = Watched(), Watched()
        settings = TrainingSettings(batch_size=20, local_epochs=2)
        for model, limit in ((whole, None), (part, most)):
            torch.manual_seed(3)
            train_plain(model, few, settings, learning_rate=0.1, most_steps=limit)
        assert len(part.seen) == steps
        assert all(map(torch.equal, part.seen, whole.seen))

    @pytest.mark.parametrize("shuffle", [True, False])
    def test_a_model_that_writes_into_its_input_leaves_the_data_alone(self, few, shuffle):
        """Every batch is a copy."""
        before = few.inputs.clone()

        class Writing(Watched):
            def forward(self, x):
                return super().forward(x.mul_(0))

        settings = TrainingSettings(batch_size=20, local_epochs=2, shuffle=shuffle)
        train_plain(Writing(), few, settings, learning_rate=0.1)
        assert torch.equal(few.inputs, before)

    def test_without_shuffling_the_order_is_the_data_s(self, few):
        """In every epoch."""
        model = Watched()
        train_plain(model, few, TrainingSettings(batch_size=20, local_epochs=2, shuffle=False), learning_rate=0.1)
        assert torch.equal(torch.cat(model.seen), torch.cat([few.inputs, few.inputs]))

    def test_shuffling_visits_everything_once_in_a_new_order_every_epoch(self, few):
        """All rows, each epoch otherwise."""
        model = Watched()
        train_plain(model, few, TrainingSettings(batch_size=20, local_epochs=2), learning_rate=0.1)
        one, two = torch.cat(model.seen).split(50)
        assert not torch.equal(one, two)
        for epoch in (one, two):
            assert sorted(epoch.tolist()) == sorted(few.inputs.tolist())

    @pytest.mark.parametrize("most", [1, 7, 25])
    def test_accumulation_equals_one_big_batch(self, few, most):
        """What does not fit in memory is summed to the same step and the same loss."""
        results = []
        for size in (256, most):
            model = Watched()
            settings = TrainingSettings(
                local_steps=3, batch_size=50, max_physical_batch=size, shuffle=False, momentum=0.9
            )
            results.append((train_plain(model, few, settings, learning_rate=0.1), model.linear.weight.detach()))
        assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
        torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("fields", [{"momentum": 0.9}, {"weight_decay": 0.1}, {"optimizer": "adamw"}, {}], ids=str)
    def test_no_state_survives_a_round(self, few, fields):
        """From the same weights the second round does what the first did."""
        model = Watched()
        start = copy.deepcopy(model.state_dict())
        settings = TrainingSettings(local_steps=3, shuffle=False, **fields)
        rounds = []
        for _ in range(2):
            model.load_state_dict(start)
            train_plain(model, few, settings, learning_rate=0.1)
            rounds.append(model.linear.weight.detach().clone())
        assert torch.equal(*rounds)

    @pytest.mark.parametrize("fields", [{"weight_decay": 0.1}, {"momentum": 0.5}])
    def test_the_short_way_without_an_optimizer_is_sgd(self, few, fields):
        """With nothing set it does what torch's SGD does; momentum and decay do something else."""
        found, expected, other = Watched(), Watched(), Watched()
        settings = TrainingSettings(local_steps=3, shuffle=False)
        train_plain(found, few, settings, learning_rate=0.1)
        train_plain(other, few, settings.model_copy(update=fields), learning_rate=0.1)
        sgd = torch.optim.SGD([expected.linear.weight, expected.linear.bias], lr=0.1)
        for begin in (0, 32, 0):
            sgd.zero_grad()
            part = slice(begin, begin + 32)
            mean_loss(expected(few.inputs[part]), few.targets[part]).backward()
            sgd.step()
        torch.testing.assert_close(found.linear.weight, expected.linear.weight)
        assert not torch.allclose(found.linear.weight, other.linear.weight)

    def test_the_proximal_term_pulls_towards_the_start(self, few):
        """After one step there is nothing to pull; the second differs by rate times mu times the first."""
        mu, rate, weights = 0.5, 0.1, {}
        for steps, pull in ((1, mu), (2, 0.0), (2, mu)):
            model = Watched()
            settings = TrainingSettings(local_steps=steps, batch_size=50, shuffle=False)
            train_plain(model, few, settings, learning_rate=rate, proximal_mu=pull)
            weights[steps, pull] = model.linear.weight.detach()
        torch.testing.assert_close(weights[2, mu], weights[2, 0.0] - rate * mu * weights[1, mu])

    def test_bfloat16_leaves_parameters_in_float32(self, few):
        """And reaches nearly the same."""
        models = [Watched(), Watched()]
        for model, precision in zip(models, ("float32", "bfloat16"), strict=True):
            settings = TrainingSettings(local_steps=3, shuffle=False, precision=precision)
            train_plain(model, few, settings, learning_rate=0.1)
        assert models[1].linear.weight.dtype == torch.float32
        torch.testing.assert_close(models[0].linear.weight, models[1].linear.weight, rtol=0.05, atol=1e-3)


class TestSchedule:
    """The learning rate over rounds."""

    @pytest.mark.parametrize(
        ("fields", "rates"),
        [
            ({}, [1, 1, 1, 1]),
            ({"schedule": "linear"}, [1, 0.75, 0.5, 0.25]),
            ({"schedule": "cosine"}, [1, 0.8535534, 0.5, 0.1464466]),
            ({"warmup_rounds": 2}, [1 / 3, 2 / 3, 1, 1]),
            ({"warmup_rounds": 2, "schedule": "linear"}, [1 / 3, 2 / 3, 1, 0.5]),
            ({"warmup_rounds": 9}, [0.1, 0.2, 0.3, 0.4]),
        ],
        ids=str,
    )
    def test_rates(self, fields, rates):
        """Constant, linear or cosine, after a warm-up; never zero in a round that takes place."""
        settings = TrainingSettings(learning_rate=1.0, **fields)
        assert [learning_rate_at(settings, r, 4) for r in (1, 2, 3, 4)] == pytest.approx(rates)


class TestLosses:
    """One example's loss is its own."""

    @pytest.mark.parametrize("shape", [(6, 4), (6, 5, 4)], ids=["class", "every position"])
    def test_the_mean_of_examples_losses_is_the_batch_s_loss(self, shape):
        """Positions are averaged within an example first: a long one does not count more."""
        generator = torch.Generator().manual_seed(0)
        logits, targets = torch.randn(shape, generator=generator), torch.randint(4, shape[:-1], generator=generator)
        losses = example_losses(logits, targets)
        assert losses.shape == (6,)
        torch.testing.assert_close(losses.mean(), mean_loss(logits, targets))
        torch.testing.assert_close(example_losses(logits[2:3], targets[2:3])[0], losses[2])


class TestPrivate:
    """With DP-SGD."""

    def test_it_learns_digits(self, digits):
        """With the noise of a loose budget."""
        model = Watched()
        train(model, digits, chosen=plan(local_steps=60, noise_multiplier=0.6, denominator=300), learning_rate=2.0)
        assert accuracy(model, digits) > 0.7

    def test_it_answers_what_the_plan_said_before(self, few):
        """A loss would be a release without noise; the clipping norm is the plan's."""
        assert train(Watched(), few) == 1.0

    def test_an_adapting_norm_is_answered_for_the_next_round(self, few):
        """It follows from a noised count, and starts where the last round ended."""
        adaptive = plan(clipping="adaptive", local_steps=1)
        norms = {train(Watched(), few, chosen=adaptive, clipping_norm=start) for start in (1.0, 5.0)}
        assert len(norms) == 2
        assert norms.isdisjoint({1.0, 5.0})
        assert all(0.3 < norm < 15 for norm in norms)

    def test_what_is_not_trained_stays_as_it_was(self, few):
        """Running statistics are those of private examples: they would leave the site without noise."""
        model = Watched()
        train(model, few, chosen=plan(sampling_rate=1.0))
        assert model.seen
        assert not model.mean.any()
        assert torch.equal(model.frozen, torch.ones(3))
        assert model.linear.weight.any()

    def test_each_step_takes_a_poisson_sample(self, digits):
        """Of another size each time, with the plan's rate; the settings' batch size has no part in it."""
        model = Watched()
        train(model, digits, TrainingSettings(batch_size=3, max_physical_batch=4096), chosen=plan(local_steps=6))
        sizes = [len(batch) for batch in model.seen]
        assert len(sizes) == 6
        # Six binomials of mean 359 and deviation 17: each within 6 deviations but for 1e-8; all alike but for 1e-8.
        assert all(abs(size - 0.2 * 1797) < 6 * 17 for size in sizes)
        assert len(set(sizes)) > 1

    def test_each_entity_gives_one_example_a_step(self, few):
        """Ten patients with five rows each: a step holds at most one row of each, another one each time."""
        entities = torch.arange(50) % 10
        model = Watched()
        marked = replace(few, inputs=torch.arange(50.0)[:, None].expand(50, 64).clone(), entities=entities)
        train(model, marked, chosen=plan(sampling_rate=1.0, local_steps=20))
        steps = [batch[:, 0].long() for batch in model.seen]
        assert all(sorted((step % 10).tolist()) == list(range(10)) for step in steps)
        # Each row is left out of 20 steps with probability 0.8^20: all of 50 seen in 60 steps but for 50 * 0.8^60.
        train(model, marked, chosen=plan(sampling_rate=1.0, local_steps=100))
        assert len(set(torch.cat([batch[:, 0] for batch in model.seen]).tolist())) == 50

    def test_steps_over_nobody_still_add_noise(self, few):
        """As many as planned, on every coordinate."""
        model = Watched()
        train(model, few, chosen=plan(sampling_rate=1e-12))
        assert model.seen == []
        assert (model.linear.weight != 0).all()
        moved = torch.cat([p.detach().reshape(-1) for p in model.linear.parameters()]).double()
        squares = (moved / (0.1 * 3**0.5 / 40)).square().sum().item()
        assert stats.chi2.ppf(5e-8, 650) < squares < stats.chi2.isf(5e-8, 650) * 1.01, "false alarms: 1e-7"

    def test_physical_batches_change_nothing(self, few):
        """However little fits in memory, the step is the same up to rounding."""
        moved = []
        for most in (256, 7):
            model = Watched()
            train(
                model, few, TrainingSettings(max_physical_batch=most), chosen=plan(sampling_rate=1.0), source=Silence()
            )
            moved.append(model.linear.weight.detach())
        torch.testing.assert_close(*moved, rtol=1e-4, atol=1e-6)

    def test_an_example_that_is_not_finite_spoils_nothing(self, few):
        """No parameter tells that it is there."""
        inputs = few.inputs.clone()
        inputs[3] = float("inf")
        model = Watched()
        train(model, Examples(inputs=inputs, targets=few.targets), chosen=plan(sampling_rate=1.0))
        assert torch.isfinite(model.linear.weight).all()

    def test_no_seed_reproduces_it(self, few):
        """Neither sample nor noise."""
        results = []
        for _ in range(2):
            torch.manual_seed(0)
            model = Watched()
            train(model, few)
            results.append(model.linear.weight.detach())
        assert (results[0] == results[1]).double().mean() < 0.05


class Patches(nn.Module):
    """Sees every example as four rows of a batch: fine in plain training, no example to a layer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 10)

    def forward(self, x):
        return self.linear(x.reshape(-1, 16)).view(len(x), 4, 10).mean(1)


class TestPrivateRules:
    def test_a_model_that_folds_rows_into_the_batch_is_refused(self, few):
        """Otherwise one example could move the sum by four times the bound, and nothing would say so."""
        with pytest.raises(PrivacyError):
            train(Patches(), few, chosen=plan(sampling_rate=1.0))

    def test_the_proximal_term_pulls_with_privacy_too(self, few):
        """FedProx means what it says in a private run: with a strong pull the model stays where it started."""
        moved = []
        for mu in (0.0, 0.99):
            model = nn.Linear(64, 10)
            start = model.weight.detach().clone()
            train(model, few, chosen=plan(local_steps=200, sampling_rate=0.5), learning_rate=1.0, proximal_mu=mu)
            moved.append((model.weight.detach() - start).norm().item())
        assert moved[1] < moved[0] / 2
