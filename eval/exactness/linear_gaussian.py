"""A masked model of continuous tokens whose sampler's joint distribution is known in closed form.

Its head is the best denoiser of a Gaussian: told m, it guesses the clean token m + k (x - root m). So every head step
is affine in x with a variance of its own, and a token given m is Gaussian. What the model says of a position is an
affine function of the known tokens. So whole images are Gaussian as well, for any order, plan, guidance and
temperature.

`World.session` gives the session, in which `MARSession`, `DiffusionDenoiser` and `FlowDenoiser` are real.
`World.distribution` gives mean and covariance by linear algebra in float64, from formulas of its own: it shares no code
with the engine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from visar.engine.denoising import Denoiser, FlowDenoiser
from visar.engine.layout import Layout
from visar.families.mar.session import MARSession

WIDE, NARROW = 1.0, 0.0064  # units of tokens: as wide as noise, or as the last head step's own noise
FLOW_LAST = 0.04  # length of a flow's last step
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Setting:
    """What the distribution of a decoding depends on besides the model.

    `head` is "diffusion" or "flow"; `latest` is the noisiest training step that is used.
    """

    passes: int
    head_steps: int = 8
    temperature: float = 1.0
    scale: float = 1.0
    guidance: str = "linear"
    last_noise: bool = False
    head: str = "diffusion"
    latest: int = 999


@dataclass(frozen=True)
class GaussianDistribution:
    """`mean` [D] and `covariance` [D, D] of the free tokens' numbers, in the order in which they are sampled."""

    mean: Array
    covariance: Array

    def whiten(self, x: Array) -> Array:
        """Independent standard normals [n, D] for samples [n, D]: each number's deviation given those before it.

        The transform of Rosenblatt 1952; the normal distribution's function of it gives the uniforms of a PIT test.
        """
        return np.linalg.solve(np.linalg.cholesky(self.covariance), (x - self.mean).T).T


