"""A run over very many clients looks at those of its cohorts, and leaves behind what does not grow with the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.config import RunConfig
from common.data.population import Population
from common.errors import ConfigError, DataError
from common.names import NumberedNames
from common.schema import ClientData, Examples
from server.results import MOST_LISTED
from server.store import RunFolder
from simulations.results import FolderObserver, listed, write_results
from simulations.run import Prepared, execute, prepare

MANY = 10_000_000


def configuration(**changes: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "name": "many",
        "rounds": 2,
        "model": {"name": "linear"},
        "data": {"name": "heart", "partition": "bootstrap", "clients": MANY, "client_examples": 5},
        "training": {"local_epochs": 1, "batch_size": 8, "learning_rate": 0.1, "device": "cpu"},
        "cohort": {"size": 6},
    }
    for key, value in changes.items():
        tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
    return RunConfig.model_validate(tree)


PRIVATE = {
    "example": {"privacy": {"unit": "example", "noise_multiplier": 2.0, "expected_batch_size": 5}},
    "client": {"privacy": {"unit": "client", "noise_multiplier": 2.0, "target_delta": 1e-9}},
}


def whole(config: RunConfig, path: Path, **how: Any) -> tuple[Prepared, dict[str, Any]]:
    """A run and its result, all as the command line makes them."""
    prepared = prepare(config, folder=path)
    with RunFolder.create(config, path) as folder:
        keeper = FolderObserver(prepared, folder)
        outcome = execute(prepared, folder=folder, observer=keeper, **how)
        keeper.close()
        return prepared, write_results(prepared, outcome, folder, seconds=0.0, comparison=None)


class TestRun:
    """Ten million clients, six of them a round."""

    @pytest.mark.parametrize("sampling", ["uniform", "balanced", "cyclic"])
    def test_makes_no_more_clients_than_it_asks_and_lists(
        self, tmp_path: Path, sampling: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each client of a cohort when it trains, and each that the result tells of."""
        made: list[int] = []
        drawn = Population.client

        def client(self: Population, index: int) -> ClientData:
            made.append(index)
            return drawn(self, index)

        monkeypatch.setattr(Population, "client", client)
        _, result = whole(configuration(cohort={"sampling": sampling}), tmp_path / "run")
        assert len(made) <= 2 * 6 * 2 + MOST_LISTED
        assert result["population"] == {"clients": MANY, "evaluated": MOST_LISTED, "participated": 12}
        assert len(result["clients"]) == MOST_LISTED
        assert result["course"]["participation"]["clients"] == MANY
        assert (tmp_path / "run" / "report.html").is_file()

    @pytest.mark.parametrize("unit", PRIVATE)
    def test_reads_no_more_ledgers_than_it_writes(self, tmp_path: Path, unit: str) -> None:
        """Rows tell of their cohort, the result of those who are listed; epsilon is what ledgers say."""
        steps = {"training": {"local_steps": 1, "local_epochs": 0}} if unit == "example" else {}
        prepared, result = whole(configuration(**PRIVATE[unit], **steps), tmp_path / "run")
        rows = RunFolder.open(tmp_path / "run").rounds()
        assert [list(row["epsilon"]) for row in rows] == [row["cohort"] for row in rows]
        asked = sorted({name for row in rows for name in row["cohort"]})
        epsilon = result["privacy"]["epsilon"]
        assert {name: epsilon[name] for name in asked} == prepared.spent(asked)
        assert set(epsilon) == set(result["clients"])
        assert max(epsilon.values()) == max(value for row in rows for value in row["epsilon"].values()) > 0
        assert set(result["privacy"]["examples_epsilon"]) == set(result["clients"])

    def test_goes_on_after_a_stop_as_if_there_had_been_none(self, tmp_path: Path) -> None:
        """To the byte, also where cohorts depend on who took part before."""
        config = configuration(rounds=4, cohort={"sampling": "balanced"})
        _, expected = whole(config, tmp_path / "whole")
        run = tmp_path / "run"
        with pytest.raises(KeyboardInterrupt), RunFolder.create(config, run) as folder:
            execute(prepare(config, folder=run), folder=folder, observer=_Stopping(prepare(config, folder=run), folder))
        with RunFolder.resume(run) as folder:
            prepared = prepare(config, folder=run)
            keeper = FolderObserver(prepared, folder)
            outcome = execute(prepared, folder=folder, observer=keeper)
            keeper.close()
            result = write_results(prepared, outcome, folder, seconds=0.0, comparison=None)
        assert (run / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
        for key in ("accuracy", "clients", "population", "course"):
            assert json.dumps(result[key]) == json.dumps(expected[key])


class _Stopping(FolderObserver):
    """Ends a run at its third round."""

    def round_started(self, server_round: int, cohort: list[str]) -> None:
        if server_round == 3:
            raise KeyboardInterrupt


class TestListed:
    """Whom a result tells of."""

    @given(st.integers(1, 60), st.sets(st.integers(0, 59)), st.integers(1, 30))
    def test_everybody_or_a_fixed_choice_with_those_who_took_part_first(
        self, count: int, took_part: set[int], most: int
    ) -> None:
        """Sorted and distinct; nobody else is listed while somebody who took part is not."""
        names = NumberedNames(count)
        part = {names[i] for i in took_part if i < count}
        found = listed(names, part, most=most)
        if count <= most:
            assert found == list(names)
            return
        assert found == sorted(set(found)) == listed(names, part, most=most)
        assert len(found) <= most
        assert len(part & set(found)) == min(len(part), most)
        assert set(found) <= set(names)

    def test_they_are_evenly_spaced(self) -> None:
        """Among those who took part, and among all others."""
        names = NumberedNames(1_000_000)
        assert [names.place(name) for name in listed(names, set(), most=4)] == [0, 250_000, 500_000, 750_000]
        part = {names[i] for i in range(100, 108)}
        assert [names.place(name) for name in listed(names, part, most=4)] == [100, 102, 104, 106]


class TestBadInput:
    """Clear errors before anything is trained, and a failed reply where only one client is at fault."""

    def test_a_cohort_above_the_population(self, tmp_path: Path) -> None:
        """Refused when the run is prepared, or at the latest by its first round."""
        config = configuration(data={"clients": 5})
        with pytest.raises(ConfigError, match="only 5 clients"):
            execute(prepare(config, folder=tmp_path))

    @pytest.mark.parametrize("partition", ["iid", "size", "dirichlet", "shards"])
    def test_more_clients_than_examples(self, tmp_path: Path, partition: str) -> None:
        """The hint names the partition that has room for them."""
        with pytest.raises(DataError, match="cannot be divided among 2000 clients") as caught:
            prepare(configuration(data={"partition": partition, "clients": 2000}), folder=tmp_path)
        assert "bootstrap" in caught.value.hint

    def test_entities_with_privacy(self, tmp_path: Path) -> None:
        """One patient's rows would be at many clients, and cost at each."""
        (tmp_path / "own.csv").write_text(
            "patient,x,y\n" + "".join(f"p{i % 30},{i},{i % 2}\n" for i in range(120)), encoding="utf-8"
        )
        (tmp_path / "site.toml").write_text(
            '[data.own]\nsource = "csv:own.csv"\nlabel = "y"\nentity = "patient"\n', encoding="utf-8"
        )
        changes = {"data": {"name": "own", "clients": 500}, "training": {"local_steps": 1, "local_epochs": 0}}
        with pytest.raises(DataError, match="own has entities"):
            prepare(configuration(**PRIVATE["example"], **changes), folder=tmp_path, site_file=tmp_path / "site.toml")
        prepared = prepare(configuration(**changes), folder=tmp_path, site_file=tmp_path / "site.toml")
        assert len(prepared.federation.clients) == 500

    def test_a_client_without_examples_fails_and_the_run_goes_on(self, tmp_path: Path) -> None:
        """Where a site's own function makes clients as they are asked for, only they can know."""
        prepared = prepare(configuration(data={"clients": 40}, rounds=1, cohort={"size": 0}), folder=tmp_path)
        sound = prepared.federation.clients

        def client(index: int) -> ClientData:
            made = sound[index]
            none = Examples(inputs=made.train.inputs[:0], targets=torch.empty(0, dtype=torch.int64))
            return ClientData(name=made.name, train=none, test=made.test) if index == 3 else made

        object.__setattr__(prepared.federation, "clients", Population(prepared.federation.names, client))
        keeper = _Fates()
        outcome = execute(prepared, observer=keeper)
        assert outcome.evaluation is not None
        assert [name for name, failure in keeper.seen if failure] == ["client-003"]


class _Fates(FolderObserver):
    """Collects what became of clients."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []

    def round_finished(self, record: Any) -> None:
        """Nothing is kept."""

    def reply_received(self, client: str, failure: Any) -> None:
        self.seen.append((client, failure.slug if failure else ""))
