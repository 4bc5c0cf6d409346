"""Predictions of a hybrid: votes, curve, baseline, cost, and the language model they need."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import EVALUATED, change_weights, predictions, quietly, recording
from torch import Tensor

from hybrid import launch
from hybrid.arc import tokenize_grid, tokens_to_grid
from hybrid.checkpoint import read
from hybrid.config import Config, EvaluationConfig
from hybrid.context import LocalContext
from hybrid.dataset import Dataset
from hybrid.errors import UserError
from hybrid.evaluate import HybridPredictor, Job, Outcome, Question, open_predictor, predict_tokens
from hybrid.evaluate.trm_predictor import tally_votes
from hybrid.llm.backbone import Backbone
from hybrid.llm.tiny import tiny_random
from hybrid.solver import HybridModel
from hybrid.train import joint

MakeConfig = Callable[..., Config]
CPU = LocalContext(torch.device("cpu"))
SILENT = {"feedback": {"source": "none"}}
VARIANTS = 6
TESTS = {"25ff71a9": 2, "44f52bb0": 2, "d037b0a7": 1}
assert TESTS.keys() == set(EVALUATED)


def grids(folder: Path) -> dict[str, Any]:
    """Return all candidates, the curve, and the original variant's attempts of every test."""
    keys = ("candidates", "curve", "attempts", "variants", "empty")
    return {
        task: [{key: test[key] for key in keys} for test in prediction["tests"]]
        for task, prediction in predictions(folder).items()
    }


def cost(outcome: Outcome) -> dict[str, Any]:
    spent: dict[str, Any] = outcome.results["spent"]
    return spent


def all_tests(outcome: Outcome) -> list[dict[str, Any]]:
    return [test for p in predictions(outcome.folder).values() for test in p["tests"]]


def test_hybrid_without_injection_equals_the_trm_with_as_many_act_steps(
    make_hybrid_config: MakeConfig,
) -> None:
    """Two attempts of two ACT steps equal four ACT steps of the TRM."""
    config = make_hybrid_config(
        adapter={"inject": "none"}, evaluation={"max_attempts": 2}, **SILENT
    )
    questions: list[Question] = []
    outcome = quietly(config, recording(questions))
    assert outcome.results["protocol"]["language model"].startswith("none")
    assert outcome.results["spent"]["llm_tokens"] == 0
    checkpoint = read(Path(str(config.evaluation.checkpoint)))
    predictor = open_predictor(Job(checkpoint=checkpoint, config=config))
    assert isinstance(predictor, HybridPredictor) and predictor.model.to_latent is None
    four = EvaluationConfig(halt="fixed", act_steps=4)
    for question in questions:
        rows = predictor.table.rows(question, VARIANTS)
        for number, pair in enumerate(question.task.test):
            inputs = np.stack(
                [tokenize_grid(variant.apply(pair.input), 3) for variant in question.variants]
            )
            tokens, logits, _ = predict_tokens(predictor.model.trm, inputs, rows, four)
            predicted = [
                variant.invert(tokens_to_grid(row))
                for variant, row in zip(question.variants, tokens, strict=True)
            ]
            confidences = torch.from_numpy(logits).double().sigmoid().tolist()
            found = predictions(outcome.folder)[question.task.id]["tests"][number]
            expected = tally_votes(predicted, confidences)
            assert [c["grid"] for c in found["candidates"]] == [
                c["grid"] for c in expected["candidates"]
            ]
            for one, other in zip(found["candidates"], expected["candidates"], strict=True):
                assert one["votes"] == other["votes"]
                assert one["confidence"] == pytest.approx(other["confidence"])


