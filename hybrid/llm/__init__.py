"""The language model that reads the puzzle; the only importer of transformers."""

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
    """UserError for a model that is not to be had; loads no weights."""
    from hybrid.llm import load  # transformers takes a second to import

    load.check_model(config, models)


def open_reader(
    config: LlamaConfig, device: torch.device, *, models: Path, prompt_cache: Path
) -> Reader:
    """The language model of `config`, ready to read; see `load_backbone` for what it raises."""
    from hybrid.llm.load import load_backbone
    from hybrid.llm.prompt_cache import PromptCacheStore  # transformers takes a second to import

    backbone = load_backbone(config, device, models)
    return Reader(
        backbone, PromptCacheStore(prompt_cache, backbone) if config.prompt_cache else None
    )
