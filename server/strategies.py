"""Flower's strategies by name: how to make one, and how many replies it needs; `strategy_state` saves what it keeps.

The strategies run unmodified. What they assume without checking, and what whoever drives them has to see to:

- FedAvgM, QFedAvg, Krum, MultiKrum and Bulyan pair arrays by position: every reply must list them in the model's order.
- QFedAvg, FedMedian, FedTrimmedAvg and Bulyan empty the replies they aggregate; QFedAvg also writes into the replies'
  arrays, so these must be writable and nobody else's.
- QFedAvg and Bulyan run the garbage collector once a reply: `gc.freeze()` after start-up keeps that cheap.
- `configure_train` puts its messages in an order drawn from the global `random`: sort replies before aggregating them.
- FedAvgM steps from the copy of the model that it made in its first round: what it returns cannot be given up.
- FedAdam and QFedAvg return float64: `cast_like` brings an aggregate back to the model's types.
- FedAdam corrects its step by `server_round`: a resumed run must go on counting where it stopped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, Literal

import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import (
    Bulyan,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    MultiKrum,
    QFedAvg,
    Strategy,
)
from numpy.typing import NDArray

from common.config import StrategySettings
from common.errors import ConfigError, RunError
from common.flower import NumpyArray

Replies = Literal["mean", "individual"]

_MEAN: Final[Mapping[str, type[FedAvg]]] = {
    "fedavg": FedAvg,
    "fedprox": FedProx,
    "fedavgm": FedAvgM,
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
    "fedadagrad": FedAdagrad,
}


def make_strategy(settings: StrategySettings, *, client_learning_rate: float) -> FedAvg:
    """Flower's strategy for these settings, which trains on exactly the nodes that its grid shows it.

    Args:
        settings: The strategy's name and options.
        client_learning_rate: Local learning rate in round 1; QFedAvg takes its inverse for the Lipschitz constant.

    Guarantee:
        `configure_train` makes one message for every node of the grid, even for a single node or none, and never waits
        for more; `configure_evaluate` makes none. No strategy of these twelve draws its cohort itself.
    """
    kind, own = _kinds(settings, client_learning_rate)[settings.name]
    strategy = kind(fraction_train=1.0, min_train_nodes=0, min_evaluate_nodes=0, min_available_nodes=0, **own)
    # Set afterwards, because the constructor logs a warning about it: clients never evaluate here, by intent.
    strategy.fraction_evaluate = 0.0
    return strategy


def _kinds(s: StrategySettings, client_learning_rate: float) -> dict[str, tuple[type[FedAvg], dict[str, Any]]]:
    """Class and own options by name."""
    rate = s.server_learning_rate  # not set: each strategy's own
    adaptive = {"eta_l": client_learning_rate, "tau": s.tau} | ({} if rate is None else {"eta": rate})
    moments = {**adaptive, "beta_1": s.beta_1, "beta_2": s.beta_2}
    momentum = {"server_momentum": s.server_momentum}
    momentum |= {} if rate is None else {"server_learning_rate": rate}
    malicious = {"num_malicious_nodes": s.malicious_clients}
    return {
        "fedavg": (FedAvg, {}),
        "fedprox": (FedProx, {"proximal_mu": s.proximal_mu}),
        "fedavgm": (FedAvgM, momentum),
        "fedadam": (FedAdam, moments),
        "fedyogi": (FedYogi, moments),
        "fedadagrad": (FedAdagrad, adaptive),
        "qfedavg": (QFedAvg, {"client_learning_rate": client_learning_rate, "q": s.q}),
        "fedmedian": (FedMedian, {}),
        "fedtrimmedavg": (FedTrimmedAvg, {"beta": s.trim_fraction}),
        "krum": (Krum, malicious),
        "multikrum": (MultiKrum, {**malicious, "num_nodes_to_select": s.clients_to_keep}),
        "bulyan": (Bulyan, malicious),
    }


def replies_needed(strategy: Strategy | str) -> Replies:
    """Whether the weighted mean of the replies is enough for a strategy, or it has to see each reply.

    Folding, batching and secure aggregation serve `mean` only. A name or class that is not known here, a subclass of a
    known one, and a strategy with its own way of combining metrics all need `individual` replies.
    """
    if isinstance(strategy, str):
        return "mean" if strategy in _MEAN else "individual"
    if not isinstance(strategy, FedAvg) or type(strategy) not in _MEAN.values():
        return "individual"
    own_metrics = strategy.train_metrics_aggr_fn is not FedAvg().train_metrics_aggr_fn
    return "individual" if own_metrics else "mean"


def minimum_replies(settings: StrategySettings) -> int:
    """Fewest replies with which a strategy does what it promises; with fewer the round must leave the model as it is.

    Flower itself refuses only Bulyan's case, silently. Krum with too few replies returns some reply, and a trimmed mean
    that cuts nothing is a plain mean: neither resists anybody.

    Source:
        Krum: n >= 2f + 3 (Blanchard et al. 2017, section 4). MultiKrum: also m <= n - f - 2 (Damaskinos et al.
        2019, AggregaThor); with f = 0 nobody is suspected and m <= n is enough. Bulyan: n >= 4f + 3
        (El Mhamdi et al. 2018, section 4). Trimmed mean: Flower cuts int(trim_fraction * n) values at each end.
    """
    f, keep = settings.malicious_clients, settings.clients_to_keep
    match settings.name:
        case "krum":
            return 2 * f + 3
        case "multikrum":
            return max(2 * f + 3, keep + f + 2 if f else keep)
        case "bulyan":
            return 4 * f + 3
        case "fedtrimmedavg" if settings.trim_fraction > 0:
            fraction = max(settings.trim_fraction, 1e-9)  # finite, and above any cohort
            fewest = math.ceil(1 / fraction)
            return fewest if int(fraction * fewest) >= 1 else fewest + 1  # 1 / fraction was rounded down
        case _:
            return 1


def largest_value(settings: StrategySettings) -> float:
    """How large a value a strategy can be given without overflowing in float32, however many there are.

    It would overflow at values that are finite one by one, and one client that sends them could undo every round. Those
    that keep squares or compare distances sum squares over the whole model; the others only add replies up.
    """
    adding = {"fedavg", "fedprox", "fedavgm", "fedmedian", "fedtrimmedavg"}
    return 2.0**100 if settings.name in adding else 2.0**32


def check_strategy(settings: StrategySettings, cohort_size: int, *, group_size: int = 1) -> None:
    """Refuse a strategy that a full cohort cannot serve, before the run starts.

    Args:
        settings: The strategy's name and options.
        cohort_size: Clients asked each round, 1 or more.
        group_size: How many of them a strategy sees as one reply, under secure aggregation in groups.

    Raises:
        ConfigError: The cohort's replies are fewer than `minimum_replies`.
    """
    needed = minimum_replies(settings) * group_size
    if cohort_size >= needed:
        return
    keys = {"fedtrimmedavg": ["trim_fraction"], "multikrum": ["malicious_clients", "clients_to_keep"]}
    options = [f"{key} = {getattr(settings, key)}" for key in keys.get(settings.name, ["malicious_clients"])]
    mend = "raise strategy.trim_fraction" if settings.name == "fedtrimmedavg" else "assume fewer malicious clients"
    raise ConfigError(
        f"strategy.name: {settings.name} with {', '.join(options)} needs {needed // group_size} replies a round, "
        + (f"a cohort has {cohort_size}" if group_size == 1 else f"{cohort_size} clients make fewer groups"),
        hint=f"ask at least {needed} clients a round (cohort.size), {mend}, or use fedmedian",
    )


def cast_like(arrays: ArrayRecord, template: ArrayRecord) -> ArrayRecord:
    """An aggregate in the model's own types: the template's key order, dtypes and shapes.

    Arrays that already fit are passed on, not copied. Where the model holds integers (a batch counter), the mean is
    rounded to the nearest one: cutting it off would turn 8.9999 into 8.

    Args:
        arrays: What a strategy returned.
        template: The model it was given.

    Raises:
        RunError: Keys or shapes differ, or a value has no place in the model's type (too large; not a number where the
            model holds integers). Infinities and NaN of a floating-point model pass through.
    """
    missing, unexpected = set(template) - set(arrays), set(arrays) - set(template)
    if missing or unexpected:
        raise RunError(
            f"the aggregate does not hold the model's arrays: missing {sorted(missing)}, unexpected "
            f"{sorted(unexpected)}",
            hint="every client must train the model it was sent",
        )
    result = ArrayRecord()
    for name, model in template.items():
        array = arrays[name]
        if tuple(array.shape) != tuple(model.shape):
            raise RunError(
                f"the aggregate's array `{name}` has shape {tuple(array.shape)}, the model's {tuple(model.shape)}",
                hint="every client must train the model it was sent",
            )
        result[name] = array if array.dtype == model.dtype else NumpyArray(_cast(name, array.numpy(), model.dtype))
    return result


def _cast(name: str, values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Values in another dtype, rounded to nearest, or RunError."""
    target = np.dtype(dtype)
    try:
        with np.errstate(over="raise", invalid="raise"):
            return (np.rint(values) if target.kind in "iu" else values).astype(target)
    except FloatingPointError as e:
        raise RunError(
            f"the aggregate's array `{name}` holds values that {dtype} cannot",
            hint="the training diverges: lower the learning rate",
        ) from e
