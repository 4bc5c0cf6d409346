"""The configuration: one YAML per experiment, `section.key=value` on top, all errors at once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from hybrid import storage
from hybrid.adapters import AdapterConfig
from hybrid.dataset import DataConfig
from hybrid.errors import UserError, check_fields
from hybrid.llm.config import LlamaConfig
from hybrid.llm.known import is_path
from hybrid.solver.config import FeedbackConfig
from hybrid.trm import TRMConfig
from hybrid.validation import adapter, known_only, parse_yaml, unknown_keys, wrong_values


@dataclass(frozen=True, kw_only=True)
class PathsConfig:
    """Where things are. Everything hangs from `root`, which all nodes of a cluster must see."""

    root: str = "/data"
    """A folder, or a URI of an object store (s3://bucket/arc, gs://bucket/arc)."""
    data: str | None = None
    """The prepared dataset; root/arc/processed when not given."""
    runs: str | None = None
    """Run folders: checkpoints, metrics, logs, evaluations; root/runs when not given."""
    models: str | None = None
    """Language models converted from GGUF, by every machine for itself if this is a URI;
    root/models when not given."""
    prompt_cache: str | None = None
    """Problem encodings of jobs/cache_prompts.py; root/encodings when not given."""

    def absolute(self) -> PathsConfig:
        """The same with every path absolute: workers run in other folders."""
        root = _absolute(self.root)
        return PathsConfig(
            root=root,
            data=_absolute(self.data or storage.join(root, "arc", "processed")),
            runs=_absolute(self.runs or storage.join(root, "runs")),
            models=_absolute(self.models or storage.join(root, "models")),
            prompt_cache=_absolute(self.prompt_cache or storage.join(root, "prompt_cache")),
        )


@dataclass(frozen=True, kw_only=True)
class TRMSection(TRMConfig):
    """The model, and what it starts from."""

    init_from: str | None = None
    """A checkpoint folder of the same sizes, which has a `/` in it, or the name of a run under
    paths.runs, whose newest is meant: a new run starts with its averaged weights, and with its
    puzzle rows where the dataset is the same, else with their mean."""

    @property
    def model(self) -> TRMConfig:
        """The model alone."""
        return TRMConfig(**{f.name: getattr(self, f.name) for f in fields(TRMConfig)})


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Optimisation; the defaults are the published ARC recipe."""

    batch_size: int = 768
    """Rows of one optimiser step, over all workers together."""
    micro_batch_size: int | None = None
    """Rows of one forward and backward pass of a worker; gradients accumulate over passes to
    batch_size. Limits memory, not results. All rows of the worker when not given."""
    epochs: float | None = None
    """Training length in passes over the tasks, one variant each; or give `steps`."""
    steps: int | None = None
    """Training length in optimiser steps; or give `epochs`."""
    lr: float = 1e-4
    puzzle_lr: float = 1e-2
    weight_decay: float = 0.1
    puzzle_weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    lr_warmup_steps: int = 2000
    lr_min_ratio: float = 1.0
    """Cosine decay ends at this part of the rate; 1 keeps it constant, as published."""
    ema_rate: float = 0.999
    seed: int = 0
    save_every: int = 1000
    """Steps between checkpoints; one is always written at the end."""
    keep_checkpoints: int = 2
    train_accuracy_pairs: int = 256
    """Training pairs on which exact accuracy is measured before and after; 0 measures nothing."""
    variants: int | None = None
    """Variants of a task that rows are drawn from, the original first; all when not given."""
    freeze_weights_fraction: float = 0.0
    """Part of the run, from its start, in which only the puzzle table learns: what test-time
    training does with new puzzles before it touches the weights."""
    clip_norm: float | None = None
    """Largest norm of the gradient over all weights; none when not given."""
    blank_puzzle_prob: float = 0.0
    """Chance that a row is trained with the blank puzzle id, so that a task unknown in training can
    be solved from what is read of it."""
    max_attempts: int = 16
    """Attempts of the hybrid at a puzzle."""
    act_steps: int = 1
    """ACT steps of an attempt."""
    bptt_attempts: int = 2
    """Attempts that gradient flows back through; memory grows with it, not with max_attempts."""
    recompute: bool = True
    """Gradient checkpointing: the hybrid's activations are made again for backward, not kept."""

    def __post_init__(self) -> None:
        problems = check_fields(
            self,
            **dict.fromkeys(("batch_size", "save_every", "keep_checkpoints"), (1, None)),
            **dict.fromkeys(
                ("lr", "puzzle_lr", "lr_warmup_steps", "train_accuracy_pairs"), (0, None)
            ),
            **dict.fromkeys(("weight_decay", "puzzle_weight_decay"), (0, None)),
            steps=(1, 10**12),
            epochs=(0, 10**12),
            seed=(0, 2**63),
            **dict.fromkeys(("beta1", "beta2", "ema_rate"), (0, 1 - 1e-09)),
            **dict.fromkeys(
                ("lr_min_ratio", "freeze_weights_fraction", "blank_puzzle_prob"), (0, 1)
            ),
            **dict.fromkeys(("variants", "max_attempts", "act_steps", "bptt_attempts"), (1, None)),
            micro_batch_size=(1, None),
            clip_norm=(1e-9, None),
        )
        if self.epochs is not None and self.steps is not None:
            problems.append("epochs and steps are both given: give one")
        if problems:
            raise ValueError("\n".join(problems))


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How tasks are solved and voted on."""

    checkpoint: str | None = None
    """Checkpoint folder; the newest of the run when not given."""
    variants: int | None = None
    """Views of a task that vote, the original included; all of the dataset's when not given."""
    halt: Literal["published", "fixed", "confident"] = "published"
    """published: halt_max_steps ACT steps; fixed: `act_steps`; confident: the halt head decides."""
    act_steps: int | None = None
    batch_size: int = 256
    """Rows an actor runs at a time."""
    limit: int | None = None
    """Ask only the first so many tasks; the report calls the score that of a subset."""
    max_attempts: int | None = None
    """Attempts of the hybrid; as many as in training when not given."""
    puzzle_ids: Literal["trained", "blank"] = "trained"
    """blank asks without the puzzle's own row: what is known of the task must be read."""
    text: Literal["own", "shuffled"] = "own"
    """shuffled has each task read another one's problem: what does the text contribute?"""
    baseline: bool = True
    """Also spend the attempts that self-correction took on more views with one attempt each."""
    compare_to: tuple[str, ...] = ()
    """Runs whose newest evaluation of the same questions is shown beside this one."""

    def __post_init__(self) -> None:
        names = ("variants", "act_steps", "batch_size", "limit", "max_attempts")
        problems = check_fields(self, **dict.fromkeys(names, (1, None)))
        if (self.halt == "fixed") != (self.act_steps is not None):
            problems.append("act_steps goes with halt=fixed, and only with it")
        if problems:
            raise ValueError("\n".join(problems))


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Processes and devices. The same rows in the same order, however many workers there are."""

    num_workers: int = 1
    """Training workers and evaluation actors; 0 runs in this process, without Ray."""
    min_workers: int | None = None
    """Training goes on with so many when nodes are lost, and grows back; num_workers when not
    given. The global batch stays the same."""
    use_gpu: bool = False
    compile: bool | None = None
    """Compile the TRM's blocks, half a minute once a machine; on GPUs when not given. Numbers
    change by rounding."""
    cpus_per_worker: float = 1.0
    """Ray's bookkeeping only; a worker computes with its share of the machine's cores."""
    max_failures: int = 3
    """Times a lost worker or actor is replaced."""

    def __post_init__(self) -> None:
        problems = check_fields(
            self, num_workers=(0, None), cpus_per_worker=(0.01, None), max_failures=(-1, None)
        )
        if self.min_workers is not None and not 1 <= self.min_workers <= self.num_workers:
            problems.append(f"min_workers must be 1 to num_workers, got {self.min_workers}")
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def compiles(self) -> bool:
        """What `compile` means here."""
        return self.use_gpu if self.compile is None else self.compile


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A search over keys of the experiment; every trial trains the hybrid."""

    space: dict[str, Any] = field(default_factory=dict)
    """section.key -> {grid: [...]}, {choice: [...]}, {uniform: [low, high]},
    {loguniform: [low, high]} or {int: [low, high]}."""
    num_samples: int = 1
    """Draws of what is not a grid, for every combination of the grids."""
    hold_out_tasks: int = 32
    """Training tasks that are not trained on: trials are compared by them."""
    search: Literal["random", "optuna"] = "random"
    """optuna learns from the trials that have ended (pip install "arc-hybrid[optuna]")."""
    scheduler: Literal["asha", "none"] = "asha"
    """asha ends a trial at a rung where it is not among the best; none trains all to the end."""
    grace_period: int | None = None
    """Steps before a trial may be ended; training.save_every when not given."""
    reduction_factor: int = 3
    """One trial of so many passes a rung, and the next rung is so many times as far."""
    max_concurrent_trials: int | None = None
    """Trials at a time; as many as the cluster holds when not given."""
    seed: int = 0

    def __post_init__(self) -> None:
        problems = check_fields(
            self,
            num_samples=(1, 10**6),
            hold_out_tasks=(1, None),
            grace_period=(1, None),
            reduction_factor=(2, None),
            max_concurrent_trials=(1, None),
            seed=(0, 2**32 - 1),
        )
        if problems:
            raise ValueError("\n".join(problems))


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is written while a job runs; metrics.jsonl and train_<rank>.log always are."""

    run: str = ""
    """Name of the run and of its folder under paths.runs; the config file's name when not given."""
    every: int = 10
    """Steps between lines of metrics.jsonl."""
    wandb: bool = True
    """Weights & Biases from rank 0, offline by itself where there is no key."""

    def __post_init__(self) -> None:
        problems = check_fields(self, every=(1, None))
        if self.run in (".", "..") or not set(self.run).isdisjoint("/\0"):
            problems.append(f"run must be a plain name, got {self.run!r}")
        if problems:
            raise ValueError("\n".join(problems))


@dataclass(frozen=True, kw_only=True)
class Config:
    """The sections."""

    paths: PathsConfig = field(default_factory=PathsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    trm: TRMSection = field(default_factory=TRMSection)
    llama: LlamaConfig = field(default_factory=LlamaConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    feedback: FeedbackConfig = field(default_factory=FeedbackConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def run_folder(self) -> Path:
        """Where checkpoints, metrics, logs and evaluations of this run are."""
        assert self.logging.run
        return self.runs_folder / self.logging.run

    @property
    def runs_folder(self) -> Path:
        """Where the run folders are."""
        assert self.paths.runs is not None
        return storage.folder(self.paths.runs)

    @property
    def data_folder(self) -> Path:
        """Where the prepared dataset is."""
        assert self.paths.data is not None
        return storage.folder(self.paths.data)

    @property
    def models_folder(self) -> Path:
        """Where converted language models are."""
        assert self.paths.models is not None
        return storage.folder(self.paths.models)

    @property
    def prompt_cache_folder(self) -> Path:
        """Where problem encodings are."""
        assert self.paths.prompt_cache is not None
        return storage.folder(self.paths.prompt_cache)


DERIVED = {
    "trm.seq_len": "data.max_side",
    "trm.num_puzzle_identifiers": "data.variants",
    "trm.vocab_size": "the tokens of grids",
}
"""Keys of TRMConfig that belong to the data: a user may not set them."""


RENAMED = {
    "paths.encodings": "paths.prompt_cache",
    "llama.encodings": "llama.prompt_cache",
    "training.probe_pairs": "training.train_accuracy_pairs",
    "training.freeze_trunk": "training.freeze_weights_fraction",
    "evaluation.beside": "evaluation.compare_to",
    "sweep.samples": "sweep.num_samples",
    "sweep.first_rung": "sweep.grace_period",
    "sweep.reduction": "sweep.reduction_factor",
    "sweep.max_concurrent": "sweep.max_concurrent_trials",
}
"""Keys of earlier versions and their names now, for the error message."""


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config in a YAML file, or a URI of one, with `section.key=value` overrides on top.

    Raises UserError with every problem found, each with its dotted path, the value and, for an
    unknown key, the nearest known one.
    """
    where = str(path)
    file = storage.folder(where)
    storage.download(file)
    raw = _read_yaml(file, where)
    problems: list[str] = []
    for text in overrides:
        _override(raw, text, problems)
    config = from_dict(raw, where=where, problems=problems)
    if not config.logging.run:
        stem = Path(where.partition("?")[0]).stem
        config = replace(config, logging=replace(config.logging, run=stem))
    return config


def from_dict(
    raw: Mapping[str, Any], *, where: str = "config", problems: Sequence[str] = ()
) -> Config:
    """A validated Config from nested mappings (a YAML document, a trial of a sweep)."""
    known = known_only(Config, raw)
    found = [*problems, *unknown_keys(Config, raw, DERIVED, RENAMED), *wrong_values(Config, known)]
    if found:
        raise UserError(f"{where}: " + "; ".join(found))
    config: Config = adapter(Config).validate_python(known)
    config = replace(config, paths=config.paths.absolute())
    # Workers have working directories of their own.
    start, model = config.trm.init_from, config.llama.model
    if start and "/" in start:
        config = replace(config, trm=replace(config.trm, init_from=_absolute(start)))
    if is_path(model):
        config = replace(config, llama=replace(config.llama, model=_absolute(model)))
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain values, without what the data decides; `from_dict` takes it back."""
    raw = asdict(config)
    for dotted in DERIVED:
        section, key = dotted.split(".")
        del raw[section][key]
    raw["data"]["training"] = list(config.data.training)
    raw["data"]["evaluation"] = list(config.data.evaluation)
    raw["evaluation"]["compare_to"] = list(config.evaluation.compare_to)
    return raw


def dump(config: Config) -> str:
    """The resolved config as YAML."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], sections: Sequence[str]
) -> list[str]:
    """`section.key: old -> new` for every key that differs between two `to_dict`s."""
    return [
        f"{section}.{key}: {old.get(section, {}).get(key)!r} -> {value!r}"
        for section in sections
        for key, value in new[section].items()
        if old.get(section, {}).get(key) != value
    ]


def _read_yaml(path: Path, where: str) -> dict[str, Any]:
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{where}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: cannot be read ({error})") from error
    except ValueError as error:
        raise UserError(f"{where}: not YAML: {error}") from error
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise UserError(f"{where}: a config is sections of keys, not a {type(raw).__name__}")
    return raw


def _override(raw: dict[str, Any], text: str, problems: list[str]) -> None:
    dotted, equals, value = text.partition("=")
    section, dot, key = dotted.partition(".")
    if not (equals and dot and section and key):
        problems.append(f"override {text!r} is not section.key=value")
        return
    try:
        parsed = parse_yaml(value)
    except ValueError:
        problems.append(f"override {text!r}: the value is not YAML")
        return
    if raw.get(section) is None:
        raw[section] = {}
    target = raw[section]
    if isinstance(target, dict):
        target[key] = parsed


def _absolute(place: str) -> str:
    # os.path's expanduser, unlike Path's, leaves the name of a user who is unknown as it is.
    return place if storage.is_uri(place) else str(Path(os.path.expanduser(place)).absolute())


__all__ = [
    "AdapterConfig",
    "ClusterConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "FeedbackConfig",
    "LlamaConfig",
    "LoggingConfig",
    "PathsConfig",
    "SweepConfig",
    "TRMConfig",
    "TRMSection",
    "TrainingConfig",
    "differences",
    "dump",
    "from_dict",
    "load",
    "to_dict",
]
