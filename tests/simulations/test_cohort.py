"""A cohort that trains stacked is the same cohort: same weights, same fates, same ledgers, one reply."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from client.mods import guard_mod
from common.config import RunConfig
from common.errors import ConfigError, FailureCode
from common.flower import ARRAYS, CONFIG, arrays_of, client_context, failure_of, to_record
from common.privacy import SecureNoise
from server.coordinator import Outcome
from server.grids.broadcast import Broadcast, CohortGrid, Fate
from server.store import RunFolder
from simulations import chunks, cohort
from simulations.batching import Batching, make_choice, read_record
from simulations.chunks import CHUNK, LARGEST, PARTITIONS
from simulations.inline import InProcess
from simulations.run import Prepared, execute, prepare
from simulations.stacking import Folded, Stack
from tests.helpers.runs import Log, as_bytes, tree

SITE = Path(__file__).parent / "cohort_fixtures" / "site.toml"
CLIENTS = 20
TROUBLED = "client-005"


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty clients make three chunks of six or seven."""
    monkeypatch.setattr(cohort, "chunk_size", lambda parameters, examples: 7)


def configuration(**changes: Any) -> RunConfig:
    base: dict[str, Any] = {"model": {"name": "linear"}, "data": {"name": "lazy", "clients": CLIENTS}}
    for key, value in changes.items():
        base[key] = {**base.get(key, {}), **value} if isinstance(value, dict) else value
    return RunConfig.model_validate(tree(**base))


def private(**changes: Any) -> RunConfig:
    """The same with example-level privacy: two steps a round."""
    privacy = {"unit": "example", "target_epsilon": 5.0, "expected_batch_size": 4, "sampling_rate": 0.3}
    return configuration(**{"training": {"local_steps": 2}, "privacy": privacy, **changes})


def run(
    path: Path,
    config: RunConfig,
    batching: Batching = "on",
    *,
    workers: int = 1,
    seed: int | None = None,
    log: Log | None = None,
) -> tuple[Outcome, Log, Prepared]:
    """A run in `path`, or its continuation."""
    log = log or Log()
    possible = prepare(config, folder=path, site_file=SITE, insecure_seed=seed)
    with RunFolder.resume(path) if (path / "run.toml").exists() else RunFolder.create(config, path) as folder:
        log.folder = folder
        outcome = execute(possible, workers=workers, folder=folder, observer=log, batching=batching)
        return outcome, log, possible


def events(prepared: Prepared) -> dict[str, list[int | None]]:
    """Which rounds each client's ledger holds."""
    ledgers = prepared.sites.ledgers
    assert ledgers is not None
    return {name: [event.server_round for event in ledgers.of(name).events()] for name in prepared.federation.names}


def apart(first: Mapping[str, NDArray[Any]], second: Mapping[str, NDArray[Any]]) -> float:
    """Largest difference, relative to the array's largest value."""
    return max(float(np.abs(first[k] - second[k]).max() / np.abs(first[k]).max()) for k in first)


