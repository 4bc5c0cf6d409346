"""Gradients of the attempt loop: finite differences in float64, windows, and memory."""

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
"""Finite-difference step along a unit direction; a third or three times it gives equal results."""


def loss_of(outputs: Outputs, state: AttemptState) -> Tensor:
    """Return a smooth loss summed over rows; stablemax's second derivative jumps at 0."""
    labels = state.current["labels"].long().flatten()
    logits = outputs.logits.flatten(0, 1)
    answer = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    return answer / 8 + outputs.q_halt.sigmoid().sum()


def total_loss(
    model: HybridModel, state: AttemptState, max_attempts: int, recompute: bool = False
) -> Tensor:
    options: dict[str, Any] = {"max_attempts": max_attempts, "history": 1, "recompute": recompute}
    made = attempts(model, state, NoFeedback(), **options)
    return torch.stack([loss_of(attempt.outputs, attempt.state) for attempt in made]).sum()


def gradients(
    case: Any, run: Callable[[AttemptState], object], rows: Sequence[int] | None = None
) -> Grads:
    """Return the gradients of all weights and the puzzle rows after `run` called backward."""
    case.model.zero_grad()
    leaf = case.puzzle_rows.clone().requires_grad_()
    run(case.initial_state(rows, puzzle_rows=leaf))
    named = [*case.model.named_parameters(), ("puzzle_rows", leaf)]
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named}


def total_gradients(case: Any, max_attempts: int, recompute: bool = True) -> Grads:
    def run(state: AttemptState) -> None:
        total_loss(case.model, state, max_attempts, recompute).backward()

    return gradients(case, run)


def assert_close(actual: Grads, expected: Grads, tolerance: float = 1e-9) -> None:
    for name, gradient in expected.items():
        torch.testing.assert_close(
            actual[name], gradient, rtol=0, atol=tolerance * float(gradient.abs().max()) + 1e-13
        )


@torch.no_grad()
def errors(case: Any, grads: Grads, max_attempts: int) -> dict[str, float]:
    """Return each tensor's relative slope error along a random direction.

    The error is relative to the larger slope, or to a tenth of the gradient's root mean square if
    the slope along the direction is near zero; at least to 1e-6, since finite differences are
    accurate to 1e-11.
    """
    draw, relative = torch.Generator().manual_seed(5), {}
    frozen = case.model.reader.config.frozen
    start = case.initial_state()
    for name, weight in [*case.model.named_parameters(), ("puzzle_rows", case.puzzle_rows)]:
        direction = torch.randn(weight.shape, generator=draw, dtype=torch.float64)
        direction /= direction.norm()
        values, original = [], weight.detach().clone()
        for k in (-2, -1, 1, 2):
            weight.copy_(original + k * STEP * direction)
            # A frozen reader's prompt cache does not depend on any weight.
            state = replace(start, puzzle_rows=case.puzzle_rows) if frozen else case.initial_state()
            values.append(float(total_loss(case.model, state, max_attempts)))
        weight.copy_(original)
        numeric = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * STEP)
        analytic = float((grads[name] * direction).sum())
        rms = float(grads[name].norm()) / weight.numel() ** 0.5
        scale = max(abs(numeric), abs(analytic), 0.1 * rms, 1e-6)
        relative[name] = abs(numeric - analytic) / scale
    return relative


def check(case: Any, max_attempts: int) -> None:
    grads = total_gradients(case, max_attempts)
    # Smaller gradients would make the comparison meaningless.
    smallest = min(float(g.abs().max()) for n, g in grads.items() if not n.startswith("llama."))
    assert smallest > 1e-5
    relative = errors(case, grads, max_attempts)
    assert max(relative.values()) <= 1e-5, {n: e for n, e in relative.items() if e > 1e-5}


@pytest.mark.parametrize("max_attempts", [1, 2, 3])
@pytest.mark.parametrize("cycles", [1, 2, 3])
@pytest.mark.parametrize("inject", ["carry", "input", "both"])
def test_gradients_match_finite_differences(
    case_of: Cases, inject: str, cycles: int, max_attempts: int
) -> None:
    case = case_of(inject=inject, rows=2, H_cycles=cycles, L_cycles=1, perturbed=True)
    check(case, max_attempts)


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
def test_gradients_match_finite_differences_in_other_configs(
    case_of: Cases, variant: dict[str, Any]
) -> None:
    case = case_of(rows=2, perturbed=True, **{"L_cycles": 1, **variant})
    if "max_new_tokens" in variant.get("llama", {}):
        with torch.no_grad():
            assert any(case.model.attempt(case.initial_state())[2].reasoning), (
                "no text was generated"
            )
    check(case, 2)


