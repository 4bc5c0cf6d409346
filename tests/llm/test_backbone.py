"""An attempt behind a remembered problem is the whole text read at once, value and gradient."""

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
"""Longest problem and longest text in different rows: every row is padded in one of both."""
EXACT = {"rtol": 0, "atol": 1e-10}


def latents(backbone: Backbone, rows: int, k: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randn(rows, k, backbone.hidden_size, generator=generator, dtype=torch.float64)
    return (drawn * backbone.embedding_scale).to(backbone.dtype).requires_grad_()


def loss(hidden: Tensor) -> Tensor:
    """Every number of the hidden states has another weight: the norm makes their squares dull."""
    return (hidden * torch.arange(hidden.numel(), dtype=hidden.dtype).view_as(hidden).cos()).sum()


def gradient(hidden: Tensor, latent: Tensor) -> Tensor:
    [found] = torch.autograd.grad(loss(hidden), latent)
    return found


def naive(one_forward: Any, backbone: Backbone, latent: Tensor) -> Tensor:
    """[B, hidden] of the rows above, each alone and whole."""
    before = backbone.config.prefix == "problem"
    rows = []
    for problem, text, row in zip(PROBLEMS, TEXTS, latent, strict=True):
        parts = (row, problem, text) if before else (problem, row, text)
        rows.append(one_forward(backbone, *parts)[-1])
    return torch.stack(rows)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("prefix", ["attempt", "problem"])
@pytest.mark.parametrize("batch_size", [8, 3])
def test_encoded_once_is_everything_in_one_forward(
    tiny: Tiny, one_forward: Any, prefix: str, recompute: bool, batch_size: int
) -> None:
    backbone = tiny(prefix=prefix, batch_size=batch_size)
    latent = latents(backbone, len(PROBLEMS))
    found = backbone.read(backbone.prefill(PROBLEMS), latent, TEXTS, recompute=recompute)
    wanted = naive(one_forward, backbone, latent)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, wanted, **EXACT)
    slope = gradient(wanted, latent)
    assert (slope.abs().amax((1, 2)) > 1e-3).all(), "a row whose latent does not matter"
    torch.testing.assert_close(gradient(found, latent), slope, **EXACT)


def test_a_batch_without_padding_is_exact_too(tiny: Tiny, one_forward: Any) -> None:
    """A mask of ones may take another way through attention than one with zeros."""
    backbone = tiny()
    latent = latents(backbone, 2)
    problems, texts = ([5, 6, 7], [8, 9, 10]), ([11, 12], [13, 14])
    found = backbone.read(backbone.prefill(problems), latent, texts)
    rows = zip(problems, latent, texts, strict=True)
    wanted = torch.stack([one_forward(backbone, *row)[-1] for row in rows])
    torch.testing.assert_close(found, wanted, **EXACT)
    torch.testing.assert_close(gradient(found, latent), gradient(wanted, latent), **EXACT)


def test_the_latent_stands_between_the_problem_and_the_text(tiny: Tiny, one_forward: Any) -> None:
    """The place is told apart: anywhere else gives another hidden state."""
    backbone = tiny()
    latent = latents(backbone, 1)
    found = backbone.read(backbone.prefill([PROBLEMS[0]]), latent, [TEXTS[0]])[0]
    other = one_forward(backbone, latent[0], PROBLEMS[0], TEXTS[0])[-1]
    assert (found - other).abs().max() > 1e-3
    assert (found - one_forward(backbone, PROBLEMS[0], TEXTS[0])[-1]).abs().max() > 1e-3


def test_an_attempt_leaves_the_encoding_as_it_was(tiny: Tiny) -> None:
    backbone = tiny()
    encoding, latent = backbone.prefill(PROBLEMS), latents(backbone, len(PROBLEMS))
    before = [tensor.clone() for layer in encoding.layers for tensor in layer]
    first = backbone.read(encoding, latent, TEXTS)
    first.sum().backward()
    backbone.generate(encoding, latent, TEXTS, 3)
    after = [tensor for layer in encoding.layers for tensor in layer]
    assert len(before) == 4 and all(map(torch.equal, before, after))
    assert not any(tensor.requires_grad for tensor in after)
    assert torch.equal(first, backbone.read(encoding, latent, TEXTS))


