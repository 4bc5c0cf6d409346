"""A puzzle as text: every demonstration and the test input, never a test output."""

from __future__ import annotations

from collections.abc import Sequence

from hybrid.arc import Task, grid_to_string

INSTRUCTION = (
    "One rule turns each input grid into its output grid. Cells are colours 0 to 9."
    " Apply the rule to the test input.\n\n"
)
CUE = "Output:\n"
"""Ends an attempt: the next token would be the first cell of the answer."""
REASONING_CUE = "The rule:"
"""Begins the reasoning text, where one is asked for."""


def format_problem_text(
    task: Task, test: int = 0, *, history: Sequence[str] = (), shown: int | None = None
) -> str:
    """The problem: demonstrations (the first `shown`, or all), the test input, then `history`.

    `history`: what was said of the attempts so far, one line each. It stands at the end, so the
    text of an attempt continues the text of the problem. Test outputs are not looked at.
    """
    parts = [INSTRUCTION]
    for number, pair in enumerate(task.train[:shown], 1):
        assert pair.output is not None, f"{task.id}: a demonstration without output"
        parts.append(
            f"Example {number}\nInput:\n{grid_to_string(pair.input)}\n"
            f"Output:\n{grid_to_string(pair.output)}\n\n"
        )
    parts.append(f"Test\nInput:\n{grid_to_string(task.test[test].input)}\n")
    parts += [f"{line}\n" for line in history]
    return "".join(parts)
