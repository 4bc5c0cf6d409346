"""Recomputed layer by layer, a reading has the same numbers and keeps one input a layer."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig as ModelConfig
from transformers import LlamaForCausalLM

from hybrid.llm import LlamaConfig
from hybrid.llm.attention import use_grouped_attention
from hybrid.llm.backbone import Backbone, PromptCache
from hybrid.llm.tiny import tiny_random

Tiny = Callable[..., Backbone]
LAYERS, WIDTH = 6, 64


def deep(**keys: Any) -> Backbone:
    """A decoder of six layers, float32."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        ModelConfig(
            vocab_size=300,
            hidden_size=WIDTH,
            intermediate_size=3 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    use_grouped_attention(model)
    return Backbone(model, tiny_random(torch.float32)[1], LlamaConfig(**keys), "none")


def problems(tokens: int) -> list[list[int]]:
    return [[row + n % 200 for n in range(tokens - 7 * row)] for row in range(2)]


TEXTS = ([50, 51, 52], [60, 61, 62, 63, 64])


def saved_bytes(run: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """Bytes of the storages that a graph keeps for backward, weights aside, and what `run` gave."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter) and tensor.dim() > 1:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        found = run()
    return sum(storages.values()), found


def read(backbone: Backbone, encoding: PromptCache, recompute: bool) -> tuple[int, list[Tensor]]:
    """Bytes kept, hidden states, the latent's gradient and the weights' if they learn."""
    latent = torch.linspace(-1, 1, 2 * 3 * WIDTH).view(2, 3, WIDTH).requires_grad_()
    held, out = saved_bytes(lambda: backbone.read(encoding, latent, TEXTS, recompute=recompute))
    weights = [] if backbone.config.frozen else list(backbone.model.model.parameters())
    slopes = torch.autograd.grad(out.sin().sum(), [latent, *weights])
    return held, [out.detach(), *slopes]


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("prefix", ["attempt", "problem"])
def test_numbers_are_the_same_to_the_bit(prefix: str, frozen: bool) -> None:
    backbone = deep(prefix=prefix, frozen=frozen)
    kept, again = (
        read(backbone, backbone.prefill(problems(40)), recompute)[1] for recompute in (False, True)
    )
    assert all(map(torch.equal, kept, again))
    assert all(slope.any() for slope in again[1:])


@pytest.mark.parametrize("prefix", ["attempt", "problem"])
def test_backward_keeps_one_input_a_layer(prefix: str) -> None:
    backbone = deep(prefix=prefix)
    encoding = backbone.prefill(problems(400))
    kept, again = (read(backbone, encoding, recompute)[0] for recompute in (False, True))
    positions = 2 * (3 + 5 + (400 if prefix == "problem" else 0))
    inputs = LAYERS * positions * WIDTH * 4
    # Beside the inputs: the last norm and the mask.
    assert inputs <= again < 2 * inputs + positions * 500
    assert kept > 8 * again


def peak(run: Callable[[], object]) -> int:
    """Most bytes that `run` had allocated at any time."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in changes))


@pytest.mark.parametrize("prefix", ["attempt", "problem"])
def test_backward_needs_one_layer_at_a_time(prefix: str) -> None:
    """Where the decoder is recomputed as a whole, its peak is that of keeping everything."""
    backbone = deep(prefix=prefix)
    encoding = backbone.prefill(problems(400))
    kept, again = (
        peak(partial(read, backbone, encoding, recompute)) for recompute in (False, True)
    )
    assert again < kept / 2.5


def test_a_problem_that_is_learned_from_keeps_one_input_a_layer_and_its_cache() -> None:
    backbone = deep(frozen=False)
    held, _ = saved_bytes(lambda: backbone.prefill(problems(400)).layers[-1][0])
    assert held < 1.5 * LAYERS * 2 * 400 * WIDTH * 4


def test_the_decoder_is_left_as_it_was() -> None:
    backbone = deep()
    read(backbone, backbone.prefill(problems(20)), recompute=True)
    assert not any("forward" in vars(layer) for layer in backbone.model.model.layers)