class TestEqualsOneByOne:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"model": {"name": "mlp"}, "training": {"local_epochs": 2, "momentum": 0.9}},
            {"strategy": {"name": "fedprox", "proximal_mu": 0.5}, "training": {"local_epochs": 3}},
            {"strategy": {"name": "fedavgm", "weighting": "equal"}, "cohort": {"size": 9}},
            {"strategy": {"name": "fedadam", "server_learning_rate": 0.1}, "training": {"local_steps": 3}},
        ],
    )
    def test_in_weights_fates_and_losses(self, changes: dict[str, Any], tmp_path: Path) -> None:
        """Clients of different sizes, over three rounds: the same survivors, and weights within 1e-5."""
        stacked, log, _ = run(tmp_path / "stacked", configuration(**changes))
        single, other, _ = run(tmp_path / "single", configuration(**changes), "off")
        assert apart(single.arrays, stacked.arrays) < 1e-5
        assert [r.survivors for r in log.records] == [r.survivors for r in other.records]
        assert sorted(log.fates) == sorted(other.fates)
        for ours, theirs in zip(log.records, other.records, strict=True):
            assert ours.train_loss == pytest.approx(theirs.train_loss, rel=1e-5)

    def test_with_privacy_and_the_same_noise(self, tmp_path: Path) -> None:
        """With noise from a seed both ways end alike, spend alike, and tell no loss."""
        stacked, log, ours = run(tmp_path / "stacked", private(), seed=3)
        single, _, theirs = run(tmp_path / "single", private(), "off", seed=3)
        assert apart(single.arrays, stacked.arrays) < 1e-5
        assert [r.train_loss for r in log.records] == [None] * 3
        assert events(ours) == events(theirs) == {name: [1, 2, 3] for name in ours.federation.names}
        assert ours.spent() == theirs.spent()
        assert all(map(math.isfinite, ours.spent().values()))

    def test_in_those_who_fail(self, tmp_path: Path) -> None:
        """A client without examples, and one whose update is too large, fail alone and for the same reason."""
        for name, reason in (("one-is-empty", "client-failed"), ("one-diverges", "non-finite-update")):
            config = configuration(data={"name": name}, rounds=2)
            stacked, log, _ = run(tmp_path / name, config)
            single, other, _ = run(tmp_path / f"{name}-single", config, "off")
            assert log.failures == other.failures == [{TROUBLED: reason}] * 2
            assert apart(single.arrays, stacked.arrays) < 1e-5

    def test_in_what_a_client_without_examples_pays(self, tmp_path: Path) -> None:
        """As much as everybody: what a ledger holds does not depend on the client's data."""
        config = private(data={"name": "one-is-empty"}, rounds=2)
        _, log, ours = run(tmp_path / "stacked", config)
        _, other, theirs = run(tmp_path / "single", config, "off")
        assert log.failures == other.failures == [{TROUBLED: "client-failed"}] * 2
        assert events(ours) == events(theirs) == {name: [1, 2] for name in ours.federation.names}


class TestNumberOfWorkers:
    @pytest.mark.parametrize("make", [configuration, private])
    def test_changes_no_bit(self, make: Any, tmp_path: Path) -> None:
        """Here, and over two and three workers."""
        expected, log, _ = run(tmp_path / "here", make(), seed=1)
        for workers in (2, 3):
            outcome, other, _ = run(tmp_path / str(workers), make(), workers=workers, seed=1)
            assert as_bytes(outcome.arrays) == as_bytes(expected.arrays)
            assert [r.train_loss for r in other.records] == [r.train_loss for r in log.records]

    def test_chunks_are_of_equal_numbers(self) -> None:
        """As few as can be, neighbours together, nobody left out."""
        found = [list(chunk) for chunk in cohort._chunks(range(20), 7)]
        assert [len(chunk) for chunk in found] == [6, 7, 7]
        assert [node for chunk in found for node in chunk] == list(range(20))
        assert [list(chunk) for chunk in cohort._chunks([4], 7)] == [[4]]
        assert list(cohort._chunks([], 7)) == []