def use_published_recursion(monkeypatch: pytest.MonkeyPatch) -> None:
    recurse = TRM.recurse

    def last_cycle_only(*args: Any, **kwargs: Any) -> Any:
        return recurse(*args, **{**kwargs, "full_gradient": False})

    monkeypatch.setattr(TRM, "recurse", last_cycle_only)


@pytest.mark.parametrize("cycles", [2, 3])
def test_published_recursion_gives_adapters_no_gradient(
    case_of: Cases, monkeypatch: pytest.MonkeyPatch, cycles: int
) -> None:
    case = case_of(inject="carry", rows=2, H_cycles=cycles, perturbed=True)
    full = total_gradients(case, 2)
    use_published_recursion(monkeypatch)
    published = total_gradients(case, 2)
    adapters = [name for name in published if name.startswith("to_")]
    assert len(adapters) == 14
    assert all(float(full[name].norm()) > 1e-5 for name in adapters)
    assert all(float(published[name].norm()) == 0 for name in adapters)
    assert float(published["trm.embed_tokens"].norm()) > 0


@pytest.mark.parametrize("inject", ["input", "both"])
def test_finite_differences_detect_a_missing_cycle(
    case_of: Cases, monkeypatch: pytest.MonkeyPatch, inject: str
) -> None:
    case = case_of(inject=inject, rows=2, L_cycles=1, perturbed=True)
    use_published_recursion(monkeypatch)
    relative = errors(case, total_gradients(case, 2), 2)
    adapters = [name for name in relative if name.startswith(("to_text", "to_latent"))]
    assert min(relative[name] for name in adapters) > 1e-3


def test_act_step_ignores_the_states_of_a_halted_carry(case_of: Cases) -> None:
    """Adapters therefore need `recurse`: `act_step` on an initial carry gives them no gradient."""
    case = case_of(H_cycles=1)
    trm, batch = case.model.trm, {"inputs": case.batch["inputs"]}
    carry = trm.initial_carry(batch)
    injected = torch.ones_like(carry.z_H, requires_grad=True)
    _, plain = trm.act_step(carry, batch, puzzle_rows=case.puzzle_rows)
    carry = replace(carry, z_H=carry.z_H + injected)
    _, out = trm.act_step(carry, batch, puzzle_rows=case.puzzle_rows)
    assert torch.equal(plain.logits, out.logits)
    out.logits.sum().backward()
    assert injected.grad is None or not injected.grad.any()