@dataclass(frozen=True)
class World:
    """N positions, tokens of d numbers, `classes` conditions and one more for none.

    Of position i it says base[class, i] + sum over known j of (pull[h, i, j] x_j + known[h, i, j]), with h = 0 under a
    condition and 1 without; the head turns that into m by the affine map (`turn`, `shift`). Clean tokens have variance
    `variance` for the head. Its log variance of a step is interpolated by level[h], or `final` at the last step, and
    moves from step to step by `swing`.
    """

    base: Array  # [classes + 1, N, d]
    pull: Array  # [2, N, N, d, d]
    known: Array  # [2, N, N, d]
    turn: Array  # [d, d]
    shift: Array  # [d]
    variance: Array  # [d]
    level: Array  # [2, d]
    final: Array  # [d]
    swing: float

    @staticmethod
    def random(length: int, dim: int = 2, unit: float = WIDE, swing: float = 0.0, seed: int = 7) -> World:
        """Tokens a few `unit`s apart, each depending on all that are known.

        Where they are narrow, the step before the last has little noise: that of the last is then most of a token's.
        """
        rng = np.random.default_rng(seed)
        low, high = (-0.85, -0.7) if unit <= NARROW else (0.6, 0.9)
        pull = rng.normal(size=(2, length, length, dim, dim)) * (0.8 / length**0.5)
        pull[1] = pull[0] + 0.4 * (pull[1] - pull[0])
        return World(
            base=rng.normal(size=(3, length, dim)) * 2 * unit + 4 * unit,
            pull=pull,
            known=rng.normal(size=(2, length, length, dim)) * unit / 2,
            turn=np.eye(dim) + rng.normal(size=(dim, dim)) * 0.2,
            shift=rng.normal(size=dim) * unit,
            variance=unit**2 * np.linspace(1, 0.6, dim),
            level=np.stack([np.linspace(low, high, dim), np.full(dim, -0.4)]),
            final=np.linspace(2, 4, dim),
            swing=swing,
        )

    def disturbed(self, unit: float, amount: float = 1.0, seed: int = 99) -> World:
        """A draft model: everything that this one says, with noise on it, and other variances."""
        rng = np.random.default_rng(seed)

        def noisy(x: Array, size: float) -> Array:
            return x + amount * size * rng.normal(size=x.shape)

        return replace(
            self, base=noisy(self.base, 0.7 * unit), pull=noisy(self.pull, 0.08), known=noisy(self.known, unit / 10),
            variance=self.variance * (1 + 0.4 * amount), level=self.level - 0.2 * amount, final=self.final - amount,
        )  # fmt: skip

    @property
    def length(self) -> int:
        return self.base.shape[1]

    @property
    def dim(self) -> int:
        return self.base.shape[2]

    def interpolation(self, time: Array) -> Array:
        """The interpolation of the log variance at training steps [n], with and without a condition, [2, n, d]."""
        moved = self.level[:, None] + self.swing * np.cos(time / 90 + np.arange(self.dim)[:, None]).T
        return np.where(time[:, None] == 0, self.final, moved)

    def token_distribution(self, setting: Setting) -> tuple[Array, Array]:
        """A token given m is N(gain * m, variance), both [d]: the recursion over the head's steps."""
        gain, variance = np.zeros(self.dim), np.ones(self.dim)
        for slope, pull, std in (flow_steps if setting.head == "flow" else diffusion_steps)(self, setting):
            gain, variance = slope * gain + pull, slope**2 * variance + (setting.temperature * std) ** 2
        return gain, variance

    def distribution(self, setting: Setting, order: Array, condition: int, given: Array) -> GaussianDistribution:
        """The joint distribution of the tokens at order[m:], for the tokens `given` [m, d] at order[:m].

        With x = L x + c + e over all numbers, L strictly lower triangular in the order of sampling and e the tokens'
        own noise of variance V: mean (I - L)^-1 c, covariance (I - L)^-1 V (I - L)^-T.
        """
        n, d = self.length, self.dim
        gain, variance = self.token_distribution(setting)
        pull, c, noise = np.zeros((n, d, n, d)), np.zeros((n, d)), np.zeros((n, d))
        c[order[: len(given)]] = given
        done, hidden = len(given), n - len(given)
        for i in range(setting.passes):
            cosine = np.cos(np.pi / 2 * (i + 1) / setting.passes)
            left = max(1, min(hidden - 1, int(np.floor((n - len(given)) * cosine))))
            ask = order[done : done + (hidden if i == setting.passes - 1 else hidden - left)]
            share = (n - left) / n if setting.guidance == "linear" else 1
            scale = 1 + (setting.scale - 1) * share
            for at in ask:
                said = scale * self.base[condition, at] + (1 - scale) * self.base[-1, at]
                for j in order[:done]:
                    said = said + scale * self.known[0, at, j] + (1 - scale) * self.known[1, at, j]
                    both = scale * self.pull[0, at, j] + (1 - scale) * self.pull[1, at, j]
                    pull[at, :, j] = gain[:, None] * (self.turn @ both)
                c[at] = gain * (self.turn @ said + self.shift)
                noise[at] = variance
            done, hidden = done + len(ask), left
        inverse = np.linalg.inv(np.eye(n * d) - pull.reshape(n * d, n * d))
        free = (order[len(given) :, None] * d + np.arange(d)).ravel()
        covariance = inverse @ np.diag(noise.ravel()) @ inverse.T
        return GaussianDistribution((inverse @ c.ravel())[free], covariance[np.ix_(free, free)])

    def session(self, setting: Setting, condition: Tensor, order: Tensor, given: Tensor | None = None) -> MARSession:
        """The engine's session of this model, for conditions [B] and orders [B, N]."""
        kind = FlowSession if setting.head == "flow" else MARSession
        made = kind(LinearMAR(self), condition, order, setting.scale, setting.guidance, given)  # type: ignore[arg-type]
        made.layout = Layout(2, made.length // 2)
        return made


def alphas_bar() -> Array:
    """The cosine schedule's share of signal at each training step, [1000]."""
    at = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.cumprod(np.maximum(at[1:] / at[:-1], 0.001))


def diffusion_steps(world: World, setting: Setting) -> list[tuple[Array, Array, Array]]:
    """Of every step x -> slope x + pull m + std noise, from the noisiest: slope, pull and std, each [d]."""
    time = np.round(np.arange(setting.head_steps) * 999 / (setting.head_steps - 1)).astype(int)
    time = np.unique(np.minimum(time, setting.latest))
    now = alphas_bar()[time]
    before = np.append(1.0, now[:-1])
    beta = 1 - now / before
    posterior = beta * (1 - before) / (1 - now)
    posterior[0] = posterior[1]
    out = []
    for i in range(len(time)):
        root = now[i] ** 0.5
        k = world.variance * root / (world.variance * now[i] + 1 - now[i])  # of the clean token given x
        of_clean = beta[i] * before[i] ** 0.5 / (1 - now[i])
        of_noisy = (1 - before[i]) * (1 - beta[i]) ** 0.5 / (1 - now[i])
        share = (
            world.interpolation(time[i : i + 1])[0, 0] + 1
        ) / 2  # guidance takes the variance of the conditional batch
        std = np.exp(0.5 * (share * np.log(beta[i]) + (1 - share) * np.log(posterior[i])))
        out.append((of_clean * k + of_noisy, of_clean * (1 - k * root), std if i or setting.last_noise else 0 * std))
    return out[::-1]


def flow_steps(world: World, setting: Setting) -> list[tuple[Array, Array, Array]]:
    """The same for a rectified flow by Euler-Maruyama."""
    times = np.append(np.linspace(0, 1 - FLOW_LAST, setting.head_steps), 1)
    out = []
    for i, (t, dt) in enumerate(zip(times[:-1], np.diff(times), strict=True)):
        k = world.variance * t / (world.variance * t**2 + (1 - t) ** 2)
        speed, pull = (k - 1) / (1 - t), (1 - k * t) / (1 - t)  # the velocity is speed x + pull m
        if i < setting.head_steps - 1:
            slope, std = 1 + dt * ((1 + t) * speed - 1), np.full(world.dim, (2 * (1 - t) * dt) ** 0.5)
            out.append((slope, dt * (1 + t) * pull, std))
        else:
            out.append((1 + dt * speed, dt * pull, np.zeros(world.dim)))
    return out


class LinearHead(nn.Module):
    """The `HeadNet` of a `World`; its vectors are [the model's output at a position, 0 or 1 (no condition)]."""

    table: Tensor

    def __init__(self, world: World):
        super().__init__()
        d = world.dim
        self.cond_embed = nn.Linear(d + 1, d)
        with torch.no_grad():
            self.cond_embed.weight.copy_(torch.tensor(np.hstack([world.turn, np.zeros((d, 1))])))
            self.cond_embed.bias.copy_(torch.tensor(world.shift))
        bar = np.repeat(alphas_bar()[:, None], d, 1)
        gain = world.variance * bar**0.5 / (world.variance * bar + 1 - bar)
        rows = [bar**0.5, (1 - bar) ** 0.5, gain, *world.interpolation(np.arange(1000.0))]
        self.register_buffer("table", torch.tensor(np.stack(rows), dtype=torch.float32))

    def time_embed(self, times: Tensor) -> Tensor:
        """The steps themselves: they are looked up."""
        return times

    def at(self, x: Tensor, times: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """The noise and the variance's interpolation, both [R, d], for x [R, d], steps [R] and z [R, d + 1]."""
        root, share, gain, own, other = self.table[:, times]
        mean = self.cond_embed(z)
        clean = mean + gain * (x - root * mean)
        return (x - root * clean) / share, torch.where(z[:, -1:] > 0, other, own)


class LinearMAR(nn.Module):
    """What `MARSession` asks of a `MAR`, of a `World`. A slot is [base of all positions, 0 or 1 (no condition)]."""

    base: Tensor
    pull: Tensor
    known: Tensor

    def __init__(self, world: World):
        super().__init__()
        n, d = world.length, world.dim
        self.world, self.device = world, torch.device("cpu")
        self.config = SimpleNamespace(token_dim=d, latest=999)
        self.diffloss = SimpleNamespace(net=LinearHead(world))
        flag = np.eye(len(world.base))[-1:].T
        self.register_buffer("base", torch.tensor(np.hstack([world.base.reshape(-1, n * d), flag])).float())
        # As maps of all known numbers [N d] to what is said of all positions [N d].
        pull = world.pull.transpose(0, 2, 4, 1, 3).reshape(2, n * d, n * d)
        known = world.known.transpose(0, 2, 1, 3).reshape(2, n, n * d)
        self.register_buffer("pull", torch.tensor(pull).float())
        self.register_buffer("known", torch.tensor(known).float())

    def slots(self, condition: Tensor) -> Tensor:
        return self.base[condition][:, None]

    def null_slots(self, batch: int) -> Tensor:
        return self.base[-1:].expand(batch, -1)[:, None]

    def forward(self, tokens: Tensor, known: Tensor, slots: Tensor, valid: Tensor | None = None) -> Tensor:
        """The vector of every position, [G, N, d + 1]."""
        given = tokens.new_zeros(tokens.shape[:2])
        given = given.scatter(1, known, torch.ones_like(known, dtype=given.dtype) if valid is None else valid.to(given))
        x = (tokens * given[..., None]).flatten(1)
        flag = slots[:, 0, -1:]
        with_it, without = (x @ self.pull[h] + given @ self.known[h] for h in (0, 1))
        said = slots[:, 0, :-1] + torch.where(flag > 0, without, with_it)
        return torch.cat([said.view(tokens.shape), flag[:, None].expand(-1, tokens.shape[1], -1)], dim=-1)


class FlowSession(MARSession):
    """The same with a rectified-flow head; guidance is of the mean, which is guidance of the velocity."""

    def make_denoiser(self, steps: int, temperature: float, latest: int, last_noise: bool) -> Denoiser:
        head: Any = self.mar.diffloss.net
        world: World = self.mar.world  # type: ignore[assignment]
        variance, c = torch.tensor(world.variance).float(), world.dim + 1

        def velocity(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            mean = head.cond_embed(condition[:, :c])
            if condition.shape[-1] > c:
                without = head.cond_embed(condition[:, c : 2 * c])
                mean = without + condition[:, -1:] * (mean - without)
            k = variance * t / (variance * t**2 + (1 - t) ** 2)
            return (mean + k * (x - t * mean) - x) / (1 - t)

        return FlowDenoiser(velocity, self.dim, steps, temperature, FLOW_LAST)
