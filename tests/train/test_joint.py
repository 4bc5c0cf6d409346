"""A step of joint training: the tensors it trains, the prompts it reads, the memory it needs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import loader_of, metrics, next_batch, tensors
from torch import Tensor

from hybrid.adapters import TextToLatentAdapter
from hybrid.arc import Task
from hybrid.checkpoint import read
from hybrid.config import Config
from hybrid.context import LocalContext
from hybrid.dataset import Dataset
from hybrid.llm import Prompt, Reader
from hybrid.solver import extract_grid
from hybrid.train import Joint, Result, estimate, joint
from hybrid.train.joint import latent_variance
from hybrid.train.loop import train
from hybrid.train.preflight import training_stream
from hybrid.train.update import Sums
from hybrid.trm import IGNORE, Batch

HybridConfig = Callable[..., Config]
CPU = LocalContext(torch.device("cpu"))
NO_DECAY = {"steps": 2, "weight_decay": 0, "puzzle_weight_decay": 0, "lr_warmup_steps": 0}
SIX = range(6)


class Recorder(Joint):
    """Joint module that records its initial tensors, its batches and the problems it prefilled."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.new = {name: value.clone() for name, value in self.all_tensors().items()}
        self.batches: list[Batch] = []
        self.read: list[list[Task]] = []
        self.prefilled: list[list[Prompt]] = []
        self.prompts: dict[int, Task] = {}
        if self.reader:
            self._record(self.reader)

    def all_tensors(self) -> dict[str, Tensor]:
        tensors = dict(self.solver.state_dict())
        if self.reader:
            tensors |= {f"lm.{k}": v for k, v in self.reader.backbone.model.state_dict().items()}
        return tensors

    def step(self, batch: Batch, total_steps: int) -> Sums:
        self.batches.append({name: value.clone() for name, value in batch.items()})
        self.prefilled.clear()
        sums = super().step(batch, total_steps)
        for prompts in self.prefilled:
            self.read.append([self.prompts[id(prompt)] for prompt in prompts])
        return sums

    def _record(self, reader: Reader) -> None:
        prompt, prefill = reader.prompt, reader.prefill

        def record_prompt(task: Task, test: int = 0) -> Prompt:
            made = prompt(task, test)
            self.prompts[id(made)] = task
            self.kept = [*getattr(self, "kept", []), made]  # so that its id is not reused
            return made

        def record_prefill(prompts: Any) -> Any:
            self.prefilled.append(list(prompts))
            return prefill(prompts)

        reader.prompt, reader.prefill = record_prompt, record_prefill  # type: ignore[method-assign]


def run(config: Config) -> tuple[Any, Result]:
    """Run to the end in this process; return the module and the result."""
    made: list[Recorder] = []

    def make(*args: Any) -> Recorder:
        made.append(Recorder(*args))
        return made[0]

    result = train(config, CPU, make)
    return made[0], result


def drive(config: Config, slots: range, steps: int) -> Recorder:
    """Take steps with some slots of the batch only, like one of several workers."""
    dataset = Dataset.open(config.data_folder)
    module = Recorder(config, dataset, CPU, slots)
    stream = training_stream(config, dataset)
    rounds = CPU.rounds(stream, slots, config.training.batch_size, 0)
    loader = loader_of(module.state, rounds)
    module.setup()
    for _ in range(steps):
        module.step(next_batch(loader, module.state), steps)
    return module


def changed(module: Recorder) -> set[str]:
    now = module.all_tensors()
    return {name for name, value in module.new.items() if not torch.equal(value, now[name])}


@pytest.mark.parametrize("inject", ["carry", "input", "both"])
def test_two_steps_change_exactly_the_trained_tensors(
    hybrid_config: HybridConfig, inject: str
) -> None:
    """Without weight decay, a tensor only changes if it has a gradient."""
    module, _ = run(hybrid_config("a", training=NO_DECAY, adapter={"inject": inject}))
    trained = set(module.state.optimizer.parameters)
    assert {name.split(".")[0] for name in trained} == {"trm", "to_latent", "to_text"}
    calibrated = {"to_latent.mean", "to_latent.std", "trm.puzzle_table"}
    assert changed(module) == trained | calibrated
    for name, weight in module.reader.backbone.model.named_parameters():
        assert weight.grad is None and not weight.requires_grad, name


def test_trained_language_model_changes_and_is_saved(
    hybrid_config: HybridConfig,
) -> None:
    llama = {"frozen": False, "lr": 1e-3}
    module, result = run(hybrid_config("a", training=NO_DECAY, llama=llama))
    trained = set(module.state.optimizer.parameters)
    decoder = {name for name in trained if name.startswith("llama.")}
    assert len(decoder) == len(list(module.reader.backbone.model.model.parameters()))
    assert trained <= changed(module)
    saved = read(result.checkpoint).tensors("model")
    for name in decoder:
        assert torch.equal(saved[name], module.all_tensors()[name]), name


