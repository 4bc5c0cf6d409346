"""Memory estimates against the tensors that autograd saves for backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import config_of
from torch import Tensor, nn
from transformers import LlamaConfig as DecoderConfig
from transformers import LlamaForCausalLM

from hybrid.config import Config
from hybrid.llm import LlamaConfig
from hybrid.llm.attention import use_grouped_attention
from hybrid.llm.backbone import Backbone
from hybrid.llm.load import _shape
from hybrid.llm.tiny import tiny_random
from hybrid.train import estimate
from hybrid.train.estimate import GiB, largest_micro_batch
from hybrid.train.memory import Worker, cycle_bytes, layer_bytes
from hybrid.trm import TRM, TRMConfig

ROWS, CELLS, P = 4, 100, 4
WIDTHS = {"bfloat16": 2, "float32": 4}
SIZES: dict[str, dict[str, Any]] = {
    "narrow": {"hidden_size": 64, "num_heads": 4, "L_cycles": 2},
    "more cycles": {"hidden_size": 64, "num_heads": 2, "L_cycles": 4, "expansion": 2},
    "wide": {"hidden_size": 192, "num_heads": 4, "L_cycles": 1, "L_layers": 3},
    "mlp_t": {"hidden_size": 64, "num_heads": 4, "L_cycles": 2, "mlp_t": True},
}


def saved(model: nn.Module, run: Callable[[], object]) -> int:
    """Return the bytes of storages, except weights, that autograd saves while `run` is called."""
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: list[Tensor] = []  # kept alive, so that no address is reused
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept.append(tensor)
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storages.values())


def trm_of(dtype: str, **sizes: Any) -> TRM:
    width = sizes["hidden_size"]
    sizes = {"seq_len": CELLS, "puzzle_emb_ndim": width, "puzzle_emb_len": P, **sizes}
    return TRM(TRMConfig(**{"forward_dtype": dtype, **sizes})).train()


def rows_of(count: int) -> dict[str, Tensor]:
    tokens = torch.ones(count, CELLS, dtype=torch.int32)
    return {"inputs": tokens, "puzzle_identifiers": torch.zeros(count, dtype=torch.int32)}


def pretraining(trm: TRM, count: int) -> int:
    batch, draws = rows_of(count), (torch.zeros(count), torch.zeros(count))
    carry = trm.initial_carry(batch)
    return saved(trm, lambda: trm.act_step(carry, batch, exploration=draws))


def per_row(measure: Callable[[int], int]) -> float:
    """Return bytes per row without those that do not depend on rows, like casts of weights."""
    return (measure(2 * ROWS) - measure(ROWS)) / ROWS


def check_cycle(trm: TRM, dtype: str, compiled: bool) -> None:
    measured = per_row(partial(pretraining, trm))
    counted = cycle_bytes(trm.config, WIDTHS[dtype], compiled=compiled, on_cpu=True)
    assert counted == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("dtype", WIDTHS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_pretraining_step_saves_one_cycle(sizes: dict[str, Any], dtype: str) -> None:
    check_cycle(trm_of(dtype, **sizes), dtype, compiled=False)


@pytest.mark.parametrize("dtype", WIDTHS)
def test_compiled_step_saves_what_is_estimated(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """The partition into forward and backward graphs decides, so no kernels are compiled."""
    compiler = partial(torch.compile, backend="aot_eager_decomp_partition")
    monkeypatch.setattr(torch, "compile", compiler)
    torch._dynamo.reset()
    trm = trm_of(dtype, **SIZES["narrow"])
    trm.compile_recursion()
    check_cycle(trm, dtype, compiled=True)
    assert pretraining(trm_of(dtype, **SIZES["narrow"]), ROWS) > 1.1 * pretraining(trm, ROWS)


@pytest.mark.parametrize("recompute", [True, False])
def test_attempt_saves_all_cycles_or_with_recompute_the_states_between(recompute: bool) -> None:
    trm = trm_of("bfloat16", **SIZES["narrow"])

    def attempt(count: int) -> int:
        batch = rows_of(count)
        states = [state.clone().requires_grad_() for state in trm.fresh_states(batch["inputs"])]
        how = {"full_gradient": True, "recompute": recompute}
        return saved(trm, lambda: trm.recurse(batch, *states, **how))

    config = config_of(
        Path("/nowhere"),
        trm={"forward_dtype": "bfloat16"},
        training={"recompute": recompute, "max_attempts": 1},
    )
    counted = worker_of(config, trm=trm.config, hybrid=True).parts()["activations"] / ROWS
    cycle = cycle_bytes(trm.config, 2, compiled=False, on_cpu=True)
    counted -= cycle / 6  # gradients during backward
    if recompute:
        counted -= cycle  # recomputed by backward
    assert counted == pytest.approx(per_row(attempt), rel=0.15)


def decoder(layers: int, dtype: str, frozen: bool) -> Backbone:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_key_value_heads": 2}
    config = DecoderConfig(vocab_size=300, num_attention_heads=4, num_hidden_layers=layers, **sizes)
    model = LlamaForCausalLM(config)
    use_grouped_attention(model)
    if frozen:
        model.to(getattr(torch, dtype))
    llama = LlamaConfig(prefix="problem", frozen=frozen)
    return Backbone(model, tiny_random(torch.float32)[1], llama, "none", getattr(torch, dtype))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("dtype", WIDTHS)
def test_llm_layer_saves_what_is_estimated(dtype: str, frozen: bool, masked: bool) -> None:
    tokens = 192
    width = WIDTHS[dtype]

    def reading(layers: int) -> int:
        backbone = decoder(layers, dtype, frozen)
        problems = [[7] * (tokens - masked * row) for row in range(2)]
        latent = torch.zeros(2, 3, 64, requires_grad=True)
        encoding, texts = backbone.prefill(problems), [[50, 51, 52, 53, 54]] * 2
        return saved(
            backbone.model, lambda: backbone.read(encoding, latent, texts, recompute=False)
        )

    shape = _shape(decoder(1, dtype, frozen).model.config)
    positions = tokens + 8
    counted = 2 * positions * layer_bytes(shape, width, positions, learns=not frozen, masked=masked)
    if not frozen and width < 4:
        counted += width * (shape.parameters - shape.head - 300 * 64)  # casts
    assert counted == pytest.approx(reading(2) - reading(1), rel=0.15)


def worker_of(config: Config, **changes: Any) -> Worker:
    worker = Worker(
        config=config,
        trm=config.trm.model,
        parameters=10**6,
        hybrid=False,
        identifiers=37,
        rows=ROWS,
        micro=ROWS,
    )
    return replace(worker, **changes)


def test_activations_scale_with_the_micro_batch_and_the_carry_with_all_rows() -> None:
    config = config_of(Path("/nowhere"))
    whole = worker_of(config, rows=64, micro=64).parts()
    parts = worker_of(config, rows=64, micro=16).parts()
    assert parts["activations"] * 4 == whole["activations"]
    assert parts["carry"] == whole["carry"] > 0


def test_largest_micro_batch_is_the_largest_that_fits() -> None:
    worker = worker_of(config_of(Path("/nowhere")), rows=96)
    sizes = {
        micro: sum(replace(worker, micro=micro).parts().values()) / GiB / 0.9
        for micro in (96, 48, 24, 12, 6, 3, 2, 1)
    }
    for micro, size in sizes.items():
        assert largest_micro_batch(worker, 1.0001 * size) == micro
    assert largest_micro_batch(worker, 0.9999 * sizes[1]) == 0


def test_gpu_estimate_suggests_a_micro_batch_size() -> None:
    config = config_of(Path("/nowhere"), cluster={"use_gpu": True})
    assert "training.micro_batch_size: 80 GiB fit all" in estimate(config, "trm")
    assert "micro_batch_size" not in estimate(config_of(Path("/nowhere")), "trm")


def test_puzzle_table_is_estimated_before_the_dataset_is_prepared() -> None:
    data = {"training": ["arc1-training"], "evaluation": ["arc1-evaluation"], "variants": 10}
    text = estimate(config_of(Path("/nowhere"), data=data), "trm")
    assert f"puzzle table about {800 * 11 + 1:,} x" in text
    missing = config_of(Path("/nowhere"), data={**data, "training": ["/no/such/folder"]})
    assert "puzzle table about 0 x" in estimate(missing, "trm")


def memory(**llama: Any) -> float:
    training = {"batch_size": 2, "recompute": llama.pop("recompute", True)}
    keys = {"model": "meta-llama/Llama-3.1-8B-Instruct", "max_prompt_tokens": 8192, **llama}
    config = config_of(Path("/nowhere"), llama=keys, training=training, cluster={"use_gpu": True})
    return float(estimate(config, "hybrid").split("memory of a worker: about ")[1].split()[0])


def test_memory_of_a_language_model() -> None:
    weights = 2 * 8.03e9 / GiB
    assert weights < memory() < 1.5 * weights
    # The prompt is read in every attempt and saves activations of all layers or of one.
    assert memory(prefix="problem", recompute=False) > 5 * memory(prefix="problem")
    assert memory(prefix="problem") > memory() + 4
    # Float32 weights, gradients, moments and EMA of all but the head.
    assert memory(frozen=False) > 20 * 7.5e9 / GiB
    head = memory(max_new_tokens=1) - memory()
    assert head == pytest.approx(2 * 525_336_576 / GiB, rel=0.1)
