"""Time of an attempt relative to prefilling its problem again, with SmolLM2 on this CPU.

    python -m benchmarks.attempt_cost [MODELS]

An attempt reads the hybrid's default suffix: latent, feedback on the previous attempt, end of the
chat turn, cue. All sides run alternately, with our attention and with transformers' (sdpa), which
copies keys and values for every query head. Writes benchmarks/results/attempt_cost.json.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path

import torch

from benchmarks.measure import faster, in_turns, record, table
from hybrid.adapters import AdapterConfig
from hybrid.llm import LlamaConfig, open_reader
from hybrid.llm.attention import NAME
from hybrid.solver import AttemptResult, Confidence, FeedbackConfig
from hybrid.solver.feedback import MAX_CELLS

PROBLEM_TOKENS = 2000
ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="?", type=Path, default=Path("out/models"))
    models = parser.parse_args().models
    cpu = torch.device("cpu")
    reader = open_reader(LlamaConfig(), cpu, models=models, prompt_cache=models)
    problem = torch.randint(100, 40_000, (PROBLEM_TOKENS,)).tolist()
    k, hidden = AdapterConfig().prefix_tokens, reader.backbone.hidden_size
    latent = torch.randn(1, k, hidden) * reader.backbone.embedding_scale
    histories = [[feedback_line()]]
    backbone = reader.backbone
    with torch.no_grad():
        cache = backbone.prefill([problem])
        tokens = reader.read(cache, latent, histories, recompute=False)[2][0]

        def prefill_again(attention: str) -> None:
            backbone.model.set_attn_implementation(attention)
            backbone.prefill([problem])

        def attempt(attention: str) -> None:
            backbone.model.set_attn_implementation(attention)
            reader.read(cache, latent, histories, recompute=False)

        sides = {
            f"{what}, {attention}": partial(work, attention)
            for what, work in (("problem again", prefill_again), ("attempt", attempt))
            for attention in (NAME, "sdpa")
        }
        seconds = in_turns(sides, rounds=ROUNDS)
    baseline = next(iter(seconds.values()))
    rows = [
        {
            "what, attention": side,
            "tokens": tokens if side.startswith("attempt") else PROBLEM_TOKENS,
            "s": round(statistics.median(took), 3),
            "of the problem's time": faster(took, baseline),
        }
        for side, took in seconds.items()
    ]
    print(table(rows))
    record("attempt_cost", rows)


def feedback_line() -> str:
    """Return the default feedback on an attempt."""
    least_confident = tuple((row, 10 + row, 5) for row in range(MAX_CELLS))
    grid = torch.zeros(30, 30, dtype=torch.uint8).numpy()
    result = AttemptResult(
        row=0, tokens=grid.ravel(), grid=grid, confidence=0.43, least_confident=least_confident
    )
    return Confidence(FeedbackConfig())(12, [result])[0].text


if __name__ == "__main__":
    main()
