"""What a run will take, before it is run."""

from __future__ import annotations

from dataclasses import replace

import torch

from hybrid.config import Config
from hybrid.dataset import Dataset, Stream
from hybrid.errors import UserError
from hybrid.train.pretrain import total_steps
from hybrid.train.state import model_config
from hybrid.trm import TRM


def estimate(config: Config) -> str:
    """Steps, parameters and memory of a worker, as lines; parts need the prepared dataset."""
    try:
        dataset = Dataset.open(config.data_folder)
    except UserError as error:
        return f"steps and memory are not known yet: {error}"
    stream = Stream(dataset, config.training.seed)
    trm = model_config(config, dataset)
    with torch.device("meta"):
        # init_weights draws on the CPU; sizes are all that is needed here.
        model = _SizesOnly(replace(trm, num_puzzle_identifiers=1))
    parameters = sum(p.numel() for p in model.parameters())
    rows = -(-config.training.batch_size // max(1, config.cluster.num_workers))
    table = 4 * trm.num_puzzle_identifiers * trm.puzzle_emb_ndim
    width = 2 if config.cluster.use_gpu else 4
    # Kept for the last cycle's backward: about 14 D-wide tensors a block, and SwiGLU's inner ones.
    inner = sum(p.shape[0] for n, p in model.blocks[0].named_parameters() if n == _UP)
    per_block = rows * trm.positions * (14 * trm.hidden_size + 2 * inner) * width
    activations = per_block * trm.L_layers * (trm.L_cycles + 1)
    carry = 4 * rows * trm.positions * trm.hidden_size * width
    total = 5 * 4 * parameters + table + activations + carry
    return "\n".join(
        [
            f"dataset: {dataset.folder}, {dataset.meta['counts']}",
            f"steps: {total_steps(config, len(stream))} of {config.training.batch_size} rows"
            f" ({len(stream)} rows an epoch)",
            f"parameters: {parameters:,} trained, puzzle table {trm.num_puzzle_identifiers:,}"
            f" x {trm.puzzle_emb_ndim}",
            f"memory of a worker: about {total / 2**30:.2f} GiB (weights, gradients, moments and"
            f" average {20 * parameters / 2**30:.2f}, table {table / 2**30:.2f}, activations"
            f" {activations / 2**30:.2f}, carry {carry / 2**30:.2f})",
        ]
    )


_UP = "mlp.gate_up_proj.weight"


class _SizesOnly(TRM):
    def init_weights(self, seed: int) -> None:
        pass
