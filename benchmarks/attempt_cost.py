"""What an attempt costs against encoding its problem again, SmolLM2 on this machine's CPU.

    python -m benchmarks.attempt_cost [MODELS]

An attempt is what the hybrid does by default: the latent, the feedback on the attempt before, the
end of the turn, the cue. Both are measured in turns, with our attention and with transformers' own
(sdpa), which copies keys and values for every query head. Writes
benchmarks/results/attempt_cost.json.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path

import torch

from benchmarks.measure import faster, in_turns, record, table
from hybrid.adapters import AdapterConfig
from hybrid.llm import LlamaConfig, Reader, open_reader
from hybrid.llm.attention import NAME
from hybrid.solver import Confidence, FeedbackConfig, Seen
from hybrid.solver.feedback import MOST_CELLS

PROBLEM_TOKENS = 2000
ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="?", type=Path, default=Path("out/models"))
    models = parser.parse_args().models
    cpu = torch.device("cpu")
    reader = open_reader(LlamaConfig(), cpu, models=models, encodings=models)
    problem = torch.randint(100, 40_000, (PROBLEM_TOKENS,)).tolist()
    k, hidden = AdapterConfig().prefix_tokens, reader.backbone.hidden_size
    latent = torch.randn(1, k, hidden) * reader.backbone.embedding_scale
    said = [[feedback_line()]]
    rows = []
    with torch.no_grad():
        for attention in (NAME, "sdpa"):
            reader.backbone.model.set_attn_implementation(attention)
            encoding = reader.backbone.encode([problem])
            tokens = reader.read(encoding, latent, said, recompute=False)[2][0]
            again, attempt = "problem again", "attempt"
            seconds = in_turns(
                {
                    again: lambda: reader.backbone.encode([problem]),
                    attempt: partial(read, reader, encoding, latent, said),
                },
                rounds=ROUNDS,
            )
            rows += [
                {
                    "attention": attention,
                    "what": what,
                    "tokens": read_tokens,
                    "s": round(statistics.median(seconds[what]), 3),
                    "of the problem's time": faster(seconds[what], seconds[again]),
                }
                for what, read_tokens in ((again, PROBLEM_TOKENS), (attempt, tokens))
            ]
    print(table(rows))
    record("attempt_cost", rows)


def read(reader: Reader, encoding: object, latent: torch.Tensor, said: list[list[str]]) -> None:
    reader.read(encoding, latent, said, recompute=False)  # type: ignore[arg-type]


def feedback_line() -> str:
    """The default feedback on an attempt."""
    doubts = tuple((row, 10 + row, 5) for row in range(MOST_CELLS))
    grid = torch.zeros(30, 30, dtype=torch.uint8).numpy()
    seen = Seen(row=0, tokens=grid.ravel(), grid=grid, confidence=0.43, doubts=doubts)
    return Confidence(FeedbackConfig())(12, [seen])[0].text


if __name__ == "__main__":
    main()
