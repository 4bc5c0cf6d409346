"""What the language model is told of a puzzle, and what an attempt takes from it."""

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
    """All 400 training tasks of ARC-AGI-1, answers in them."""
    tasks = list(load_tasks("arc1-training"))
    assert len(tasks) == 400
    return tasks


def encoded(reader: Reader, tasks: list[Task]) -> tuple[Any, Tensor]:
    """Their encoding, and a latent for each."""
    backbone = reader.backbone
    latent = torch.randn(
        len(tasks), 2, backbone.hidden_size, generator=torch.Generator().manual_seed(5)
    )
    latent = (latent * backbone.embedding_scale).to(backbone.dtype)
    return reader.prefill([reader.prompt(task) for task in tasks]), latent.requires_grad_()


# The prompt


def test_every_demonstration_and_the_test_input_is_in_it_in_order(training: list[Task]) -> None:
    for task in training:
        for test, asked in enumerate(task.test):
            text = format_problem_text(task, test)
            at = 0
            for pair in task.train:
                assert pair.output is not None
                for name, grid in (("Input", pair.input), ("Output", pair.output)):
                    wanted = f"\n{name}:\n{grid_to_string(grid)}\n"
                    at = text.index(wanted, at) + len(wanted) - 1
            assert text[at:].endswith(f"Test\nInput:\n{grid_to_string(asked.input)}\n"), task.id
            assert text.count("Output:\n") == len(task.train), task.id


def test_no_answer_changes_it(training: list[Task]) -> None:
    """Neither its presence nor what it is: another answer and none give the same tokens."""
    for task in training:
        poisoned, blind = poison(task), task.without_answers()
        for test in range(len(task.test)):
            text = format_problem_text(task, test)
            assert text == format_problem_text(blind, test) == format_problem_text(poisoned, test)


def test_a_unique_answer_is_not_in_it(arc1: dict[str, Task], tiny: Tiny) -> None:
    """Of the test that is asked and of the others."""
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
def test_text_with_history_continues_text_without(
    arc1: dict[str, Task], history: tuple[str, ...]
) -> None:
    task = arc1["0d3d703e"]
    before = format_problem_text(task)
    after = format_problem_text(task, history=history)
    assert after == before + "".join(f"{line}\n" for line in history)


def test_the_chat_template_stands_around_it_where_there_is_one(
    tiny: Tiny, arc1: dict[str, Task]
) -> None:
    backbone = tiny()
    backbone.tokenizer.chat_template = TEMPLATE
    backbone = Backbone(backbone.model, backbone.tokenizer, backbone.config, "none")
    assert (backbone.head, backbone.tail) == ("<s>[user]", "[end][assistant]")
    tokens = Reader(backbone).prompt(arc1["25ff71a9"]).tokens
    assert tokens[0] == backbone.tokenizer.bos_token_id and tokens.count(tokens[0]) == 1
    assert backbone.tokenizer.decode(tokens).startswith(f"<s>[user]{INSTRUCTION}")


def test_without_a_template_it_begins_with_the_bos_token(tiny: Tiny, arc1: dict[str, Task]) -> None:
    backbone = tiny()
    assert (backbone.head, backbone.tail) == ("<s>", "")
    tokens = Reader(backbone).prompt(arc1["25ff71a9"]).tokens
    assert tokens[0] == backbone.tokenizer.bos_token_id and tokens.count(tokens[0]) == 1
    backbone.tokenizer.bos_token = None
    assert Backbone(backbone.model, backbone.tokenizer, backbone.config, "none").head == ""


def test_smollm2_is_asked_in_its_own_turns(smollm2: Backbone, arc1: dict[str, Task]) -> None:
    task = arc1["25ff71a9"]
    found = smollm2.tokenizer.decode(Reader(smollm2).prompt(task).tokens)
    turn = [{"role": "user", "content": format_problem_text(task)}]
    wanted = smollm2.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert found + smollm2.tail == wanted


def test_too_long_a_prompt_loses_whole_demonstrations_the_last_first(
    tiny: Tiny, arc1: dict[str, Task]
) -> None:
    """One token less than n demonstrations take is the prompt with n - 1."""
    task = arc1["0d3d703e"]
    whole = Reader(tiny(max_prompt_tokens=8192)).prompt(task)
    assert whole.shown == whole.demonstrations == len(task.train) == 4
    most, shown = len(whole.tokens), 4
    while shown:
        reader = Reader(tiny(max_prompt_tokens=most))
        prompt = reader.prompt(task)
        assert (prompt.shown, prompt.demonstrations, len(prompt.tokens)) == (shown, 4, most)
        text = "<s>" + format_problem_text(replace(task, train=task.train[:shown]))
        assert prompt.tokens == tuple(reader.backbone.tokens(text))
        smaller = Reader(tiny(max_prompt_tokens=most - 1)).prompt(task)
        most, shown = len(smaller.tokens), shown - 1
        assert smaller.shown == shown
    with pytest.raises(UserError, match=r"^llama\.max_prompt_tokens: .*0d3d703e") as caught:
        Reader(tiny(max_prompt_tokens=most - 1)).prompt(task)
    assert str(most) in str(caught.value) and "\n" not in str(caught.value)


