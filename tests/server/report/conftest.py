"""Run folders like those that real runs leave, with figures made up from a fixed seed."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest

Sample = Callable[[str], Path]

HEART = {"cleveland": (273, 30, [148, 125]), "hungary": (265, 29, [169, 96]), "switzerland": (111, 12, [7, 104]),
         "long-beach-va": (180, 20, [46, 134])}  # fmt: skip
GARMENTS = ["T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def write(folder: Path, config: str, rounds: list[dict], result: dict | None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.toml").write_text(config, encoding="utf-8")
    (folder / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rounds), encoding="utf-8")
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return folder


def seconds(draw: random.Random) -> dict:
    return {"train": 0.3 + 0.1 * draw.random(), "aggregate": 0.004, "evaluate": 0.02, "checkpoint": 0.01}


def heart(folder: Path) -> Path:
    """Four hospitals, private, with a comparison of ten folds."""
    draw, sites = random.Random(1), list(HEART)
    rounds = [
        {
            "server_round": r, "cohort": sites, "survivors": sites, "failures": {}, "train_loss": None,
            "accuracy": 0.81 - 0.26 * math.exp(-r / 4) + 0.01 * draw.random(), "loss": 0.45 + 0.25 * math.exp(-r / 5),
            "epsilon": {site: 2.97 * math.sqrt(r / 20) for site in sites}, "seconds": seconds(draw),
        }
        for r in range(1, 21)
    ]  # fmt: skip
    result = {
        "format": 1, "name": "heart", "status": "completed", "rounds": 20, "selected_round": 20, "accuracy": 0.812,
        "loss": 0.451, "majority_accuracy": 0.549, "evaluation": {"examples": 184, "released": False},
        "clients": {
            site: {"train_examples": train, "test_examples": test, "accuracy": accuracy, "class_counts": counts}
            for (site, (train, test, counts)), accuracy in zip(
                HEART.items(), (0.833, 0.862, 0.917, 0.70), strict=True
            )
        },
        "privacy": {
            "unit": "example", "relation": "add/remove", "target_epsilon": 3.0, "target_delta": 1e-5,
            "noise_multiplier": 2.06, "epsilon": dict.fromkeys(sites, 2.97),
            "epsilon_replace_one": dict.fromkeys(sites, 5.71), "epsilon_is": "spent at each client over the whole run",
        },
        "model": {"name": "tabular", "parameters": 1346},
        "data": {"name": "heart-disease", "partition": "natural", "class_names": ["healthy", "diseased"]},
        "seconds": {"total": 8.9, "train": 7.1, "aggregate": 0.1, "evaluate": 0.4, "checkpoint": 0.2},
        "simulated": True, "comparison": comparison(draw),
    }  # fmt: skip
    config = (
        'name = "heart"\nrounds = 20\n[model]\nname = "tabular"\n[data]\nname = "heart-disease"\n'
        'partition = "natural"\nclients = 0\n[training]\nlocal_steps = 10\n'
        '[privacy]\nunit = "example"\ntarget_epsilon = 3.0\n'
    )
    return write(folder, config, rounds, result)


def comparison(draw: random.Random) -> dict:
    base = {"cleveland": 0.79, "hungary": 0.81, "switzerland": 0.92, "long-beach-va": 0.74}

    def arm(shift: dict, overall: float) -> dict:
        return {
            "accuracy_mean": overall, "accuracy_sd": 0.03 + 0.01 * draw.random(), "auc_mean": overall + 0.06,
            "auc_sd": 0.021,
            "sites": {
                site: {
                    "accuracy_mean": mean + shift.get(site, 0.0), "accuracy_sd": 0.02 + 0.04 * draw.random(),
                    "auc_mean": 0.8, "auc_sd": 0.05, "majority": max(HEART[site][2]) / sum(HEART[site][2]),
                }
                for site, mean in base.items()
            },
        }  # fmt: skip

    return {
        "folds": 10, "test_majority": 0.553, "pooled_minus_federated": 0.007,
        "gains": {
            "cleveland": {"federated": gain(0.035, 0.012), "federated_dp": gain(0.015, 0.013)},
            "hungary": {"federated": gain(0.02, 0.014), "federated_dp": gain(-0.01, 0.01)},
            "switzerland": {"federated": gain(-0.01, 0.004), "federated_dp": gain(-0.02, 0.006)},
            "long-beach-va": {"federated": gain(0.06, 0.02), "federated_dp": gain(0.05, 0.02)},
        },
        "arms": {
            "federated": arm({"cleveland": 0.035, "hungary": 0.02, "long-beach-va": 0.06, "switzerland": -0.01}, 0.823),
            "federated_dp": {
                **arm({"cleveland": 0.015, "hungary": -0.01, "long-beach-va": 0.05, "switzerland": -0.02}, 0.806),
                "epsilon": dict.fromkeys(base, 2.97), "delta": 1e-5,
            },
            "pooled": arm({"cleveland": 0.04, "hungary": 0.02, "long-beach-va": 0.05}, 0.83),
            "alone": {site: arm({}, 0.71 + 0.06 * draw.random()) for site in base},
        },
    }  # fmt: skip


def gain(mean: float, error: float) -> dict:
    verdict = "no clear gain" if abs(mean) <= 2 * error else "gains" if mean > 0 else "loses"
    return {"accuracy_gain": mean, "standard_error": error, "verdict": verdict}


def fashion(folder: Path) -> Path:
    """Ten clients with skewed classes, without privacy, some of which fail."""
    draw, names = random.Random(2), [f"client-{i:02d}" for i in range(10)]
    rounds = []
    for r in range(1, 31):
        failures = {n: draw.choice(["deadline-exceeded", "client-lost"]) for n in names if draw.random() < 0.04}
        rounds.append(
            {
                "server_round": r, "cohort": names, "survivors": [n for n in names if n not in failures],
                "failures": failures, "train_loss": 0.3 + 1.6 * math.exp(-r / 6) + 0.03 * draw.random(),
                "accuracy": 0.86 - 0.6 * math.exp(-r / 5) + 0.02 * draw.random(),
                "loss": 0.42 + 1.5 * math.exp(-r / 5), "epsilon": {}, "seconds": seconds(draw),
            }
        )  # fmt: skip
    result = {
        "format": 1, "name": "fashion-skewed", "status": "completed", "rounds": 30, "selected_round": 29,
        "accuracy": 0.861, "loss": 0.42, "majority_accuracy": 0.1, "evaluation": {"examples": 2000, "released": False},
        "clients": {n: skewed(draw, 10) for n in names}, "privacy": None, "model": {"name": "cnn", "parameters": 28938},
        "data": {"name": "fashion-mnist-10k", "partition": "dirichlet", "class_names": GARMENTS},
        "seconds": {"total": 64.0, "train": 52.0, "aggregate": 0.9, "evaluate": 6.1, "checkpoint": 1.4},
        "simulated": True, "comparison": None,
    }  # fmt: skip
    config = 'name = "fashion-skewed"\nrounds = 30\n[data]\npartition = "dirichlet"\n[evaluation]\nselect = "best"\n'
    return write(folder, config, rounds, result)


def skewed(draw: random.Random, classes: int, accuracy: float = 0.86) -> dict:
    shares = [draw.gammavariate(0.4, 1) for _ in range(classes)]
    size = draw.choice([200, 400, 800, 900])
    counts = [round(size * share / sum(shares)) for share in shares]
    return {
        "train_examples": sum(counts), "test_examples": 80, "accuracy": draw.gauss(accuracy, 0.05),
        "class_counts": counts,
    }  # fmt: skip


def thousand(folder: Path) -> Path:
    """A thousand clients, fifty a round, private, stopped early."""
    draw, names = random.Random(3), [f"phone-{i:04d}" for i in range(1000)]
    spent = dict.fromkeys(names, 0.0)
    rounds = []
    for r in range(1, 41):
        cohort = draw.sample(names, 50)
        for name in cohort:
            spent[name] += 0.35 / (1 + spent[name])
        rounds.append(
            {
                "server_round": r, "cohort": cohort, "survivors": cohort, "failures": {}, "train_loss": None,
                "accuracy": 0.7 - 0.5 * math.exp(-r / 9) if r % 5 == 0 else None,
                "loss": 0.9 + math.exp(-r / 9) if r % 5 == 0 else None,
                "epsilon": {name: spent[name] for name in cohort}, "seconds": seconds(draw),
            }
        )  # fmt: skip
    result = {
        "format": 1, "name": "phones", "status": "stopped-early", "rounds": 40, "selected_round": 40, "accuracy": 0.694,
        "loss": 0.91, "majority_accuracy": 0.1, "evaluation": {"examples": 5000, "released": False},
        "clients": {name: skewed(draw, 10, 0.69) for name in names},
        "privacy": {
            "unit": "example", "relation": "add/remove", "target_epsilon": 2.0, "target_delta": 1e-6,
            "noise_multiplier": 1.1, "epsilon": spent, "epsilon_is": "spent at each client over the whole run",
        },
        "model": {"name": "cnn", "parameters": 28938},
        "data": {"name": "fashion-mnist", "partition": "dirichlet", "class_names": GARMENTS},
        "seconds": {"total": 900.0, "train": 850.0, "aggregate": 11.0, "evaluate": 6.0, "checkpoint": 3.0},
        "simulated": True, "comparison": None,
    }  # fmt: skip
    config = (
        'name = "phones"\nrounds = 50\n[data]\nclients = 1000\npartition = "dirichlet"\n[cohort]\nsize = 50\n'
        '[training]\nlocal_steps = 5\n[privacy]\nunit = "example"\ntarget_epsilon = 2.0\ntarget_delta = 1e-6\n'
    )
    return write(folder, config, rounds, result)


@pytest.fixture
def sample(tmp_path: Path) -> Sample:
    """Writes the sample of that name and returns its folder."""
    kinds = {"heart": heart, "fashion": fashion, "thousand": thousand}
    return lambda kind: kinds[kind](tmp_path / kind)
