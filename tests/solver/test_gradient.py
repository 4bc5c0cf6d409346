"""Nothing between text and latent is cut: finite differences in float64; what a window costs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hybrid.solver import AttemptResult, AttemptState, Feedback, HybridModel, NoFeedback, attempts
from hybrid.trm import IGNORE, TRM, Outputs

Cases = Callable[..., Any]
Grads = dict[str, Tensor]
STEP = 3e-4
"""Of a finite difference along a direction of length 1; a third or three times it does as well."""


def loss_of(outputs: Outputs, rows: AttemptState) -> Tensor:
    """Smooth, unlike stablemax, whose second derivative jumps at 0; summed over rows."""
    labels = rows.current["labels"].long().flatten()
    logits = outputs.logits.flatten(0, 1)
    answer = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    return answer / 8 + outputs.q_halt.sigmoid().sum()


def whole_loss(
    solver: HybridModel, rows: AttemptState, most: int, recompute: bool = False
) -> Tensor:
    made = attempts(solver, rows, NoFeedback(), most=most, history=1, recompute=recompute)
    return torch.stack([loss_of(one.outputs, one.rows) for one in made]).sum()


def gradients(
    case: Any, run: Callable[[AttemptState], object], kept: Sequence[int] | None = None
) -> Grads:
    """Of all weights and of the puzzle rows, after `run` has called backward."""
    case.solver.zero_grad()
    leaf = case.puzzle_rows.clone().requires_grad_()
    run(case.begin(kept, puzzle_rows=leaf))
    named = [*case.solver.named_parameters(), ("puzzle_rows", leaf)]
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named}


def whole_gradients(case: Any, most: int, recompute: bool = True) -> Grads:
    return gradients(case, lambda rows: whole_loss(case.solver, rows, most, recompute).backward())


def assert_close(found: Grads, wanted: Grads, tolerance: float = 1e-9) -> None:
    for name, gradient in wanted.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=0, atol=tolerance * float(gradient.abs().max()) + 1e-13
        )


@torch.no_grad()
def errors(case: Any, found: Grads, most: int) -> dict[str, float]:
    """Per tensor the relative error of its slope along a random direction.

    Relative to the larger of both slopes; where the direction happens to be level, to a tenth of
    the slope that is usual for a gradient of this length; never to less than 1e-6, because the
    differences themselves are good to 1e-11.
    """
    draw, wrong = torch.Generator().manual_seed(5), {}
    frozen = case.solver.reader.config.frozen
    start = case.begin()
    for name, weight in [*case.solver.named_parameters(), ("puzzle_rows", case.puzzle_rows)]:
        direction = torch.randn(weight.shape, generator=draw, dtype=torch.float64)
        direction /= direction.norm()
        values, here = [], weight.detach().clone()
        for k in (-2, -1, 1, 2):
            weight.copy_(here + k * STEP * direction)
            # Of a frozen reader nothing in the problem's encoding can move.
            rows = replace(start, puzzle_rows=case.puzzle_rows) if frozen else case.begin()
            values.append(float(whole_loss(case.solver, rows, most)))
        weight.copy_(here)
        numeric = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * STEP)
        analytic = float((found[name] * direction).sum())
        usual = float(found[name].norm()) / weight.numel() ** 0.5
        scale = max(abs(numeric), abs(analytic), 0.1 * usual, 1e-6)
        wrong[name] = abs(numeric - analytic) / scale
    return wrong


def check(case: Any, most: int) -> None:
    found = whole_gradients(case, most)
    # Slopes this small would tell nothing.
    least = min(float(g.abs().max()) for n, g in found.items() if not n.startswith("llama."))
    assert least > 1e-5
    wrong = errors(case, found, most)
    assert max(wrong.values()) <= 1e-5, {n: e for n, e in wrong.items() if e > 1e-5}


@pytest.mark.parametrize("most", [1, 2, 3])
@pytest.mark.parametrize("cycles", [1, 2, 3])
@pytest.mark.parametrize("inject", ["carry", "input", "both"])
def test_every_gradient_is_that_of_finite_differences(
    case_of: Cases, inject: str, cycles: int, most: int
) -> None:
    case = case_of(inject=inject, rows=2, H_cycles=cycles, L_cycles=1, shaken=True)
    check(case, most)


SHORT = {"max_prompt_tokens": 170}
VARIANTS = {
    "prefix=problem": {"llama": {"prefix": "problem", **SHORT}},
    "reasoning": {"llama": {"max_new_tokens": 3}},
    "both": {"llama": {"max_new_tokens": 3, "prefix": "problem", **SHORT}},
    "act_steps=2": {"act_steps": 2},
    "L_cycles=3, P=3": {"L_cycles": 3, "puzzle_emb_len": 3},
    "mlp_t": {"mlp_t": True, "pos_encodings": "none"},
    "llama.frozen=false": {"llama": {"frozen": False, **SHORT}},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_so_it_is_in_other_hybrids(case_of: Cases, variant: dict[str, Any]) -> None:
    case = case_of(rows=2, shaken=True, **{"L_cycles": 1, **variant})
    if "max_new_tokens" in variant.get("llama", {}):
        with torch.no_grad():
            assert any(case.solver.attempt(case.begin())[2].reasoning), "nothing was written"
    check(case, 2)


def as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    recurse = TRM.recurse

    def last_cycle_only(*args: Any, **kwargs: Any) -> Any:
        return recurse(*args, **{**kwargs, "full_gradient": False})

    monkeypatch.setattr(TRM, "recurse", last_cycle_only)


@pytest.mark.parametrize("cycles", [2, 3])
def test_the_published_recursion_would_teach_an_adapter_nothing(
    case_of: Cases, monkeypatch: pytest.MonkeyPatch, cycles: int
) -> None:
    case = case_of(inject="carry", rows=2, H_cycles=cycles, shaken=True)
    learned = whole_gradients(case, 2)
    as_published(monkeypatch)
    trap = whole_gradients(case, 2)
    adapters = [name for name in trap if name.startswith("to_")]
    assert len(adapters) == 14
    assert all(float(learned[name].norm()) > 1e-5 for name in adapters)
    assert all(float(trap[name].norm()) == 0 for name in adapters)
    assert float(trap["trm.embed_tokens"].norm()) > 0


@pytest.mark.parametrize("inject", ["input", "both"])
def test_the_finite_differences_notice_a_missing_cycle(
    case_of: Cases, monkeypatch: pytest.MonkeyPatch, inject: str
) -> None:
    case = case_of(inject=inject, rows=2, L_cycles=1, shaken=True)
    as_published(monkeypatch)
    wrong = errors(case, whole_gradients(case, 2), 2)
    assert min(wrong[name] for name in wrong if name.startswith(("to_text", "to_latent"))) > 1e-3


def test_a_halted_carry_would_be_overwritten(case_of: Cases) -> None:
    """The other half of the trap: `act_step` on a fresh carry takes no notice of what is in it."""
    case = case_of(H_cycles=1)
    trm, batch = case.solver.trm, {"inputs": case.batch["inputs"]}
    carry = trm.initial_carry(batch)
    told = torch.ones_like(carry.z_H, requires_grad=True)
    _, plain = trm.act_step(carry, batch, puzzle_rows=case.puzzle_rows)
    _, out = trm.act_step(replace(carry, z_H=carry.z_H + told), batch, puzzle_rows=case.puzzle_rows)
    assert torch.equal(plain.logits, out.logits)
    out.logits.sum().backward()
    assert told.grad is None or not told.grad.any()


@pytest.mark.parametrize("llama", [{}, {"prefix": "problem"}, {"max_new_tokens": 3}])
def test_recomputing_changes_nothing(case_of: Cases, llama: dict[str, Any]) -> None:
    case = case_of(rows=2, shaken=True, llama=llama, act_steps=2)
    losses = [whole_loss(case.solver, case.begin(), 2, recompute) for recompute in (True, False)]
    assert torch.equal(*losses)
    assert_close(whole_gradients(case, 2, True), whole_gradients(case, 2, False), 1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recompute", [True, False])
def test_the_full_gradient_has_the_published_numbers(
    case_of: Cases, recompute: bool, dtype: str
) -> None:
    case = case_of(shaken=True, inject="none", H_cycles=3, forward_dtype=dtype)
    trm, states = case.solver.trm.float(), case.solver.trm.fresh_states(case.batch["inputs"])
    found = [
        trm.recurse(case.batch, *states, puzzle_rows=case.puzzle_rows, **how)
        for how in ({}, {"full_gradient": True, "recompute": recompute})
    ]
    published, ours = ((z_H, z_L, o.logits, o.q_halt) for z_H, z_L, o in found)
    assert all(map(torch.equal, published, ours))


class Stops:
    """Row r stops after attempt `after[r]`; says which attempt it was."""

    def __init__(self, *after: int) -> None:
        self.after = after

    def __call__(self, number: int, seen: Sequence[AttemptResult]) -> list[Feedback]:
        return [Feedback(text=f"Try {number}", stop=number >= self.after[s.row]) for s in seen]


def in_windows(case: Any, most: int, bptt: int | None, judge: Any, recompute: bool = True) -> Grads:
    """As training does it: backward at every cut."""

    how: dict[str, Any] = {"most": most, "history": 1, "bptt": bptt, "recompute": recompute}

    def run(rows: AttemptState) -> None:
        window = torch.zeros(())
        for one in attempts(case.solver, rows, judge, **how):
            window = window + loss_of(one.outputs, one.rows)
            if one.cut:
                window.backward()
                window = torch.zeros(())

    return gradients(case, run)


def by_hand(case: Any, row: int, most: int, bptt: int) -> Grads:
    """One row alone, detached by hand, one backward at the end."""

    def run(rows: AttemptState) -> None:
        total = torch.zeros(())
        for number in range(1, most + 1):
            rows, outputs, _ = case.solver.attempt(rows)
            total = total + loss_of(outputs, rows)
            rows = replace(rows, histories=((f"Try {number}",),))
            if number % bptt == 0:
                rows = replace(rows, z_H=rows.z_H.detach(), z_L=rows.z_L.detach())
        total.backward()

    return gradients(case, run, [row])


@pytest.mark.parametrize("after", [(4, 4, 4), (1, 4, 3), (3, 1, 2)])
@pytest.mark.parametrize("bptt", [1, 2, 3])
def test_a_window_is_a_detach_every_so_many_attempts(
    case_of: Cases, bptt: int, after: tuple[int, ...]
) -> None:
    """Also where rows leave in the middle of a window that others go on from."""
    case = case_of(shaken=True)
    alone = [by_hand(case, row, most, bptt) for row, most in enumerate(after)]
    wanted = {name: sum(g[name] for g in alone) for name in alone[0]}
    found = in_windows(case, 4, bptt, Stops(*after))
    assert_close(found, wanted)
    unbound = in_windows(case, 4, None, Stops(*after))
    far = float((found["to_latent.positions"] - unbound["to_latent.positions"]).norm())
    assert (far > 1e-6) == (max(after) > bptt), "a window that cuts nothing, or nothing is cut"


@pytest.mark.parametrize("after", [(4, 4, 4), (1, 4, 3)])
def test_a_language_model_that_learns_goes_from_window_to_window(
    case_of: Cases, after: tuple[int, ...]
) -> None:
    case = case_of(shaken=True, llama={"frozen": False, **SHORT})
    found = in_windows(case, 4, 2, Stops(*after))
    learned = [name for name in found if name.startswith("llama.")]
    assert len(learned) == 20 and all(found[name].any() for name in learned)
    once = in_windows(case, 2, 2, Stops(*after))
    assert any(not torch.equal(found[name], once[name]) for name in learned)


@pytest.mark.parametrize("recompute", [True, False])
def test_memory_does_not_grow_with_attempts_beyond_a_window(
    case_of: Cases, recompute: bool
) -> None:
    case = case_of(rows=2, shaken=True)

    def peak(most: int, bptt: int | None) -> int:
        held = Held()
        with torch.autograd.graph.saved_tensors_hooks(held.pack, lambda kept: next(iter(kept))):
            in_windows(case, most, bptt, Stops(99, 99), recompute)
        assert held.now == 0, "something of the graph outlives the last backward"
        return held.most

    two, four, eight = (peak(most, 2) for most in (2, 4, 8))
    # The first attempt has no history and a text that is shorter by one line.
    assert four <= 1.05 * two + 20_000 and eight <= four
    assert peak(8, None) > 1.8 * peak(4, None), "the measure would not see it grow"


class Held:
    """Bytes that graphs hold for backward. A set, because it can be referred to weakly."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def pack(self, tensor: Tensor) -> Any:
        kept, size = {tensor}, tensor.numel() * tensor.element_size()
        self.count(size)
        weakref.finalize(kept, self.count, -size)
        return kept

    def count(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)
