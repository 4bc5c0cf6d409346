"""Adam-atan2 for the weights, sign-SGD for the puzzle table, the schedule, the moving average."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


def learning_rate(step: int, *, base: float, warmup: int, total: int, min_ratio: float) -> float:
    """Rate of step 1, 2, ...: linear warm-up, then cosine from base to base * min_ratio."""
    if step < warmup:
        return base * step / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return base * (min_ratio + (1 - min_ratio) * cosine)


class AdamAtan2:
    """Adam with atan2 in place of the division (arXiv 2407.05872): no epsilon, scale-free.

        p *= 1 - lr * weight_decay
        p -= lr / (1 - beta1^t) * atan2(m, sqrt(v) / sqrt(1 - beta2^t))

    The first moment's correction stands outside atan2, so that the first step is almost lr.
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
        """Move every parameter by its .grad, which every one must have; one rate, or one each."""
        self.t += 1
        by_rate: dict[float, list[str]] = {}
        for name in self.parameters:
            by_rate.setdefault(lr[name] if isinstance(lr, Mapping) else lr, []).append(name)
        for rate, names in by_rate.items():
            self._move(names, rate)

    def _move(self, names: list[str], lr: float) -> None:
        beta1, beta2 = self.betas
        p, m, v = ([of[name] for name in names] for of in (self.parameters, self.m, self.v))
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
    """Sign-SGD with decoupled decay on the rows of `table` that `ids` [B] touch, in place.

    `grads` [B, ndim] of one id are summed over the *global* batch before the sign is taken.
    """
    ids = ids.long()
    # The first slot of the same id. With torch.unique a GPU's host would wait for how many there
    # are; so a row is written several times, each time the same.
    first = (ids[:, None] == ids).int().argmax(1)
    summed = torch.zeros_like(grads).index_add_(0, first, grads)[first]
    table[ids] = table[ids] * (1 - lr * weight_decay) - lr * summed.sign()


class ExponentialMovingAverage:
    """EMA of the trained weights alone: no buffers, no puzzle table."""

    def __init__(self, parameters: Mapping[str, Tensor], rate: float) -> None:
        self.parameters = dict(parameters)
        self.rate = rate
        self.values = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """shadow = rate * shadow + (1 - rate) * weight, after every optimiser step."""
        values: Iterable[Tensor] = self.parameters.values()
        torch._foreach_lerp_(list(self.values.values()), list(values), 1 - self.rate)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model computes with the averaged weights; nothing is copied."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.data, self.values[name] = self.values[name], parameter.data
