"""The hybrid model: a language model reads, the TRM predicts, latents are passed both ways.

    soft     = to_text(z_H, z_L)                 [n, k, H], soft tokens for the language model
    hidden   = reader(prompt, soft, feedback)    [n, H], read after the cached prompt
    delta    = to_latent(hidden)                 [n, P+L, D] each for z_H, z_L and x
    z_H, z_L = act_steps ACT steps from (z_H, z_L) + delta, with x + delta["x"]
    grid     = argmax of the logits; its feedback enters the next attempt

Shapes: B initial batch, n active rows, P puzzle positions, L canvas cells, D TRM width, H LLM
width, k soft tokens.

Gradients flow from the logits through states, adapters and LLM activations, back through at most
`bptt` attempts; not through decoded grids, feedback text or generated tokens. If `to_latent`
returns zeros, the forward pass of n attempts equals n * `act_steps` ACT steps, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isqrt
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hybrid.adapters import AdapterConfig, LatentToTextAdapter, TextToLatentAdapter
from hybrid.arc import FIRST_COLOUR, PAD, Grid, halt_confidence, tokens_to_grid
from hybrid.solver.feedback import MAX_CELLS, AttemptResult, Feedback, FeedbackSource
from hybrid.trm import TRM, Batch, Outputs

if TYPE_CHECKING:
    from hybrid.llm.backbone import PromptCache
    from hybrid.llm.reader import Reader


@dataclass(frozen=True, kw_only=True)
class AttemptState:
    """State of n active rows between attempts; z_H and z_L are [n, P+L, D]."""

    row_indices: Tensor
    """[n], indices in the initial batch."""
    current: dict[str, Tensor]
    """The rows' batch: inputs, optionally others, [n, ...] each."""
    puzzle_rows: Tensor
    """[B, puzzle_emb_ndim], initial batch. Each attempt gathers its rows anew, because backward()
    frees the gather's graph."""
    prompt_cache: PromptCache | None
    """Cached prompts of the rows; None with adapter.inject=none."""
    z_H: Tensor
    z_L: Tensor
    histories: tuple[tuple[str, ...], ...]
    """Feedback lines of each row's latest attempts."""

    def detach(self) -> AttemptState:
        """Detach z_H, z_L and the prompt cache in a copy; puzzle embeddings stay attached."""
        cache = self.prompt_cache
        if cache:
            layers = tuple((keys.detach(), values.detach()) for keys, values in cache.layers)
            cache = replace(cache, layers=layers)
        return replace(self, z_H=self.z_H.detach(), z_L=self.z_L.detach(), prompt_cache=cache)

    def select(self, rows: Sequence[int]) -> AttemptState:
        """Return the state of `rows`, given as positions 0..n-1 in ascending order."""
        if len(rows) == len(self.histories):
            return self
        index = torch.tensor(rows, dtype=torch.long, device=self.z_H.device)
        return AttemptState(
            row_indices=self.row_indices[index],
            current={name: value[index] for name, value in self.current.items()},
            puzzle_rows=self.puzzle_rows,
            prompt_cache=self.prompt_cache.select(index) if self.prompt_cache else None,
            z_H=self.z_H[index],
            z_L=self.z_L[index],
            histories=tuple(self.histories[n] for n in rows),
        )


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Hidden state and text of the language model, and the deltas; tensors are detached."""

    hidden: Tensor | None
    """[n, H]; None with adapter.inject=none."""
    delta: Tensor | None
    """[n, S*(P+L), D]: outputs of `to_latent` concatenated over the S targets (z_H, z_L, x) of
    adapter.inject; None with adapter.inject=none."""
    reasoning: list[str]
    """Generated text of each row, possibly empty."""
    llm_tokens: list[int]
    """Tokens processed for each row, without the cached prompt."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One attempt at the n active rows."""

    number: int
    """1, 2, ..."""
    state: AttemptState
    """States after the attempt; rows and histories as before it."""
    outputs: Outputs
    """Outputs of the attempt's last ACT step."""
    reading: Reading
    results: list[AttemptResult]
    """One per active row; `result.row` indexes the initial batch."""
    feedbacks: list[Feedback]
    ended: Tensor
    """[n] bool, True for rows that make no further attempt."""
    cut: bool
    """True if the graph ends here: to train, call backward() before requesting the next attempt."""


