"""Every scenario learns from real data, plain and private: in a short form here, in full under `-m slow`.

Plain runs are deterministic: all their seeds are fixed. Privacy noise never comes from a seed, so private floors stand
well below what was seen; `docs/scenarios.md` has the figures and their spread.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

import simulations.scenarios
from common.cli import main
from common.config import RunConfig, load_config
from common.data import data_sets
from common.errors import FailureCode
from common.privacy import make_plan
from common.site import load_site
from server.cohort import participations
from server.coordinator import Observer
from simulations.run import execute, prepare

PLAIN, PRIVATE = ["privacy.unit=none"], ["privacy.unit=example"]
KNOWN = {info.name: info for info in data_sets(load_site(None))}
FILES = sorted(path.stem for path in Path(simulations.scenarios.__file__).parent.glob("*.toml"))


@dataclass(frozen=True, kw_only=True)
class Floors:
    """What a scenario reaches at least, and the `--set` overrides that make it short."""

    plain: float
    private: float
    short_plain: float
    short_private: float
    short: tuple[str, ...]
    short_with_privacy: tuple[str, ...] = ()


FLOORS = {
    # Half of the patients held out, so that the figure rests on 459 of them; majority 0.55.
    "heart": Floors(
        plain=0.75,
        private=0.70,
        short_plain=0.75,
        short_private=0.7,
        short=("data.folds=0", "data.test_fraction=0.5", "comparison.enabled=false", "evaluation.every=0"),
    ),
    # Ten classes in equal shares: 0.10 by chance.
    "fashion": Floors(
        plain=0.8,
        private=0.7,
        short_plain=0.68,
        short_private=0.5,
        short=("rounds=4", "data.max_examples=300", "evaluation.every=0"),
        short_with_privacy=("rounds=10", "privacy.expected_batch_size=75", "strategy.server_learning_rate=0.02"),
    ),
    # The most common character is 0.164 of all.
    "shakespeare": Floors(
        plain=0.43,
        private=0.34,
        short_plain=0.33,
        short_private=0.22,
        short=("rounds=3", "cohort.size=8", "data.clients=16", "data.test_fraction=0.05", "evaluation.every=0"),
        short_with_privacy=("rounds=12", "cohort.size=4", "strategy.server_momentum=0.8", "training.learning_rate=6"),
    ),
    "shakespeare-transformer": Floors(
        plain=0.41,
        private=0.26,
        short_plain=0.26,
        short_private=0.19,
        short=(
            "rounds=3",
            "cohort.size=8",
            "data.clients=16",
            "data.test_fraction=0.05",
            "data.max_examples=200",
            "evaluation.every=0",
        ),
        short_with_privacy=("rounds=12", "cohort.size=4", "data.max_examples=0", "strategy.server_learning_rate=0.03"),
    ),
    # Majority 0.55; the clients are many, the patients behind them few.
    "population": Floors(
        plain=0.77,
        private=0.75,
        short_plain=0.7,
        short_private=0.7,
        short=("rounds=8", "data.clients=2000", "cohort.size=50", "evaluation.every=0"),
    ),
    # Majority 0.533. From scratch nothing is learnt within epsilon 8: with privacy only the budget is checked.
    "sentiment": Floors(
        plain=0.7,
        private=0.0,
        short_plain=0.58,
        short_private=0.0,
        short=("rounds=3", "data.max_examples=2000", "evaluation.every=0"),
        short_with_privacy=("rounds=4", "privacy.expected_batch_size=150"),
    ),
}

DIGITS = (
    "data.name=digits", "data.partition=iid", "data.clients=4", "evaluation.every=0", "training.device=cpu",
    "training.batch_size=16",
)  # fmt: skip
"""1,797 handwritten digits, 8x8: small enough for the larger image models."""

FAMILIES: dict[str, tuple[str, ...]] = {
    "mlp": ("rounds=10",),
    "resnet": ("rounds=3", "model.options.width=8", "model.options.blocks=1"),
    "inception": (
        "rounds=3", "model.options.width=4", "model.options.groups=1", "training.optimizer=adamw",
        "training.learning_rate=0.01",
    ),
}  # fmt: skip
"""The image models that no scenario uses, in a tiny form."""

FAMILY_FLOORS = {"mlp": (0.85, 0.75), "resnet": (0.75, 0.35), "inception": (0.50, 0.25)}
"""Without and with privacy; 0.10 by chance."""

FAMILY_PRIVACY = (
    "privacy.unit=example", "privacy.target_epsilon=8", "privacy.sampling_rate=0.5", "privacy.expected_batch_size=180",
    "training.local_steps=1", "training.optimizer=sgd", "training.learning_rate=2", "rounds=12",
)  # fmt: skip


def family(model: str, *, private: bool) -> RunConfig:
    """A tiny model of the family, on digits."""
    changes = [*DIGITS, *FAMILIES[model]]
    if private:
        changes += FAMILY_PRIVACY
        changes += ["model.options.groups=8"] * (model == "inception")
    return load_config(None, [f"model.name={model}", *changes]).config


class Failures(Observer):
    """Collects clients that failed: a run survives them, a test must not. And those who were asked at all."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, FailureCode]] = []
        self.asked: set[str] = set()

    def round_started(self, server_round: int, cohort: list[str]) -> None:
        self.asked |= set(cohort)

    def reply_received(self, client: str, failure: FailureCode | None) -> None:
        if failure is not None:
            self.seen.append((client, failure))


