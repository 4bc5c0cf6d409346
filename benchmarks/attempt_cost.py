"""What an attempt costs against encoding its problem again, SmolLM2 on this machine's CPU.

    python -m benchmarks.attempt_cost [MODELS]

An attempt is what the hybrid does by default: the latent, the feedback on the attempt before, the
end of the turn, the cue. Both are measured in turns, and so is transformers' own attention (sdpa),
which copies keys and values for every query head. Writes benchmarks/results/attempt_cost.json.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.measure import record
from hybrid.adapters import AdapterConfig
from hybrid.llm import LlamaConfig, Reader, open_reader
from hybrid.llm.attention import NAME
from hybrid.solver import Confidence, FeedbackConfig, Seen
from hybrid.solver.feedback import MOST_CELLS

PROBLEM_TOKENS = 2000
ROUNDS = 5
ATTEMPTS_PER_ROUND = 5


def main() -> None:
    models = Path(sys.argv[1] if len(sys.argv) > 1 else "out/models")
    cpu = torch.device("cpu")
    reader = open_reader(LlamaConfig(), cpu, models=models, encodings=models)
    problem = torch.randint(100, 40_000, (PROBLEM_TOKENS,)).tolist()
    k, hidden = AdapterConfig().prefix_tokens, reader.backbone.hidden_size
    latent = torch.randn(1, k, hidden) * reader.backbone.embedding_scale
    said = [[feedback_line()]]
    seconds: dict[str, list[float]] = {}
    with torch.no_grad():
        encoding = reader.backbone.encode([problem])
        tokens = reader.read(encoding, latent, said, recompute=False)[2][0]
        for _ in range(ROUNDS):
            for attention in (NAME, "sdpa"):
                reader.backbone.model.set_attn_implementation(attention)
                encode, attempt = (
                    f"{attention}: problem again",
                    f"{attention}: attempt",
                )
                seconds.setdefault(encode, []).append(
                    timed(lambda: reader.backbone.encode([problem]))
                )
                seconds.setdefault(attempt, []).extend(
                    timed(lambda: read(reader, encoding, latent, said))
                    for _ in range(ATTEMPTS_PER_ROUND)
                )
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {
        attention: medians[f"{attention}: attempt"] / medians[f"{attention}: problem again"]
        for attention in (NAME, "sdpa")
    }
    results = {
        "problem tokens": PROBLEM_TOKENS,
        "attempt tokens": tokens,
        "median seconds": medians,
        "all seconds": seconds,
        "attempt / problem again": ratios,
    }
    record("attempt_cost", results)
    print(json.dumps({k: v for k, v in results.items() if k != "all seconds"}, indent=1))


def read(reader: Reader, encoding: object, latent: torch.Tensor, said: list[list[str]]) -> None:
    reader.read(encoding, latent, said, recompute=False)  # type: ignore[arg-type]


def feedback_line() -> str:
    """The default feedback on an attempt."""
    doubts = tuple((row, 10 + row, 5) for row in range(MOST_CELLS))
    grid = torch.zeros(30, 30, dtype=torch.uint8).numpy()
    seen = Seen(row=0, tokens=grid.ravel(), grid=grid, confidence=0.43, doubts=doubts)
    return Confidence(FeedbackConfig())(12, [seen])[0].text


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
