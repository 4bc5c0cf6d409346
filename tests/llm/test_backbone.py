"""An attempt on a cached prompt equals one forward over the full text, values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hybrid.arc import Task
from hybrid.llm.backbone import Backbone, PromptCache
from hybrid.llm.prompt import format_problem_text

Tiny = Callable[..., Backbone]
PROBLEMS = ([5, 6, 7, 8, 9], [20, 21], [30, 31, 32, 33, 34, 35, 36, 37, 38], [40])
TEXTS = ([50, 51, 52], [60, 61, 62, 63, 64], [70], [80, 81])
"""The longest problem and the longest text are in different rows, so every row is padded in one."""
EXACT = {"rtol": 0, "atol": 1e-10}


def latents(backbone: Backbone, rows: int, k: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randn(rows, k, backbone.hidden_size, generator=generator, dtype=torch.float64)
    return (drawn * backbone.embedding_scale).to(backbone.dtype).requires_grad_()


def loss(hidden: Tensor) -> Tensor:
    """Weight each hidden value differently; the norm makes a sum of squares nearly constant."""
    return (hidden * torch.arange(hidden.numel(), dtype=hidden.dtype).view_as(hidden).cos()).sum()


def gradient(hidden: Tensor, latent: Tensor) -> Tensor:
    [grad] = torch.autograd.grad(loss(hidden), latent)
    return grad


def naive(one_forward: Any, backbone: Backbone, latent: Tensor) -> Tensor:
    """Return [B, hidden] of PROBLEMS and TEXTS, each row alone in one forward pass."""
    before = backbone.config.prefix == "problem"
    rows = []
    for problem, text, row in zip(PROBLEMS, TEXTS, latent, strict=True):
        parts = (row, problem, text) if before else (problem, row, text)
        rows.append(one_forward(backbone, *parts)[-1])
    return torch.stack(rows)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("prefix", ["attempt", "problem"])
@pytest.mark.parametrize("batch_size", [8, 3])
def test_prefill_and_attempt_match_one_forward(
    tiny: Tiny, one_forward: Any, prefix: str, recompute: bool, batch_size: int
) -> None:
    backbone = tiny(prefix=prefix, batch_size=batch_size)
    latent = latents(backbone, len(PROBLEMS))
    actual = backbone.read(backbone.prefill(PROBLEMS), latent, TEXTS, recompute=recompute)
    expected = naive(one_forward, backbone, latent)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, **EXACT)
    grad = gradient(expected, latent)
    assert (grad.abs().amax((1, 2)) > 1e-3).all(), "a row ignores its latent"
    torch.testing.assert_close(gradient(actual, latent), grad, **EXACT)


def test_unpadded_batch_matches_one_forward(tiny: Tiny, one_forward: Any) -> None:
    """An all-ones mask may use another attention kernel than a mask with zeros."""
    backbone = tiny()
    latent = latents(backbone, 2)
    problems, texts = ([5, 6, 7], [8, 9, 10]), ([11, 12], [13, 14])
    actual = backbone.read(backbone.prefill(problems), latent, texts)
    rows = zip(problems, latent, texts, strict=True)
    expected = torch.stack([one_forward(backbone, *row)[-1] for row in rows])
    torch.testing.assert_close(actual, expected, **EXACT)
    torch.testing.assert_close(gradient(actual, latent), gradient(expected, latent), **EXACT)


def test_latent_position_is_between_problem_and_text(tiny: Tiny, one_forward: Any) -> None:
    """Any other position gives another hidden state."""
    backbone = tiny()
    latent = latents(backbone, 1)
    actual = backbone.read(backbone.prefill([PROBLEMS[0]]), latent, [TEXTS[0]])[0]
    other = one_forward(backbone, latent[0], PROBLEMS[0], TEXTS[0])[-1]
    assert (actual - other).abs().max() > 1e-3
    assert (actual - one_forward(backbone, PROBLEMS[0], TEXTS[0])[-1]).abs().max() > 1e-3


def test_attempt_does_not_change_the_prompt_cache(tiny: Tiny) -> None:
    backbone = tiny()
    prompts, latent = backbone.prefill(PROBLEMS), latents(backbone, len(PROBLEMS))
    before = [tensor.clone() for layer in prompts.layers for tensor in layer]
    first = backbone.read(prompts, latent, TEXTS)
    first.sum().backward()
    backbone.generate(prompts, latent, TEXTS, 3)
    after = [tensor for layer in prompts.layers for tensor in layer]
    assert len(before) == 4 and all(map(torch.equal, before, after))
    assert not any(tensor.requires_grad for tensor in after)
    assert torch.equal(first, backbone.read(prompts, latent, TEXTS))


def test_prefill_batches_problems_by_length(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny(batch_size=2)
    prefill, shapes = backbone._prefill, []

    def record_shape(problems: Any) -> PromptCache:
        cache = prefill(problems)
        shapes.append(tuple(cache.tokens.shape))
        return cache

    monkeypatch.setattr(backbone, "_prefill", record_shape)
    prompts = backbone.prefill(PROBLEMS)
    assert sorted(shapes) == [(2, 2), (2, 9)], "the given order needs 28 tokens"
    rows = [row[mask].tolist() for row, mask in zip(prompts.tokens, prompts.mask, strict=True)]
    assert rows == list(PROBLEMS)


def test_select_and_join_preserve_rows(tiny: Tiny) -> None:
    """Rows may be selected in any order, repeatedly, and joined with problems of other lengths."""
    backbone = tiny()
    prompts, latent = backbone.prefill(PROBLEMS), latents(backbone, len(PROBLEMS))
    full = backbone.read(prompts, latent, TEXTS)
    order = [3, 1, 1, 2]
    selected = backbone.read(
        prompts.select(torch.tensor(order)), latent[order], [TEXTS[n] for n in order]
    )
    torch.testing.assert_close(selected, full[order], **EXACT)
    parts = [backbone.prefill([PROBLEMS[1]]), backbone.prefill(PROBLEMS[2:]), prompts]
    joined = PromptCache.join(parts)
    assert len(joined) == 7 and joined.mask.sum(1).tolist() == [2, 9, 1, 5, 2, 9, 1]
    rows = [1, 2, 3, 0, 1, 2, 3]
    actual = backbone.read(joined, latent[rows], [TEXTS[n] for n in rows])
    torch.testing.assert_close(actual, full[rows], **EXACT)


@pytest.mark.parametrize("prefix", ["attempt", "problem"])
def test_values_at_padding_do_not_matter(tiny: Tiny, prefix: str) -> None:
    backbone = tiny(prefix=prefix)
    prompts, latent = backbone.prefill(PROBLEMS), latents(backbone, len(PROBLEMS))
    padding = ~prompts.mask[:, None, :, None]
    changed = PromptCache(
        tokens=prompts.tokens.masked_fill(~prompts.mask, 99),
        mask=prompts.mask,
        layers=tuple((k + 7 * padding, v - 7 * padding) for k, v in prompts.layers),
    )
    actual, expected = (backbone.read(one, latent, TEXTS) for one in (changed, prompts))
    torch.testing.assert_close(actual, expected, **EXACT)


def test_frozen_model_gets_no_gradient_and_does_not_change(tiny: Tiny) -> None:
    backbone = tiny()
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    assert not any(weight.requires_grad for weight in backbone.model.parameters())
    latent = latents(backbone, len(PROBLEMS))
    hidden = backbone.read(backbone.prefill(PROBLEMS), latent, TEXTS)
    loss(hidden).backward()
    assert latent.grad is not None and latent.grad.abs().sum() > 0
    assert all(weight.grad is None for weight in backbone.model.parameters())
    after = backbone.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(module.training for module in backbone.model.modules())


@pytest.mark.parametrize("prefix", ["attempt", "problem"])
def test_unfrozen_model_gets_the_gradient_of_one_forward(
    tiny: Tiny, one_forward: Any, prefix: str
) -> None:
    """The gradient includes the problem, and is finite although padding attends to nothing."""
    backbone = tiny(frozen=False, prefix=prefix)
    latent = latents(backbone, len(PROBLEMS))
    weights = dict(backbone.model.model.named_parameters())
    actual = loss(backbone.read(backbone.prefill(PROBLEMS), latent, TEXTS))
    expected = loss(naive(one_forward, backbone, latent))
    actual_grads = torch.autograd.grad(actual, list(weights.values()))
    expected_grads = torch.autograd.grad(expected, list(weights.values()))
    for name, one, other in zip(weights, actual_grads, expected_grads, strict=True):
        assert other.abs().max() > 1e-5, name
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, msg=name)


def test_module_that_holds_a_backbone_does_not_own_its_weights(tiny: Tiny) -> None:
    class Holder(nn.Module):
        def __init__(self, backbone: Backbone) -> None:
            super().__init__()
            self.backbone = backbone

    holder = Holder(tiny())
    assert not isinstance(holder.backbone, nn.Module)
    assert not holder.state_dict() and not list(holder.parameters())


def test_fingerprint_differs_between_models_but_not_dtypes(tiny: Tiny) -> None:
    backbone = tiny()
    fingerprints = {tiny(dtype=dtype).fingerprint() for dtype in ("float64", "float32", "bfloat16")}
    assert fingerprints == {backbone.fingerprint()}
    with torch.no_grad():
        backbone.model.model.norm.weight[5] += 0.1
    assert backbone.fingerprint() not in fingerprints


# Generation


def decode_uncached(
    one_forward: Any, backbone: Backbone, row: int, latent: Tensor, max_tokens: int
) -> list[int]:
    """Decode greedily with one forward over the full text for each token."""
    written: list[int] = []
    before = backbone.config.prefix == "problem"
    parts = (latent[row], PROBLEMS[row]) if before else (PROBLEMS[row], latent[row])
    while len(written) < max_tokens:
        state = one_forward(backbone, *parts, [*TEXTS[row], *written])[-1]
        token = int((backbone.model.lm_head.weight @ state).argmax())
        if token == backbone.model.generation_config.eos_token_id:
            break
        written.append(token)
    return written


@pytest.mark.parametrize("prefix", ["attempt", "problem"])
def test_greedy_text_equals_that_of_each_row_alone_and_stops_at_its_end(
    tiny: Tiny, one_forward: Any, prefix: str
) -> None:
    backbone = tiny(prefix=prefix)
    latent = latents(backbone, len(PROBLEMS)).detach()
    backbone.model.generation_config.eos_token_id = None
    backbone.tokenizer.eos_token = None
    endless = [
        decode_uncached(one_forward, backbone, row, latent, 12) for row in range(len(PROBLEMS))
    ]
    assert len({token for row in endless for token in row}) > 8, "rows are too similar"
    assert backbone.generate(backbone.prefill(PROBLEMS), latent, TEXTS, 12) == endless
    end = endless[1][4]
    backbone.model.generation_config.eos_token_id = end
    expected = [row[: row.index(end)] if end in row else row for row in endless]
    assert len({len(row) for row in expected}) > 1, "all rows end at the same token"
    prompts = backbone.prefill(PROBLEMS)
    assert backbone.generate(prompts, latent, TEXTS, 12) == expected
    for row in range(len(PROBLEMS)):
        assert decode_uncached(one_forward, backbone, row, latent, 12) == expected[row]
        alone = prompts.select(torch.tensor([row]))
        assert backbone.generate(alone, latent[[row]], [TEXTS[row]], 12) == [expected[row]]
    for limit in (0, 1, 5):
        generated = backbone.generate(prompts, latent, TEXTS, limit)
        assert generated == [row[:limit] for row in expected]


@pytest.mark.parametrize("where", ["list", "tokenizer"])
def test_every_end_token_stops_generation(tiny: Tiny, where: str) -> None:
    """Instruct models have several end tokens, and the tokenizer may define another."""
    backbone = tiny()
    prompts, latent = backbone.prefill(PROBLEMS[:1]), latents(backbone, 1)
    [endless] = backbone.generate(prompts, latent, TEXTS[:1], 6)
    end, unseen = endless[3], 255
    if where == "list":
        backbone.model.generation_config.eos_token_id = [unseen, end]
    else:
        backbone.tokenizer.eos_token = backbone.tokenizer.convert_ids_to_tokens(end)
    assert backbone.generate(prompts, latent, TEXTS[:1], 6) == [endless[: endless.index(end)]]


# The real model


@pytest.fixture(scope="module")
def real(smollm2: Backbone, arc1: dict[str, Task]) -> tuple[list[list[int]], list[list[int]]]:
    """Two small real problems and the texts of an attempt, all of different lengths."""
    tasks = [arc1["25ff71a9"], arc1["d037b0a7"]]
    problems = [smollm2.tokens(smollm2.head + format_problem_text(task)) for task in tasks]
    tails = (smollm2.tail + "Output:\n", "Attempt 1 was wrong\n" + smollm2.tail + "Output:\n")
    texts = [smollm2.tokens(tail) for tail in tails]
    assert len({len(row) for row in (*problems, *texts)}) == 4
    return problems, texts


def test_smollm2_prefill_and_attempt_match_one_forward(
    smollm2: Backbone, real: Any, one_forward: Any
) -> None:
    problems, texts = real
    latent = latents(smollm2, 2)
    actual = smollm2.read(smollm2.prefill(problems), latent, texts)
    rows = zip(problems, latent, texts, strict=True)
    expected = torch.stack([one_forward(smollm2, *row)[-1] for row in rows])
    assert actual.dtype == torch.float32
    error = (actual - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < 1e-4
    one, other = gradient(actual, latent), gradient(expected, latent)
    assert (other.norm(dim=(1, 2)) > 0).all()
    assert ((one - other).norm(dim=(1, 2)) / other.norm(dim=(1, 2))).max() < 1e-3


def test_smollm2_knows_the_capital_of_france(smollm2: Backbone) -> None:
    """The GGUF conversion is correct: a permuted head or another RoPE would give nonsense."""
    question = smollm2.tokens(smollm2.head + "What is the capital of France?")
    no_latent = torch.zeros(1, 0, smollm2.hidden_size)
    tail = smollm2.tokens(smollm2.tail)
    [written] = smollm2.generate(smollm2.prefill([question]), no_latent, [tail], 24)
    assert "Paris" in smollm2.text(written)
    assert len(written) < 24, "the answer did not end"