class TestFailingMember:
    def test_that_cannot_be_made_fails_alone(self, tmp_path: Path) -> None:
        """A user's own function that raises for one client costs that client, and its text goes nowhere."""
        outcome, log, _ = run(tmp_path / "run", configuration(data={"name": "one-raises"}))
        assert log.failures == [{TROUBLED: "client-failed"}] * 3
        assert outcome.evaluation is not None

    def test_whose_examples_do_not_fit_fails_alone(self, tmp_path: Path) -> None:
        """The others of its stack train all the same."""
        _, log, _ = run(tmp_path / "run", configuration(data={"name": "far-apart"}))
        assert log.failures == [{TROUBLED: "client-failed"}] * 3

    def test_that_takes_its_worker_with_it_costs_its_chunk(self, tmp_path: Path) -> None:
        """All members of the chunk are lost, in each round anew; everybody else trains, and the run goes on."""
        config = configuration(data={"name": "one-kills"})
        outcome, log, _ = run(tmp_path / "run", config, workers=2)
        lost = {f"client-{i:03d}": "client-lost" for i in range(6)}
        assert log.failures == [lost] * 3
        assert [len(r.survivors) for r in log.records] == [14] * 3
        assert outcome.evaluation is not None

    def test_whose_budget_is_spent_fails_alone(self, tmp_path: Path) -> None:
        """A client that may not take part is left out of its stack; nobody pays for it."""
        config = private()
        possible = prepare(config, folder=tmp_path / "run", site_file=SITE)
        assert possible.plan is not None
        assert possible.sites.ledgers is not None
        ledger = possible.sites.ledgers.of(TROUBLED)
        for server_round in range(1, config.rounds + 1):
            ledger.reserve(possible.plan.event(server_round), planned=config.rounds)
        log = Log()
        execute(possible, observer=log, batching="on")
        assert log.failures == [{TROUBLED: "budget-exhausted"}] * 3
        assert events(possible)[TROUBLED] == [1, 2, 3]
        assert events(possible)["client-004"] == [1, 2, 3]


