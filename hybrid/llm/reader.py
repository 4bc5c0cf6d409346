"""Reads puzzles with a language model: prompts within a budget, encoded once, read per attempt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from hybrid.arc import Task
from hybrid.errors import UserError
from hybrid.llm.prompt import CUE, REASONING_CUE, format_problem_text

if TYPE_CHECKING:  # transformers takes a second that runs without a language model should not pay
    from hybrid.llm.backbone import Backbone, PromptCache
    from hybrid.llm.prompt_cache import PromptCacheStore


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A problem as tokens."""

    tokens: tuple[int, ...]
    demonstrations: int
    shown: int
    """How many of them fit the budget."""


class Reader:
    """A language model that reads problems; what an attempt says to it and takes from it."""

    def __init__(self, backbone: Backbone, store: PromptCacheStore | None = None) -> None:
        self.backbone = backbone
        self.store = store
        """Encodings made beforehand; what is not in it is encoded when it is needed."""
        self.config = backbone.config
        self._end = backbone.tokens(backbone.tail)
        self._cue = backbone.tokens(CUE)
        self._reasoning_cue = backbone.tokens(REASONING_CUE)
        self._after_reasoning = backbone.tokens("\n" + CUE)

    def prompt(self, task: Task, test: int = 0) -> Prompt:
        """The problem within llama.max_prompt_tokens; demonstrations are left out last first.

        Raises UserError if the test input alone does not fit.
        """
        most = self.config.max_prompt_tokens
        for shown in range(len(task.train), -1, -1):
            text = format_problem_text(task, test, shown=shown)
            tokens = self.backbone.tokens(self.backbone.head + text)
            if len(tokens) <= most:
                return Prompt(tokens=tuple(tokens), demonstrations=len(task.train), shown=shown)
        raise UserError(
            f"llama.max_prompt_tokens: {most} do not hold the test input of {task.id},"
            f" which takes {len(tokens)}"
        )

    def prefill(self, prompts: Sequence[Prompt]) -> PromptCache:
        """Key-value caches of the problems, in one batch; from the store where it has them."""
        problems = [prompt.tokens for prompt in prompts]
        return self.store.prefill(problems) if self.store else self.backbone.prefill(problems)

    def caching_costs(self, prompts: Sequence[Prompt]) -> list[int]:
        """Tokens that `prefill` takes of each; with prefix=problem attempts pay them instead."""
        once = self.config.prefix == "attempt"
        return [len(prompt.tokens) if once else 0 for prompt in prompts]

    def read(
        self,
        encoding: PromptCache,
        latent: Tensor,
        histories: Sequence[Sequence[str]],
        recompute: bool,
    ) -> tuple[Tensor, list[str], list[int]]:
        """Hidden state [B, H] of an attempt, its reasoning texts, and the tokens each row took.

        `histories`: per row the lines said of earlier attempts. Reasoning is written without
        gradient and then read with it, so the latent gets one either way.
        """
        said = [self.backbone.tokens("".join(f"{line}\n" for line in lines)) for lines in histories]
        front = [latent.shape[1]] * len(said)
        if self.config.prefix == "problem":
            front = [
                k + problem for k, problem in zip(front, encoding.mask.sum(1).tolist(), strict=True)
            ]
        if not self.config.max_new_tokens:
            texts = [[*lines, *self._end, *self._cue] for lines in said]
            spent = [k + len(text) for k, text in zip(front, texts, strict=True)]
            hidden = self.backbone.read(encoding, latent, texts, recompute=recompute)
            return hidden, [""] * len(texts), spent
        texts = [[*lines, *self._end, *self._reasoning_cue] for lines in said]
        most = self.config.max_new_tokens
        written = self.backbone.generate(encoding, latent.detach(), texts, most)
        whole = [
            [*text, *tokens, *self._after_reasoning]
            for text, tokens in zip(texts, written, strict=True)
        ]
        # Read twice: once to be written, token by token, once as a whole to be understood.
        spent = [
            2 * k + sum(map(len, parts))
            for k, *parts in zip(front, texts, written, whole, strict=True)
        ]
        hidden = self.backbone.read(encoding, latent, whole, recompute=recompute)
        return hidden, [self.backbone.text(tokens) for tokens in written], spent
