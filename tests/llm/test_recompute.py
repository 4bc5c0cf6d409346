"""Layer-wise recomputation gives the same values and keeps one input per layer."""

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
    """Return a float32 decoder of six layers."""
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
    """Return the bytes saved for backward, without weights, and the result of `run`."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter) and tensor.dim() > 1:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    return sum(storages.values()), output


def read(backbone: Backbone, prompts: PromptCache, recompute: bool) -> tuple[int, list[Tensor]]:
    """Return saved bytes, and hidden states with gradients of the latent and trainable weights."""
    latent = torch.linspace(-1, 1, 2 * 3 * WIDTH).view(2, 3, WIDTH).requires_grad_()
    saved, out = saved_bytes(lambda: backbone.read(prompts, latent, TEXTS, recompute=recompute))
    weights = [] if backbone.config.frozen else list(backbone.model.model.parameters())
    grads = torch.autograd.grad(out.sin().sum(), [latent, *weights])
    return saved, [out.detach(), *grads]


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("prefix", ["attempt", "problem"])
def test_recomputation_is_bit_identical(prefix: str, frozen: bool) -> None:
    backbone = deep(prefix=prefix, frozen=frozen)
    stored, recomputed = (
        read(backbone, backbone.prefill(problems(40)), recompute)[1] for recompute in (False, True)
    )
    assert all(map(torch.equal, stored, recomputed))
    assert all(grad.any() for grad in recomputed[1:])


@pytest.mark.parametrize("prefix", ["attempt", "problem"])
def test_backward_keeps_one_input_per_layer(prefix: str) -> None:
    backbone = deep(prefix=prefix)
    prompts = backbone.prefill(problems(400))
    stored, recomputed = (read(backbone, prompts, recompute)[0] for recompute in (False, True))
    positions = 2 * (3 + 5 + (400 if prefix == "problem" else 0))
    inputs = LAYERS * positions * WIDTH * 4
    # The last norm and the mask are saved in addition to the inputs.
    assert inputs <= recomputed < 2 * inputs + positions * 500
    assert stored > 8 * recomputed


def peak(run: Callable[[], object]) -> int:
    """Return the peak of allocated bytes during `run`."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in changes))


@pytest.mark.parametrize("prefix", ["attempt", "problem"])
def test_backward_holds_one_layer_at_a_time(prefix: str) -> None:
    """Recomputing the whole decoder at once would have the peak of storing all activations."""
    backbone = deep(prefix=prefix)
    prompts = backbone.prefill(problems(400))
    stored, recomputed = (
        peak(partial(read, backbone, prompts, recompute)) for recompute in (False, True)
    )
    assert recomputed < stored / 2.5


def test_prefill_with_gradient_keeps_one_input_per_layer_and_the_cache() -> None:
    backbone = deep(frozen=False)
    saved, _ = saved_bytes(lambda: backbone.prefill(problems(400)).layers[-1][0])
    assert saved < 1.5 * LAYERS * 2 * 400 * WIDTH * 4


def test_decoder_forward_is_restored() -> None:
    backbone = deep()
    read(backbone, backbone.prefill(problems(20)), recompute=True)
    assert not any("forward" in vars(layer) for layer in backbone.model.model.layers)
