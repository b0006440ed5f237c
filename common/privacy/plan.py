"""The plan of a private run: one object from which sampler, clipper, noise and ledger take their parameters."""

from __future__ import annotations

from dataclasses import dataclass, replace

from common.config.settings import RunConfig
from common.errors import PrivacyError
from common.privacy.accountant import calibrate_noise, spent_epsilon
from common.privacy.events import PoissonGaussian

RELATION = "add/remove"
"""Neighbouring data sets differ by one example added or removed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrivacyPlan:
    """What one client does with its examples over a whole run, and what that costs. Unit: one training example.

    Attributes:
        run: Digest of the run's configuration.
        noise_multiplier: Noise standard deviation over `max_grad_norm`.
        max_grad_norm: L2 bound on one example's gradient, over all parameters.
        sampling_rate: Poisson rate; public.
        expected_batch_size: Public constant that divides the noised sum.
        local_steps: Steps in each round.
        participations: Most rounds in which one client takes part.
        target_epsilon: What the run may cost; None where the noise was given instead.
        target_delta: The run's delta.
    """

    run: str
    noise_multiplier: float
    max_grad_norm: float
    sampling_rate: float
    expected_batch_size: int
    local_steps: int
    participations: int
    target_epsilon: float | None
    target_delta: float

    def event(self, server_round: int) -> PoissonGaussian:
        """What one round releases."""
        return PoissonGaussian(
            noise_multiplier=self.noise_multiplier,
            sampling_rate=self.sampling_rate,
            steps=self.local_steps,
            run=self.run,
            server_round=server_round,
        )

    def epsilon_after(self, rounds: int) -> float:
        """Epsilon of a client that took part in `rounds` rounds of this run, add/remove relation."""
        if rounds == 0:
            return 0.0
        return spent_epsilon([replace(self.event(1), steps=self.local_steps * rounds)], delta=self.target_delta)

    @property
    def budget(self) -> tuple[float, float]:
        """(epsilon, delta) that this run may not pass at any client."""
        epsilon = self.epsilon_after(self.participations) if self.target_epsilon is None else self.target_epsilon
        return epsilon, self.target_delta


def make_plan(config: RunConfig, *, participations: int, noise_multiplier: float | None = None) -> PrivacyPlan:
    """The plan of a private run; noise is calibrated where the configuration gives a target.

    Args:
        config: A configuration whose privacy unit is `example`.
        participations: Most rounds in which one client takes part.
        noise_multiplier: Noise that was calibrated before, by whoever started the run; None calibrates now.

    Guarantee: With a target, `epsilon_after(participations) <= target_epsilon`.

    Raises:
        PrivacyError: The configuration is not private, the target cannot be reached or is not kept by the given noise,
            or the arguments contradict the configuration: other noise than it gives, more participations than rounds.
    """
    privacy = config.privacy
    if not config.private:
        raise PrivacyError("a run without privacy has no privacy plan", hint="set privacy.unit = 'example'")
    if not 1 <= participations <= config.rounds:
        raise PrivacyError(
            f"{participations} participations in {config.rounds} rounds", hint="a client takes part once a round"
        )
    noise = privacy.noise_multiplier if noise_multiplier is None else noise_multiplier
    if privacy.noise_multiplier is not None and noise != privacy.noise_multiplier:
        raise PrivacyError(
            f"noise {noise} was asked for, the configuration says {privacy.noise_multiplier}",
            hint="leave it to privacy.noise_multiplier",
        )
    if noise is None:
        if privacy.target_epsilon is None:
            raise PrivacyError("neither target_epsilon nor noise_multiplier is set", hint="set privacy.target_epsilon")
        noise = calibrate_noise(
            target_epsilon=privacy.target_epsilon,
            target_delta=privacy.target_delta,
            sampling_rate=privacy.sampling_rate,
            steps=participations * config.training.local_steps,
        )
    plan = PrivacyPlan(
        run=config.digest(),
        noise_multiplier=noise,
        max_grad_norm=privacy.max_grad_norm,
        sampling_rate=privacy.sampling_rate,
        expected_batch_size=privacy.expected_batch_size,
        local_steps=config.training.local_steps,
        participations=participations,
        target_epsilon=privacy.target_epsilon,
        target_delta=privacy.target_delta,
    )
    if privacy.target_epsilon is not None and plan.epsilon_after(participations) > privacy.target_epsilon:
        raise PrivacyError(
            f"noise {noise} does not keep epsilon {privacy.target_epsilon}",
            hint="calibrate it for these participations",
        )
    return plan