# An attempt


def test_without_reasoning_an_attempt_is_history_end_of_turn_and_cue(
    tiny: Tiny, arc1: dict[str, Task], one_forward: Any
) -> None:
    backbone = tiny()
    backbone.tokenizer.chat_template = TEMPLATE
    reader = Reader(Backbone(backbone.model, backbone.tokenizer, backbone.config, "none"))
    tasks = [arc1[name] for name in ("25ff71a9", "44f52bb0", "d037b0a7")]
    encoding, latent = encoded(reader, tasks)
    hidden, said, spent = reader.read(encoding, latent, HISTORIES, True)
    texts = ["".join(f"{line}\n" for line in lines) for lines in HISTORIES]
    tokens = [backbone.tokens(text + "[end][assistant]" + CUE) for text in texts]
    for row, task in enumerate(tasks):
        alone = one_forward(backbone, reader.prompt(task).tokens, latent[row], tokens[row])
        torch.testing.assert_close(hidden[row], alone[-1], rtol=0, atol=1e-10)
    assert said == ["", "", ""]
    assert spent == [len(row) + latent.shape[1] for row in tokens]


def test_reasoning_is_what_was_written_and_is_read_with_gradient(
    tiny: Tiny, arc1: dict[str, Task], one_forward: Any
) -> None:
    backbone = tiny(max_new_tokens=5)
    reader = Reader(backbone)
    tasks = [arc1[name] for name in ("25ff71a9", "44f52bb0", "d037b0a7")]
    encoding, latent = encoded(reader, tasks)
    before = [
        backbone.tokens("".join(f"{line}\n" for line in lines) + REASONING_CUE)
        for lines in HISTORIES
    ]
    written = backbone.generate(encoding, latent, before, 5)
    hidden, said, _ = reader.read(encoding, latent, HISTORIES, True)
    assert said == [backbone.text(tokens) for tokens in written] and any(said)
    wholes = []
    for row, task in enumerate(tasks):
        whole = [*before[row], *written[row], *backbone.tokens("\n" + CUE)]
        wholes.append(one_forward(backbone, reader.prompt(task).tokens, latent[row], whole)[-1])
    wanted = torch.stack(wholes)
    torch.testing.assert_close(hidden, wanted, rtol=0, atol=1e-10)
    weights = torch.arange(hidden.numel(), dtype=hidden.dtype).view_as(hidden).sin()
    one, other = (torch.autograd.grad((h * weights).sum(), latent)[0] for h in (hidden, wanted))
    assert (one.abs().amax((1, 2)) > 1e-4).all()
    torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("prefix", ["attempt", "problem"])
@pytest.mark.parametrize("most", [0, 5])
def test_tokens_spent_are_those_the_model_was_given(
    tiny: Tiny, arc1: dict[str, Task], monkeypatch: pytest.MonkeyPatch, prefix: str, most: int
) -> None:
    """Per row what went through the decoder, padding not counted."""
    tasks = [arc1[name] for name in ("25ff71a9", "44f52bb0", "d037b0a7")]
    reader = Reader(tiny(max_new_tokens=most, prefix=prefix))
    given = torch.zeros(len(tasks), dtype=torch.long)
    decoder = reader.backbone.model.model
    forward = decoder.forward

    def counted(ids: Any, mask: Tensor, positions: Tensor, *rest: Any) -> Any:
        given.add_(mask[:, -positions.shape[1] :].sum(1))
        return forward(ids, mask, positions, *rest)

    monkeypatch.setattr(decoder, "forward", counted)
    encoding, latent = encoded(reader, tasks)
    assert reader.caching_costs([reader.prompt(task) for task in tasks]) == given.tolist()
    given.zero_()
    _, _, spent = reader.read(encoding, latent.detach(), HISTORIES, False)
    assert spent == given.tolist()


def test_smollm2_reasons_within_its_tokens(smollm2: Backbone, arc1: dict[str, Task]) -> None:
    """And an attempt that reasons still has a gradient into its latent."""
    config = replace(smollm2.config, max_new_tokens=6)
    reader = Reader(Backbone(smollm2.model, smollm2.tokenizer, config, "none"))
    encoding, latent = encoded(reader, [arc1["25ff71a9"]])
    hidden, [said], _ = reader.read(encoding, latent, [["Attempt 1: not sure."]], True)
    assert said and len(smollm2.tokens(said)) <= 6
    [slope] = torch.autograd.grad(hidden.sum(), latent)
    assert torch.isfinite(slope).all() and slope.norm() > 0
