"""Padding gives repeating shapes and does not change results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hybrid.llm.backbone import Backbone
from hybrid.llm.padding import PROBLEM_MULTIPLE, TEXT_MULTIPLE, left_padded
from hybrid.llm.prompt_cache import PromptCacheStore

Tiny = Callable[..., Backbone]
CPU = torch.device("cpu")
PROBLEMS = ([5, 6, 7, 8, 9], [20, 21], [30, 31, 32, 33, 34, 35, 36, 37, 38])
TEXTS = ([50, 51, 52], [60, 61, 62, 63, 64], [70])


@pytest.fixture
def padded(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """padded() makes the CPU pad as a GPU does, to multiples of 8 and 6."""

    def pad() -> None:
        monkeypatch.setitem(PROBLEM_MULTIPLE, "cpu", 8)
        monkeypatch.setitem(TEXT_MULTIPLE, "cpu", 6)

    return pad


def read(backbone: Backbone, latent: Tensor, store: PromptCacheStore | None = None) -> list[Tensor]:
    """Return the hidden states and the gradient of the latent."""
    prompts = (store or backbone).prefill(PROBLEMS)
    out = backbone.read(prompts, latent, TEXTS)
    return [out, *torch.autograd.grad(out.sin().sum(), latent)]


def test_rows_are_left_padded_to_a_multiple() -> None:
    ids, mask = left_padded([[1, 2, 3], [4]], {"cpu": 4}, CPU)
    assert ids.tolist() == [[0, 1, 2, 3], [0, 0, 0, 4]]
    assert mask.tolist() == [[False, True, True, True], [False, False, False, True]]
    assert left_padded([[1, 2, 3]], {"cuda": 4}, CPU)[0].tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("batch_size", [8, 1])
@pytest.mark.parametrize("prefix", ["attempt", "problem"])
def test_padding_does_not_change_results(
    tiny: Tiny, padded: Callable[[], None], prefix: str, batch_size: int
) -> None:
    backbone = tiny(prefix=prefix, batch_size=batch_size)
    latent = torch.linspace(-1, 1, 3 * 2 * 32, dtype=torch.float64).view(3, 2, 32).requires_grad_()
    plain = read(backbone, latent)
    generated = backbone.generate(backbone.prefill(PROBLEMS), latent, TEXTS, 6)
    padded()
    assert backbone.prefill(PROBLEMS).tokens.shape == (3, 16)
    for one, other in zip(read(backbone, latent), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    assert backbone.generate(backbone.prefill(PROBLEMS), latent, TEXTS, 6) == generated


def test_stored_prompt_caches_are_padded_when_joined(
    tiny: Tiny, padded: Callable[[], None], tmp_path: Path
) -> None:
    backbone = tiny()
    latent = torch.linspace(-1, 1, 3 * 2 * 32, dtype=torch.float64).view(3, 2, 32).requires_grad_()
    plain = read(backbone, latent)
    padded()
    store = PromptCacheStore(tmp_path, backbone)
    store.add(PROBLEMS)
    assert store.prefill(PROBLEMS).tokens.shape == (3, 16)
    for one, other in zip(read(backbone, latent, store), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
