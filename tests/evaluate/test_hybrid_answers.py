"""What a hybrid's answers are made of, what they cost, and which model gives them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ASKED, change_weights, predictions, quietly, recording
from torch import Tensor

from hybrid import launch
from hybrid.arc import tokenize_grid, tokens_to_grid
from hybrid.checkpoint import read
from hybrid.config import Config, EvaluationConfig
from hybrid.context import LocalContext
from hybrid.dataset import Dataset
from hybrid.errors import UserError
from hybrid.evaluate import HybridPredictor, Job, Outcome, Question, open_predictor, predict
from hybrid.evaluate.trm_predictor import tally_votes
from hybrid.llm.backbone import Backbone
from hybrid.llm.tiny import tiny_random
from hybrid.solver import HybridModel
from hybrid.train import joint

Ask = Callable[..., Config]
CPU = LocalContext(torch.device("cpu"))
SILENT = {"feedback": {"source": "none"}}
VIEWS = 6
TESTS = {"25ff71a9": 2, "44f52bb0": 2, "d037b0a7": 1}
assert TESTS.keys() == set(ASKED)


def grids(folder: Path) -> dict[str, Any]:
    """Every candidate of every test, after every attempt, and the first view's attempts."""
    kept = ("candidates", "curve", "attempts", "variants", "empty")
    return {
        task: [{key: test[key] for key in kept} for test in prediction["tests"]]
        for task, prediction in predictions(folder).items()
    }


def cost(outcome: Outcome) -> dict[str, Any]:
    spent: dict[str, Any] = outcome.results["spent"]
    return spent


def all_tests(outcome: Outcome) -> list[dict[str, Any]]:
    return [test for p in predictions(outcome.folder).values() for test in p["tests"]]


def test_alone_it_is_the_trm_with_as_many_act_steps(ask_hybrid: Ask) -> None:
    """Two attempts of two ACT steps are the four that the plain solver takes."""
    config = ask_hybrid(adapter={"inject": "none"}, evaluation={"max_attempts": 2}, **SILENT)
    asked: list[Question] = []
    outcome = quietly(config, recording(asked))
    assert outcome.results["protocol"]["language model"].startswith("nothing")
    assert outcome.results["spent"]["llm_tokens"] == 0
    checkpoint = read(Path(str(config.evaluation.checkpoint)))
    solver = open_predictor(Job(checkpoint=checkpoint, config=config))
    assert isinstance(solver, HybridPredictor) and solver.solver.to_latent is None
    four = EvaluationConfig(halt="fixed", act_steps=4)
    for question in asked:
        rows = solver.table.rows(question, VIEWS)
        for number, pair in enumerate(question.task.test):
            inputs = np.stack([tokenize_grid(view.apply(pair.input), 3) for view in question.views])
            tokens, logits, _ = predict(solver.solver.trm, inputs, rows, four)
            made = [
                view.invert(tokens_to_grid(row))
                for view, row in zip(question.views, tokens, strict=True)
            ]
            sure = torch.from_numpy(logits).double().sigmoid().tolist()
            found = predictions(outcome.folder)[question.task.id]["tests"][number]
            wanted = tally_votes(made, sure)
            assert [c["grid"] for c in found["candidates"]] == [
                c["grid"] for c in wanted["candidates"]
            ]
            for ours, theirs in zip(found["candidates"], wanted["candidates"], strict=True):
                assert ours["votes"] == theirs["votes"]
                assert ours["confidence"] == pytest.approx(theirs["confidence"])


