"""A round's noise is paid for first, drawn once, of the right size, and on disk before anybody sees what it hides."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from common.errors import BudgetExhaustedError, FailureCode, LedgerError, PrivacyError, RunError
from common.privacy import MatrixGaussian, PrivacyPlan, SampledGaussian
from common.privacy.noise import GRID_STDDEV
from server import release as module
from server import stored
from server.grids import ClippedSum
from server.release import FOLDER, Releases
from tests.helpers.releasing import DIMENSIONS, MemoryLedger, NoNoise, client_private, fixed_noise, plan_of

FLAT: dict[str, Any] = {}
ADAPTIVE = {"privacy": {"clipping": "adaptive"}}
MATRIX = {"privacy": {"mechanism": "matrix"}, "rounds": 12, "cohort": {"size": 2, "sampling": "cyclic"}}
POISSON = {"cohort": {"size": 3, "sampling": "poisson"}}
KINDS = {"flat": FLAT, "adaptive": ADAPTIVE, "matrix": MATRIX, "poisson": POISSON}
every_kind = pytest.mark.parametrize("kind", KINDS)

CLIENTS = 8


def plan(kind: str = "flat", **changes: Any) -> PrivacyPlan:
    return replace(plan_of(client_private(**KINDS[kind]), CLIENTS), **changes)


def releases(plan: PrivacyPlan, *, folder: Path | None = None, ledger: Any = None, source: Any = None) -> Releases:
    return Releases(
        plan,
        run=plan.run,
        dimensions=DIMENSIONS,
        ledger=ledger or MemoryLedger(),
        noise=lambda _: source or NoNoise(),
        checkpoints=folder,
    )


def total(value: float = 0.0, *, within: float = 0.0, asked: int = CLIENTS) -> ClippedSum:
    return ClippedSum(update=np.full(DIMENSIONS, value), within=within, asked=asked)


def released(given: Releases, server_round: int, value: float = 0.0, **fields: Any) -> NDArray[np.float64]:
    return given.release(server_round, total(value, **fields), cohort=["a"], fates={"a": None}).mean


def check_deviation(values: NDArray[np.float64], expected: float) -> None:
    """Mean and standard deviation of independent normal values: a false alarm once in 10^6, for each of them."""
    assert abs(values.mean()) < 5 * expected / math.sqrt(values.size)
    assert abs((values**2).mean() / expected**2 - 1) < 5 * math.sqrt(2 / values.size)


class TestNoise:
    def drawn(self, plan: PrivacyPlan, rounds: int = 5000) -> NDArray[np.float64]:
        """float64[rounds, d]: the noise in the sums of so many rounds, each the first of a run."""
        ledger, source = MemoryLedger(), fixed_noise(3)
        means = [released(releases(plan, ledger=ledger, source=source), 1, 0.25) for _ in range(rounds)]
        return np.array(means) * plan.denominator - 0.25

    def test_is_on_every_coordinate_of_the_sum_once(self) -> None:
        """Of 5000 releases of the same sum, all eight coordinates vary by the plan's standard deviation, none follows
        another, and no round follows the one before.
        """
        given = plan("poisson")
        noise = self.drawn(given)
        check_deviation(noise, given.noise_stddev)
        for coordinate in noise.T:
            check_deviation(coordinate, given.noise_stddev)
        correlations = np.corrcoef(np.vstack([noise.T, np.roll(noise.T, 1, axis=1)])) - np.eye(16)
        assert np.abs(correlations).max() < 6 / math.sqrt(len(noise))

    @pytest.mark.parametrize("factor", [1 / CLIENTS, 0.9, 2**0.5, 1.1])
    def test_of_another_size_is_refuted(self, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same test fails where noise is divided by the number of clients, drawn twice, or off by a tenth."""
        right = module.noised
        monkeypatch.setattr(
            module,
            "noised",
            lambda values, *, noise_stddev, source: right(values, noise_stddev=noise_stddev * factor, source=source),
        )
        given = plan("poisson")
        noise = self.drawn(given, rounds=2000)
        with pytest.raises(AssertionError):
            check_deviation(noise, given.noise_stddev)

    def test_lies_on_the_grid_that_the_sum_is_rounded_to(self) -> None:
        """The noised sum is a whole number of the noise's steps, so its last bits tell nothing."""
        given = plan("poisson")
        mean = released(releases(given, source=fixed_noise()), 1, math.pi / 10)
        steps = mean * given.denominator / (given.noise_stddev / GRID_STDDEV)
        np.testing.assert_allclose(steps, np.rint(steps), atol=1e-6)

    def test_grows_and_falls_with_the_clipping_norm(self) -> None:
        """At another norm than the first, noise keeps its ratio to what one client can do."""
        given = plan("adaptive")
        noise = []
        for _ in range(2000):
            one = releases(given, source=self.source)
            one.clipping_norm = 0.5 * given.clipping_norm
            noise.append(released(one, 1) * given.denominator)
        check_deviation(np.array(noise), 0.5 * given.noise_stddev)

    source = fixed_noise(5)

    def test_of_the_count_is_the_plans(self) -> None:
        """The share within the norm varies around the truth by the count's noise over the public denominator."""
        given = plan("adaptive")
        assert given.count_noise_stddev is not None
        shares = []
        for _ in range(4000):
            release = releases(given, source=self.source).release(1, total(within=2.0), cohort=[], fates={})
            assert release.within is not None
            shares.append(release.within)
        truth = 0.5 + 2.0 / given.denominator
        check_deviation((np.array(shares) - truth) * given.denominator, given.count_noise_stddev)