def test_inject_none_trains_the_trm_alone(
    hybrid_config: HybridConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["hybrid.train.joint"]
    monkeypatch.setattr(module, "open_reader", None)  # called, it would raise
    module, result = run(hybrid_config("a", training=NO_DECAY, adapter={"inject": "none"}))
    trained = set(module.state.optimizer.parameters)
    assert {name.split(".")[0] for name in trained} == {"trm"}
    assert changed(module) == trained | {"trm.puzzle_table"}
    assert read(result.checkpoint).state["llama"] is None


def test_checkpoint_identifies_the_frozen_model_and_does_not_contain_it(
    hybrid_config: HybridConfig,
) -> None:
    module, result = run(hybrid_config("a", training=NO_DECAY))
    saved = tensors(result.checkpoint)
    assert not [name for name in saved if "llama" in name or "lm." in name]
    model = module.reader.backbone.model
    for name in ("model", "ema"):
        own = read(result.checkpoint).tensors(name)
        assert {part.split(".")[0] for part in own} == {"trm", "to_latent", "to_text"}
        size = (result.checkpoint / f"{name}.safetensors").stat().st_size
        weights = sum(value.nbytes for value in own.values())
        assert weights < size < weights + 16 * 1024, name
    vocabulary = model.get_input_embeddings().weight.shape[0]
    assert all(vocabulary not in value.shape for value in saved.values())
    llama = read(result.checkpoint).state["llama"]
    assert llama == {
        "model": "tiny-random",
        "revision": "none",
        "fingerprint": module.reader.backbone.fingerprint(),
    }


def test_adapter_is_calibrated_once_and_not_on_resume(
    hybrid_config: HybridConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Tensor] = []
    calibrate = TextToLatentAdapter.calibrate

    def count(self: TextToLatentAdapter, hidden: Tensor) -> None:
        measured.append(hidden)
        calibrate(self, hidden)

    monkeypatch.setattr(TextToLatentAdapter, "calibrate", count)
    config = hybrid_config("a", training={"steps": 1})
    first = read(joint(config, CPU).checkpoint).tensors("model")
    longer = replace(config, training=replace(config.training, steps=2))
    second = read(joint(longer, CPU).checkpoint).tensors("model")
    [hidden] = measured
    assert len(hidden) >= 64
    torch.testing.assert_close(first["to_latent.mean"], hidden.mean(0))
    for name in ("to_latent.mean", "to_latent.std"):
        assert torch.equal(first[name], second[name]), name
    assert not torch.equal(first["to_latent.positions"], second["to_latent.positions"])


@pytest.mark.parametrize("slots", [SIX, range(3, 6)], ids=["one worker", "second of two workers"])
@pytest.mark.parametrize("variants", [None, 1])
def test_prompt_has_the_other_demonstrations_and_never_the_rows_output(
    hybrid_config: HybridConfig, slots: range, variants: int | None
) -> None:
    config = hybrid_config("a", training={"variants": variants, "max_attempts": 1})
    dataset = Dataset.open(config.data_folder)
    module = drive(config, slots, 9)
    kinds = set()
    for batch, problems in zip(module.batches, module.read, strict=True):
        assert len(problems) == len(slots)
        for n, problem in enumerate(problems):
            inputs = batch["inputs"][n].numpy().astype(np.uint8)
            labels = batch["labels"][n].masked_fill(batch["labels"][n] == IGNORE, 0).numpy()
            given, answer = (extract_grid(t.astype(np.uint8), inputs)[0] for t in (inputs, labels))
            variant = int(batch["puzzle_identifiers"][n]) - 1
            task = int(dataset.task_of[variant])
            augmentation = dataset.augmentation(variant)
            own = [
                pair
                for pair in dataset.tasks[task].pairs
                if pair.output is not None
                and np.array_equal(augmentation.apply(pair.input), given)
                and np.array_equal(augmentation.apply(pair.output), answer)
            ]
            assert len(own) == 1, "row and identifier do not match"
            others = [pair for pair in dataset.tasks[task].train if pair != own[0]]
            shown = [(p.input.tolist(), p.output.tolist()) for p in problem.train]  # type: ignore[union-attr]
            assert shown == [tuple(augmentation.apply(g).tolist() for g in p.grids) for p in others]
            [test] = problem.test
            assert np.array_equal(test.input, given) and test.output is None
            assert (given.tolist(), answer.tolist()) not in shown
            kinds.add((dataset.purposes[task], own[0] in dataset.tasks[task].test))
            if variants == 1:
                assert variant == dataset.first_variant[task]
    expected = {("training", False), ("training", True), ("evaluation", False)}
    assert kinds == expected, "not every kind of row occurred"


def test_every_row_has_an_llm_gradient_in_every_attempt(
    hybrid_config: HybridConfig,
) -> None:
    """A reader output cached between steps would have a gradient for new rows only."""
    module = drive(hybrid_config("a", training=NO_DECAY, feedback={"source": "none"}), SIX, 2)
    assert module.solver.to_latent is not None
    latents: list[Tensor] = []
    hidden: list[Tensor] = []

    def keep(module: Any, given: tuple[Any, ...], made: dict[str, Tensor]) -> None:
        if not torch.is_grad_enabled():
            return
        for value in (given[0], *made.values()):
            value.retain_grad()
        latents.extend(made.values())
        hidden.append(given[0])

    module.solver.to_latent.register_forward_hook(keep)
    dataset = Dataset.open(module.config.data_folder)
    stream = training_stream(module.config, dataset)
    loader = loader_of(module.state, CPU.rounds(stream, SIX, 6, 2), 2)
    for _ in range(2):
        module.step(next_batch(loader, module.state), 4)
    assert len(hidden) == 2 * 3 and len(latents) == 2 * 3 * 3
    for value in (*latents, *hidden):
        assert value.grad is not None
        assert (value.grad.flatten(1).abs().sum(1) > 0).all()


def peak_bytes(config: Config) -> int:
    """Return the peak of bytes saved for backward during a step."""
    module = drive(config, SIX, 1)
    now = peak = 0

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal now, peak
            self.tensor = tensor
            now += tensor.nbytes
            peak = max(peak, now)

        def __del__(self) -> None:
            nonlocal now
            now -= self.tensor.nbytes

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        module.step(module.batches[0], 2)
    return peak


def test_memory_does_not_grow_with_attempts(hybrid_config: HybridConfig) -> None:
    def measure(**training: Any) -> int:
        training = {"bptt_attempts": 2, **training}
        return peak_bytes(hybrid_config("a", training=training, feedback={"source": "none"}))

    four, eight = (measure(max_attempts=n) for n in (4, 8))
    assert four == eight
    kept, kept_more = (measure(max_attempts=n, recompute=False) for n in (4, 8))
    assert kept == kept_more > 2 * four, "recomputing saves too little"
    assert measure(max_attempts=8, bptt_attempts=4, recompute=False) > 1.7 * kept


def test_exploration_continues_rows_that_feedback_would_stop(hybrid_config: HybridConfig) -> None:
    def attempts(name: str, chance: float) -> list[float]:
        feedback = {"threshold": 0.0}  # every row stops after one attempt
        trm = {"halt_exploration_prob": chance}
        config = hybrid_config(
            name, trm=trm, feedback=feedback, training={"steps": 3, "max_attempts": 4}
        )
        joint(config, CPU)
        return [line["steps"] for line in metrics(config.run_folder) if "loss" in line]

    assert attempts("never", 0) == [1, 1, 1]
    assert all(2 <= mean < 4 for mean in attempts("always", 1))


def test_blank_puzzle_prob_trains_the_blank_puzzle_row(hybrid_config: HybridConfig) -> None:
    def changed_rows(chance: float) -> set[int]:
        training = {**NO_DECAY, "blank_puzzle_prob": chance}
        module = drive(hybrid_config("a", training=training), SIX, 2)
        table = module.new["trm.puzzle_table"] != module.state.trm.puzzle_table
        return set(table.any(1).nonzero().flatten().tolist())

    assert changed_rows(1) == {0}
    assert 0 not in changed_rows(0) and changed_rows(0)
    mixed = changed_rows(0.5)
    assert 0 in mixed and len(mixed) > 1


def test_oracle_answers_of_training_rows_are_their_labels(hybrid_config: HybridConfig) -> None:
    config = hybrid_config("a", feedback={"source": "oracle"}, training={"steps": 1})
    module = drive(config, SIX, 4)
    for batch in module.batches:
        oracle = module._feedback_source(batch)
        for n, answer in enumerate(oracle.answers):  # type: ignore[attr-defined]
            labels = batch["labels"][n].masked_fill(batch["labels"][n] == IGNORE, 0)
            colours = labels[labels >= 2].numpy() - 2
            assert answer.size == len(colours) and answer.ravel().tolist() == colours.tolist()
    assert read(joint(config, CPU).checkpoint).state["oracle"] is True


def test_latent_variance_is_a_metric(hybrid_config: HybridConfig) -> None:
    """The adapter outputs zeros in the first step; later its latents differ between rows."""
    config = hybrid_config("a", training={"steps": 4, "lr_warmup_steps": 0})
    joint(config, CPU)
    values = [m["latent_variance"] for m in metrics(config.run_folder) if "loss" in m]
    assert values[0] == 0 and all(0 < value <= 1 for value in values[1:])
    assert float(latent_variance(torch.ones(4, 3, 2))) == pytest.approx(0, abs=1e-6)
    assert float(latent_variance(torch.eye(4))) == pytest.approx(0.75)
    assert float(latent_variance(torch.tensor([[1.0], [-1.0]]))) == 1


def test_estimate_counts_the_adapter_parameters(hybrid_config: HybridConfig) -> None:
    for adapter in ({"inject": "carry"}, {"inject": "both", "layers": 3}):
        config = hybrid_config("a", adapter=adapter)
        module = drive(config, SIX, 0)
        sizes = {
            prefix: sum(p.numel() for n, p in module.solver.named_parameters() if prefix in n)
            for prefix in ("trm.", "to_")
        }
        text = estimate(config, "hybrid")
        assert f"{sizes['trm.']:,} trained in the TRM" in text
        assert f"{sizes['to_']:,} trained in the adapters" in text
