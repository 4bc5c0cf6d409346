"""Text of a puzzle: all demonstrations and the test input, never a test output."""

from __future__ import annotations

from collections.abc import Sequence

from hybrid.arc import Task, grid_to_string

INSTRUCTION = (
    "One rule turns each input grid into its output grid. Cells are colours 0 to 9."
    " Apply the rule to the test input.\n\n"
)
CUE = "Output:\n"
"""End of an attempt's text; the next token would be the first cell of the answer."""
REASONING_CUE = "The rule:"
"""Start of the reasoning text, used with llama.max_new_tokens > 0."""


def format_problem_text(
    task: Task, test: int = 0, *, history: Sequence[str] = (), shown: int | None = None
) -> str:
    """Return the demonstrations (all, or the first `shown`), the test input, then `history`.

    `history` holds one feedback line per earlier attempt. It comes last, so that an attempt's text
    continues the prompt. Test outputs are never read.
    """
    parts = [INSTRUCTION]
    for number, pair in enumerate(task.train[:shown], 1):
        assert pair.output is not None, f"{task.id}: demonstration without output"
        parts.append(
            f"Example {number}\nInput:\n{grid_to_string(pair.input)}\n"
            f"Output:\n{grid_to_string(pair.output)}\n\n"
        )
    parts.append(f"Test\nInput:\n{grid_to_string(task.test[test].input)}\n")
    parts += [f"{line}\n" for line in history]
    return "".join(parts)