class TestDenominator:
    def test_is_the_plans_whoever_answered(self) -> None:
        """The mean is the sum over the expected cohort, not over those asked or those that came."""
        given = plan()
        for asked in (0, 1, 8):
            np.testing.assert_allclose(released(releases(given), 1, 2.0, asked=asked), 2.0 / 8, rtol=1e-5)

    def test_of_nobody_is_noise(self) -> None:
        """An empty round is released and paid for like any other."""
        ledger = MemoryLedger()
        mean = released(releases(plan("poisson"), ledger=ledger, source=fixed_noise()), 1, asked=0)
        assert np.abs(mean).min() > 0
        assert ledger.log == ["reserve 1"]


class TestAdaptiveNorm:
    @pytest.mark.parametrize(("within", "factor"), [(4.0, math.exp(-0.1)), (-4.0, math.exp(0.1)), (0.0, 1.0)])
    def test_follows_the_quantile(self, within: float, factor: float) -> None:
        """With all 8 of 8 within, the norm falls by exp(-eta (1 - gamma)); with none it grows; at the quantile it
        stays.
        """
        given = plan("adaptive")
        one = releases(given)
        released(one, 1, within=within)
        assert one.clipping_norm == pytest.approx(given.clipping_norm * factor, rel=1e-4)

    def test_of_a_round_is_the_one_it_was_asked_with(self) -> None:
        """The release tells the norm that updates were clipped to, and the next round uses the new one."""
        one = releases(plan("adaptive"))
        first = one.release(1, total(within=4.0), cohort=[], fates={})
        second = one.release(2, total(within=4.0), cohort=[], fates={})
        assert first.clipping_norm == 2.0
        assert second.clipping_norm == pytest.approx(2 * math.exp(-0.1), rel=1e-4)

    def test_stays_where_it_does_not_adapt(self) -> None:
        """With flat clipping no count is released, whatever clients claim."""
        one = releases(plan())
        release = one.release(1, total(within=4.0), cohort=[], fates={})
        assert (release.within, one.clipping_norm, one.adaptive) == (None, 2.0, False)

    @pytest.mark.parametrize("denominator", [7, 1000])
    @pytest.mark.parametrize("noise_multiplier", [0.3, 1.1, 17.0])
    def test_moves_by_one_client_no_further_than_half_a_count(self, denominator: int, noise_multiplier: float) -> None:
        """1/2 is a whole number of the count's steps: rounding adds nothing to what a client can do."""
        given = replace(plan("adaptive"), denominator=denominator, noise_multiplier=noise_multiplier)
        assert given.count_noise_stddev is not None
        steps = 0.5 / (given.count_noise_stddev / GRID_STDDEV)
        assert steps == pytest.approx(round(steps), rel=1e-14)
        shares = [
            releases(given).release(1, total(within=w), cohort=[], fates={}).within or 0.0 for w in (1.0, 1.5, 2.0)
        ]
        np.testing.assert_allclose(np.diff(shares) * denominator, 0.5, rtol=1e-9)