def test_problems_of_like_length_share_a_batch(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny(batch_size=2)
    encode, shapes = backbone._encode, []

    def counted(problems: Any) -> PromptCache:
        made = encode(problems)
        shapes.append(tuple(made.tokens.shape))
        return made

    monkeypatch.setattr(backbone, "_encode", counted)
    encoding = backbone.prefill(PROBLEMS)
    assert sorted(shapes) == [(2, 2), (2, 9)], "28 tokens in the order they come"
    told = [row[mask].tolist() for row, mask in zip(encoding.tokens, encoding.mask, strict=True)]
    assert told == list(PROBLEMS)


def test_take_and_join_change_no_row(tiny: Tiny) -> None:
    """Rows taken in any order, twice too, and put together from problems of other lengths."""
    backbone = tiny()
    encoding, latent = backbone.prefill(PROBLEMS), latents(backbone, len(PROBLEMS))
    whole = backbone.read(encoding, latent, TEXTS)
    order = [3, 1, 1, 2]
    taken = backbone.read(
        encoding.select(torch.tensor(order)), latent[order], [TEXTS[n] for n in order]
    )
    torch.testing.assert_close(taken, whole[order], **EXACT)
    parts = [backbone.prefill([PROBLEMS[1]]), backbone.prefill(PROBLEMS[2:]), encoding]
    joined = PromptCache.join(parts)
    assert len(joined) == 7 and joined.mask.sum(1).tolist() == [2, 9, 1, 5, 2, 9, 1]
    rows = [1, 2, 3, 0, 1, 2, 3]
    found = backbone.read(joined, latent[rows], [TEXTS[n] for n in rows])
    torch.testing.assert_close(found, whole[rows], **EXACT)


@pytest.mark.parametrize("prefix", ["attempt", "problem"])
def test_what_padding_holds_does_not_matter(tiny: Tiny, prefix: str) -> None:
    backbone = tiny(prefix=prefix)
    encoding, latent = backbone.prefill(PROBLEMS), latents(backbone, len(PROBLEMS))
    padding = ~encoding.mask[:, None, :, None]
    spoiled = PromptCache(
        tokens=encoding.tokens.masked_fill(~encoding.mask, 99),
        mask=encoding.mask,
        layers=tuple((k + 7 * padding, v - 7 * padding) for k, v in encoding.layers),
    )
    found, wanted = (backbone.read(one, latent, TEXTS) for one in (spoiled, encoding))
    torch.testing.assert_close(found, wanted, **EXACT)


def test_a_frozen_model_gets_no_gradient_and_does_not_change(tiny: Tiny) -> None:
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
def test_an_unfrozen_model_gets_the_gradient_of_one_forward(
    tiny: Tiny, one_forward: Any, prefix: str
) -> None:
    """Through the problem too, and finite: padding has positions that see nothing."""
    backbone = tiny(frozen=False, prefix=prefix)
    latent = latents(backbone, len(PROBLEMS))
    weights = dict(backbone.model.model.named_parameters())
    found = loss(backbone.read(backbone.prefill(PROBLEMS), latent, TEXTS))
    wanted = loss(naive(one_forward, backbone, latent))
    found_slopes = torch.autograd.grad(found, list(weights.values()))
    wanted_slopes = torch.autograd.grad(wanted, list(weights.values()))
    for name, one, other in zip(weights, found_slopes, wanted_slopes, strict=True):
        assert other.abs().max() > 1e-5, name
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, msg=name)


def test_nobody_gets_its_weights_by_holding_one(tiny: Tiny) -> None:
    class Holder(nn.Module):
        def __init__(self, backbone: Backbone) -> None:
            super().__init__()
            self.backbone = backbone

    holder = Holder(tiny())
    assert not isinstance(holder.backbone, nn.Module)
    assert not holder.state_dict() and not list(holder.parameters())


def test_the_fingerprint_tells_models_apart_but_not_dtypes(tiny: Tiny) -> None:
    backbone = tiny()
    prints = {tiny(dtype=dtype).fingerprint() for dtype in ("float64", "float32", "bfloat16")}
    assert prints == {backbone.fingerprint()}
    with torch.no_grad():
        backbone.model.model.norm.weight[5] += 0.1
    assert backbone.fingerprint() not in prints


# Generation


def by_hand(one_forward: Any, backbone: Backbone, row: int, latent: Tensor, most: int) -> list[int]:
    """Greedy without a cache: the whole text read anew for every token."""
    written: list[int] = []
    before = backbone.config.prefix == "problem"
    parts = (latent[row], PROBLEMS[row]) if before else (PROBLEMS[row], latent[row])
    while len(written) < most:
        state = one_forward(backbone, *parts, [*TEXTS[row], *written])[-1]
        token = int((backbone.model.lm_head.weight @ state).argmax())
        if token == backbone.model.generation_config.eos_token_id:
            break
        written.append(token)
    return written