class TestLedgersComeFirst:
    def test_all_members_have_paid_when_training_begins(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """When a stack begins, the round of each of its members is on the disk; no other client's is."""
        seen: list[tuple[set[str], set[str]]] = []

        class Watching(Stack):
            def train(self, start: Any, members: Any, **options: Any) -> Folded:
                paid = events(prepare(private(), folder=tmp_path / "run", site_file=SITE))
                seen.append(({m.name for m in members}, {name for name, rounds in paid.items() if rounds == [1]}))
                return super().train(start, members, **options)

        monkeypatch.setattr(chunks, "Stack", Watching)
        run(tmp_path / "run", private(rounds=1))
        assert len(seen) == 3
        done: set[str] = set()
        for members, paid in seen:
            done |= members
            assert paid == done

    def test_a_stack_that_breaks_has_been_paid_for(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What may have been drawn is on record, and the chunk fails; the next round's stack is a new one."""
        made = []

        class Breaking(Stack):
            def __init__(self, *words: Any, **options: Any) -> None:
                made.append(self)
                super().__init__(*words, **options)

            def train(self, start: Any, members: Any, *, server_round: int, **options: Any) -> Folded:
                if server_round == 1:
                    raise RuntimeError("secret: 17")
                return super().train(start, members, server_round=server_round, **options)

        monkeypatch.setattr(chunks, "Stack", Breaking)
        _, log, possible = run(tmp_path / "run", private(rounds=2))
        assert log.failures == [dict.fromkeys(possible.federation.names, "client-failed"), {}]
        assert set(map(tuple, events(possible).values())) == {(1, 2)}
        assert len(made) == 4  # one for each broken chunk, and one for all that came after

    def test_a_request_that_cannot_be_read_costs_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Clients that are not there or are named twice, and a bound that is none; as it was asked it is answered."""
        message, *_ = asked(tmp_path / "asked", monkeypatch)
        possible = prepare(private(rounds=1), folder=tmp_path / "run", site_file=SITE)
        app = cohort.cohort_app(possible.sites)
        sound = dict(message.content[CHUNK])
        spoiled = {
            "text": {PARTITIONS: "1"},
            "half": {PARTITIONS: b"1234"},
            "none": {PARTITIONS: b""},
            "beyond": {PARTITIONS: np.array([1, CLIENTS]).tobytes()},
            "negative": {PARTITIONS: np.array([-1, 1]).tobytes()},
            "twice": {PARTITIONS: np.array([1, 2, 1]).tobytes()},
            "bound": {LARGEST: "1e9"},
        }
        for what, change in spoiled.items():
            message.content[CHUNK] = ConfigRecord({**sound, **change})  # type: ignore[dict-item]
            assert failure_of(answer(app, message)) is FailureCode.INVALID_REQUEST, what
        del message.content[CHUNK]
        assert failure_of(answer(app, message)) is FailureCode.INVALID_REQUEST
        assert set(map(tuple, events(possible).values())) == {()}
        message.content[CHUNK] = ConfigRecord(sound)  # type: ignore[arg-type]
        assert failure_of(answer(app, message)) is None

    def test_a_request_of_another_run_costs_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A chunk is trained for the run that its clients belong to."""
        message, *_ = asked(tmp_path / "asked", monkeypatch)
        possible = prepare(private(rounds=1, name="another"), folder=tmp_path / "run", site_file=SITE)
        reply = answer(cohort.cohort_app(possible.sites), message)
        assert failure_of(reply) is FailureCode.INVALID_REQUEST
        assert set(map(tuple, events(possible).values())) == {()}


def asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Message]:
    """The messages of a private run of one round."""
    messages: list[Message] = []
    original = InProcess.answer

    def noting(self: InProcess, given: Any, *, timeout: float | None) -> Iterator[Message]:
        messages.extend(given)
        return original(self, given, timeout=timeout)

    with monkeypatch.context() as patch:
        patch.setattr(InProcess, "answer", noting)
        execute(prepare(private(rounds=1), folder=folder, site_file=SITE), batching="on")
    return messages


def answer(app: ClientApp, message: Message) -> Message:
    return guard_mod(message, client_context(node_id=2, partition=0), app)


class Stopping(Log):
    """Ctrl-C in the middle of a round: as many clients have answered as are given."""

    def __init__(self, answered: int) -> None:
        super().__init__()
        self._left = answered

    def reply_received(self, client: str, failure: Any) -> None:
        super().reply_received(client, failure)
        self._left -= 1
        if not self._left:
            raise KeyboardInterrupt


class TestResumed:
    @pytest.mark.parametrize("answered", [CLIENTS + 6, CLIENTS + 13, 2 * CLIENTS])
    def test_chunks_that_were_paid_for_are_sent_again(self, answered: int, tmp_path: Path) -> None:
        """A run that stopped in its second round goes on with the chunks that it has; no ledger holds a round twice."""
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", private(), log=Stopping(answered))
        _, log, possible = run(tmp_path / "run", private(), "off")  # the folder knows better
        assert [r.server_round for r in log.records] == [2, 3]
        assert set(map(tuple, events(possible).values())) == {(1, 2, 3)}

    def test_stored_chunk_draws_no_noise(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same request is answered with the same bytes; not one word of randomness is drawn for it."""
        messages = asked(tmp_path / "asked", monkeypatch)
        possible = prepare(private(rounds=1), folder=tmp_path / "run", site_file=SITE)
        app = cohort.cohort_app(possible.sites)
        first = [answer(app, message) for message in messages]

        def refuse(*_: Any, **__: Any) -> None:
            raise AssertionError("noise was drawn")

        monkeypatch.setattr(SecureNoise, "words", refuse)
        monkeypatch.setattr(chunks, "Stack", refuse)
        again = [answer(cohort.cohort_app(possible.sites), message) for message in messages]
        for before, after in zip(first, again, strict=True):
            assert after.content[CHUNK] == before.content[CHUNK]
            assert as_bytes(arrays_of(after.content)) == as_bytes(arrays_of(before.content))

    def test_chunk_of_other_members_is_another_chunk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A stored chunk answers for its own members only, though another one begins with the same client."""
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", private(rounds=2), log=Stopping(CLIENTS))
        monkeypatch.setattr(cohort, "chunk_size", lambda parameters, examples: 10)
        _, log, possible = run(tmp_path / "run", private(rounds=2))
        assert log.failures == [{}, dict.fromkeys(possible.federation.names, "budget-exhausted")]
        assert set(map(tuple, events(possible).values())) == {(1, 1)}  # paid for anew, never sent for others

    def test_ends_like_a_run_that_never_stopped(self, tmp_path: Path) -> None:
        """To the bit, with noise from a seed."""
        whole, _, _ = run(tmp_path / "whole", private(), seed=5)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", private(), seed=5, log=Stopping(CLIENTS + 9))
        resumed, _, _ = run(tmp_path / "run", private(), seed=5)
        assert as_bytes(resumed.arrays) == as_bytes(whole.arrays)


class TestAuto:
    def test_is_on_record_and_resumed(self, tmp_path: Path) -> None:
        """Rounds alternate, then one way is kept; a resumed run repeats the interrupted round the same way."""
        config = configuration(rounds=7)

        ways: dict[int, set[bool]] = {}
        original = cohort.CohortGrid.fold

        def noting(self: cohort.CohortGrid, messages: Broadcast, **options: Any) -> Any:
            found = original(self, messages, **options)
            ways.setdefault(messages.template.content[CONFIG]["server-round"], set()).add(found is not None)  # type: ignore[arg-type,call-overload,index]
            return found

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cohort.CohortGrid, "fold", noting)
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path / "run", config, "auto", log=Stopping(5 * CLIENTS + 3))
            run(tmp_path / "run", config, "auto")
        record = read_record(tmp_path / "run")
        assert record is not None
        assert [(p["server_round"], p["stacked"]) for p in record["probes"]] == [
            (1, False), (2, True), (3, False), (4, True),
        ]  # fmt: skip
        assert all(p["cpu_seconds"] > 0 and p["weight"] == 350 for p in record["probes"])
        assert ways == {n: {n % 2 == 0 if n < 5 else record["stacked"]} for n in range(1, 8)}

    def test_repeated_from_its_record_ends_with_the_same_bytes(self, tmp_path: Path) -> None:
        """Whatever is quicker by then."""
        first, _, possible = run(tmp_path / "run", configuration(rounds=6), "auto")
        record = read_record(tmp_path / "run")
        again = execute(possible, batching="auto", record=record)
        assert as_bytes(again.arrays) == as_bytes(first.arrays)


