"""Estimate of steps, parameters and memory of a training run, for --dry-run."""

from __future__ import annotations

from dataclasses import replace

import torch

from hybrid.adapters import STATES
from hybrid.arc import load_tasks
from hybrid.config import Config
from hybrid.dataset import Dataset
from hybrid.errors import UserError
from hybrid.llm import Shape
from hybrid.train.memory import Worker
from hybrid.train.preflight import total_steps, training_stream
from hybrid.trm import TRM, TRMConfig

GiB = 2**30
GPUS = (80, 24)
"""GPU memory sizes in GiB for which micro-batches are suggested."""
USABLE = 0.9
"""Fraction of GPU memory for tensors; CUDA, libraries and fragmentation take the rest."""


def estimate(config: Config, kind: str) -> str:
    """Return lines on steps, parameters and memory of a worker; `kind` is 'trm' or 'hybrid'.

    Before the dataset is prepared, steps are unknown and the puzzle table is an estimate.
    """
    lines, identifiers, about = [], 0, ""
    try:
        dataset = Dataset.open(config.data_folder)
    except UserError as error:
        lines.append(f"steps are not known yet: {error}")
        identifiers, about = _expected_identifiers(config), "about "
    else:
        stream = training_stream(config, dataset)
        identifiers = dataset.num_identifiers
        lines += [
            f"dataset: {dataset.folder}, {dataset.meta['counts']}",
            f"steps: {total_steps(config, len(stream))} of {config.training.batch_size} rows"
            f" ({len(stream)} rows per epoch)",
        ]
    trm = replace(
        config.trm.model, seq_len=config.data.max_side**2, num_puzzle_identifiers=identifiers or 1
    )
    rows = -(-config.training.batch_size // max(1, config.cluster.num_workers))
    worker = Worker(
        config=config,
        trm=trm,
        parameters=_trm_parameters(trm),
        hybrid=kind != "trm",
        identifiers=identifiers,
        rows=rows,
        micro=min(rows, config.training.micro_batch_size or rows),
    )
    lines.append(
        f"parameters: {worker.parameters:,} trained in the TRM,"
        f" puzzle table {about}{identifiers:,} x {trm.puzzle_emb_ndim}"
    )
    if worker.hybrid and config.adapter.inject != "none":
        shape = _llama_shape(config)
        if shape is None:
            lines.append(f"memory: unknown, {config.llama.model} is not on this machine")
            return "\n".join(lines)
        worker = replace(worker, shape=shape, adapters=_adapter_parameters(config, trm, shape))
        lines.append(
            f"parameters: {worker.adapters:,} trained in the adapters, language model {shape}"
        )
    return "\n".join([*lines, *_memory(worker)])


def largest_micro_batch(worker: Worker, gibibytes: float) -> int:
    """Return the largest micro-batch that fits a GPU, halving rows until one does; 0 if none."""
    micro = worker.rows
    while sum(replace(worker, micro=micro).parts().values()) > USABLE * gibibytes * GiB:
        if micro == 1:
            return 0
        micro = -(-micro // 2)
    return micro


def _memory(worker: Worker) -> list[str]:
    parts = worker.parts()
    sizes = ", ".join(f"{name} {size / GiB:.2f}" for name, size in parts.items())
    total = sum(parts.values()) / GiB
    micro = "" if worker.micro == worker.rows else f" with micro-batches of {worker.micro} rows"
    lines = [f"memory of a worker: about {total:.2f} GiB{micro} ({sizes})"]
    if worker.config.cluster.use_gpu:
        fits = "; ".join(f"{size} GiB fit {_fit(worker, size)}" for size in GPUS)
        lines.append(f"training.micro_batch_size: {fits}")
    return lines


def _fit(worker: Worker, gibibytes: int) -> str:
    micro = largest_micro_batch(worker, gibibytes)
    if micro == worker.rows:
        return f"all {micro} rows"
    return f"{micro} of {worker.rows} rows" if micro else "none"


def _expected_identifiers(config: Config) -> int:
    """Return the rows of the puzzle table without excluded tasks; 0 if a source is unreadable."""
    try:
        sources = (*config.data.training, *config.data.evaluation)
        tasks = sum(len(load_tasks(source)) for source in sources)
    except UserError:
        return 0
    return tasks * (config.data.variants + 1) + 1


def _trm_parameters(trm: TRMConfig) -> int:
    with torch.device("meta"):
        model = _WithoutWeights(replace(trm, num_puzzle_identifiers=1))
    return sum(p.numel() for p in model.parameters())


def _adapter_parameters(config: Config, trm: TRMConfig, shape: Shape) -> int:
    adapter, D, H = config.adapter, trm.hidden_size, shape.hidden_size
    states = len(STATES[adapter.inject])
    hidden_layers = 2 * (adapter.layers - 2) * (adapter.hidden + 1) * adapter.hidden
    to_latent = (H + 1 + states * D) * adapter.hidden + states * D * (1 + trm.positions)
    to_text = (D + 1 + H) * adapter.hidden + H + adapter.prefix_tokens * D
    return hidden_layers + to_latent + to_text


def _llama_shape(config: Config) -> Shape | None:
    from hybrid.llm.load import shape  # importing transformers takes a second

    return shape(config.llama)


class _WithoutWeights(TRM):
    """A TRM without initial weights, which would be drawn on the CPU."""

    def init_weights(self, seed: int) -> None:
        pass
