"""Denoising: the Gaussian steps by which a head turns noise into a continuous token, and how many calls they take.

A step goes from x to N(mean, std**2), diagonal. The network's output for x is its *guess*, from which `kernel` computes
the step in closed form. A guess made at another x gives the kernel of a draft without a network call. The guess is the
clean token and not the noise, because it changes less from step to step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from visar.engine.finite import is_finite
from visar.errors import VisarError


class Denoiser(ABC):
    """`steps` denoising steps over tokens of `dim` numbers; step 0 is the noisiest.

    `calls` counts the sequential calls of the network, `evaluations` the rows in them; the unconditional batch is not
    counted separately. At `temperature` 0 no step adds noise. The last step adds noise only with `last_noise`. `finite`
    says, on the device, whether all guesses so far were.
    """

    def __init__(self, steps: int, dim: int, temperature: float = 1.0, last_noise: bool = False):
        self.steps, self.dim, self.temperature, self.last_noise = steps, dim, float(temperature), last_noise
        self.calls = self.evaluations = 0
        self.finite = torch.ones((), dtype=torch.bool)

    def evaluate(self, x: Tensor, step: Tensor, condition: Tensor) -> Tensor:
        """The network's guess [R, G] for x [R, d] at the steps [R] under conditions [R, K]. Counted."""
        self.calls += 1
        self.evaluations += len(x)
        guess = self.captured("guess", self.guess)(x, step, condition)
        self.finite = self.finite.to(guess.device) & is_finite(guess)
        return guess

    @abstractmethod
    def guess(self, x: Tensor, step: Tensor, condition: Tensor) -> Tensor:
        """`evaluate` without the count."""

    def denoise(self, condition: Tensor, start: Tensor, normals: Tensor) -> Tensor:
        """Tokens [R, d] after all steps, for conditions [R, K], `start` [R, d] and `normals` [R, T, d]."""
        self.calls += self.steps
        self.evaluations += self.steps * len(start)
        return self.captured("denoise", self._denoise)(condition, start, normals)

    def _denoise(self, condition: Tensor, x: Tensor, normals: Tensor) -> Tensor:
        for i in range(self.steps):
            step = torch.full((len(x),), i, device=x.device)
            mean, std = self.kernel(x, step, self.guess(x, step, condition))
            x = mean + std * normals[:, i]
        return x

    def captured(self, what: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The function as a CUDA graph, where a subclass supports that."""
        return function

    @abstractmethod
    def kernel(self, x: Tensor, step: Tensor, guess: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, both [R, d], of the step from x; std may be 0 in the last."""

    def draft(self, x: Tensor, steps: Tensor, guess: Tensor, normals: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The states after x [R, d] under one frozen guess, their means and standard deviations, each [R, n, d].

        `steps` [R, n] are successive steps and `normals` [R, n, d] their noise.
        """
        states, means, stds = [], [], []
        for i in range(steps.shape[1]):
            mean, std = self.kernel(x, steps[:, i], guess)
            x = mean + std * normals[:, i]
            states.append(x)
            means.append(mean)
            stds.append(std)
        return torch.stack(states, 1), torch.stack(means, 1), torch.stack(stds, 1)


class FlowDenoiser(Denoiser):
    """A rectified-flow head with Euler-Maruyama steps, as in SphereAR and NextStep-1; the guess is the clean token.

    x at time t is (1 - t) noise + t clean, and `velocity(x, t, condition)` predicts clean - noise. Steps have equal
    length and noise of standard deviation temperature * sqrt(2 (1 - t) dt); a step of length `last` without noise
    ends the sequence. Raises `VisarError` for fewer than 2 steps.
    """

    def __init__(
        self,
        velocity: Callable[[Tensor, Tensor, Tensor], Tensor],
        dim: int,
        steps: int = 50,
        temperature: float = 1.0,
        last: float = 0.04,
        device: torch.device | str = "cpu",
    ):
        super().__init__(steps, dim, temperature)
        if steps < 2:
            raise VisarError(f"A flow head takes 2 or more steps, not {steps}.")
        self.velocity = velocity
        self.at = torch.cat([torch.linspace(0, 1 - last, steps)[:, None], torch.ones(1, 1)]).to(device)
        length = self.at.diff(dim=0)
        self.std = (2 * (1 - self.at[:-1]) * length).sqrt() * temperature
        self.std[-1] = 0

    def guess(self, x: Tensor, step: Tensor, condition: Tensor) -> Tensor:
        t = self.at[step]
        return x + (1 - t) * self.velocity(x, t, condition)

    def kernel(self, x: Tensor, step: Tensor, guess: Tensor) -> tuple[Tensor, Tensor]:
        t, dt = self.at[step], self.at[step + 1] - self.at[step]
        v = (guess - x) / (1 - t)
        drift = torch.where(step[:, None] == self.steps - 1, v, (1 + t) * v - x)
        return x + drift * dt, self.std[step].expand_as(x)
