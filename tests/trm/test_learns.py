"""A tiny TRM learns two puzzles, for which it needs its puzzle table."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hybrid.trm import TRM, AdamAtan2, TRMConfig, act_loss, learning_rate, sign_sgd_

COPY, RECOLOUR = 1, 2


def test_copy_and_recolour_are_learned_exactly(tiny: Callable[..., TRMConfig]) -> None:
    """Both puzzles share eight grids: without puzzle embeddings at most 8 of 16 can be right."""
    config = tiny(
        hidden_size=32,
        puzzle_emb_ndim=32,
        puzzle_emb_len=1,
        seq_len=16,
        num_puzzle_identifiers=3,
        halt_exploration_prob=0.1,
    )
    generator = torch.Generator().manual_seed(0)
    grids = torch.randint(2, 12, (8, 16), generator=generator)
    recoloured = 2 + (grids - 2 + 3) % 10
    batch = {
        "inputs": torch.cat((grids, grids)),
        "labels": torch.cat((grids, recoloured)),
        "puzzle_identifiers": torch.tensor([COPY] * 8 + [RECOLOUR] * 8),
    }
    torch.manual_seed(0)
    model = TRM(config).train()
    adam = AdamAtan2(dict(model.named_parameters()))
    carry = model.initial_carry(batch)
    for step in range(1, 301):
        carry, out = model.act_step(carry, batch)
        loss, _ = act_loss(
            out.logits, out.q_halt, carry.current["labels"], carry.steps, carry.halted
        )
        (loss / 16).backward()
        lr = learning_rate(step, base=3e-3, warmup=20, total=300, min_ratio=0.1)
        ids = carry.current["puzzle_identifiers"]
        assert out.puzzle_rows is not None and out.puzzle_rows.grad is not None
        sign_sgd_(model.puzzle_table, ids, out.puzzle_rows.grad, lr=10 * lr, weight_decay=0.1)
        adam.step(lr)
        model.zero_grad()
    sums = evaluate(model, batch)
    assert (sums["count"], sums["exact_accuracy"], sums["q_halt_accuracy"]) == (16, 16, 16), sums


@torch.inference_mode()
def evaluate(model: TRM, batch: dict[str, torch.Tensor]) -> dict[str, float]:
    model.eval()
    carry = model.initial_carry(batch)
    while True:
        carry, out = model.act_step(carry, batch)
        if carry.halted.all():
            _, sums = act_loss(out.logits, out.q_halt, batch["labels"], carry.steps, carry.halted)
            return {name: float(value) for name, value in sums.items()}