@pytest.mark.parametrize("llama", [{}, {"prefix": "problem"}, {"max_new_tokens": 3}])
def test_recompute_gives_the_same_loss_and_gradients(case_of: Cases, llama: dict[str, Any]) -> None:
    case = case_of(rows=2, perturbed=True, llama=llama, act_steps=2)
    losses = [
        total_loss(case.model, case.initial_state(), 2, recompute) for recompute in (True, False)
    ]
    assert torch.equal(*losses)
    assert_close(total_gradients(case, 2, True), total_gradients(case, 2, False), 1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recompute", [True, False])
def test_full_gradient_gives_the_published_outputs(
    case_of: Cases, recompute: bool, dtype: str
) -> None:
    case = case_of(perturbed=True, inject="none", H_cycles=3, forward_dtype=dtype)
    trm, states = case.model.trm.float(), case.model.trm.fresh_states(case.batch["inputs"])
    results = [
        trm.recurse(case.batch, *states, puzzle_rows=case.puzzle_rows, **options)
        for options in ({}, {"full_gradient": True, "recompute": recompute})
    ]
    published, ours = ((z_H, z_L, o.logits, o.q_halt) for z_H, z_L, o in results)
    assert all(map(torch.equal, published, ours))


class Stops:
    """Feedback source: row r stops after attempt `after[r]`; the text names the attempt."""

    def __init__(self, *after: int) -> None:
        self.after = after

    def __call__(self, number: int, results: Sequence[AttemptResult]) -> list[Feedback]:
        return [Feedback(text=f"Try {number}", stop=number >= self.after[r.row]) for r in results]


def in_windows(
    case: Any, max_attempts: int, bptt: int | None, source: Any, recompute: bool = True
) -> Grads:
    """Return the gradients of training, which calls backward at every cut."""
    options: dict[str, Any] = {"max_attempts": max_attempts, "history": 1, "bptt": bptt}

    def run(state: AttemptState) -> None:
        window = torch.zeros(())
        for attempt in attempts(case.model, state, source, recompute=recompute, **options):
            window = window + loss_of(attempt.outputs, attempt.state)
            if attempt.cut:
                window.backward()
                window = torch.zeros(())

    return gradients(case, run)


def by_hand(case: Any, row: int, max_attempts: int, bptt: int) -> Grads:
    """Return the gradients of a single row: states detached by hand, one backward at the end."""

    def run(state: AttemptState) -> None:
        total = torch.zeros(())
        for number in range(1, max_attempts + 1):
            state, outputs, _ = case.model.attempt(state)
            total = total + loss_of(outputs, state)
            state = replace(state, histories=((f"Try {number}",),))
            if number % bptt == 0:
                state = replace(state, z_H=state.z_H.detach(), z_L=state.z_L.detach())
        total.backward()

    return gradients(case, run, [row])


@pytest.mark.parametrize("after", [(4, 4, 4), (1, 4, 3), (3, 1, 2)])
@pytest.mark.parametrize("bptt", [1, 2, 3])
def test_windows_match_detaching_every_bptt_attempts(
    case_of: Cases, bptt: int, after: tuple[int, ...]
) -> None:
    """Rows may stop in the middle of a window in which other rows continue."""
    case = case_of(perturbed=True)
    alone = [by_hand(case, row, last, bptt) for row, last in enumerate(after)]
    expected = {name: sum(g[name] for g in alone) for name in alone[0]}
    grads = in_windows(case, 4, bptt, Stops(*after))
    assert_close(grads, expected)
    uncut = in_windows(case, 4, None, Stops(*after))
    distance = float((grads["to_latent.positions"] - uncut["to_latent.positions"]).norm())
    assert (distance > 1e-6) == (max(after) > bptt), (
        "gradients must differ only if attempts exceed the window"
    )


@pytest.mark.parametrize("after", [(4, 4, 4), (1, 4, 3)])
def test_trained_language_model_receives_gradient_in_every_window(
    case_of: Cases, after: tuple[int, ...]
) -> None:
    case = case_of(perturbed=True, llama={"frozen": False, **SHORT})
    two_windows = in_windows(case, 4, 2, Stops(*after))
    trained = [name for name in two_windows if name.startswith("llama.")]
    assert len(trained) == 20 and all(two_windows[name].any() for name in trained)
    one_window = in_windows(case, 2, 2, Stops(*after))
    assert any(not torch.equal(two_windows[name], one_window[name]) for name in trained)


@pytest.mark.parametrize("recompute", [True, False])
def test_memory_is_bounded_by_the_window(case_of: Cases, recompute: bool) -> None:
    case = case_of(rows=2, perturbed=True)

    def peak(max_attempts: int, bptt: int | None) -> int:
        saved = SavedBytes()
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda box: next(iter(box))):
            in_windows(case, max_attempts, bptt, Stops(99, 99), recompute)
        assert saved.current == 0, "saved tensors outlive the last backward"
        return saved.peak

    two, four, eight = (peak(count, 2) for count in (2, 4, 8))
    # The first attempt has no history, hence a text that is shorter by one line.
    assert four <= 1.05 * two + 20_000 and eight <= four
    assert peak(8, None) > 1.8 * peak(4, None), "the measurement does not detect growth"


class SavedBytes:
    """Count of bytes saved for backward; tensors are boxed in sets, which allow weak references."""

    def __init__(self) -> None:
        self.current = self.peak = 0

    def pack(self, tensor: Tensor) -> Any:
        box, size = {tensor}, tensor.numel() * tensor.element_size()
        self.count(size)
        weakref.finalize(box, self.count, -size)
        return box

    def count(self, size: int) -> None:
        self.current += size
        self.peak = max(self.peak, self.current)