@pytest.mark.parametrize("source", ["none", "confidence", "vote"])
def test_an_adapter_that_says_nothing_leaves_the_trm_alone(
    ask_hybrid: Ask, hybrid: Config, source: str
) -> None:
    feedback = {"feedback": {"source": source}}
    alone = {"adapter": {"inject": "none"}}
    spoken = grids(quietly(ask_hybrid("spoken", **feedback)).folder)
    assert spoken != grids(quietly(ask_hybrid("alone", **feedback, **alone)).folder)
    step = hybrid.run_folder / "checkpoints/step_00000004"
    silent = hybrid.run_folder.parent / f"silent-{source}" / step.name
    shutil.copytree(step, silent)

    def silence(found: dict[str, Tensor]) -> None:
        found["to_latent.mlp.layers.1.weight"].zero_()
        found["to_latent.mlp.layers.1.bias"].zero_()

    change_weights(silent, silence)
    evaluation = {"evaluation": {"checkpoint": str(silent)}}
    heard = quietly(ask_hybrid("heard", **feedback, **evaluation))
    without = quietly(ask_hybrid("without", **feedback, **evaluation, **alone))
    assert grids(heard.folder) == grids(without.folder)
    assert heard.results["spent"]["llm_tokens"] > without.results["spent"]["llm_tokens"] == 0


def test_the_averaged_weights_answer(ask_hybrid: Ask, hybrid: Config) -> None:
    step = hybrid.run_folder / "checkpoints/step_00000004"
    other = hybrid.run_folder.parent / "blurred" / step.name
    shutil.copytree(step, other)
    averaged = read(step).tensors("ema")

    def blur(found: dict[str, Tensor]) -> None:
        for name in averaged.keys() & found.keys():
            found[name].fill_(0.1)

    change_weights(other, blur, ["model"])
    evaluation = {"checkpoint": str(other)}
    blurred = quietly(ask_hybrid("blurred", evaluation=evaluation))
    assert grids(blurred.folder) == grids(quietly(ask_hybrid()).folder)