class TestCorrelatedNoise:
    def test_comes_out_as_the_matrix_says(self) -> None:
        """Multiplied back by the coefficients, what was released is the same multiple of the sums plus independent
        noise of the plan's standard deviation on each coordinate.
        """
        given = plan("matrix")
        assert len(given.coefficients) > 1
        residues = []
        source = fixed_noise(7)
        for run in range(400):
            one, sums, out = releases(given, source=source), [], []
            for server_round in range(1, given.rounds + 1):
                sums.append(np.full(DIMENSIONS, math.sin(server_round + run)))
                out.append(released(one, server_round, math.sin(server_round + run)) * given.denominator)
            for t in range(given.rounds):
                row = range(min(t + 1, len(given.coefficients)))
                residues.append(sum(given.coefficients[j] * (out[t - j] - sums[t - j]) for j in row))
        noise = np.array(residues)
        check_deviation(noise, given.noise_stddev)
        one, two = noise[:-1].ravel(), noise[1:].ravel()
        assert abs(np.corrcoef(one, two)[0, 1]) < 5 / math.sqrt(one.size)

    def test_is_less_in_the_sum_over_rounds(self) -> None:
        """The model after all rounds has less noise than independent noise of the same privacy would leave."""
        given = plan("matrix")
        source = fixed_noise(9)
        ends = []
        for _ in range(400):
            one = releases(given, source=source)
            ends.append(sum(released(one, t) for t in range(1, given.rounds + 1)) * given.denominator)
        stddev = math.sqrt(given.participations) * given.clipping_norm * math.sqrt(given.rounds)
        assert np.std(np.array(ends)) < 0.75 * stddev

    def test_without_noise_gives_the_sums_back(self) -> None:
        """Encoding, rounding and decoding together change no sum by more than a few steps of the grid."""
        given = plan("matrix")
        one = releases(given)
        for t in range(1, given.rounds + 1):
            mean = released(one, t, t / 3)
            np.testing.assert_allclose(mean * given.denominator, t / 3, atol=8 * given.noise_stddev / GRID_STDDEV)


class TestLedger:
    @every_kind
    def test_is_written_before_noise_is_drawn(self, kind: str) -> None:
        """A reservation comes before each round's first draw."""
        log: list[str] = []

        class Watched(NoNoise):
            def integers(self, count: int) -> Any:
                log.append("draw")
                return super().integers(count)

        given = plan(kind)
        one = releases(given, ledger=MemoryLedger(log), source=Watched())
        for t in (1, 2, 3):
            released(one, t)
        draws = ["draw"] * (2 if kind == "adaptive" else 1)
        assert log == ["reserve 1", *draws, "reserve 2", *draws, "reserve 3", *draws]

    def test_records_what_the_plan_says(self) -> None:
        """Rounds over Poisson cohorts are releases each; all rounds of another run are one, each on record."""
        for kind, expected in (("poisson", SampledGaussian), ("flat", MatrixGaussian), ("matrix", MatrixGaussian)):
            ledger, given = MemoryLedger(), plan(kind)
            released(releases(given, ledger=ledger), 1)
            assert ledger.events() == [given.central_event(1)]
            assert isinstance(ledger.events()[0], expected)

    @pytest.mark.parametrize("error", [BudgetExhaustedError("spent"), LedgerError("no disk")])
    @every_kind
    def test_that_refuses_ends_it_before_any_draw(self, kind: str, error: Exception, tmp_path: Path) -> None:
        """Where nothing could be reserved nothing is drawn, kept or changed."""

        class Refusing(MemoryLedger):
            def reserve(self, event: Any, *, planned: int) -> float:
                raise error

        class Untouched(NoNoise):
            def integers(self, count: int) -> Any:
                pytest.fail("noise was drawn")

        one = releases(plan(kind), folder=tmp_path, ledger=Refusing(), source=Untouched())
        before = {name: values.tobytes() for name, values in one.state().items()}
        with pytest.raises(type(error)):
            released(one, 1)
        assert list(tmp_path.rglob("*.safetensors")) == []
        assert {name: values.tobytes() for name, values in one.state().items()} == before

    def test_is_needed(self) -> None:
        """Noise that nobody counts is not added."""
        with pytest.raises(PrivacyError, match="has no ledger"):
            Releases(plan(), run="r", dimensions=DIMENSIONS, ledger=None)

    def test_is_not_taken_for_paid_by_an_earlier_run(self) -> None:
        """A second run of the same configuration is a release of its own: it does not go on the first one's event."""
        ledger, given = MemoryLedger(), plan()
        released(releases(given, ledger=ledger), 1)
        with pytest.raises(BudgetExhaustedError, match="round 1 cannot be released") as raised:
            released(releases(given, ledger=ledger), 1)
        assert "name" in raised.value.hint

    def test_plan_of_a_smaller_model_is_refused(self) -> None:
        """Rounding was counted for so many parameters; with more the sensitivity would be larger."""
        with pytest.raises(PrivacyError, match="covers 7 parameters"):
            releases(plan(dimensions=7))