@pytest.mark.parametrize("source", ["none", "confidence", "vote"])
def test_zero_adapter_predicts_the_same_as_no_injection(
    make_hybrid_config: MakeConfig, hybrid: Config, source: str
) -> None:
    feedback = {"feedback": {"source": source}}
    no_injection = {"adapter": {"inject": "none"}}
    injected = grids(quietly(make_hybrid_config("injected", **feedback)).folder)
    plain = quietly(make_hybrid_config("plain", **feedback, **no_injection))
    assert injected != grids(plain.folder)
    step = hybrid.run_folder / "checkpoints/step_00000004"
    zeroed = hybrid.run_folder.parent / f"zeroed-{source}" / step.name
    shutil.copytree(step, zeroed)

    def zero_adapter(tensors: dict[str, Tensor]) -> None:
        tensors["to_latent.mlp.layers.1.weight"].zero_()
        tensors["to_latent.mlp.layers.1.bias"].zero_()

    change_weights(zeroed, zero_adapter)
    evaluation = {"evaluation": {"checkpoint": str(zeroed)}}
    zero = quietly(make_hybrid_config("zero", **feedback, **evaluation))
    without = quietly(make_hybrid_config("without", **feedback, **evaluation, **no_injection))
    assert grids(zero.folder) == grids(without.folder)
    assert zero.results["spent"]["llm_tokens"] > without.results["spent"]["llm_tokens"] == 0


def test_predictions_use_the_ema_weights(make_hybrid_config: MakeConfig, hybrid: Config) -> None:
    step = hybrid.run_folder / "checkpoints/step_00000004"
    other = hybrid.run_folder.parent / "blurred" / step.name
    shutil.copytree(step, other)
    ema = read(step).tensors("ema")

    def blur(tensors: dict[str, Tensor]) -> None:
        for name in ema.keys() & tensors.keys():
            tensors[name].fill_(0.1)

    change_weights(other, blur, ["model"])
    evaluation = {"checkpoint": str(other)}
    blurred = quietly(make_hybrid_config("blurred", evaluation=evaluation))
    assert grids(blurred.folder) == grids(quietly(make_hybrid_config()).folder)


