"""Every setting of a run, declared once: default, unit, help, limits.

A run's configuration travels to every site, so it holds registered names only: no paths, no module names, no code.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from common.config.base import Name as Name  # noqa: PLC0414 - passed on
from common.config.base import NonNegativeFloat, OptionValue, Positive, PositiveFloat, Seed, Settings
from common.config.rules import Rule, all_rules
from common.config.simulated import SimulationSettings


class ModelSettings(Settings):
    """Which model is trained."""

    name: Name = Field("cnn", description="Registered name of the model (`coterie models` lists the built-in ones).")
    options: dict[Name, OptionValue] = Field({}, description="Options of the model, such as `hidden = 128`.")


class DataSettings(Settings):
    """Which data is trained on, and how a simulation divides it among clients."""

    name: Name = Field("fashion-mnist-10k", description="Registered name of the data set (`coterie data list`).")
    partition: Literal["natural", "iid", "dirichlet", "shards", "size", "bootstrap"] = Field(
        "iid",
        description="How a simulation divides the data: by the data's own groups (natural), evenly at random (iid), "
        "with class shares drawn from Dirichlet(alpha), in shards of sorted classes, or in unequal sizes (size). "
        "bootstrap divides nothing: each client draws its own examples with replacement from one group of the data "
        "(or by class shares from Dirichlet(alpha), where it has no groups), so that there can be millions of clients.",
    )
    clients: int = Field(
        10,
        ge=0,
        le=10_000_000,
        description="Number of simulated clients; 0 takes as many as the natural partition has.",
    )
    sites: list[Name] = Field([], description="Keep only these clients of a natural partition; empty keeps all.")
    pooled: bool = Field(False, description="Put all clients' examples into one client: training without federation.")
    alpha: PositiveFloat = Field(0.5, description="Concentration of the Dirichlet partition; smaller is more skewed.")
    shards_per_client: Positive = Field(2, description="Shards of sorted classes given to each client.")
    size_ratio: Annotated[float, Field(ge=1, allow_inf_nan=False)] = Field(
        10.0,
        description="Largest over smallest client in the partitions size and bootstrap; sizes are spread evenly on a "
        "logarithmic scale between.",
    )
    client_examples: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        20, description="bootstrap: training examples of a client, on average.", json_schema_extra={"unit": "examples"}
    )
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.2, description="Share of examples held out, where the data set has no held-out part of its own."
    )
    folds: int = Field(0, ge=0, le=1000, description="Cross-validation: number of folds; 0 uses one held-out part.")
    fold: int = Field(0, ge=0, description="Cross-validation: which fold is held out, from 0.")
    max_examples: int = Field(0, ge=0, description="Most training examples a client keeps; 0 keeps all.")
    sequence_length: Annotated[int, Field(ge=1, le=65_536)] = Field(80, description="Tokens in one example of text.")


class TrainingSettings(Settings):
    """What a client does in one round."""

    local_epochs: int = Field(
        1, ge=0, le=10_000, description="Passes over the client's examples; used when local_steps is 0."
    )
    local_steps: int = Field(
        0, ge=0, le=1_000_000, description="Fixed number of optimizer steps a round; required with privacy."
    )
    batch_size: Positive = Field(
        32, description="Examples in a step, without privacy.", json_schema_extra={"unit": "examples"}
    )
    max_physical_batch: Annotated[int, Field(ge=1, le=4096)] = Field(
        256,
        description="Most examples held in memory at once; larger batches are accumulated.",
        json_schema_extra={"unit": "examples"},
    )
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="Local optimizer.")
    learning_rate: PositiveFloat = Field(0.1, description="Local learning rate in round 1.")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Momentum of SGD; starts at zero every round."
    )
    weight_decay: NonNegativeFloat = Field(0.0, description="L2 penalty (sgd) or decoupled decay (adamw).")
    schedule: Literal["constant", "cosine", "linear"] = Field(
        "constant", description="How the learning rate falls over rounds."
    )
    warmup_rounds: int = Field(0, ge=0, description="Rounds over which the learning rate rises to its value.")
    shuffle: bool = Field(True, description="Visit examples in a new order every epoch (without privacy).")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="Where clients train.")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="bfloat16 runs forward and backward under autocast; parameters stay float32."
    )


class StrategySettings(Settings):
    """How the coordinator combines updates: Flower's own strategies by name."""

    name: Literal[
        "fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad",
        "qfedavg", "fedmedian", "fedtrimmedavg", "krum", "multikrum", "bulyan",
    ] = Field("fedavg", description="Flower strategy.")  # fmt: skip
    weighting: Literal["examples", "equal"] = Field(
        "examples",
        description="How much a client counts in the mean: by its number of examples, as it reports it, or equally. "
        "With privacy always equally.",
    )
    proximal_mu: NonNegativeFloat = Field(0.01, description="FedProx: weight of the proximal term.")
    server_learning_rate: PositiveFloat | None = Field(
        None,
        description="FedAvgM, FedAdam, FedYogi, FedAdagrad: the server's learning rate (eta); not set takes Flower's "
        "own: 1.0, 0.1, 0.01, 0.1.",
    )
    server_momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="FedAvgM: the server's momentum.")
    beta_1: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="FedAdam, FedYogi: decay of the first moment.")
    beta_2: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.99, description="FedAdam, FedYogi: decay of the second moment."
    )
    tau: PositiveFloat = Field(1e-3, description="FedAdam, FedYogi, FedAdagrad: adaptivity floor.")
    q: NonNegativeFloat = Field(0.1, description="QFedAvg: fairness exponent.")
    trim_fraction: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.2, description="FedTrimmedAvg: share of values cut from each end."
    )
    malicious_clients: int = Field(0, ge=0, description="Krum, MultiKrum, Bulyan: assumed number of malicious clients.")
    clients_to_keep: Positive = Field(1, description="MultiKrum: number of updates that are averaged.")


