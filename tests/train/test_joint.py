"""What a step of joint training moves, what it reads, and what it keeps in memory."""

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


class Listening(Joint):
    """Keeps what it was when it was new, the batches of its steps and the problems it read."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.new = {name: value.clone() for name, value in self.everything().items()}
        self.batches: list[Batch] = []
        self.read: list[list[Task]] = []
        self.encoded: list[list[Prompt]] = []
        self.prompts: dict[int, Task] = {}
        if self.reader:
            self._listen(self.reader)

    def everything(self) -> dict[str, Tensor]:
        found = dict(self.solver.state_dict())
        if self.reader:
            found |= {f"lm.{k}": v for k, v in self.reader.backbone.model.state_dict().items()}
        return found

    def step(self, batch: Batch, total_steps: int) -> Sums:
        self.batches.append({name: value.clone() for name, value in batch.items()})
        self.encoded.clear()
        sums = super().step(batch, total_steps)
        for prompts in self.encoded:
            self.read.append([self.prompts[id(prompt)] for prompt in prompts])
        return sums

    def _listen(self, reader: Reader) -> None:
        prompt, encode = reader.prompt, reader.prefill

        def listen(task: Task, test: int = 0) -> Prompt:
            made = prompt(task, test)
            self.prompts[id(made)] = task
            self.kept = [*getattr(self, "kept", []), made]  # an id must not be used again
            return made

        def see(prompts: Any) -> Any:
            self.encoded.append(list(prompts))
            return encode(prompts)

        reader.prompt, reader.prefill = listen, see  # type: ignore[method-assign]


def run(config: Config) -> tuple[Any, Result]:
    """The learner of a whole run in this process, and how the run ended."""
    made: list[Listening] = []

    def make(*args: Any) -> Listening:
        made.append(Listening(*args))
        return made[0]

    result = train(config, CPU, make)
    return made[0], result


def drive(config: Config, slots: range, steps: int) -> Listening:
    """Some slots of a run, as one worker of several computes them, without the others."""
    dataset = Dataset.open(config.data_folder)
    module = Listening(config, dataset, CPU, slots)
    stream = training_stream(config, dataset)
    rounds = CPU.rounds(stream, slots, config.training.batch_size, 0)
    loader = loader_of(module.state, rounds)
    module.setup()
    for _ in range(steps):
        module.step(next_batch(loader, module.state), steps)
    return module


def moved(module: Listening) -> set[str]:
    now = module.everything()
    return {name for name, value in module.new.items() if not torch.equal(value, now[name])}


@pytest.mark.parametrize("inject", ["carry", "input", "both"])
def test_two_steps_move_every_trained_tensor_and_nothing_else(
    hybrid_config: HybridConfig, inject: str
) -> None:
    """Without decay: what moves has had a gradient."""
    module, _ = run(hybrid_config("a", training=NO_DECAY, adapter={"inject": inject}))
    trained = set(module.state.optimizer.parameters)
    assert {name.split(".")[0] for name in trained} == {"trm", "to_latent", "to_text"}
    calibrated = {"to_latent.mean", "to_latent.std", "trm.puzzle_table"}
    assert moved(module) == trained | calibrated
    for name, weight in module.reader.backbone.model.named_parameters():
        assert weight.grad is None and not weight.requires_grad, name


def test_a_language_model_that_is_not_frozen_learns_and_is_kept(hybrid_config: HybridConfig) -> None:
    llama = {"frozen": False, "lr": 1e-3}
    module, result = run(hybrid_config("a", training=NO_DECAY, llama=llama))
    trained = set(module.state.optimizer.parameters)
    decoder = {name for name in trained if name.startswith("llama.")}
    assert len(decoder) == len(list(module.reader.backbone.model.model.parameters()))
    assert trained <= moved(module)
    kept = read(result.checkpoint).tensors("model")
    for name in decoder:
        assert torch.equal(kept[name], module.everything()[name]), name


def test_without_injection_the_trm_trains_alone(
    hybrid_config: HybridConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["hybrid.train.joint"]
    monkeypatch.setattr(module, "open_reader", None)  # called, it would raise
    module, result = run(hybrid_config("a", training=NO_DECAY, adapter={"inject": "none"}))
    trained = set(module.state.optimizer.parameters)
    assert {name.split(".")[0] for name in trained} == {"trm"}
    assert moved(module) == trained | {"trm.puzzle_table"}
    assert read(result.checkpoint).state["llama"] is None


def test_a_checkpoint_holds_the_name_of_the_frozen_model_and_not_its_weights(
    hybrid_config: HybridConfig,
) -> None:
    module, result = run(hybrid_config("a", training=NO_DECAY))
    kept = tensors(result.checkpoint)
    assert not [name for name in kept if "llama" in name or "lm." in name]
    model = module.reader.backbone.model
    for name in ("model", "ema"):
        own = read(result.checkpoint).tensors(name)
        assert {part.split(".")[0] for part in own} == {"trm", "to_latent", "to_text"}
        size = (result.checkpoint / f"{name}.safetensors").stat().st_size
        weights = sum(value.nbytes for value in own.values())
        assert weights < size < weights + 16 * 1024, name
    vocabulary = model.get_input_embeddings().weight.shape[0]
    assert all(vocabulary not in value.shape for value in kept.values())
    llama = read(result.checkpoint).state["llama"]
    assert llama == {
        "model": "tiny-random",
        "revision": "none",
        "fingerprint": module.reader.backbone.fingerprint(),
    }


def test_news_is_measured_once_and_not_again_on_resuming(
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


@pytest.mark.parametrize("slots", [SIX, range(3, 6)], ids=["one worker", "the second of two"])
@pytest.mark.parametrize("variants", [None, 1])
def test_a_row_is_read_with_the_other_demonstrations_of_its_task_and_never_its_output(
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
            view = dataset.augmentation(variant)
            own = [
                pair
                for pair in dataset.tasks[task].pairs
                if pair.output is not None
                and np.array_equal(view.apply(pair.input), given)
                and np.array_equal(view.apply(pair.output), answer)
            ]
            assert len(own) == 1, "the row and its identifier belong together"
            others = [pair for pair in dataset.tasks[task].train if pair != own[0]]
            shown = [(p.input.tolist(), p.output.tolist()) for p in problem.train]  # type: ignore[union-attr]
            assert shown == [tuple(view.apply(g).tolist() for g in p.grids) for p in others]
            [asked] = problem.test
            assert np.array_equal(asked.input, given) and asked.output is None
            assert (given.tolist(), answer.tolist()) not in shown
            kinds.add((dataset.purposes[task], own[0] in dataset.tasks[task].test))
            if variants == 1:
                assert variant == dataset.first_variant[task]
    wanted = {("training", False), ("training", True), ("evaluation", False)}
    assert kinds == wanted, "not every kind of row was seen"


def test_every_row_gets_a_gradient_through_the_language_model_at_every_attempt(
    hybrid_config: HybridConfig,
) -> None:
    """Encoder outputs that are cached between steps starve all but the newest rows."""
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


def peak(config: Config) -> int:
    """Most bytes that were saved for backward at any time of a step."""
    module = drive(config, SIX, 1)
    now = most = 0

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal now, most
            self.tensor = tensor
            now += tensor.nbytes
            most = max(most, now)

        def __del__(self) -> None:
            nonlocal now
            now -= self.tensor.nbytes

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        module.step(module.batches[0], 2)
    return most


def test_memory_does_not_grow_with_attempts(hybrid_config: HybridConfig) -> None:
    def measure(**training: Any) -> int:
        training = {"bptt_attempts": 2, **training}
        return peak(hybrid_config("a", training=training, feedback={"source": "none"}))

    four, eight = (measure(max_attempts=most) for most in (4, 8))
    assert four == eight
    kept, kept_more = (measure(max_attempts=most, recompute=False) for most in (4, 8))
    assert kept == kept_more > 2 * four, "recomputing saves nothing"
    assert measure(max_attempts=8, bptt_attempts=4, recompute=False) > 1.7 * kept


def test_exploration_keeps_rows_going_that_would_have_stopped(hybrid_config: HybridConfig) -> None:
    def attempts(name: str, chance: float) -> list[float]:
        sure = {"threshold": 0.0}  # every row stops at once
        trm = {"halt_exploration_prob": chance}
        config = hybrid_config(name, trm=trm, feedback=sure, training={"steps": 3, "max_attempts": 4})
        joint(config, CPU)
        return [line["steps"] for line in metrics(config.run_folder) if "loss" in line]

    assert attempts("never", 0) == [1, 1, 1]
    assert all(2 <= mean < 4 for mean in attempts("always", 1))


def test_blank_rows_teach_the_blank_puzzle_alone(hybrid_config: HybridConfig) -> None:
    def rows_moved(chance: float) -> set[int]:
        training = {**NO_DECAY, "blank_puzzle_prob": chance}
        module = drive(hybrid_config("a", training=training), SIX, 2)
        table = module.new["trm.puzzle_table"] != module.state.trm.puzzle_table
        return set(table.any(1).nonzero().flatten().tolist())

    assert rows_moved(1) == {0}
    assert 0 not in rows_moved(0) and rows_moved(0)
    mixed = rows_moved(0.5)
    assert 0 in mixed and len(mixed) > 1


def test_the_oracle_of_a_training_row_is_its_label(hybrid_config: HybridConfig) -> None:
    config = hybrid_config("a", feedback={"source": "oracle"}, training={"steps": 1})
    module = drive(config, SIX, 4)
    for batch in module.batches:
        judge = module._feedback_source(batch)
        for n, answer in enumerate(judge.answers):  # type: ignore[attr-defined]
            labels = batch["labels"][n].masked_fill(batch["labels"][n] == IGNORE, 0)
            colours = labels[labels >= 2].numpy() - 2
            assert answer.size == len(colours) and answer.ravel().tolist() == colours.tolist()
    assert read(joint(config, CPU).checkpoint).state["oracle"] is True


def test_the_variance_of_the_latent_is_a_metric(hybrid_config: HybridConfig) -> None:
    """At the first step the adapter says nothing yet; then rows must differ."""
    config = hybrid_config("a", training={"steps": 4, "lr_warmup_steps": 0})
    joint(config, CPU)
    values = [m["latent_variance"] for m in metrics(config.run_folder) if "loss" in m]
    assert values[0] == 0 and all(0 < value <= 1 for value in values[1:])
    assert float(latent_variance(torch.ones(4, 3, 2))) == pytest.approx(0, abs=1e-6)
    assert float(latent_variance(torch.eye(4))) == pytest.approx(0.75)
    assert float(latent_variance(torch.tensor([[1.0], [-1.0]]))) == 1


def test_the_estimate_knows_the_adapters(hybrid_config: HybridConfig) -> None:
    for adapter in ({"inject": "carry"}, {"inject": "both", "layers": 3}):
        config = hybrid_config("a", adapter=adapter)
        module = drive(config, SIX, 0)
        sizes = {
            room: sum(p.numel() for n, p in module.solver.named_parameters() if room in n)
            for room in ("trm.", "to_")
        }
        text = estimate(config, "hybrid")
        assert f"{sizes['trm.']:,} trained in the TRM" in text
        assert f"{sizes['to_']:,} trained in the adapters" in text