class TestGrid:
    def test_is_one_that_folds(self, tmp_path: Path) -> None:
        """`PlainAsking` finds `fold` by the protocol, and each node's fate comes once, the reply last."""
        possible = prepare(configuration(), folder=tmp_path, site_file=SITE)
        engine = InProcess(cohort.cohort_factory(possible.sites))
        grid = cohort.cohort_grid(engine, possible.sites, possible.model, make_choice("on", None, cohort=CLIENTS))
        assert isinstance(grid, CohortGrid)
        arrays = {name: tensor.numpy() for name, tensor in possible.model.state_dict().items()}
        record = ConfigRecord({"run": configuration().canonical_json(), "server-round": 1})
        template = Message(RecordDict({ARRAYS: to_record(arrays), CONFIG: record}), 2, "train")
        nodes = [3, 9, 4, 21]
        answers = grid.fold(Broadcast(template, nodes), largest=1e9, timeout=None)
        assert answers is not None
        *fates, reply = answers
        assert fates == [Fate(node_id=node, failure=None) for node in nodes]
        assert isinstance(reply, Message)
        assert reply.content.metric_records["metrics"]["num-examples"] == sum(8 + node - 2 for node in nodes)

    def test_gives_no_reply_where_nobody_counts(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A round of failures leaves the model as it is."""

        class Failing(Stack):
            def train(self, start: Any, members: Any, *, server_round: int, **options: Any) -> Folded:
                if server_round == 2:
                    raise RuntimeError("secret: 17")
                return super().train(start, members, server_round=server_round, **options)

        monkeypatch.setattr(chunks, "Stack", Failing)
        _, log, _ = run(tmp_path / "run", configuration())
        assert [len(r.survivors) for r in log.records] == [CLIENTS, 0, CLIENTS]
        assert log.records[1].train_loss is None

    def test_refuses_to_stack_what_cannot_be(self, tmp_path: Path) -> None:
        """Before the run begins."""
        for changes in ({"strategy": {"name": "fedmedian"}}, {"transport": {"compression": "bf16"}}):
            with pytest.raises(ConfigError, match="cannot be stacked"):
                run(tmp_path / "run", configuration(**changes))
        possible = prepare(configuration(), folder=tmp_path, site_file=SITE)
        with pytest.raises(ConfigError, match="cannot be stacked"):
            execute(possible, batching="on", sealed=True)
