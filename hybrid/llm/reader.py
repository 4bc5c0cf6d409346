"""Puzzle reading with a language model: prompts within a budget, prefill, one read per attempt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from hybrid.arc import Task
from hybrid.errors import UserError
from hybrid.llm.prompt import CUE, REASONING_CUE, format_problem_text

if TYPE_CHECKING:  # importing transformers takes a second, also in runs without a language model
    from hybrid.llm.backbone import Backbone, PromptCache
    from hybrid.llm.prompt_cache import PromptCacheStore


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Tokenized prompt of a puzzle."""

    tokens: tuple[int, ...]
    demonstrations: int
    """Number of demonstrations of the task."""
    shown: int
    """Number of demonstrations that fit the token budget."""


class Reader:
    """Language model with the prompt format and the texts of an attempt."""

    def __init__(self, backbone: Backbone, store: PromptCacheStore | None = None) -> None:
        self.backbone = backbone
        self.store = store
        """Prompt caches on disk; prompts that are not stored are prefilled when needed."""
        self.config = backbone.config
        self._end = backbone.tokens(backbone.tail)
        self._cue = backbone.tokens(CUE)
        self._reasoning_cue = backbone.tokens(REASONING_CUE)
        self._after_reasoning = backbone.tokens("\n" + CUE)

    def prompt(self, task: Task, test: int = 0) -> Prompt:
        """Return the prompt, without the last demonstrations that exceed llama.max_prompt_tokens.

        Raises UserError if the test input alone does not fit.
        """
        budget = self.config.max_prompt_tokens
        for shown in range(len(task.train), -1, -1):
            text = format_problem_text(task, test, shown=shown)
            tokens = self.backbone.tokens(self.backbone.head + text)
            if len(tokens) <= budget:
                return Prompt(tokens=tuple(tokens), demonstrations=len(task.train), shown=shown)
        raise UserError(
            f"llama.max_prompt_tokens: {budget} is too small for the test input of {task.id},"
            f" which needs {len(tokens)}"
        )

    def prefill(self, prompts: Sequence[Prompt]) -> PromptCache:
        """Return the key-value cache of the prompts, loaded from the store where possible."""
        tokens = [prompt.tokens for prompt in prompts]
        return self.store.prefill(tokens) if self.store else self.backbone.prefill(tokens)

    def caching_costs(self, prompts: Sequence[Prompt]) -> list[int]:
        """Return the tokens that `prefill` processes per prompt: 0 with prefix=problem."""
        prefills = self.config.prefix == "attempt"
        return [len(prompt.tokens) if prefills else 0 for prompt in prompts]

    def read(
        self,
        prompts: PromptCache,
        latent: Tensor,
        histories: Sequence[Sequence[str]],
        recompute: bool,
    ) -> tuple[Tensor, list[str], list[int]]:
        """Return an attempt's hidden state [B, H], reasoning texts [B] and token counts [B].

        `histories` holds feedback lines on earlier attempts, per row. Reasoning is generated
        without gradients and read again with them, so the latent always gets a gradient.
        """
        history = [self.backbone.tokens("".join(f"{line}\n" for line in row)) for row in histories]
        prefix = [latent.shape[1]] * len(history)
        if self.config.prefix == "problem":
            prefix = [k + n for k, n in zip(prefix, prompts.mask.sum(1).tolist(), strict=True)]
        if not self.config.max_new_tokens:
            texts = [[*lines, *self._end, *self._cue] for lines in history]
            counts = [k + len(text) for k, text in zip(prefix, texts, strict=True)]
            hidden = self.backbone.read(prompts, latent, texts, recompute=recompute)
            return hidden, [""] * len(texts), counts
        texts = [[*lines, *self._end, *self._reasoning_cue] for lines in history]
        limit = self.config.max_new_tokens
        reasoning = self.backbone.generate(prompts, latent.detach(), texts, limit)
        full = [
            [*text, *tokens, *self._after_reasoning]
            for text, tokens in zip(texts, reasoning, strict=True)
        ]
        # The prefix and the text are processed twice: for generation and for the final read.
        counts = [
            2 * k + sum(map(len, parts))
            for k, *parts in zip(prefix, texts, reasoning, full, strict=True)
        ]
        hidden = self.backbone.read(prompts, latent, full, recompute=recompute)
        return hidden, [self.backbone.text(tokens) for tokens in reasoning], counts