class HybridModel(nn.Module):
    """TRM and adapters around a language model.

    A frozen language model is not a submodule; with llama.frozen=false its decoder is, as `llama`,
    and is trained.
    """

    def __init__(
        self, trm: TRM, reader: Reader | None, config: AdapterConfig, *, act_steps: int, seed: int
    ) -> None:
        super().__init__()
        self.trm = trm
        self.reader = reader
        self.act_steps = act_steps
        """ACT steps per attempt."""
        self.to_latent: TextToLatentAdapter | None = None
        self.to_text: LatentToTextAdapter | None = None
        if config.inject != "none":
            assert reader is not None, f"adapter.inject={config.inject} needs a reader"
            llm, D = reader.backbone, trm.config.hidden_size
            self.to_latent = TextToLatentAdapter(
                llm.hidden_size, trm.config.positions, D, config, seed
            )
            self.to_text = LatentToTextAdapter(
                D, llm.hidden_size, llm.embedding_scale, config, seed + 1
            )
            if not llm.config.frozen:
                self.llama = llm.model.model

    def train(self, mode: bool = True) -> HybridModel:
        """Set the mode; the language model stays in eval mode: dropout would break its caches."""
        super().train(mode)
        if self.reader:
            self.reader.backbone.model.eval()
        return self

    def initial_state(
        self, batch: Batch, puzzle_rows: Tensor, prompt_cache: PromptCache | None
    ) -> AttemptState:
        """Return the state before the first attempt; `puzzle_rows` is [B, puzzle_emb_ndim]."""
        count = len(batch["inputs"])
        z_H, z_L = self.trm.fresh_states(batch["inputs"])
        return AttemptState(
            row_indices=torch.arange(count, device=z_H.device),
            current=dict(batch),
            puzzle_rows=puzzle_rows,
            prompt_cache=prompt_cache if self.to_latent else None,
            z_H=z_H,
            z_L=z_L,
            histories=((),) * count,
        )

    def attempt(
        self, state: AttemptState, *, recompute: bool = True
    ) -> tuple[AttemptState, Outputs, Reading]:
        """Run one attempt: read, inject, recurse; return the new state, outputs and reading."""
        delta: Mapping[str, Tensor] = {}
        count = len(state.histories)
        hidden, reasoning, llm_tokens = None, [""] * count, [0] * count
        if self.to_latent is not None and self.to_text is not None:
            assert self.reader is not None and state.prompt_cache is not None
            soft_tokens = self.to_text(state.z_H, state.z_L)
            hidden, reasoning, llm_tokens = self.reader.read(
                state.prompt_cache, soft_tokens, state.histories, recompute
            )
            positions = self.trm.position_indices(state.z_H.shape[1])
            delta = {
                name: value.to(self.trm.dtype)
                for name, value in self.to_latent(hidden, positions).items()
            }
        z_H = state.z_H + delta["z_H"] if "z_H" in delta else state.z_H
        z_L = state.z_L + delta["z_L"] if "z_L" in delta else state.z_L
        puzzle_rows = state.puzzle_rows[state.row_indices]
        for _ in range(self.act_steps):
            z_H, z_L, outputs = self.trm.recurse(
                state.current,
                z_H,
                z_L,
                puzzle_rows=puzzle_rows,
                injected=delta.get("x"),
                full_gradient=True,
                recompute=recompute,
            )
        reading = Reading(
            hidden=None if hidden is None else hidden.detach(),
            delta=torch.cat([d.detach() for d in delta.values()], dim=1) if delta else None,
            reasoning=reasoning,
            llm_tokens=llm_tokens,
        )
        return replace(state, z_H=z_H, z_L=z_L), outputs, reading