class CohortSettings(Settings):
    """Who takes part in a round."""

    size: int = Field(0, ge=0, description="Clients asked each round; 0 asks all.")
    sampling: Literal["uniform", "balanced", "cyclic", "poisson"] = Field(
        "uniform",
        description="uniform draws each cohort afresh; balanced lets every client take part equally often, "
        "which bounds what any of them spends; cyclic asks fixed groups in turn; poisson asks each client with "
        "probability size / clients, unpredictably, so that privacy.unit = 'client' may count on it.",
    )
    min_survivors: Positive = Field(
        1, description="Fewest updates that make a round; with fewer the model stays as it is."
    )
    deadline_seconds: NonNegativeFloat = Field(
        0.0,
        description="A client that has not answered by then failed; 0 waits for ever. Where a simulation has virtual "
        "time, the seconds are virtual ones.",
        json_schema_extra={"unit": "seconds"},
    )
    over_sampling: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0,
        description="Share of clients asked beyond size, so that stragglers need not be waited for: a round on "
        "separate machines ends with the first `size` updates. All who were asked pay for the round.",
    )

    def asked(self) -> int:
        """How many clients are asked each round: `size` and those beyond it; 0 asks all."""
        return math.ceil(round(self.size * (1 + self.over_sampling), 6))  # 10 and a tenth of 10 are 11, also in floats

    def expected_size(self, clients: int) -> float:
        """How many of `clients` a cohort has on average: a public constant, by which a noised sum can be divided.

        For cyclic cohorts it is the mean over all groups, so that over one turn every client counts equally.
        """
        if self.size == 0:
            return float(clients)
        return (
            clients / (clients // self.size) if self.sampling == "cyclic" and clients >= self.size else float(self.size)
        )


class AsynchronousSettings(Settings):
    """Asynchronous aggregation (FedBuff): the server steps whenever enough updates are there, whoever is still at work.

    `cohort.size` then is how many clients are at work at a time.
    """

    buffer_size: int = Field(
        0,
        ge=0,
        description="Updates that make one step of the server, which counts as a round; 0 waits for whole cohorts.",
    )
    staleness_exponent: NonNegativeFloat = Field(
        0.5,
        description="An update that began s steps ago counts (1 + s) to the power of minus this.",
    )
    max_staleness: int = Field(
        20,
        ge=0,
        le=1000,
        description="Updates that began longer ago than so many steps are dropped; a model is kept for each step.",
    )


class TransportSettings(Settings):
    """How updates travel."""

    compression: Literal["none", "bf16", "int8", "top-k"] = Field(
        "none",
        description="How an update is shortened before it is sealed: not at all, to 16 or 8 bits a value (int8 rounds "
        "stochastically, with one scale a tensor), or to its largest values (top-k; what was left out is added to the "
        "next round's update).",
    )
    top_k_fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        0.01, description="top-k: share of each tensor's values that is sent."
    )