def train(config: RunConfig, ledgers: Path) -> float:
    """Accuracy of the run's result on held-out examples.

    No client fails. With privacy the ledger of every client that was asked, replayed, shows that it spent something and
    no more than the target.
    """
    prepared, failures = prepare(config, folder=ledgers), Failures()
    evaluation = execute(prepared, observer=failures).evaluation
    assert not failures.seen
    spent = prepared.spent(sorted(failures.asked))
    assert bool(spent) == config.private
    if config.private:
        assert config.privacy.target_epsilon is not None
        assert min(spent.values()) > 0
        assert max(spent.values()) <= config.privacy.target_epsilon
    assert evaluation is not None
    return evaluation.accuracy


def floors_of(name: str) -> Floors:
    """Floors of a scenario whose data is here."""
    info = KNOWN[load_config(name).config.data.name]
    if not info.available:
        pytest.skip(f"the data of scenario {name} is not on this machine: {info.how_to_get}")
    return FLOORS[name]


every_scenario = pytest.mark.parametrize("name", FILES)


def test_every_scenario_has_floors() -> None:
    """A scenario without a test is a promise that nobody checks."""
    assert sorted(FLOORS) == FILES


@every_scenario
def test_short_form_learns(name: str, tmp_path: Path) -> None:
    """A few rounds on part of the data already beat guessing by far."""
    floors = floors_of(name)
    assert train(load_config(name, [*PLAIN, *floors.short]).config, tmp_path) >= floors.short_plain


@every_scenario
def test_short_form_learns_with_privacy(name: str, tmp_path: Path) -> None:
    """A few noised steps learn, and nobody spends more than the scenario's own target."""
    floors = floors_of(name)
    config = load_config(name, [*PRIVATE, *floors.short, *floors.short_with_privacy]).config
    assert train(config, tmp_path) >= floors.short_private


@pytest.mark.slow
@every_scenario
@pytest.mark.timeout(1800)
def test_full_form_reaches_its_accuracy(name: str, tmp_path: Path) -> None:
    """The scenario as it is written reaches what its documentation says."""
    floors = floors_of(name)
    assert train(load_config(name, PLAIN).config, tmp_path) >= floors.plain


@pytest.mark.slow
@every_scenario
@pytest.mark.timeout(1800)
def test_full_form_reaches_its_accuracy_with_privacy(name: str, tmp_path: Path) -> None:
    """The same within the scenario's own privacy budget."""
    floors = floors_of(name)
    assert train(load_config(name, PRIVATE).config, tmp_path) >= floors.private


@every_scenario
def test_another_privacy_target_is_one_setting_away(name: str) -> None:
    """At epsilon 3 the plan of the whole run stays within 3, whatever the scenario's own target."""
    config = load_config(name, [*PRIVATE, "privacy.target_epsilon=3"]).config
    clients = config.data.clients or KNOWN[config.data.name].groups
    rounds = participations(config.cohort, clients, config.rounds)
    assert 0 < make_plan(config, participations=rounds, dimensions=100_000).epsilon_after(rounds) <= 3


def test_dp_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`coterie simulate NAME --dp --json` prints one document that names unit, relation, epsilon and delta."""
    arguments = ["simulate", "heart", "--dp", "--json", "--workers", "1", "--out", str(tmp_path / "run")]
    settings = [part for override in FLOORS["heart"].short for part in ("--set", override)]
    with pytest.raises(SystemExit) as end:
        main([*arguments, *settings])
    assert not end.value.code
    privacy = json.loads(capsys.readouterr().out)["privacy"]
    assert (privacy["unit"], privacy["relation"], privacy["target_delta"]) == ("example", "add/remove", 1e-5)
    assert len(privacy["epsilon"]) == 4
    assert all(0 < epsilon <= privacy["target_epsilon"] for epsilon in privacy["epsilon"].values())


@pytest.mark.parametrize("model", FAMILIES)
def test_other_models_learn_real_data(model: str, tmp_path: Path) -> None:
    """Models that no scenario uses learn to read digits in a few rounds."""
    assert train(family(model, private=False), tmp_path) >= FAMILY_FLOORS[model][0]


@pytest.mark.parametrize("model", FAMILIES)
def test_other_models_learn_real_data_with_privacy(model: str, tmp_path: Path) -> None:
    """The same with every example protected, at epsilon 8."""
    assert train(family(model, private=True), tmp_path) >= FAMILY_FLOORS[model][1]
