"""What a run folder says, read leniently: a run that was interrupted has a report too."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from common.config import RunConfig
from common.disk import disk_errors
from common.errors import RunError
from server.store import RunFolder


def _finite(value: Any) -> Any:
    """None in place of NaN and infinities: a diverged loss is drawn as a gap."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _bounded(value: Any) -> Any:
    """Infinity in place of what is no number: JSON has no infinity, so a run folder holds null in its place."""
    return math.inf if value is None or (isinstance(value, float) and math.isnan(value)) else value


Measure = Annotated[float | None, BeforeValidator(_finite)]
"""A figure that may be missing."""

Epsilon = Annotated[float, BeforeValidator(_bounded)]
"""What a client spent; never missing, so that a client whose epsilon has no bound cannot look like one that has."""


class Document(BaseModel):
    """Base of what is read. Keys that a later version added are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)


D = TypeVar("D", bound=Document)


class SumRow(Document):
    """One sum of a round under secure aggregation; `refused` is empty, or says why it was not opened."""

    members: int = 0
    asked: int = 0
    survivors: int = 0
    refused: str = ""


class AggregationRow(Document):
    """The sums of one round: a single one of the whole cohort, or one a group."""

    epoch: int = 0
    groups: list[SumRow] = []


class ClockRow(Document):
    """A round in virtual time: when it ended, how long devices were at work for it, and how much of that was wasted."""

    at_seconds: float
    work_seconds: float = 0.0
    wasted_seconds: float = 0.0


class RoundRow(Document):
    """One line of `rounds.jsonl`."""

    server_round: int
    cohort: list[str] = []
    survivors: list[str] = []
    failures: dict[str, str] = {}
    train_loss: Measure = None
    accuracy: Measure = None
    loss: Measure = None
    epsilon: dict[str, Epsilon] = {}
    seconds: dict[str, Measure] = {}
    aggregation: AggregationRow | None = None
    staleness: dict[str, int] | None = None
    clock: ClockRow | None = None


class ClientResult(Document):
    """One client of the finished run, as the simulation saw it."""

    train_examples: int | None = None
    test_examples: int | None = None
    accuracy: Measure = None
    class_counts: list[int] = []


class SharesResult(Document):
    """How noise was divided among the clients of a sum, where they added it."""

    mechanism: str = ""
    honest: int | None = None
    colluding: int | None = None


class PrivacyResult(Document):
    """What the run promised, and what each client spent."""

    unit: str = "example"
    trust: str = ""
    shares: SharesResult | None = None
    relation: str = "add/remove"
    target_epsilon: Measure = None
    target_delta: Measure = None
    noise_multiplier: Measure = None
    epsilon: dict[str, Epsilon] = {}
    epsilon_replace_one: dict[str, Epsilon] = {}
    epsilon_is: str = ""
    insecure_fixed_noise: bool = False


class EvaluationResult(Document):
    """How the accuracy was measured."""

    examples: int | None = None
    released: bool = True


class ProbeFacts(Document):
    """What a round cost while it was found out which way of training is quicker."""

    stacked: bool = False
    cpu_seconds: float = 0.0
    weight: float = 0.0


class BatchingFacts(Document):
    """Whether clients trained stacked, as one computation, or one by one; `why` they could not be stacked."""

    batching: str = ""
    why: str = ""
    stacked: bool | None = None
    probes: list[ProbeFacts] = []


class PopulationFacts(Document):
    """How many clients there are, where these are too many to be measured one by one."""

    clients: int | None = None
    evaluated: int | None = None
    participated: int | None = None


class ModelFacts(Document):
    """The trained model."""

    name: str = ""
    parameters: int | None = None


class DataFacts(Document):
    """The data it was trained on."""

    name: str = ""
    partition: str = ""
    class_names: list[str] = []


class Score(Document):
    """Mean and standard deviation over the folds of a comparison."""

    accuracy_mean: Measure = None
    accuracy_sd: Measure = None
    auc_mean: Measure = None
    auc_sd: Measure = None
    majority: Measure = None


class Arm(Score):
    """One way of training, measured on all sites' held-out examples and on each site's own."""

    sites: dict[str, Score] = {}
    epsilon: dict[str, Epsilon] = {}
    delta: Measure = None


class Arms(Document):
    """All ways of training that a comparison holds side by side."""

    federated: Arm | None = None
    federated_dp: Arm | None = None
    pooled: Arm | None = None
    alone: dict[str, Arm] = {}


class Gain(Document):
    """What one site gains over training alone, fold by fold: a mean difference of shares and its standard error."""

    accuracy_gain: Measure = None
    standard_error: Measure = None
    verdict: str = ""


class Comparison(Document):
    """Each site alone, federated, with privacy, and pooled, over identical folds."""

    folds: int = 0
    test_majority: Measure = None
    arms: Arms = Arms()
    pooled_minus_federated: Measure = None
    gains: dict[str, dict[str, Gain]] = {}


class Result(Document):
    """`result.json`."""

    name: str = ""
    status: str = ""
    rounds: int | None = None
    selected_round: int | None = None
    accuracy: Measure = None
    loss: Measure = None
    majority_accuracy: Measure = None
    evaluation: EvaluationResult | None = None
    clients: dict[str, ClientResult] = {}
    population: PopulationFacts | None = None
    privacy: PrivacyResult | None = None
    model: ModelFacts = ModelFacts()
    data: DataFacts = DataFacts()
    seconds: dict[str, Measure] = {}
    simulated: bool = False
    comparison: Comparison | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """A run folder's content. `result` is None while the run has not finished."""

    config: RunConfig
    rounds: tuple[RoundRow, ...]
    result: Result | None
    batching: BatchingFacts | None = None


def read_record(folder: Path) -> Record:
    """Read a run folder. A line of `rounds.jsonl` that is still being written is left out.

    Raises:
        RunError: The folder holds no run, or a file in it is damaged.
    """
    run = RunFolder.open(folder)
    result = run.read_result()
    rows = {row["server_round"]: row for row in run.rounds()}
    return Record(
        config=run.config(),
        rounds=tuple(_checked(RoundRow, rows[key], folder / "rounds.jsonl") for key in sorted(rows)),
        result=None if result is None else parse_result(result, folder),
        batching=_batching(folder / "batching.json"),
    )


def parse_result(document: dict[str, Any], folder: Path) -> Result:
    """What `result.json` of a run folder says.

    Raises:
        RunError: It is damaged.
    """
    return _checked(Result, document, folder / "result.json")


def _batching(path: Path) -> BatchingFacts | None:
    """How a simulation trained its clients; None of a run that does not say."""
    with disk_errors(path, "read"):
        text = path.read_bytes() if path.is_file() else None
    if text is None:
        return None
    try:
        return BatchingFacts.model_validate_json(text)
    except ValidationError as e:
        raise RunError(f"{path} is damaged", hint="restore the file, or run again") from e


def _checked(model: type[D], document: dict[str, Any], path: Path) -> D:
    try:
        return model.model_validate(document)
    except ValidationError as e:
        where = ".".join(str(part) for part in e.errors()[0]["loc"])
        raise RunError(f"{path}: `{where}` is damaged", hint="restore the file, or run again") from e