class EvaluationSettings(Settings):
    """What the coordinator measures on its own held-out data."""

    every: int = Field(1, ge=0, description="Rounds between evaluations; 0 evaluates only the last model.")
    batch_size: Positive = Field(
        512, description="Examples in one evaluation step.", json_schema_extra={"unit": "examples"}
    )
    select: Literal["last", "best"] = Field(
        "last",
        description="Which round's model is the result: the last, or the best on the coordinator's held-out data.",
    )
    patience: int = Field(
        0, ge=0, description="Stop after this many evaluations without a better accuracy; 0 never stops early."
    )


class PrivacySettings(Settings):
    """What is protected, and how strongly. A privacy budget has no default."""

    unit: Literal["none", "example", "client"] = Field(
        "none",
        description="Whom differential privacy protects: nobody (none), each training example (example), or each "
        "client's whole data (client): against everybody but the coordinator, which adds the noise, or with "
        "secure_aggregation against the coordinator, too.",
    )
    target_epsilon: PositiveFloat | None = Field(
        None, description="Epsilon that the whole run may cost, add/remove relation; calibrates the noise."
    )
    target_delta: Annotated[float, Field(gt=0, le=0.01)] = Field(
        1e-5, description="Delta of the whole run: at most 0.01, and better below one over the number of examples."
    )
    noise_multiplier: PositiveFloat | None = Field(
        None, description="Noise standard deviation over the sensitivity, instead of target_epsilon."
    )
    max_grad_norm: Annotated[float, Field(ge=1e-6, le=1e6)] = Field(
        1.0, description="Unit example: L2 bound on one example's gradient."
    )
    clipping_norm: Annotated[float, Field(ge=1e-6, le=1e6)] = Field(
        1.0, description="Unit client: L2 bound on one client's whole update."
    )
    secure_aggregation: bool = Field(
        False,
        description="Whether the coordinator sees nothing but sums of updates, under masks that only sums lose "
        "(experimental). With unit client each client adds its share of the noise, and the coordinator none.",
    )
    clipping: Literal["flat", "per-layer", "adaptive"] = Field(
        "flat",
        description="How contributions are bounded: as a whole (flat), each parameter by an equal share (per-layer; "
        "unit example), or as a whole by a norm that follows a quantile of their norms (adaptive).",
    )
    target_quantile: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="Adaptive clipping: share of contributions that should lie within the norm."
    )
    clipping_learning_rate: Annotated[float, Field(gt=0, le=2)] = Field(
        0.2, description="Adaptive clipping: how fast the norm follows, each step (example) or round (client)."
    )
    mechanism: Literal["independent", "matrix"] = Field(
        "independent",
        description="Unit client: fresh noise every round (independent), or noise correlated over rounds, which "
        "cancels in part (matrix: DP-FTRL; for cohort.sampling = 'cyclic').",
    )
    sampling_rate: Annotated[float, Field(gt=0, le=1)] = Field(
        0.1, description="Unit example: probability with which each example enters a step (Poisson sampling); public."
    )
    expected_batch_size: Positive = Field(
        32, description="Unit example: public constant by which the noised sum is divided; never derived from a "
        "client's row count.",
        json_schema_extra={"unit": "examples"},
    )  # fmt: skip