def attempts(
    model: HybridModel,
    state: AttemptState,
    feedback_source: FeedbackSource,
    *,
    max_attempts: int,
    history: int,
    min_attempts: Sequence[int] | None = None,
    bptt: int | None = None,
    recompute: bool = True,
) -> Iterator[Attempt]:
    """Yield up to `max_attempts` attempts; stopped rows leave the batch.

    `min_attempts` [B]: attempts a row makes even if feedback stops it. `history`: latest feedback
    lines passed on per row, 0 for none. `bptt`: detach the states after every `bptt` attempts; None
    never. `cut` is True on attempts bptt, 2*bptt, ... and on the last: add up losses and call
    backward() when it is set, before requesting the next attempt. `recompute`: gradient
    checkpointing.
    """
    for number in range(1, max_attempts + 1):
        state, outputs, reading = model.attempt(state, recompute=recompute)
        results = read_predictions(state, outputs)
        feedbacks = feedback_source(number, results)
        active = [
            n
            for n, (result, feedback) in enumerate(zip(results, feedbacks, strict=True))
            if not feedback.stop or (min_attempts is not None and number < min_attempts[result.row])
        ]
        last = number == max_attempts or not active
        cut = last or (bptt is not None and number % bptt == 0)
        yield Attempt(
            number=number,
            state=state,
            outputs=outputs,
            reading=reading,
            results=results,
            feedbacks=feedbacks,
            ended=_ended(len(results), () if last else active, state.row_indices.device),
            cut=cut,
        )
        if last:
            return
        if cut:
            state = state.detach()
        histories = tuple(
            tuple(line for line in (*lines, feedback.text) if line)[-history:] if history else ()
            for lines, feedback in zip(state.histories, feedbacks, strict=True)
        )
        state = replace(state, histories=histories).select(active)


def read_predictions(state: AttemptState, outputs: Outputs) -> list[AttemptResult]:
    """Return each row's tokens, grid, confidence and least confident cells.

    confidence: sigmoid of the halt logit; least_confident: cells of the grid with the smallest
    top-1 minus top-2 logit.
    """
    with torch.no_grad():
        top = outputs.logits.topk(2, dim=-1)
        tokens = top.indices[..., 0].to(torch.uint8).cpu().numpy()
        margins = (top.values[..., 0] - top.values[..., 1]).float().cpu().numpy()
        inputs = state.current["inputs"].to(torch.uint8).cpu().numpy()
        confidences = halt_confidence(outputs.q_halt.float().cpu().numpy())
    return [
        _attempt_result(row, tokens[n], margins[n], inputs[n], float(confidences[n]))
        for n, row in enumerate(state.row_indices.tolist())
    ]


def extract_grid(
    tokens: npt.NDArray[np.uint8], inputs: npt.NDArray[np.uint8]
) -> tuple[Grid, tuple[int, int]]:
    """Return the grid decoded from `tokens` [L], and (row, column) of its top-left cell.

    The cell is taken from `inputs` [L]: both are translated equally.
    """
    side = isqrt(len(tokens))
    top, left = divmod(int((inputs >= FIRST_COLOUR).argmax()), side)
    moved = np.full((side, side), PAD, np.uint8)
    moved[: side - top, : side - left] = tokens.reshape(side, side)[top:, left:]
    return tokens_to_grid(moved.ravel()), (top, left)


def _attempt_result(
    row: int,
    tokens: npt.NDArray[np.uint8],
    margins: npt.NDArray[np.float32],
    inputs: npt.NDArray[np.uint8],
    confidence: float,
) -> AttemptResult:
    grid, (top, left) = extract_grid(tokens, inputs)
    side = isqrt(len(tokens))
    height, width = grid.shape
    inside = margins.reshape(side, side)[top : top + height, left : left + width]
    order = np.argsort(inside, axis=None, kind="stable")[:MAX_CELLS]
    cells = [divmod(int(n), width) for n in order]
    return AttemptResult(
        row=row,
        tokens=tokens,
        grid=grid,
        confidence=confidence,
        least_confident=tuple((r, c, int(grid[r, c])) for r, c in cells),
    )


def _ended(count: int, active: Sequence[int], device: torch.device) -> Tensor:
    ended = torch.ones(count, dtype=torch.bool)
    ended[list(active)] = False
    return ended.to(device)
