"""The state of a training run in one dataclass, and its construction.

It holds no random generator: row order, augmentation and exploration are functions of (seed, step)
or of the position in the stream.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor, nn

from hybrid import storage
from hybrid.arc import pair_hash
from hybrid.checkpoint import Checkpoint, newest, read
from hybrid.config import Config, TrainingConfig
from hybrid.dataset import Dataset
from hybrid.device import compile_if_enabled
from hybrid.errors import UserError
from hybrid.llm.reader import Reader
from hybrid.solver import HybridModel
from hybrid.trm import TRM, AdamAtan2, Carry, ExponentialMovingAverage, TRMConfig

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
"""Name of the checkpoint folder inside a run folder."""


@dataclass(kw_only=True)
class TrainState:
    """One worker's state; only slots, carry, rows_consumed and halted differ between workers."""

    step: int
    """Optimizer steps taken."""
    model: TRM | HybridModel
    optimizer: AdamAtan2
    ema: ExponentialMovingAverage
    slots: range
    """Slots of the global batch that this worker computes."""
    carry: Carry
    """State of the TRM between steps. The hybrid finishes a row within one step and uses only
    `current`."""
    rows_consumed: Tensor
    """[slots] int64: rows each slot has taken, i.e. its position in the stream."""
    trained_on: list[str]
    """Content hashes of all pairs the weights were trained on, in this run or before it."""
    halted: Tensor = field(init=False)
    """[slots] bool on the CPU: slots that take a new row in the next step."""

    def __post_init__(self) -> None:
        self.halted = torch.ones(len(self.slots), dtype=torch.bool)

    @classmethod
    def create(
        cls,
        model: TRM | HybridModel,
        training: TrainingConfig,
        slots: range,
        carry: Carry,
        trained_on: list[str],
    ) -> TrainState:
        """Return the state before the first step, with a new optimizer and EMA of the weights."""
        parameters = dict(model.named_parameters())
        return cls(
            step=0,
            model=model,
            optimizer=AdamAtan2(
                parameters,
                betas=(training.beta1, training.beta2),
                weight_decay=training.weight_decay,
            ),
            ema=ExponentialMovingAverage(parameters, training.ema_rate),
            slots=slots,
            carry=carry,
            rows_consumed=torch.zeros(len(slots), dtype=torch.int64),
            trained_on=trained_on,
        )

    @property
    def trm(self) -> TRM:
        """The TRM: the model itself, or the one inside the hybrid."""
        return self.model if isinstance(self.model, TRM) else self.model.trm


def model_config(config: Config, dataset: Dataset) -> TRMConfig:
    """Return the TRM's config with the sizes that come from the dataset."""
    return replace(
        config.trm.model, seq_len=dataset.canvas**2, num_puzzle_identifiers=dataset.num_identifiers
    )


def create_state(
    config: Config,
    dataset: Dataset,
    slots: range,
    device: torch.device,
    reader: Reader | None = None,
    *,
    hybrid: bool = False,
) -> TrainState:
    """Return the state before the first step, of a TRM or of a hybrid around it.

    The weights come from `trm.init_from` if it is set. `reader` is the hybrid's language model.
    """
    training = config.training
    trm = TRM(model_config(config, dataset), seed=training.seed)
    initial = initial_checkpoint(config)
    if initial:
        init_from(trm, initial, dataset)
    model: TRM | HybridModel = trm
    if hybrid:
        model = HybridModel(
            trm, reader, config.adapter, act_steps=training.act_steps, seed=training.seed
        )
    model.to(device)
    compile_if_enabled(trm, config.cluster.compiles)
    return TrainState.create(
        model,
        training,
        slots,
        carry=trm.initial_carry(_empty_rows(len(slots), dataset.canvas**2, device)),
        trained_on=sorted({*trained_on(dataset), *(initial.trained_on if initial else ())}),
    )


def trained_on(dataset: Dataset) -> list[str]:
    """Return the sorted content hashes (`input|output`) of all training pairs."""
    pairs = {
        pair_hash(p) for task in range(len(dataset.tasks)) for p in dataset.training_pairs(task)
    }
    return sorted(pairs)


def initial_checkpoint(config: Config) -> Checkpoint | None:
    """Return the checkpoint that `trm.init_from` names, None if it is not set.

    A value with a slash is a checkpoint folder or URI, any other the name of a run, of which the
    newest checkpoint counts. Raises UserError if there is none.
    """
    name = config.trm.init_from
    if name is None:
        return None
    if "/" in name:
        return read(storage.child(name))
    # Workers receive the URI of the checkpoint: download it to the folder that they will use.
    uri = storage.uri(config.runs_folder / name / CHECKPOINTS)
    checkpoint = newest(storage.folder(uri))
    if not checkpoint:
        raise UserError(
            f"trm.init_from: {name} is no run with a checkpoint in"
            f" {storage.uri(config.runs_folder)}; write a checkpoint folder with a /"
        )
    return checkpoint


def check_same_sizes(config: TRMConfig, checkpoint: Checkpoint) -> None:
    """Raise UserError if the checkpoint's weights do not fit a TRM of `config`."""
    saved = checkpoint.state["trm"]
    derived = ("num_puzzle_identifiers", "forward_dtype", "halt_max_steps", "halt_exploration_prob")
    wrong = [
        f"trm.{name} {saved[name]!r} there, {value!r} here"
        for name, value in asdict(config).items()
        if name not in derived and saved[name] != value
    ]
    if wrong:
        raise UserError(f"trm.init_from: {checkpoint.folder}: {'; '.join(wrong)}")


def init_from(trm: TRM, checkpoint: Checkpoint, dataset: Dataset) -> None:
    """Load the EMA weights and the puzzle table of a checkpoint into a TRM.

    If the checkpoint was trained on another dataset, every row of the table becomes the mean row
    and a warning is logged. Raises UserError if the sizes differ.
    """
    check_same_sizes(trm.config, checkpoint)
    tensors = checkpoint.tensors("model") | checkpoint.tensors("ema")
    trm_weights = {
        name.removeprefix("trm."): value
        for name, value in tensors.items()
        if checkpoint.state["kind"] == "trm" or name.startswith("trm.")
    }
    load_weights(trm, trm_weights)
    table = checkpoint.tensors("puzzle_table")["puzzle_table"]
    if checkpoint.state["dataset"]["fingerprint"] == dataset.fingerprint:
        trm.puzzle_table.copy_(table)
    elif table.numel():
        trained = table[1:] if len(table) > 1 else table  # row 0 is blank and untrained
        trm.puzzle_table.copy_(trained.mean(0, keepdim=True).expand_as(trm.puzzle_table))
        log.warning(
            "%s: puzzle table of another dataset, every row starts as its mean", checkpoint.folder
        )


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's tensors except the puzzle table, which is saved in a separate file."""
    return {
        name: value
        for name, value in model.state_dict().items()
        if not name.endswith("puzzle_table")
    }


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors of `weights` into a model; the names must match exactly."""
    own = weights(model)
    assert own.keys() == tensors.keys(), sorted(own.keys() ^ tensors.keys())
    for name, value in own.items():
        value.copy_(tensors[name])


def _empty_rows(slots: int, positions: int, device: torch.device) -> dict[str, Tensor]:
    tokens = torch.zeros(slots, positions, dtype=torch.int32, device=device)
    identifiers = torch.zeros(slots, dtype=torch.int32, device=device)
    return {
        "inputs": tokens,
        "labels": tokens.clone(),
        "puzzle_identifiers": identifiers,
        "side": identifiers.clone(),
    }