class SecureAggregationSettings(Settings):
    """How sums are made where `privacy.secure_aggregation` is on; each site checks it against its policy."""

    epoch_rounds: Annotated[int, Field(ge=1, le=64)] = Field(
        16,
        description="Rounds that one set-up of keys serves; where cohorts are sampled, each has its own.",
    )
    honest: Annotated[int, Field(ge=2)] = Field(
        2, description="Fewest honest sites in a sum: fewer than two, and a sum is somebody's update."
    )
    colluding: Annotated[int, Field(ge=0)] = Field(
        1, description="Sites (of a sum) that are assumed to help a malicious coordinator."
    )
    bits: Literal[16, 20, 24, 32] = Field(
        32, description="Size of the ring in which masked values are added; fewer bits travel, and round more."
    )
    clipping_norm: Annotated[float, Field(ge=1e-6, le=1e6)] = Field(
        16.0, description="L2 bound to which each client clips its update, so that no sum can leave the ring."
    )
    most_weight: Annotated[int, Field(ge=1, le=1 << 24)] = Field(
        1 << 16, description="Largest weight of one client where weighting = 'examples'; larger ones count as this."
    )
    group_size: int = Field(
        0,
        ge=0,
        description="Clients of a group: strategies that look at single updates see the groups' means instead. "
        "0 adds up the whole cohort.",
    )
    noise: Literal["skellam", "discrete-gaussian"] = Field(
        "skellam", description="Unit client: which noise each client adds its share of, inside the sum."
    )


class SeedSettings(Settings):
    """Seeds of everything that is random but not secret. Privacy noise never comes from a seed."""

    data: Seed = Field(0, description="Seed of partitions and held-out parts.")
    model: Seed = Field(0, description="Seed of the starting model.")
    cohort: Seed = Field(0, description="Seed of the cohorts.")
    training: Seed = Field(0, description="Seed of example order and dropout.")
    devices: Seed = Field(0, description="Seed of simulated devices: their speeds, when they are there, who drops out.")


class ComparisonSettings(Settings):
    """A comparison beside the run: each client alone, federated, with privacy and pooled, over identical folds."""

    enabled: bool = Field(False, description="Whether to run it; needs data.folds.")


class RunConfig(Settings):
    """One training from start to end: what every party of a run agrees on."""

    name: Name = Field("run", description="Name of the run, part of its folder's name.")
    rounds: Annotated[int, Field(ge=1, le=1_000_000)] = Field(10, description="Rounds of federated training.")
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    training: TrainingSettings = TrainingSettings()
    strategy: StrategySettings = StrategySettings()
    cohort: CohortSettings = CohortSettings()
    asynchronous: AsynchronousSettings = AsynchronousSettings()
    transport: TransportSettings = TransportSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    privacy: PrivacySettings = PrivacySettings()
    secagg: SecureAggregationSettings = SecureAggregationSettings()
    seeds: SeedSettings = SeedSettings()
    simulation: SimulationSettings = SimulationSettings()
    comparison: ComparisonSettings = ComparisonSettings()

    @property
    def private(self) -> bool:
        """Whether differential privacy is on."""
        return self.privacy.unit != "none"

    @property
    def distributed(self) -> bool:
        """Whether the noise of privacy unit `client` is added by the clients, inside secure aggregation."""
        return self.privacy.unit == "client" and self.privacy.secure_aggregation

    @property
    def central(self) -> bool:
        """Whether the noise of privacy unit `client` is added by the coordinator, which sees clipped updates."""
        return self.privacy.unit == "client" and not self.privacy.secure_aggregation

    @model_validator(mode="after")
    def _agree(self) -> Self:
        """Settings that contradict each other are refused before anything starts."""
        for broken, key, problem, hint in self.rules():
            if broken:
                raise ValueError(f"{key}|{problem}|{hint}")
        return self

    def rules(self) -> tuple[Rule, ...]:
        """All rules between settings, broken or not."""
        return all_rules(self)

    def canonical_json(self) -> str:
        """The configuration as JSON with sorted keys: equal configurations give equal text."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    def digest(self) -> str:
        """SHA-256 of `canonical_json`, in hex: names this configuration to every party."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()
