"""Adam-atan2 for weights, sign-SGD for the puzzle table, learning-rate schedule, and EMA."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


def learning_rate(step: int, *, base: float, warmup: int, total: int, min_ratio: float) -> float:
    """Return the rate of step 1, 2, ...: linear warm-up, then cosine to base * min_ratio."""
    if step < warmup:
        return base * step / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return base * (min_ratio + (1 - min_ratio) * cosine)


class AdamAtan2:
    """Adam-atan2 (arXiv 2407.05872): atan2 replaces the division; no epsilon, scale-invariant.

        p *= 1 - lr * weight_decay
        p -= lr / (1 - beta1^t) * atan2(m, sqrt(v) / sqrt(1 - beta2^t))

    The first moment's bias correction is outside atan2, so that the first step is almost lr.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
    ) -> None:
        self.parameters = dict(parameters)
        self.betas = betas
        self.weight_decay = weight_decay
        self.t = 0
        self.m = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.v = {name: torch.zeros_like(p) for name, p in self.parameters.items()}

    @torch.no_grad()
    def step(self, lr: float | Mapping[str, float]) -> None:
        """Update every parameter from its .grad; `lr` is one rate or one per parameter name."""
        self.t += 1
        by_rate: dict[float, list[str]] = {}
        for name in self.parameters:
            by_rate.setdefault(lr[name] if isinstance(lr, Mapping) else lr, []).append(name)
        for rate, names in by_rate.items():
            self._update(names, rate)

    def _update(self, names: list[str], lr: float) -> None:
        beta1, beta2 = self.betas
        p, m, v = ([group[n] for n in names] for group in (self.parameters, self.m, self.v))
        grads = []
        for name, parameter in zip(names, p, strict=True):
            assert parameter.grad is not None, f"{name} has no gradient"
            grads.append(parameter.grad)
        torch._foreach_lerp_(m, grads, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
        root = torch._foreach_sqrt(v)
        torch._foreach_div_(root, math.sqrt(1 - beta2**self.t))
        torch._foreach_mul_(p, 1 - lr * self.weight_decay)
        scale = -lr / (1 - beta1**self.t)
        torch._foreach_add_(
            p, [torch.atan2(a, b) for a, b in zip(m, root, strict=True)], alpha=scale
        )


@torch.no_grad()
def sign_sgd_(table: Tensor, ids: Tensor, grads: Tensor, *, lr: float, weight_decay: float) -> None:
    """Update rows `ids` [B] of `table` in place by sign-SGD with decoupled weight decay.

    `grads` [B, ndim] must cover the *global* batch: they are summed by id before taking the sign.
    """
    ids = ids.long()
    # Index of the first equal id. torch.unique would wait for the GPU to return a size; instead,
    # repeated ids write the same row several times.
    first = (ids[:, None] == ids).int().argmax(1)
    summed = torch.zeros_like(grads).index_add_(0, first, grads)[first]
    table[ids] = table[ids] * (1 - lr * weight_decay) - lr * summed.sign()


class ExponentialMovingAverage:
    """EMA of the trained weights, without buffers and the puzzle table."""

    def __init__(self, parameters: Mapping[str, Tensor], rate: float) -> None:
        self.parameters = dict(parameters)
        self.rate = rate
        self.values = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Set ema = rate * ema + (1 - rate) * weight; call it after every optimiser step."""
        values: Iterable[Tensor] = self.parameters.values()
        torch._foreach_lerp_(list(self.values.values()), list(values), 1 - self.rate)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Swap the averaged weights into the model inside the context, without a copy."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.data, self.values[name] = self.values[name], parameter.data
