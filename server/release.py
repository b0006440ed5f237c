"""What the coordinator releases under client-level privacy: a noised mean update a round, drawn once, paid for first.

One round goes: the ledger reserves, noise is drawn, the release is written to disk, the strategy steps, the record is
told, the checkpoint is written, and only with the next round's messages does the new model reach a client.

**A process may stop at any instant.** What it leaves behind is one of three things.

- No release on disk. If noise was drawn, it was in memory only, and nothing that depends on it left the process:
  neither a model nor a figure. If the round is not in the ledger, it is made again. If it is, nobody can tell that
  no release of it was stored and then removed. Over Poisson cohorts, where each round is paid for by itself, it is
  made and paid for again, and the run ends a round early, with the model so far; an event of the whole run does not
  cover a second release of a round, and the run ends there.
- The round's release on disk, but no checkpoint of it. Figures of the new model may be known by now, for the round's
  record is told before its checkpoint. The round is made again *from the stored release*: no client is asked, no noise
  drawn, nothing reserved, and strategy and model come out as they were, to the bit. A second noised sum of the same
  round would be a second release, which an event of the whole run does not cover.
- The checkpoint. The stored release is of the past.

So a stored release that is damaged ends the run: nothing may take its place.

**Nothing depends on who answered but the sum.** The divisor is the plan's. A round with few survivors or none, and an
empty cohort's, is released like any other: leaving the model as it was would tell, without noise, on which side of a
threshold their number lies. That is why `cohort.min_survivors` does not apply here. Only the operator, who is trusted,
is told at the end if no update came in any round.

**Neighbours.** Who the clients are is public, and so is a fixed schedule. Two runs are neighbours if in one of them all
updates of one client are zero; over Poisson cohorts that is the same as adding or removing the client.

**What is secret.** Correlated noise is added to sums over several rounds, so the last rounds' sums are kept as they
are: checkpoints and stored releases of such a run are as sensitive as the updates. So is every file with the names of a
Poisson cohort.

Source: McMahan et al. 2018 (arXiv 1710.06963); Andrew et al. 2021 (arXiv 1905.03871); Kairouz et al. 2021 (arXiv
2103.00039) and what `common.privacy.matrix` names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from common.errors import BudgetExhaustedError, FailureCode, PrivacyError, RunError
from common.privacy import Ledger, PrivacyPlan, matrix
from common.privacy.clipping import adapted
from common.privacy.noise import NoiseSource, SecureNoise, noised
from server.cohort import NoiseByRound
from server.grids.clipped_sum import ClippedSum, check_rounding
from server.stored import StoredRounds

Arrays = Mapping[str, NDArray[Any]]
Vector = NDArray[np.float64]

_RELEASED, _SUM, _MEAN = "released", "sum", "mean"
FOLDER: Final = "released"
"""Of the stored releases, inside the folder of checkpoints."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Release:
    """What came of one round. All of it may be known, but for who was asked and answered.

    Attributes:
        server_round: The round.
        mean: float64[d]: the noised sum over the public denominator.
        clipping_norm: The norm that updates were clipped to.
        within: Noised share of updates within it, or None where clipping does not adapt.
        cohort: Who was asked.
        fates: Why a client's update does not count, or None where it does; clients that were asked.
    """

    server_round: int
    mean: Vector
    clipping_norm: float
    within: float | None
    cohort: list[str]
    fates: dict[str, FailureCode | None]


def _secure() -> NoiseByRound:
    source = SecureNoise()
    return lambda _: source