def test_puzzle_rows_are_those_of_the_views_or_blank(
    ask_hybrid: Ask, hybrid: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the voting views and, in the baseline, of the spare ones behind them."""
    begun: list[Tensor] = []
    begin = HybridModel.begin

    def listen(self: HybridModel, batch: Any, puzzle_rows: Tensor, encoding: Any) -> Any:
        begun.append(puzzle_rows.clone())
        return begin(self, batch, puzzle_rows, encoding)

    monkeypatch.setattr(HybridModel, "begin", listen)
    step = hybrid.run_folder / "checkpoints/step_00000004"
    table = read(step).tensors("puzzle_table")["puzzle_table"]
    dataset = Dataset.open(hybrid.data_folder)
    evaluation = {"limit": 1, "variants": 2}
    quietly(ask_hybrid(evaluation=evaluation, **SILENT))
    first = int(dataset.first_variant[dataset.evaluated[0]]) + 1
    voting, spare = begun
    tests = len(dataset.tasks[dataset.evaluated[0]].test)
    assert torch.equal(voting, table[first : first + 2].repeat_interleave(tests, 0))
    assert torch.equal(spare, table[first + 2 : first + VIEWS].repeat_interleave(tests, 0))
    begun.clear()
    blank = quietly(ask_hybrid(evaluation=evaluation | {"puzzle_ids": "blank"}, **SILENT))
    assert len(begun) == 2
    for rows in begun:
        assert torch.equal(rows, table[:1].expand_as(rows))
    assert not torch.equal(table[0], table[first])
    assert blank.results["protocol"]["puzzle ids"].startswith("blank")


@pytest.mark.parametrize("source", ["none", "confidence", "vote", "demos"])
def test_the_curve_ends_in_the_score(ask_hybrid: Ask, source: str) -> None:
    outcome = quietly(ask_hybrid(feedback={"source": source}))
    assert [point["attempt"] for point in outcome.results["curve"]] == [1, 2, 3]
    for k in ("pass@1", "pass@2"):
        assert outcome.results["curve"][-1][k] == outcome.results["scores"][k]
    for test in all_tests(outcome):
        assert len(test["curve"]) == 3
        assert test["curve"][-1] == test["candidates"][:2]
    trying = [point["trying"] for point in outcome.results["curve"]]
    assert trying == sorted(trying, reverse=True) and trying[0] == 5


def test_a_row_that_has_stopped_votes_with_its_last_grid(ask_hybrid: Ask) -> None:
    outcome = quietly(ask_hybrid(evaluation={"variants": 1}))
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
    assert len(counts) > 1, "all rows stopped together"


def test_the_baseline_spends_as_many_attempts_where_there_are_views(ask_hybrid: Ask) -> None:
    """And votes as that many views with one attempt each do."""
    one = {"max_attempts": 1}
    for variants, wanted, there in ((1, 3, 3), (2, 6, 6), (3, 9, 6)):
        outcome = quietly(ask_hybrid(evaluation={"variants": variants}, **SILENT))
        alone = quietly(ask_hybrid(evaluation=one | {"variants": there}, **SILENT))
        for test, other in zip(all_tests(outcome), all_tests(alone), strict=True):
            found = test["baseline"]
            assert (found["views"], found["wanted"]) == (there, wanted)
            assert [c["grid"] for c in found["candidates"]] == [
                c["grid"] for c in other["candidates"][:2]
            ]
            assert "baseline" not in other
        said = outcome.results["baseline"]
        assert (said["views"], said["wanted"]) == (5 * there, 5 * wanted)
        assert said["pass@2"] == alone.results["scores"]["pass@2"]
        assert said["spent"] == {k: v for k, v in cost(alone).items() if k != "seconds"}
        assert "baseline" not in alone.results
    stopping = quietly(ask_hybrid(evaluation={"variants": 2}))
    for prediction in predictions(stopping.folder).values():
        used = prediction["spent"]["attempts"] // len(prediction["tests"])
        for test in prediction["tests"]:
            assert test["baseline"]["wanted"] == max(2, used)
    off = quietly(ask_hybrid(evaluation={"variants": 2, "baseline": False}))
    assert "baseline" not in off.results and off.folder != stopping.folder
    assert grids(off.folder) == grids(stopping.folder)


@pytest.mark.parametrize("source", ["none", "confidence", "demos"])
def test_what_was_spent_adds_up(
    ask_hybrid: Ask, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    thought: list[int] = []
    read_rows: list[int] = []
    attempt = HybridModel.attempt

    def count(self: HybridModel, rows: Any, **options: Any) -> Any:
        made = attempt(self, rows, **options)
        thought.append(len(rows.histories) * self.act_steps)
        read_rows.append(sum(made[2].llm_tokens))
        return made

    encode = Backbone.encode
    encoded: list[int] = []

    def weigh(self: Backbone, problems: Any) -> Any:
        encoded.append(sum(map(len, problems)))
        return encode(self, problems)

    monkeypatch.setattr(HybridModel, "attempt", count)
    monkeypatch.setattr(Backbone, "encode", weigh)
    evaluation = {"variants": 4, "baseline": False}
    outcome = quietly(ask_hybrid(evaluation=evaluation, feedback={"source": source}))
    spent = cost(outcome)
    assert spent["rows"] == 4 * (5 + (3 if source == "demos" else 0))
    assert spent["act_steps"] == 2 * spent["attempts"] == sum(thought)
    assert spent["llm_tokens"] == sum(encoded) + sum(read_rows)
    if source == "none":
        assert spent["attempts"] == 3 * spent["rows"]
    for name in ("rows", "attempts", "act_steps", "llm_tokens"):
        tasks = predictions(outcome.folder).values()
        assert spent[name] == sum(p["spent"][name] for p in tasks)


def test_how_rows_are_put_into_batches_changes_no_answer(ask_hybrid: Ask) -> None:
    for source in ("confidence", "demos"):
        whole = quietly(ask_hybrid(feedback={"source": source}))
        for size in (1, 5):
            parts = ask_hybrid(
                evaluation={"batch_size": size},
                feedback={"source": source},
                llama={"batch_size": 3},
            )
            assert rounded(quietly(parts)) == rounded(whole), (source, size)


def rounded(outcome: Outcome) -> Any:
    """Everything that was predicted, numbers to nine digits."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(v) for key, v in value.items()}
        if isinstance(value, list):
            return [plain(v) for v in value]
        return round(value, 9) if isinstance(value, float) else value

    return plain(predictions(outcome.folder))


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """saved(change): the tiny language model in a folder, its embeddings moved by `change`."""

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


def test_another_language_model_is_refused_and_the_same_one_elsewhere_is_not(
    ask_hybrid: Ask, saved: Callable[..., Path]
) -> None:
    here = quietly(ask_hybrid("here"))
    there = quietly(ask_hybrid("there", llama={"model": str(saved(0))}))
    assert rounded(there) == rounded(here)
    with pytest.raises(UserError, match=r"is not the model that .* was trained with \(tiny-random"):
        quietly(ask_hybrid("other", llama={"model": str(saved(0.5))}))


def test_a_model_that_was_trained_along_needs_one_of_its_shape_and_no_encodings(
    ask_hybrid: Ask, hybrid: Config, saved: Callable[..., Path], tmp_path: Path
) -> None:
    llama = replace(hybrid.llama, frozen=False, lr=1e-3)
    run = replace(hybrid.logging, run="tuned")
    tuned = joint(replace(hybrid, llama=llama, logging=run), CPU).checkpoint
    given = {"evaluation": {"checkpoint": str(tuned)}}
    own = quietly(ask_hybrid("own", **given))
    based_on_another = quietly(ask_hybrid("moved", llama={"model": str(saved(0.5))}, **given))
    assert rounded(based_on_another) == rounded(own), "its weights are in the checkpoint"
    with pytest.raises(UserError, match=r"is not the model that .* was trained with"):
        quietly(ask_hybrid("big", llama={"model": str(saved(0, layers=1))}, **given))
    with pytest.raises(UserError, match=r"llama\.prompt_cache of a model that is trained"):
        quietly(ask_hybrid("stale", llama={"prompt_cache": True}, **given))


def test_encodings_made_beforehand_answer_the_same(
    ask_hybrid: Ask, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of every view that was asked for."""
    paths = {"prompt_cache": str(tmp_path / "prompt_cache")}
    two = {"evaluation": {"variants": 2, "baseline": False}, "training": {"variants": 2}}
    now = quietly(ask_hybrid("now", **two))
    llama, cluster = {"prompt_cache": True}, {"num_workers": 0}
    config = ask_hybrid("before", llama=llama, paths=paths, cluster=cluster, **two)
    launch.cache_prompts(config)
    torch.set_num_threads(1)
    monkeypatch.setattr(Backbone, "_encode", None)  # called, it would raise
    assert rounded(quietly(config)) == rounded(now)


def test_other_runs_of_the_same_questions_stand_beside_it(ask_hybrid: Ask) -> None:
    first = quietly(ask_hybrid("first", **SILENT))
    oracle = quietly(ask_hybrid("cheat", feedback={"source": "oracle"}))
    outcome = quietly(ask_hybrid("second", evaluation={"compare_to": ["first", "cheat"]}))
    one, other = outcome.results["compare_to"]
    for found, its in ((one, first), (other, oracle)):
        assert found["scores"] == its.results["scores"] and found["title"] == its.results["title"]
        assert found["spent"] == its.results["spent"]
    assert (one["oracle"], other["oracle"]) == (False, True)
    quietly(ask_hybrid("fewer", evaluation={"limit": 1}))
    for name in ("nobody", "fewer"):
        config = ask_hybrid("third", evaluation={"compare_to": [name]})
        with pytest.raises(
            UserError, match=rf"evaluation\.compare_to: .*{name}/evaluation holds no"
        ):
            quietly(config)
        assert not config.run_folder.exists(), "found out after the work was done"
