"""Configuration: one YAML file per experiment plus overrides; all errors are reported at once."""

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
    """Storage locations. All nodes of a cluster must be able to read and write `root`."""

    root: str = "/data"
    """Root folder, or object store URI (s3://bucket/arc, gs://bucket/arc)."""
    data: str | None = None
    """Folder of the prepared dataset. Default: root/arc/processed."""
    runs: str | None = None
    """Folder of the run folders (checkpoints, metrics, logs, evaluations). Default: root/runs."""
    models: str | None = None
    """Folder of models converted from GGUF, per machine if a URI. Default: root/models."""
    prompt_cache: str | None = None
    """Folder of prompt caches written by jobs/cache_prompts.py. Default: root/prompt_cache."""

    def absolute(self) -> PathsConfig:
        """Return a copy with absolute paths, because workers have other working directories."""
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
    """TRM architecture and initial weights."""

    init_from: str | None = None
    """Initial weights of a new run: a checkpoint folder (contains a `/`), or the name of a run in
    paths.runs (its newest checkpoint). Loads the EMA weights, which must have the same sizes, and
    the puzzle embeddings, or their mean if the dataset differs. Default: random weights."""

    @property
    def model(self) -> TRMConfig:
        """TRM architecture without `init_from`."""
        return TRMConfig(**{f.name: getattr(self, f.name) for f in fields(TRMConfig)})


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Optimization settings; the defaults are the published ARC recipe."""

    batch_size: int = 768
    """Global batch size: rows per optimizer step, summed over all workers."""
    micro_batch_size: int | None = None
    """Rows per forward and backward pass of a worker (gradient accumulation). Default: all."""
    epochs: float | None = None
    """Training length in epochs: passes over all training pairs. Excludes `steps`."""
    steps: int | None = None
    """Training length in optimizer steps. Excludes `epochs`."""
    lr: float = 1e-4
    """Peak learning rate of the TRM weights."""
    puzzle_lr: float = 1e-2
    """Peak learning rate of the puzzle embeddings."""
    weight_decay: float = 0.1
    """Weight decay of all weights except the puzzle embeddings."""
    puzzle_weight_decay: float = 0.1
    """Weight decay of the puzzle embeddings."""
    beta1: float = 0.9
    beta2: float = 0.95
    lr_warmup_steps: int = 2000
    """Steps of linear learning-rate warm-up."""
    lr_min_ratio: float = 1.0
    """Final learning rate of the cosine decay, relative to the peak; 1 disables decay."""
    ema_rate: float = 0.999
    """Decay of the exponential moving average (EMA) of the weights, per step."""
    seed: int = 0
    save_every: int = 1000
    """Steps between checkpoints; the last step always saves one."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep."""
    train_accuracy_pairs: int = 256
    """Training pairs for measuring exact match before and after training; 0 disables it."""
    variants: int | None = None
    """Train on the first N variants of each task, the original included. Default: all."""
    freeze_weights_fraction: float = 0.0
    """Initial fraction of the run in which only the puzzle embeddings are trained."""
    clip_norm: float | None = None
    """Maximum global gradient norm. Default: no clipping."""
    blank_puzzle_prob: float = 0.0
    """Probability of training a row with the blank puzzle id, to learn tasks from text alone."""
    max_attempts: int = 16
    """Attempts of the hybrid per puzzle."""
    act_steps: int = 1
    """ACT steps per attempt of the hybrid."""
    bptt_attempts: int = 2
    """Attempts that gradients flow back through; memory grows with this, not with max_attempts."""
    recompute: bool = True
    """Gradient checkpointing: recompute the hybrid's activations in backward to save memory."""

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
    """Prediction and voting."""

    checkpoint: str | None = None
    """Checkpoint folder. Default: the newest checkpoint of the run."""
    variants: int | None = None
    """Vote over the first N variants of each task, the original included. Default: all."""
    halt: Literal["published", "fixed", "confident"] = "published"
    """Halting of the TRM. published: run trm.halt_max_steps ACT steps; fixed: run `act_steps`;
    confident: stop when the halt head predicts a correct answer."""
    act_steps: int | None = None
    """ACT steps per prediction with halt=fixed."""
    batch_size: int = 256
    """Rows per forward pass of an evaluation actor."""
    limit: int | None = None
    """Evaluate only the first N tasks; the report marks the score as a subset. Default: all."""
    max_attempts: int | None = None
    """Attempts of the hybrid per puzzle. Default: training.max_attempts of the checkpoint."""
    puzzle_ids: Literal["trained", "blank"] = "trained"
    """Puzzle embedding: that of the puzzle (trained), or of the blank puzzle id (blank)."""
    text: Literal["own", "shuffled"] = "own"
    """Prompt: that of the task (own), or of another task (shuffled) as an ablation."""
    baseline: bool = True
    """Also evaluate a baseline that spends the attempts on more variants, one attempt each."""
    compare_to: tuple[str, ...] = ()
    """Names of runs whose newest evaluation of the same questions is shown for comparison."""

    def __post_init__(self) -> None:
        names = ("variants", "act_steps", "batch_size", "limit", "max_attempts")
        problems = check_fields(self, **dict.fromkeys(names, (1, None)))
        if (self.halt == "fixed") != (self.act_steps is not None):
            problems.append("act_steps must be set with halt=fixed, and only then")
        if problems:
            raise ValueError("\n".join(problems))


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Processes and devices. Training rows and their order do not depend on the worker count."""

    num_workers: int = 1
    """Number of training workers or evaluation actors; 0 runs in this process, without Ray."""
    min_workers: int | None = None
    """Minimum workers: training continues with this many after losing nodes and scales back up. The
    global batch does not change. Default: num_workers."""
    use_gpu: bool = False
    """Run each worker or actor on one GPU."""
    compile: bool | None = None
    """Compile the TRM's blocks: takes half a minute once per machine, changes results by rounding
    only. Default: use_gpu."""
    cpus_per_worker: float = 1.0
    """CPUs that Ray reserves per worker; it does not limit the threads of a worker."""
    max_failures: int = 3
    """Maximum number of replacements of lost workers or actors; -1: no limit."""

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
        """Resolved value of `compile`."""
        return self.use_gpu if self.compile is None else self.compile


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Hyperparameter search over config keys; every trial trains the hybrid."""

    space: dict[str, Any] = field(default_factory=dict)
    """Search space, by section.key: {grid: [...]}, {choice: [...]}, {uniform: [low, high]},
    {loguniform: [low, high]} or {int: [low, high]}."""
    num_samples: int = 1
    """Random samples of the keys without a grid, for each combination of the grids."""
    hold_out_tasks: int = 32
    """Training tasks held out of training; trials are ranked by their score on them."""
    search: Literal["random", "optuna"] = "random"
    """Search algorithm; optuna learns from ended trials (pip install "arc-hybrid[optuna]")."""
    scheduler: Literal["asha", "none"] = "asha"
    """asha: stop a trial at a rung unless it is among the best; none: run all trials to the end."""
    grace_period: int | None = None
    """ASHA grace period: steps before a trial may be stopped. Default: training.save_every."""
    reduction_factor: int = 3
    """ASHA reduction factor: the top 1/N trials continue; rungs are spaced by a factor of N."""
    max_concurrent_trials: int | None = None
    """Maximum trials at a time. Default: as many as the cluster has resources for."""
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
    """Logging. metrics.jsonl and train_<rank>.log are always written."""

    run: str = ""
    """Name of the run and of its folder in paths.runs. Default: the config file's name."""
    every: int = 10
    """Steps between lines of metrics.jsonl."""
    wandb: bool = True
    """Log to Weights & Biases from rank 0; offline if no API key is set."""

    def __post_init__(self) -> None:
        problems = check_fields(self, every=(1, None))
        if self.run in (".", "..") or not set(self.run).isdisjoint("/\0"):
            problems.append(f"run must be a plain name, got {self.run!r}")
        if problems:
            raise ValueError("\n".join(problems))


