"""A compiled recursion never falls back to eager kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hybrid.trm import TRM, TRMConfig


@pytest.mark.slow
def test_no_batch_canvas_or_model_size_falls_back_to_eager(
    tiny: Callable[..., TRMConfig],
    batch_of: Callable[..., dict[str, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beyond recompile_limit torch falls back with a warning; the test turns it into an error."""
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    stats = torch._dynamo.utils.counters["stats"]
    graphs = []
    for width in (8, 16, 24):
        config = tiny(hidden_size=width, seq_len=16)
        model = TRM(config)
        model.compile_recursion()
        for rows, side in ((3, 4), (1, 4), (5, 4), (3, 3), (1, 3), (7, 2)):
            full = batch_of(config, rows=rows)
            batch = {n: v[:, : side**2] if v.dim() > 1 else v for n, v in full.items()}
            carry, outputs = model.train().act_step(model.initial_carry(batch), batch)
            outputs.logits.sum().backward()
            with torch.inference_mode():
                model.eval().act_step(carry, batch)
            graphs.append(stats["unique_graphs"])
    several, one, *others, last = graphs
    assert 0 < several < one and others[:4] == [one] * 4, "recompiled for another size"
    assert last == 3 * one > 8, "the test does not exceed torch's default limit"