class Releases:
    """The noise of one run under client-level privacy, and what has been released.

    Guarantee:
        Every release was reserved in the ledger before its noise was drawn, and is on disk before anybody sees it.
        Noise of standard deviation `plan.noise_stddev`, times the present over the first clipping norm, is added once
        to each coordinate of the sum, or of what the plan's coefficients make of it and earlier sums.
    """

    def __init__(
        self,
        plan: PrivacyPlan,
        *,
        run: str,
        dimensions: int,
        ledger: Ledger | None,
        noise: NoiseByRound | None = None,
        checkpoints: Path | None = None,
    ) -> None:
        """Prepare a run.

        Args:
            plan: The plan, of unit `client`.
            run: Digest of the run's configuration.
            dimensions: Number of trainable parameters of the model.
            ledger: The coordinator's own record of what it releases.
            noise: Where each round's noise comes from; None takes one fresh secure source for all.
            checkpoints: The run's folder of checkpoints, or None to keep nothing; such a run cannot be resumed.

        Raises:
            PrivacyError: There is no ledger, or the plan was made for a smaller model.
        """
        if ledger is None:
            raise PrivacyError(
                "the coordinator adds the noise but has no ledger", hint="give the run a ledger of the coordinator's"
            )
        if dimensions > plan.dimensions:
            raise PrivacyError(
                f"the plan covers {plan.dimensions} parameters, the model has {dimensions}",
                hint="make the plan for the model that is trained",
            )
        self.clipping_norm = plan.clipping_norm
        self._plan, self._ledger = plan, ledger
        self._noise = noise or _secure()
        self._store = StoredRounds(None if checkpoints is None else checkpoints / FOLDER, run=run)
        self._sums: list[Vector] = []
        self._released: list[Vector] = []

    @property
    def adaptive(self) -> bool:
        """Whether clients have to say if their update lay within the norm."""
        return self._plan.clipping == "adaptive"

    def release(
        self, server_round: int, total: ClippedSum, *, cohort: Sequence[str], fates: Mapping[str, FailureCode | None]
    ) -> Release:
        """Reserve, draw, keep: the round's one release.

        Args:
            server_round: The round; each is released once, in their order.
            total: The sum of its clipped updates.
            cohort: Who was asked.
            fates: Of each of them.

        Raises:
            BudgetExhaustedError: The ledger's budget does not allow it. No noise was drawn.
            LedgerError, RunError: Ledger or disk failed. Nothing may be released, and nothing was.
            PrivacyError: So many clients were asked that rounding could pass what the plan allows for.
        """
        plan, norm = self._plan, self.clipping_norm
        check_rounding(plan.coefficients, rounds=plan.rounds, asked=total.asked)
        self._reserve(server_round)
        source = self._noise(server_round)
        encoded = noised(
            matrix.encode(plan.coefficients, total.update, self._sums),
            noise_stddev=plan.noise_stddev * (norm / plan.clipping_norm),
            source=source,
        )
        released = matrix.decode(plan.coefficients, encoded, self._released)
        within = self._share_within(total, source)
        release = Release(
            server_round=server_round,
            mean=released / plan.denominator,
            clipping_norm=norm,
            within=within,
            cohort=list(cohort),
            fates=dict(fates),
        )
        self._keep(release, {_RELEASED: released, _SUM: total.update} if self._memory else {})
        self._commit(release, total.update, released)
        return release

    def stored(self, server_round: int) -> Release | None:
        """The round's release, if it took place before this process began; it takes effect as if made now.

        Raises:
            RunError: It is damaged, or of another configuration.
        """
        found = self._store.find(server_round)
        if found is None:
            return None
        release = Release(
            server_round=server_round,
            mean=np.asarray(found.arrays[_MEAN]),
            clipping_norm=found.facts["clipping_norm"],
            within=found.facts["within"],
            cohort=found.cohort,
            fates=found.fates,
        )
        if release.clipping_norm != self.clipping_norm or len(self._sums) != min(server_round - 1, self._memory):
            raise RunError(
                f"the stored release of round {server_round} does not continue the checkpoint", hint="start a new run"
            )
        empty = np.zeros(0)
        self._commit(release, np.asarray(found.noise.get(_SUM, empty)), np.asarray(found.noise.get(_RELEASED, empty)))
        return release

    def state(self) -> dict[str, NDArray[Any]]:
        """What a checkpoint has to keep: the present clipping norm; with correlated noise also earlier sums, which are
        secret.
        """
        state: dict[str, NDArray[Any]] = {"clipping_norm": np.asarray(self.clipping_norm)}
        for name, past in ((_SUM, self._sums), (_RELEASED, self._released)):
            state |= {f"{name}/{i}": values for i, values in enumerate(past)}
        return state

    def restore(self, state: Arrays, *, server_round: int) -> None:
        """Continue after a checkpoint, with the noise that was drawn before it.

        Raises:
            RunError: The state is not that of `server_round` rounds of this plan. Nothing is changed.
        """
        kept = min(server_round, self._memory)
        names = [[f"{name}/{i}" for i in range(kept)] for name in (_SUM, _RELEASED)]
        if state.keys() != {"clipping_norm", *names[0], *names[1]}:
            raise RunError(
                "the checkpoint does not hold this run's noise",
                hint="resume with the configuration that wrote it, or start a new run",
            )
        self.clipping_norm = float(state["clipping_norm"])
        self._sums, self._released = ([np.asarray(state[name]) for name in part] for part in names)

    @property
    def _memory(self) -> int:
        """How many earlier rounds a round's noise depends on."""
        return len(self._plan.coefficients) - 1

    def _reserve(self, server_round: int) -> None:
        """Pay first. A round that is in the ledger already has no second release: its first was stored, or is lost."""
        plan = self._plan
        try:
            self._ledger.reserve(plan.central_event(server_round), planned=plan.rounds)
        except BudgetExhaustedError as e:
            raise BudgetExhaustedError(
                f"round {server_round} cannot be released: {e}",
                hint="a round that was paid for but not stored is lost; a run of the same configuration needs another "
                "`name`",
            ) from e

    def _share_within(self, total: ClippedSum, source: NoiseSource) -> float | None:
        """The noised share of updates within the norm, or None."""
        stddev = self._plan.count_noise_stddev
        if stddev is None:
            return None
        count = noised(np.array([total.within]), noise_stddev=stddev, source=source)
        return float(count[0]) / self._plan.denominator + 0.5

    def _keep(self, release: Release, noise: Arrays) -> None:
        """Write a release to disk before anybody sees it."""
        self._store.keep(
            release.server_round,
            arrays={_MEAN: release.mean},
            noise=noise,
            facts={"clipping_norm": release.clipping_norm, "within": release.within},
            cohort=release.cohort,
            fates=release.fates,
        )

    def _commit(self, release: Release, total: Vector, released: Vector) -> None:
        """What a release changes for the rounds after it."""
        plan = self._plan
        if self._memory:
            self._sums = [*self._sums, total][-self._memory :]
            self._released = [*self._released, released][-self._memory :]
        if release.within is not None:
            self.clipping_norm = adapted(
                self.clipping_norm,
                share_within=release.within,
                target_quantile=plan.target_quantile,
                learning_rate=plan.clipping_learning_rate,
            )
