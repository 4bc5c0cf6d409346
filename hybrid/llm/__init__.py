"""Language model that reads the puzzles; the only package that imports transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hybrid.llm.config import LlamaConfig
from hybrid.llm.known import SHAPES, Shape, misnamed
from hybrid.llm.prompt import format_problem_text
from hybrid.llm.reader import Prompt, Reader

if TYPE_CHECKING:
    import torch

__all__ = [
    "SHAPES",
    "LlamaConfig",
    "Prompt",
    "Reader",
    "Shape",
    "check_model",
    "format_problem_text",
    "misnamed",
    "open_reader",
]


def check_model(config: LlamaConfig, models: Path) -> None:
    """Raise UserError if the model is unavailable; no weights are loaded."""
    from hybrid.llm import load  # importing transformers takes a second

    load.check_model(config, models)


def open_reader(
    config: LlamaConfig, device: torch.device, *, models: Path, prompt_cache: Path
) -> Reader:
    """Load the language model of `config`; raises the errors of `load_backbone`."""
    from hybrid.llm.load import load_backbone
    from hybrid.llm.prompt_cache import PromptCacheStore  # importing transformers takes a second

    backbone = load_backbone(config, device, models)
    store = PromptCacheStore(prompt_cache, backbone) if config.prompt_cache else None
    return Reader(backbone, store)