class TestKept:
    @every_kind
    def test_release_is_found_again_and_continues_the_same(self, kind: str, tmp_path: Path) -> None:
        """What a process that stopped had released is what the next one uses: the same bytes, no draw, no reservation,
        and the same noise after it.
        """
        given = plan(kind)
        source, other = fixed_noise(1), fixed_noise(1)
        whole = releases(given, source=other)
        one = releases(given, folder=tmp_path, source=source)
        for t in (1, 2):
            released(one, t, t / 5)
        state = one.state()
        stopped = one.release(3, total(0.6, within=1.5), cohort=["a", "b"], fates={"a": None, "b": LOST})

        ledger = MemoryLedger()
        again = releases(given, folder=tmp_path, ledger=ledger, source=source)
        again.restore(state, server_round=2)
        found = again.stored(3)
        assert found is not None
        assert found.mean.tobytes() == stopped.mean.tobytes()
        assert (found.cohort, found.fates) == (["a", "b"], {"a": None, "b": LOST})
        assert (found.within, found.clipping_norm) == (stopped.within, stopped.clipping_norm)
        assert ledger.log == []

        for t in (1, 2):
            released(whole, t, t / 5)
        whole.release(3, total(0.6, within=1.5), cohort=[], fates={})
        assert released(again, 4, 0.8).tobytes() == released(whole, 4, 0.8).tobytes()
        assert again.clipping_norm == whole.clipping_norm

    def test_release_of_another_round_is_none(self, tmp_path: Path) -> None:
        """Only the very round's release stands for it."""
        one = releases(plan(), folder=tmp_path)
        released(one, 1)
        again = releases(plan(), folder=tmp_path)
        again.restore(one.state(), server_round=1)
        assert again.stored(2) is None
        assert releases(plan()).stored(1) is None

    def test_damaged_release_ends_the_run(self, tmp_path: Path) -> None:
        """It is not drawn again: its round has been released."""
        released(releases(plan(), folder=tmp_path), 1)
        (path,) = (tmp_path / FOLDER).glob("round-00001*")
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(RunError, match="damaged"):
            releases(plan(), folder=tmp_path).stored(1)

    def test_release_that_does_not_continue_the_checkpoint_is_refused(self, tmp_path: Path) -> None:
        """A release from after an older checkpoint than the one loaded would mix two courses."""
        given = plan("matrix")
        one = releases(given, folder=tmp_path)
        released(one, 1)
        released(one, 2)
        with pytest.raises(RunError, match="does not continue"):
            releases(given, folder=tmp_path).stored(2)

    @every_kind
    def test_state_has_to_be_that_of_the_round(self, kind: str) -> None:
        """A checkpoint without this run's noise is refused, and nothing changes."""
        given = plan(kind)
        one = releases(given)
        released(one, 1)
        state = one.state()
        fresh = releases(given)
        for wrong in ({}, {**state, "sum/9": np.zeros(1)}, {"clipping_norm": state["clipping_norm"], "x": np.ones(1)}):
            with pytest.raises(RunError, match="does not hold this run's noise"):
                fresh.restore(wrong, server_round=1)
        fresh.restore(state, server_round=1)

    def test_state_of_independent_noise_has_no_sums(self) -> None:
        """Only correlated noise keeps what is secret, and no more rounds of it than it needs."""
        one = releases(plan())
        released(one, 1)
        assert list(one.state()) == ["clipping_norm"]
        given = plan("matrix")
        one = releases(given)
        for t in range(1, 8):
            released(one, t)
        assert len(one.state()) == 1 + 2 * (len(given.coefficients) - 1)

    def test_full_disk_releases_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where a release cannot be kept nobody is shown it, and the noise's state is what it was."""
        one = releases(plan("matrix"), folder=tmp_path)
        released(one, 1)
        before = {name: values.tobytes() for name, values in one.state().items()}

        def full(*_: Any) -> None:
            raise RunError("disk full")

        monkeypatch.setattr(stored, "save_checkpoint", full)
        with pytest.raises(RunError, match="disk full"):
            released(one, 2)
        assert {name: values.tobytes() for name, values in one.state().items()} == before


LOST = FailureCode.CLIENT_LOST
