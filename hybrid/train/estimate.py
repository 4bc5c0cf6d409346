"""What a run will take, before it is run."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from hybrid.adapters import STATES
from hybrid.config import Config
from hybrid.dataset import Dataset
from hybrid.errors import UserError
from hybrid.llm import Shape
from hybrid.train.plan import total_steps, training_stream
from hybrid.trm import TRM, TRMConfig

GiB = 2**30


def estimate(config: Config, kind: str) -> str:
    """Steps, parameters and memory of a worker that trains a `kind`, as lines.

    Steps and the puzzle table need the prepared dataset, the rest the config alone.
    """
    lines, identifiers = [], 0
    try:
        dataset = Dataset.open(config.data_folder)
    except UserError as error:
        lines.append(f"steps and puzzle table are not known yet: {error}")
    else:
        stream = training_stream(config, dataset)
        identifiers = dataset.num_identifiers
        lines += [
            f"dataset: {dataset.folder}, {dataset.meta['counts']}",
            f"steps: {total_steps(config, len(stream))} of {config.training.batch_size} rows"
            f" ({len(stream)} rows an epoch)",
        ]
    trm = replace(
        config.trm.model, seq_len=config.data.max_side**2, num_puzzle_identifiers=identifiers or 1
    )
    sizes = _trm_sizes(trm, config)
    lines.append(
        f"parameters: {sizes.parameters:,} trained in the TRM, puzzle table {identifiers:,}"
        f" x {trm.puzzle_emb_ndim}"
    )
    parts = {
        "weights, gradients, moments and average": 20 * sizes.parameters,
        "table": 4 * identifiers * trm.puzzle_emb_ndim,
    }
    if kind == "trm":
        parts |= {"activations": sizes.cycle, "carry": sizes.carry}
    elif config.adapter.inject == "none":
        parts |= {"activations": sizes.cycle + _kept_between_cycles(sizes, config)}
    else:
        shape = _llama_shape(config)
        if shape is None:
            lines.append(f"memory: {config.llama.model} is not on this machine, its size not known")
            return "\n".join(lines)
        adapters = _adapter_parameters(config, trm, shape)
        lines.append(f"parameters: {adapters:,} trained in the adapters, language model {shape}")
        parts |= _hybrid_parts(config, sizes, shape, adapters)
    said = ", ".join(f"{name} {size / GiB:.2f}" for name, size in parts.items())
    total = sum(parts.values()) / GiB
    lines.append(f"memory of a worker: about {total:.2f} GiB ({said})")
    return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """Of a worker's TRM; bytes but for `parameters`."""

    parameters: int
    cycle: int
    """What backward through one cycle needs."""
    carry: int


def _trm_sizes(trm: TRMConfig, config: Config) -> _Sizes:
    with torch.device("meta"):
        # init_weights draws on the CPU; sizes are all that is needed here.
        model = _SizesOnly(replace(trm, num_puzzle_identifiers=1))
    rows = _rows(config)
    width = _width(config)
    # About 14 D-wide tensors a block, and SwiGLU's inner ones.
    inner = sum(p.shape[0] for n, p in model.blocks[0].named_parameters() if n == _UP)
    per_block = rows * trm.positions * (14 * trm.hidden_size + 2 * inner) * width
    return _Sizes(
        parameters=sum(p.numel() for p in model.parameters()),
        cycle=per_block * trm.L_layers * (trm.L_cycles + 1),
        carry=4 * rows * trm.positions * trm.hidden_size * width,
    )


def _kept_between_cycles(sizes: _Sizes, config: Config) -> int:
    """States at the borders of cycles; all of the cycles where nothing is computed again."""
    training = config.training
    cycles = config.trm.H_cycles * training.act_steps * training.bptt_attempts
    return cycles * (sizes.carry if training.recompute else sizes.cycle)


def _hybrid_parts(config: Config, sizes: _Sizes, shape: Shape, adapters: int) -> dict[str, int]:
    rows, width, llama = _rows(config), _width(config), config.llama
    tokens = rows * llama.max_prompt_tokens
    cache = tokens * shape.kv_values_per_token * width
    fine_tuned = 0 if llama.frozen else 20 * shape.parameters
    # An attempt appends to a copy of the cache, whose heads attention repeats for its queries.
    attempt = cache * (1 + shape.query_groups)
    held = 1 if config.training.recompute else config.training.bptt_attempts
    return {
        "adapters": 20 * adapters,
        "language model": shape.parameters * width + fine_tuned,
        f"cache of {tokens} prompt tokens at most": cache,
        "an attempt's reading": attempt * held,
        "activations": sizes.cycle + _kept_between_cycles(sizes, config),
    }


def _adapter_parameters(config: Config, trm: TRMConfig, shape: Shape) -> int:
    adapter, D, H = config.adapter, trm.hidden_size, shape.hidden_size
    states = len(STATES[adapter.inject])
    inside = 2 * (adapter.layers - 2) * (adapter.hidden + 1) * adapter.hidden
    to_latent = (H + 1 + states * D) * adapter.hidden + states * D * (1 + trm.positions)
    to_text = (D + 1 + H) * adapter.hidden + H + adapter.prefix_tokens * D
    return inside + to_latent + to_text


def _llama_shape(config: Config) -> Shape | None:
    from hybrid.llm.load import shape  # transformers takes a second to import

    return shape(config.llama)


def _rows(config: Config) -> int:
    return -(-config.training.batch_size // max(1, config.cluster.num_workers))


def _width(config: Config) -> int:
    return 2 if config.cluster.use_gpu else 4


_UP = "mlp.gate_up_proj.weight"


class _SizesOnly(TRM):
    def init_weights(self, seed: int) -> None:
        pass