@pytest.mark.parametrize("prefix", ["attempt", "problem"])
def test_greedy_text_is_that_of_each_row_alone_and_stops_at_its_end(
    tiny: Tiny, one_forward: Any, prefix: str
) -> None:
    backbone = tiny(prefix=prefix)
    latent = latents(backbone, len(PROBLEMS)).detach()
    backbone.model.generation_config.eos_token_id = None
    backbone.tokenizer.eos_token = None
    endless = [by_hand(one_forward, backbone, row, latent, 12) for row in range(len(PROBLEMS))]
    assert len({token for row in endless for token in row}) > 8, "too dull to tell rows apart"
    assert backbone.generate(backbone.prefill(PROBLEMS), latent, TEXTS, 12) == endless
    end = endless[1][4]
    backbone.model.generation_config.eos_token_id = end
    wanted = [row[: row.index(end)] if end in row else row for row in endless]
    assert len({len(row) for row in wanted}) > 1, "all rows end together"
    encoding = backbone.prefill(PROBLEMS)
    assert backbone.generate(encoding, latent, TEXTS, 12) == wanted
    for row in range(len(PROBLEMS)):
        assert by_hand(one_forward, backbone, row, latent, 12) == wanted[row]
        alone = encoding.select(torch.tensor([row]))
        assert backbone.generate(alone, latent[[row]], [TEXTS[row]], 12) == [wanted[row]]
    for most in (0, 1, 5):
        few = backbone.generate(encoding, latent, TEXTS, most)
        assert few == [row[:most] for row in wanted]


@pytest.mark.parametrize("where", ["list", "tokenizer"])
def test_every_end_token_ends(tiny: Tiny, where: str) -> None:
    """LLaMA's instruct models have several, and the tokenizer may know another."""
    backbone = tiny()
    encoding, latent = backbone.prefill(PROBLEMS[:1]), latents(backbone, 1)
    [endless] = backbone.generate(encoding, latent, TEXTS[:1], 6)
    end, unseen = endless[3], 255
    if where == "list":
        backbone.model.generation_config.eos_token_id = [unseen, end]
    else:
        backbone.tokenizer.eos_token = backbone.tokenizer.convert_ids_to_tokens(end)
    assert backbone.generate(encoding, latent, TEXTS[:1], 6) == [endless[: endless.index(end)]]


# The real model


@pytest.fixture(scope="module")
def real(smollm2: Backbone, arc1: dict[str, Task]) -> tuple[list[list[int]], list[list[int]]]:
    """Two small real problems and what an attempt says of each, other lengths all."""
    tasks = [arc1["25ff71a9"], arc1["d037b0a7"]]
    problems = [smollm2.tokens(smollm2.head + format_problem_text(task)) for task in tasks]
    tails = (smollm2.tail + "Output:\n", "Attempt 1 was wrong\n" + smollm2.tail + "Output:\n")
    texts = [smollm2.tokens(tail) for tail in tails]
    assert len({len(row) for row in (*problems, *texts)}) == 4
    return problems, texts


def test_smollm2_encoded_once_is_everything_in_one_forward(
    smollm2: Backbone, real: Any, one_forward: Any
) -> None:
    problems, texts = real
    latent = latents(smollm2, 2)
    found = smollm2.read(smollm2.prefill(problems), latent, texts)
    rows = zip(problems, latent, texts, strict=True)
    wanted = torch.stack([one_forward(smollm2, *row)[-1] for row in rows])
    assert found.dtype == torch.float32
    far = (found - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert far.max() < 1e-4
    one, other = gradient(found, latent), gradient(wanted, latent)
    assert (other.norm(dim=(1, 2)) > 0).all()
    assert ((one - other).norm(dim=(1, 2)) / other.norm(dim=(1, 2))).max() < 1e-3


def test_smollm2_knows_the_capital_of_france(smollm2: Backbone) -> None:
    """Its conversion kept what it knows: a permuted head or another rope would babble."""
    question = smollm2.tokens(smollm2.head + "What is the capital of France?")
    nothing = torch.zeros(1, 0, smollm2.hidden_size)
    tail = smollm2.tokens(smollm2.tail)
    [written] = smollm2.generate(smollm2.prefill([question]), nothing, [tail], 24)
    assert "Paris" in smollm2.text(written)
    assert len(written) < 24, "its answer did not end"