def test_puzzle_rows_are_those_of_the_variants_or_blank(
    make_hybrid_config: MakeConfig, hybrid: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The voting variants come first, then the spare ones of the baseline."""
    rows_given: list[Tensor] = []
    initial_state = HybridModel.initial_state

    def record(self: HybridModel, batch: Any, puzzle_rows: Tensor, encoding: Any) -> Any:
        rows_given.append(puzzle_rows.clone())
        return initial_state(self, batch, puzzle_rows, encoding)

    monkeypatch.setattr(HybridModel, "initial_state", record)
    step = hybrid.run_folder / "checkpoints/step_00000004"
    table = read(step).tensors("puzzle_table")["puzzle_table"]
    dataset = Dataset.open(hybrid.data_folder)
    evaluation = {"limit": 1, "variants": 2}
    quietly(make_hybrid_config(evaluation=evaluation, **SILENT))
    first = int(dataset.first_variant[dataset.evaluated[0]]) + 1
    voting, spare = rows_given
    tests = len(dataset.tasks[dataset.evaluated[0]].test)
    assert torch.equal(voting, table[first : first + 2].repeat_interleave(tests, 0))
    assert torch.equal(spare, table[first + 2 : first + VARIANTS].repeat_interleave(tests, 0))
    rows_given.clear()
    blank = quietly(make_hybrid_config(evaluation=evaluation | {"puzzle_ids": "blank"}, **SILENT))
    assert len(rows_given) == 2
    for rows in rows_given:
        assert torch.equal(rows, table[:1].expand_as(rows))
    assert not torch.equal(table[0], table[first])
    assert blank.results["protocol"]["puzzle ids"].startswith("blank")


@pytest.mark.parametrize("source", ["none", "confidence", "vote", "demos"])
def test_last_point_of_the_curve_is_the_score(make_hybrid_config: MakeConfig, source: str) -> None:
    outcome = quietly(make_hybrid_config(feedback={"source": source}))
    assert [point["attempt"] for point in outcome.results["curve"]] == [1, 2, 3]
    for k in ("pass@1", "pass@2"):
        assert outcome.results["curve"][-1][k] == outcome.results["scores"][k]
    for test in all_tests(outcome):
        assert len(test["curve"]) == 3
        assert test["curve"][-1] == test["candidates"][:2]
    active = [point["trying"] for point in outcome.results["curve"]]
    assert active == sorted(active, reverse=True) and active[0] == 5


def test_stopped_row_votes_with_its_last_grid(make_hybrid_config: MakeConfig) -> None:
    outcome = quietly(make_hybrid_config(evaluation={"variants": 1}))
    counts = set()
    for test in all_tests(outcome):
        made = [attempt["grid"] for attempt in test["attempts"]]
        counts.add(len(made))
        assert [attempt["stopped"] for attempt in test["attempts"]][:-1] == [False] * (
            len(made) - 1
        )
        assert test["attempts"][-1]["stopped"] or len(made) == 3
        for number, candidates in enumerate(test["curve"], 1):
            last = made[min(number, len(made)) - 1]
            assert [c["grid"] for c in candidates] == ([last] if last else [])
    assert len(counts) > 1, "all rows stopped after the same attempt"


def test_baseline_spends_as_many_attempts_as_variants_allow(
    make_hybrid_config: MakeConfig,
) -> None:
    """It votes as an evaluation of that many variants with one attempt each."""
    single = {"max_attempts": 1}
    for variants, wanted, available in ((1, 3, 3), (2, 6, 6), (3, 9, 6)):
        outcome = quietly(make_hybrid_config(evaluation={"variants": variants}, **SILENT))
        other = quietly(make_hybrid_config(evaluation=single | {"variants": available}, **SILENT))
        for test, expected in zip(all_tests(outcome), all_tests(other), strict=True):
            found = test["baseline"]
            assert (found["views"], found["wanted"]) == (available, wanted)
            assert [c["grid"] for c in found["candidates"]] == [
                c["grid"] for c in expected["candidates"][:2]
            ]
            assert "baseline" not in expected
        baseline = outcome.results["baseline"]
        assert (baseline["views"], baseline["wanted"]) == (5 * available, 5 * wanted)
        assert baseline["pass@2"] == other.results["scores"]["pass@2"]
        assert baseline["spent"] == {k: v for k, v in cost(other).items() if k != "seconds"}
        assert "baseline" not in other.results
    stopping = quietly(make_hybrid_config(evaluation={"variants": 2}))
    for prediction in predictions(stopping.folder).values():
        used = prediction["spent"]["attempts"] // len(prediction["tests"])
        for test in prediction["tests"]:
            assert test["baseline"]["wanted"] == max(2, used)
    off = quietly(make_hybrid_config(evaluation={"variants": 2, "baseline": False}))
    assert "baseline" not in off.results and off.folder != stopping.folder
    assert grids(off.folder) == grids(stopping.folder)


@pytest.mark.parametrize("source", ["none", "confidence", "demos"])
def test_recorded_cost_matches_the_calls_made(
    make_hybrid_config: MakeConfig, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    act_steps: list[int] = []
    read_tokens: list[int] = []
    attempt = HybridModel.attempt

    def count_attempt(self: HybridModel, rows: Any, **options: Any) -> Any:
        made = attempt(self, rows, **options)
        act_steps.append(len(rows.histories) * self.act_steps)
        read_tokens.append(sum(made[2].llm_tokens))
        return made

    prefill = Backbone.prefill
    prompt_tokens: list[int] = []

    def count_prompts(self: Backbone, prompts: Any) -> Any:
        prompt_tokens.append(sum(map(len, prompts)))
        return prefill(self, prompts)

    monkeypatch.setattr(HybridModel, "attempt", count_attempt)
    monkeypatch.setattr(Backbone, "prefill", count_prompts)
    evaluation = {"variants": 4, "baseline": False}
    outcome = quietly(make_hybrid_config(evaluation=evaluation, feedback={"source": source}))
    spent = cost(outcome)
    assert spent["rows"] == 4 * (5 + (3 if source == "demos" else 0))
    assert spent["act_steps"] == 2 * spent["attempts"] == sum(act_steps)
    assert spent["llm_tokens"] == sum(prompt_tokens) + sum(read_tokens)
    if source == "none":
        assert spent["attempts"] == 3 * spent["rows"]
    for name in ("rows", "attempts", "act_steps", "llm_tokens"):
        tasks = predictions(outcome.folder).values()
        assert spent[name] == sum(p["spent"][name] for p in tasks)


def test_batch_sizes_do_not_change_predictions(make_hybrid_config: MakeConfig) -> None:
    for source in ("confidence", "demos"):
        expected = quietly(make_hybrid_config(feedback={"source": source}))
        for size in (1, 5):
            config = make_hybrid_config(
                evaluation={"batch_size": size},
                feedback={"source": source},
                llama={"batch_size": 3},
            )
            assert rounded(quietly(config)) == rounded(expected), (source, size)


def rounded(outcome: Outcome) -> Any:
    """Return all predictions, floats rounded to nine digits."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(v) for key, v in value.items()}
        if isinstance(value, list):
            return [plain(v) for v in value]
        return round(value, 9) if isinstance(value, float) else value

    return plain(predictions(outcome.folder))


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """saved(change): save the tiny language model with `change` added to its embeddings."""

    def save(change: float, layers: int = 2) -> Path:
        model, tokenizer = tiny_random(torch.float32)
        del model.model.layers[layers:]
        model.config.num_hidden_layers = layers
        with torch.no_grad():
            model.get_input_embeddings().weight.add_(change)
        folder = tmp_path / f"model-{change}-{layers}"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


def test_only_the_language_model_of_training_is_accepted(
    make_hybrid_config: MakeConfig, saved: Callable[..., Path]
) -> None:
    named = quietly(make_hybrid_config("named"))
    copied = quietly(make_hybrid_config("copied", llama={"model": str(saved(0))}))
    assert rounded(copied) == rounded(named)
    with pytest.raises(UserError, match=r"is not the model that .* was trained with \(tiny-random"):
        quietly(make_hybrid_config("other", llama={"model": str(saved(0.5))}))


def test_fine_tuned_model_needs_a_base_of_its_shape_and_no_prompt_cache(
    make_hybrid_config: MakeConfig, hybrid: Config, saved: Callable[..., Path], tmp_path: Path
) -> None:
    llama = replace(hybrid.llama, frozen=False, lr=1e-3)
    run = replace(hybrid.logging, run="tuned")
    tuned = joint(replace(hybrid, llama=llama, logging=run), CPU).checkpoint
    given = {"evaluation": {"checkpoint": str(tuned)}}
    own = quietly(make_hybrid_config("own", **given))
    based_on_another = quietly(
        make_hybrid_config("moved", llama={"model": str(saved(0.5))}, **given)
    )
    assert rounded(based_on_another) == rounded(own), "the weights must come from the checkpoint"
    with pytest.raises(UserError, match=r"is not the model that .* was trained with"):
        quietly(make_hybrid_config("big", llama={"model": str(saved(0, layers=1))}, **given))
    with pytest.raises(
        UserError, match=r"llama\.prompt_cache would be stale for a model in training"
    ):
        quietly(make_hybrid_config("stale", llama={"prompt_cache": True}, **given))


def test_prompt_cache_does_not_change_predictions(
    make_hybrid_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The cache holds the prompts of every variant; none is computed again."""
    paths = {"prompt_cache": str(tmp_path / "prompt_cache")}
    two = {"evaluation": {"variants": 2, "baseline": False}, "training": {"variants": 2}}
    computed = quietly(make_hybrid_config("computed", **two))
    llama, cluster = {"prompt_cache": True}, {"num_workers": 0}
    config = make_hybrid_config("cached", llama=llama, paths=paths, cluster=cluster, **two)
    launch.cache_prompts(config)
    torch.set_num_threads(1)
    monkeypatch.setattr(Backbone, "_prefill", None)  # fail if called
    assert rounded(quietly(config)) == rounded(computed)


def test_compare_to_embeds_scores_of_other_runs_of_the_same_questions(
    make_hybrid_config: MakeConfig,
) -> None:
    first = quietly(make_hybrid_config("first", **SILENT))
    oracle = quietly(make_hybrid_config("oracle", feedback={"source": "oracle"}))
    outcome = quietly(make_hybrid_config("second", evaluation={"compare_to": ["first", "oracle"]}))
    one, other = outcome.results["compare_to"]
    for found, source in ((one, first), (other, oracle)):
        for key in ("scores", "title", "spent"):
            assert found[key] == source.results[key], key
    assert (one["oracle"], other["oracle"]) == (False, True)
    quietly(make_hybrid_config("fewer", evaluation={"limit": 1}))
    for name in ("missing", "fewer"):
        config = make_hybrid_config("third", evaluation={"compare_to": [name]})
        with pytest.raises(
            UserError, match=rf"evaluation\.compare_to: .*{name}/evaluation holds no"
        ):
            quietly(config)
        assert not config.run_folder.exists(), "the error must come before any prediction"
