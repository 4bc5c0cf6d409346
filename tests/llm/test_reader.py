"""Prompts of puzzles, and the reading of attempts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import poison
from torch import Tensor

from hybrid.arc import Task, grid_to_string, load_tasks
from hybrid.errors import UserError
from hybrid.llm.backbone import Backbone
from hybrid.llm.prompt import CUE, INSTRUCTION, REASONING_CUE, format_problem_text
from hybrid.llm.reader import Reader

Tiny = Callable[..., Backbone]
TEMPLATE = "{{ bos_token }}[user]{{ messages[0]['content'] | trim }}[end]{{ '[assistant]' }}"
HISTORIES = ((), ("Attempt 1: not sure.",), ("Attempt 1: wrong.", "Attempt 2: not sure."))


@pytest.fixture(scope="module")
def training() -> list[Task]:
    """All 400 training tasks of ARC-AGI-1, with answers."""
    tasks = list(load_tasks("arc1-training"))
    assert len(tasks) == 400
    return tasks


def prefilled(reader: Reader, tasks: list[Task]) -> tuple[Any, Tensor]:
    """Return the prompt cache of the tasks and a latent for each."""
    backbone = reader.backbone
    latent = torch.randn(
        len(tasks), 2, backbone.hidden_size, generator=torch.Generator().manual_seed(5)
    )
    latent = (latent * backbone.embedding_scale).to(backbone.dtype)
    return reader.prefill([reader.prompt(task) for task in tasks]), latent.requires_grad_()


# The prompt


def test_prompt_contains_every_demonstration_and_the_test_input_in_order(
    training: list[Task],
) -> None:
    for task in training:
        for test, pair in enumerate(task.test):
            text = format_problem_text(task, test)
            at = 0
            for shown in task.train:
                assert shown.output is not None
                for name, grid in (("Input", shown.input), ("Output", shown.output)):
                    expected = f"\n{name}:\n{grid_to_string(grid)}\n"
                    at = text.index(expected, at) + len(expected) - 1
            assert text[at:].endswith(f"Test\nInput:\n{grid_to_string(pair.input)}\n"), task.id
            assert text.count("Output:\n") == len(task.train), task.id


def test_answers_do_not_change_the_prompt(training: list[Task]) -> None:
    """Another answer and no answer give the same text."""
    for task in training:
        poisoned, blind = poison(task), task.without_answers()
        for test in range(len(task.test)):
            text = format_problem_text(task, test)
            assert text == format_problem_text(blind, test) == format_problem_text(poisoned, test)


def test_prompt_does_not_contain_the_answers(arc1: dict[str, Task], tiny: Tiny) -> None:
    """Neither the answer of the given test nor those of the other tests."""
    backbone = tiny()
    reader = Reader(backbone)
    task = arc1["25ff71a9"]
    rng = np.random.default_rng(0)
    answers = [rng.integers(0, 10, (4, 5), dtype=np.uint8) for _ in task.test]
    pairs = [replace(pair, output=answer) for pair, answer in zip(task.test, answers, strict=True)]
    task = replace(task, test=tuple(pairs))
    for test in range(len(answers)):
        text = backbone.text(reader.prompt(task, test).tokens)
        squeezed = "".join(text.split())
        assert "".join(grid_to_string(task.test[test].input).split()) in squeezed
        for answer in answers:
            for row in answer.tolist():
                assert "".join(map(str, row)) not in squeezed


@pytest.mark.parametrize("history", HISTORIES)
def test_history_is_appended_to_the_problem_text(
    arc1: dict[str, Task], history: tuple[str, ...]
) -> None:
    task = arc1["0d3d703e"]
    before = format_problem_text(task)
    after = format_problem_text(task, history=history)
    assert after == before + "".join(f"{line}\n" for line in history)


def test_prompt_is_wrapped_in_the_chat_template(tiny: Tiny, arc1: dict[str, Task]) -> None:
    backbone = tiny()
    backbone.tokenizer.chat_template = TEMPLATE
    backbone = Backbone(backbone.model, backbone.tokenizer, backbone.config, "none")
    assert (backbone.head, backbone.tail) == ("<s>[user]", "[end][assistant]")
    tokens = Reader(backbone).prompt(arc1["25ff71a9"]).tokens
    assert tokens[0] == backbone.tokenizer.bos_token_id and tokens.count(tokens[0]) == 1
    assert backbone.tokenizer.decode(tokens).startswith(f"<s>[user]{INSTRUCTION}")


def test_prompt_without_a_template_begins_with_the_bos_token(
    tiny: Tiny, arc1: dict[str, Task]
) -> None:
    backbone = tiny()
    assert (backbone.head, backbone.tail) == ("<s>", "")
    tokens = Reader(backbone).prompt(arc1["25ff71a9"]).tokens
    assert tokens[0] == backbone.tokenizer.bos_token_id and tokens.count(tokens[0]) == 1
    backbone.tokenizer.bos_token = None
    assert Backbone(backbone.model, backbone.tokenizer, backbone.config, "none").head == ""


def test_smollm2_prompt_uses_its_chat_template(smollm2: Backbone, arc1: dict[str, Task]) -> None:
    task = arc1["25ff71a9"]
    actual = smollm2.tokenizer.decode(Reader(smollm2).prompt(task).tokens)
    turn = [{"role": "user", "content": format_problem_text(task)}]
    expected = smollm2.tokenizer.apply_chat_template(
        turn, tokenize=False, add_generation_prompt=True
    )
    assert actual + smollm2.tail == expected


def test_long_prompt_drops_whole_demonstrations_last_first(
    tiny: Tiny, arc1: dict[str, Task]
) -> None:
    """One token less than n demonstrations need gives the prompt with n - 1."""
    task = arc1["0d3d703e"]
    full = Reader(tiny(max_prompt_tokens=8192)).prompt(task)
    assert full.shown == full.demonstrations == len(task.train) == 4
    budget, shown = len(full.tokens), 4
    while shown:
        reader = Reader(tiny(max_prompt_tokens=budget))
        prompt = reader.prompt(task)
        assert (prompt.shown, prompt.demonstrations, len(prompt.tokens)) == (shown, 4, budget)
        text = "<s>" + format_problem_text(replace(task, train=task.train[:shown]))
        assert prompt.tokens == tuple(reader.backbone.tokens(text))
        smaller = Reader(tiny(max_prompt_tokens=budget - 1)).prompt(task)
        budget, shown = len(smaller.tokens), shown - 1
        assert smaller.shown == shown
    with pytest.raises(UserError, match=r"^llama\.max_prompt_tokens: .*0d3d703e") as caught:
        Reader(tiny(max_prompt_tokens=budget - 1)).prompt(task)
    assert str(budget) in str(caught.value) and "\n" not in str(caught.value)


# An attempt


def test_attempt_without_reasoning_is_history_end_of_turn_and_cue(
    tiny: Tiny, arc1: dict[str, Task], one_forward: Any
) -> None:
    backbone = tiny()
    backbone.tokenizer.chat_template = TEMPLATE
    reader = Reader(Backbone(backbone.model, backbone.tokenizer, backbone.config, "none"))
    tasks = [arc1[name] for name in ("25ff71a9", "44f52bb0", "d037b0a7")]
    prompts, latent = prefilled(reader, tasks)
    hidden, reasoning, counts = reader.read(prompts, latent, HISTORIES, True)
    texts = ["".join(f"{line}\n" for line in lines) for lines in HISTORIES]
    tokens = [backbone.tokens(text + "[end][assistant]" + CUE) for text in texts]
    for row, task in enumerate(tasks):
        alone = one_forward(backbone, reader.prompt(task).tokens, latent[row], tokens[row])
        torch.testing.assert_close(hidden[row], alone[-1], rtol=0, atol=1e-10)
    assert reasoning == ["", "", ""]
    assert counts == [len(row) + latent.shape[1] for row in tokens]


def test_reasoning_is_generated_text_and_is_read_with_gradient(
    tiny: Tiny, arc1: dict[str, Task], one_forward: Any
) -> None:
    backbone = tiny(max_new_tokens=5)
    reader = Reader(backbone)
    tasks = [arc1[name] for name in ("25ff71a9", "44f52bb0", "d037b0a7")]
    prompts, latent = prefilled(reader, tasks)
    before = [
        backbone.tokens("".join(f"{line}\n" for line in lines) + REASONING_CUE)
        for lines in HISTORIES
    ]
    generated = backbone.generate(prompts, latent, before, 5)
    hidden, reasoning, _ = reader.read(prompts, latent, HISTORIES, True)
    assert reasoning == [backbone.text(tokens) for tokens in generated] and any(reasoning)
    states = []
    for row, task in enumerate(tasks):
        text = [*before[row], *generated[row], *backbone.tokens("\n" + CUE)]
        states.append(one_forward(backbone, reader.prompt(task).tokens, latent[row], text)[-1])
    expected = torch.stack(states)
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-10)
    weights = torch.arange(hidden.numel(), dtype=hidden.dtype).view_as(hidden).sin()
    one, other = (torch.autograd.grad((h * weights).sum(), latent)[0] for h in (hidden, expected))
    assert (one.abs().amax((1, 2)) > 1e-4).all()
    torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("prefix", ["attempt", "problem"])
@pytest.mark.parametrize("limit", [0, 5])
def test_token_counts_are_those_the_decoder_processed(
    tiny: Tiny, arc1: dict[str, Task], monkeypatch: pytest.MonkeyPatch, prefix: str, limit: int
) -> None:
    """Counts are per row and exclude padding."""
    tasks = [arc1[name] for name in ("25ff71a9", "44f52bb0", "d037b0a7")]
    reader = Reader(tiny(max_new_tokens=limit, prefix=prefix))
    processed = torch.zeros(len(tasks), dtype=torch.long)
    decoder = reader.backbone.model.model
    forward = decoder.forward

    def count(ids: Any, mask: Tensor, positions: Tensor, *rest: Any) -> Any:
        processed.add_(mask[:, -positions.shape[1] :].sum(1))
        return forward(ids, mask, positions, *rest)

    monkeypatch.setattr(decoder, "forward", count)
    prompts, latent = prefilled(reader, tasks)
    assert reader.caching_costs([reader.prompt(task) for task in tasks]) == processed.tolist()
    processed.zero_()
    _, _, counts = reader.read(prompts, latent.detach(), HISTORIES, False)
    assert counts == processed.tolist()


def test_smollm2_reasoning_respects_the_token_limit(
    smollm2: Backbone, arc1: dict[str, Task]
) -> None:
    """An attempt with reasoning still has a gradient to its latent."""
    config = replace(smollm2.config, max_new_tokens=6)
    reader = Reader(Backbone(smollm2.model, smollm2.tokenizer, config, "none"))
    prompts, latent = prefilled(reader, [arc1["25ff71a9"]])
    hidden, [reasoning], _ = reader.read(prompts, latent, [["Attempt 1: not sure."]], True)
    assert reasoning and len(smollm2.tokens(reasoning)) <= 6
    [grad] = torch.autograd.grad(hidden.sum(), latent)
    assert torch.isfinite(grad).all() and grad.norm() > 0