@dataclass(frozen=True, kw_only=True)
class Config:
    """Complete configuration of an experiment."""

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
        """Folder of this run's checkpoints, metrics, logs and evaluations."""
        assert self.logging.run
        return self.runs_folder / self.logging.run

    @property
    def runs_folder(self) -> Path:
        """Folder of the run folders."""
        assert self.paths.runs is not None
        return storage.folder(self.paths.runs)

    @property
    def data_folder(self) -> Path:
        """Folder of the prepared dataset."""
        assert self.paths.data is not None
        return storage.folder(self.paths.data)

    @property
    def models_folder(self) -> Path:
        """Folder of language models converted from GGUF."""
        assert self.paths.models is not None
        return storage.folder(self.paths.models)

    @property
    def prompt_cache_folder(self) -> Path:
        """Folder of prompt caches."""
        assert self.paths.prompt_cache is not None
        return storage.folder(self.paths.prompt_cache)


DERIVED = {
    "trm.seq_len": "data.max_side",
    "trm.num_puzzle_identifiers": "data.variants",
    "trm.vocab_size": "the tokens of grids",
}
"""Keys of TRMConfig that users may not set, and the source of their values."""


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
"""Old keys and their current names, for the error message."""


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Load a YAML config file (path or URI) and apply `section.key=value` overrides.

    Raises UserError with every problem: its dotted key, its value, and for an unknown key the
    nearest known one.
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
    """Validate nested mappings (a YAML document, a trial of a sweep) and return the Config."""
    known = known_only(Config, raw)
    errors = [*problems, *unknown_keys(Config, raw, DERIVED, RENAMED), *wrong_values(Config, known)]
    if errors:
        raise UserError(f"{where}: " + "; ".join(errors))
    config: Config = adapter(Config).validate_python(known)
    config = replace(config, paths=config.paths.absolute())
    # Absolute, because workers have other working directories.
    source, model = config.trm.init_from, config.llama.model
    if source and "/" in source:
        config = replace(config, trm=replace(config.trm, init_from=_absolute(source)))
    if is_path(model):
        config = replace(config, llama=replace(config.llama, model=_absolute(model)))
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Return nested plain values without DERIVED keys; `from_dict` is the inverse."""
    raw = asdict(config)
    for dotted in DERIVED:
        section, key = dotted.split(".")
        del raw[section][key]
    raw["data"]["training"] = list(config.data.training)
    raw["data"]["evaluation"] = list(config.data.evaluation)
    raw["evaluation"]["compare_to"] = list(config.evaluation.compare_to)
    return raw


def dump(config: Config) -> str:
    """Format the resolved config as YAML."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], sections: Sequence[str]
) -> list[str]:
    """Return `section.key: old -> new` for each key that differs between two `to_dict` results."""
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
        raise UserError(f"{where}: not valid YAML: {error}") from error
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise UserError(f"{where}: must be a mapping of sections, not a {type(raw).__name__}")
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
        problems.append(f"override {text!r}: the value is not valid YAML")
        return
    if raw.get(section) is None:
        raw[section] = {}
    target = raw[section]
    if isinstance(target, dict):
        target[key] = parsed


def _absolute(path: str) -> str:
    # os.path.expanduser, unlike Path.expanduser, does not raise for an unknown user.
    return path if storage.is_uri(path) else str(Path(os.path.expanduser(path)).absolute())


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
