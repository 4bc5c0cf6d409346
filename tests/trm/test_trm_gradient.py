"""Gradient flows through the last cycle only, verified by finite differences in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid.trm import TRM, Carry, TRMConfig, act_loss

Tiny = Callable[..., TRMConfig]
BatchOf = Callable[..., dict[str, Tensor]]
MIXES = [
    pytest.param({"pos_encodings": "rope"}, id="rope"),
    pytest.param({"pos_encodings": "learned"}, id="learned"),
    pytest.param({"pos_encodings": "none"}, id="none"),
    pytest.param({"mlp_t": True, "pos_encodings": "none"}, id="mlp_t"),
    pytest.param({"mlp_t": True, "pos_encodings": "learned"}, id="mlp_t-learned"),
    pytest.param({"puzzle_emb_ndim": 0}, id="no-puzzle"),
]


def loss_of(model: TRM, carry: Carry, batch: dict[str, Tensor], rows: Tensor | None) -> Tensor:
    carry, out = model.act_step(carry, batch, puzzle_rows=rows)
    return act_loss(out.logits, out.q_halt, batch["labels"], carry.steps, carry.halted)[0]


def slope(f: Callable[[], Tensor], weight: Tensor, direction: Tensor, step: float) -> float:
    """Return df / d(weight along direction) by a fourth-order central difference."""
    start = weight.clone()
    values = []
    for k in (-2, -1, 1, 2):
        weight.copy_(start + k * step * direction)
        values.append(float(f()))
    weight.copy_(start)
    return (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * step)


@pytest.mark.parametrize("cycles", [1, 2, 3])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("head", ["answer", "halt"])
def test_gradient_matches_finite_differences_of_the_last_cycle(
    tiny: Tiny, batch_of: BatchOf, head: str, mix: dict[str, Any], cycles: int
) -> None:
    config = tiny(forward_dtype="float64", H_cycles=cycles, halt_max_steps=16, **mix)
    model = TRM(config, seed=1).double().train()
    # With one cycle per ACT step, the carry after k steps is the result of k cycles.
    single = TRM(replace(config, H_cycles=1)).double().train()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        model.puzzle_table.normal_(generator=generator)
        if head == "halt":
            model.q_head.weight.normal_(generator=generator)
            model.q_head.bias.zero_()
    single.load_state_dict(model.state_dict())
    # The halt logit is float32 for every dtype. At its initial zero weight it does not depend on
    # the other weights, and finite differences are exact; otherwise they need a large step.
    step, tolerance = (1e-4, 1e-8) if head == "answer" else (3e-3, 2e-3)

    batch = batch_of(config, rows=3)
    loss_of(model, model.initial_carry(batch), batch, None).backward()
    constant = single.initial_carry(batch)
    with torch.no_grad():
        for _ in range(cycles - 1):
            constant, _ = single.act_step(constant, batch)
            constant = replace(constant, halted=torch.zeros_like(constant.halted))

    slopes = []
    for (name, weight), own in zip(single.named_parameters(), model.parameters(), strict=True):
        if head == "answer" and name.startswith("q_head"):
            continue
        assert own.grad is not None, name
        direction = own.grad / own.grad.norm()
        with torch.no_grad():
            numeric = slope(lambda: loss_of(single, constant, batch, None), weight, direction, step)
        slopes.append(float(own.grad.norm()))
        assert slopes[-1] == pytest.approx(numeric, rel=tolerance, abs=tolerance), name
        sideways = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        sideways /= sideways.norm()
        with torch.no_grad():
            numeric = slope(lambda: loss_of(single, constant, batch, None), weight, sideways, step)
        analytic = float((own.grad * sideways).sum())
        assert analytic == pytest.approx(numeric, rel=tolerance, abs=tolerance), name
    assert min(slopes) > 1e-3, "gradients are too small for a meaningful comparison"


@pytest.mark.parametrize("cycles", [1, 2, 3])
def test_puzzle_rows_receive_the_gradient_of_the_last_cycle(
    tiny: Tiny, batch_of: BatchOf, cycles: int
) -> None:
    config = tiny(forward_dtype="float64", H_cycles=cycles, halt_max_steps=16)
    model, single = (TRM(c, seed=1).double().train() for c in (config, replace(config, H_cycles=1)))
    batch = batch_of(config, rows=3)
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    leaf = rows.clone().requires_grad_()
    loss_of(model, model.initial_carry(batch), batch, leaf).backward()
    constant = single.initial_carry(batch)
    with torch.no_grad():
        for _ in range(cycles - 1):
            constant, _ = single.act_step(constant, batch, puzzle_rows=rows)
            constant = replace(constant, halted=torch.zeros_like(constant.halted))
        direction = torch.randn(3, 8, generator=generator, dtype=torch.float64)
        numeric = slope(lambda: loss_of(single, constant, batch, rows), rows, direction, 1e-4)
    assert leaf.grad is not None
    assert float((leaf.grad * direction).sum()) == pytest.approx(numeric, rel=1e-7)
    assert abs(numeric) > 1e-2


def test_full_gradient_differs(tiny: Tiny, batch_of: BatchOf) -> None:
    """The finite differences above therefore distinguish one cycle from two."""
    config = tiny(forward_dtype="float64", H_cycles=2)
    model = TRM(config, seed=1).double().train()
    batch = batch_of(config, rows=3)
    weight = model.blocks[0].mlp.down_proj.weight
    loss_of(model, model.initial_carry(batch), batch, None).backward()
    direction = weight.grad / weight.grad.norm()
    with torch.no_grad():
        through_all = slope(
            lambda: loss_of(model, model.initial_carry(batch), batch, None), weight, direction, 1e-4
        )
    assert abs(through_all / float(weight.grad.norm()) - 1) > 0.05


@pytest.mark.parametrize("cycles", [1, 2])
def test_returned_carry_is_detached(tiny: Tiny, batch_of: BatchOf, cycles: int) -> None:
    model = TRM(tiny(H_cycles=cycles)).train()
    batch = batch_of(model.config)
    carry, out = model.act_step(model.initial_carry(batch), batch)
    assert out.logits.requires_grad and out.q_halt.requires_grad
    for value in (carry.z_H, carry.z_L, carry.steps, carry.halted, *carry.current.values()):
        assert not value.requires_grad


def test_initial_states_and_puzzle_table_are_buffers(tiny: Tiny, batch_of: BatchOf) -> None:
    """H_init and L_init are not trained, and the table's gradient is that of the rows used."""
    model = TRM(tiny()).train()
    assert dict(model.named_buffers()).keys() == {"H_init", "L_init", "puzzle_table"}
    batch = batch_of(model.config)
    out = model.act_step(model.initial_carry(batch), batch)[1]
    assert out.puzzle_rows is not None
    assert out.puzzle_rows.is_leaf and out.puzzle_rows.requires_grad
    assert not model.puzzle_table.requires_grad
    for mode in (False, True):
        model.train(mode)
        with torch.no_grad():
            rows = model.act_step(model.initial_carry(batch), batch)[1].puzzle_rows
        assert rows is not None and not rows.requires_grad


