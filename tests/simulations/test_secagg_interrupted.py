"""A run under secure aggregation that is stopped goes on: keys are made anew, and no update is masked twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.config import RunConfig
from server.coordinator import Coordinator
from tests.helpers.coordinating import StoppedError, Stopping
from tests.helpers.runs import as_bytes, rows, run
from tests.simulations.test_secagg import furthest, secure


def config(**changes: Any) -> RunConfig:
    return secure(rounds=4, strategy={"weighting": "equal"}, **changes)


@pytest.mark.parametrize("place", ["started", "recorded"])
@pytest.mark.parametrize("cohort", [{}, {"size": 3}], ids=["everybody", "cohorts"])
def test_between_rounds_no_bit_changes(place: str, cohort: dict[str, Any], tmp_path: Path) -> None:
    """Stopped before a round, or after its record and before its checkpoint: then the opened sum is used again."""
    whole, _ = run(tmp_path / "whole", config(cohort=cohort))
    with pytest.raises(StoppedError):
        run(tmp_path / "run", config(cohort=cohort), observer=Stopping(place, 3))
    again, log = run(tmp_path / "run", config(cohort=cohort))
    assert as_bytes(dict(again.arrays)) == as_bytes(dict(whole.arrays))
    assert rows(tmp_path / "run") == [1, 2, 3, 4]
    assert all(not failures for failures in log.failures)


def test_within_a_round_it_goes_on_from_the_same_model_or_next_to_it(tmp_path: Path) -> None:
    """Stopped while updates come in: sites that hold to their journals do not train on that very model again."""
    whole, _ = run(tmp_path / "whole", config())
    with pytest.raises(StoppedError):
        run(tmp_path / "run", config(), observer=Stopping("reply", 3))
    again, _ = run(tmp_path / "run", config())
    assert furthest(dict(again.arrays), dict(whole.arrays)) <= 1e-5
    assert rows(tmp_path / "run") == [1, 2, 3, 4]


def test_an_opened_sum_outlasts_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after the sum is open and before the strategy used it: the clients are not asked again."""

    def stop(*_: object) -> None:
        raise StoppedError

    whole, _ = run(tmp_path / "whole", config())
    with monkeypatch.context() as patch:
        real, calls = Coordinator._aggregate, iter(range(100))

        def aggregate(self: Coordinator, *words: Any) -> Any:
            return stop() if next(calls) == 2 else real(self, *words)

        patch.setattr(Coordinator, "_aggregate", aggregate)
        with pytest.raises(StoppedError):
            run(tmp_path / "run", config())
    again, log = run(tmp_path / "run", config())
    assert as_bytes(dict(again.arrays)) == as_bytes(dict(whole.arrays))
    assert log.records[0].server_round == 3
    assert log.records[0].survivors == [f"client-{i:02d}" for i in range(4)]