def test_model_trains_after_evaluation(tiny: Tiny, batch_of: BatchOf) -> None:
    """Cached tensors must not be inference tensors, which backward rejects."""
    model = TRM(tiny())
    batch = batch_of(model.config)
    with torch.inference_mode():
        model.eval().act_step(model.initial_carry(batch), batch)
    model.train()
    loss_of(model, model.initial_carry(batch), batch, None).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_gradient_is_deterministic_on_two_threads() -> None:
    """Indexing instead of F.embedding would sum gradients in a nondeterministic order."""
    config = TRMConfig(
        hidden_size=128,
        num_heads=4,
        seq_len=36,
        H_cycles=1,
        L_cycles=1,
        puzzle_emb_ndim=128,
        puzzle_emb_len=2,
    )
    model = TRM(config).train()
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 12, (64, 36), generator=draw, dtype=torch.int32)
    batch = {"inputs": tokens, "labels": tokens, "puzzle_identifiers": torch.zeros(64).int()}
    torch.set_num_threads(2)
    grads = []
    for _ in range(8):
        model.zero_grad()
        _, outputs = model.act_step(model.initial_carry(batch), batch)
        torch.autograd.backward(outputs.logits.square().sum())
        assert model.embed_tokens.grad is not None
        grads.append(model.embed_tokens.grad.clone())
    assert all(torch.equal(grad, grads[0]) for grad in grads)
