"""The hybrid: a language model reads, the TRM draws, latents go both ways.

    latent   = to_text(z_H, z_L)                     what the TRM has, for the language model
    hidden   = reader(problem, latent, feedback)     read behind the encoded problem
    delta    = to_latent(hidden)                     what the TRM is told
    z_H, z_L = TRM ACT steps from (z_H, z_L) + delta
    grid     = read-out; its feedback goes into the next attempt

Nothing on this way is detached. The carry goes on from attempt to attempt, so with adapters that
say nothing n attempts are n times `act_steps` ACT steps of the TRM, bit for bit.
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
from hybrid.solver.feedback import MOST_CELLS, AttemptResult, Feedback, FeedbackSource
from hybrid.trm import TRM, Batch, Outputs

if TYPE_CHECKING:
    from hybrid.llm.backbone import PromptCache
    from hybrid.llm.reader import Reader


@dataclass(frozen=True, kw_only=True)
class AttemptState:
    """Rows in the middle of their attempts, [n, ...] each."""

    numbers: Tensor
    """Their numbers in the batch that the loop began with."""
    current: dict[str, Tensor]
    """inputs, and whatever else the batch has."""
    puzzle_rows: Tensor
    """Of *all* rows that the loop began with: picked anew by every attempt, because what is picked
    once is freed by the backward of its window."""
    encoding: PromptCache | None
    """The problems; None where nobody reads."""
    z_H: Tensor
    z_L: Tensor
    histories: tuple[tuple[str, ...], ...]
    """Lines said of the attempts so far."""

    def detach(self) -> AttemptState:
        """Without the graph that made them; of a language model in training also the problems'."""
        encoding = self.encoding
        if encoding:
            layers = tuple((keys.detach(), values.detach()) for keys, values in encoding.layers)
            encoding = replace(encoding, layers=layers)
        return replace(self, z_H=self.z_H.detach(), z_L=self.z_L.detach(), encoding=encoding)

    def take(self, kept: Sequence[int]) -> AttemptState:
        """Some of them."""
        if len(kept) == len(self.histories):
            return self
        index = torch.tensor(kept, dtype=torch.long, device=self.z_H.device)
        return AttemptState(
            numbers=self.numbers[index],
            current={name: value[index] for name, value in self.current.items()},
            puzzle_rows=self.puzzle_rows,
            encoding=self.encoding.take(index) if self.encoding else None,
            z_H=self.z_H[index],
            z_L=self.z_L[index],
            histories=tuple(self.histories[n] for n in kept),
        )


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What the language model made of the rows of an attempt; detached."""

    hidden: Tensor | None
    """[n, H]; None where nobody reads."""
    latent: Tensor | None
    """[n, ...]: all that it told the TRM."""
    reasoning: list[str]
    """Text that it wrote, "" where it wrote none."""
    llm_tokens: list[int]
    """Tokens that each row took, without what its problem took beforehand."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """What one attempt made of the rows that were still going."""

    number: int
    """1, 2, ..."""
    rows: AttemptState
    """As the attempt left them."""
    outputs: Outputs
    reading: Reading
    seen: list[AttemptResult]
    feedbacks: list[Feedback]
    ended: Tensor
    """[n] bool: the rows that make no attempt after this one."""
    cut: bool
    """The graph ends here: whoever wants gradients calls backward before going on."""


class HybridModel(nn.Module):
    """TRM and adapters, which are trained, around a reader, which is not part of the module."""

    def __init__(
        self, trm: TRM, reader: Reader | None, config: AdapterConfig, *, act_steps: int, seed: int
    ) -> None:
        super().__init__()
        self.trm = trm
        self.reader = reader
        self.act_steps = act_steps
        """ACT steps of an attempt."""
        self.to_latent: TextToLatentAdapter | None = None
        self.to_text: LatentToTextAdapter | None = None
        if config.inject != "none":
            assert reader is not None, "somebody must read"
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
        """The language model stays as it is for inference: dropout would break its caches."""
        super().train(mode)
        if self.reader:
            self.reader.backbone.model.eval()
        return self

    def begin(
        self, batch: Batch, puzzle_rows: Tensor, encoding: PromptCache | None
    ) -> AttemptState:
        """Rows before their first attempt. `encoding` of the same rows, None without a reader."""
        count = len(batch["inputs"])
        z_H, z_L = self.trm.fresh_states(batch["inputs"])
        return AttemptState(
            numbers=torch.arange(count, device=z_H.device),
            current=dict(batch),
            puzzle_rows=puzzle_rows,
            encoding=encoding if self.to_latent else None,
            z_H=z_H,
            z_L=z_L,
            histories=((),) * count,
        )

    def attempt(
        self, rows: AttemptState, *, recompute: bool = True
    ) -> tuple[AttemptState, Outputs, Reading]:
        """One attempt: read, inject, think."""
        delta: Mapping[str, Tensor] = {}
        count = len(rows.histories)
        hidden, reasoning, llm_tokens = None, [""] * count, [0] * count
        if self.to_latent is not None and self.to_text is not None:
            assert self.reader is not None and rows.encoding is not None
            latent = self.to_text(rows.z_H, rows.z_L)
            positions = rows.z_H.shape[1]
            hidden, reasoning, llm_tokens = self.reader.read(
                rows.encoding, latent, rows.histories, recompute
            )
            delta = {
                state: value.to(self.trm.dtype)
                for state, value in self.to_latent(hidden, self.trm.places(positions)).items()
            }
        z_H = rows.z_H + delta["z_H"] if "z_H" in delta else rows.z_H
        z_L = rows.z_L + delta["z_L"] if "z_L" in delta else rows.z_L
        puzzle_rows = rows.puzzle_rows[rows.numbers]
        for _ in range(self.act_steps):
            z_H, z_L, outputs = self.trm.recurse(
                rows.current,
                z_H,
                z_L,
                puzzle_rows=puzzle_rows,
                injected=delta.get("x"),
                full_gradient=True,
                recompute=recompute,
            )
        reading = Reading(
            hidden=None if hidden is None else hidden.detach(),
            latent=torch.cat([d.detach() for d in delta.values()], dim=1) if delta else None,
            reasoning=reasoning,
            llm_tokens=llm_tokens,
        )
        return replace(rows, z_H=z_H, z_L=z_L), outputs, reading


def attempts(
    solver: HybridModel,
    rows: AttemptState,
    judge: FeedbackSource,
    *,
    most: int,
    history: int,
    least: Sequence[int] | None = None,
    bptt: int | None = None,
    recompute: bool = True,
) -> Iterator[Attempt]:
    """Up to `most` attempts; rows that stop leave the batch and cost nothing more.

    `least`: per row the attempts it makes at least, whatever the judge says. After every `bptt`
    attempts the states are detached; the attempt before that has `cut` set, as has the last one.
    """
    for number in range(1, most + 1):
        rows, outputs, reading = solver.attempt(rows, recompute=recompute)
        seen = read_predictions(rows, outputs)
        feedbacks = judge(number, seen)
        going = [
            n
            for n, (one, feedback) in enumerate(zip(seen, feedbacks, strict=True))
            if not feedback.stop or (least is not None and number < least[one.row])
        ]
        last = number == most or not going
        cut = last or (bptt is not None and number % bptt == 0)
        yield Attempt(
            number=number,
            rows=rows,
            outputs=outputs,
            reading=reading,
            seen=seen,
            feedbacks=feedbacks,
            ended=_ended(len(seen), () if last else going, rows.numbers.device),
            cut=cut,
        )
        if last:
            return
        if cut:
            rows = rows.detach()
        said = [
            tuple(line for line in (*lines, feedback.text) if line)[-history:] if history else ()
            for lines, feedback in zip(rows.histories, feedbacks, strict=True)
        ]
        rows = replace(rows, histories=tuple(said)).take(going)


def read_predictions(rows: AttemptState, outputs: Outputs) -> list[AttemptResult]:
    """Tokens, grids, confidences and least sure cells."""
    with torch.no_grad():
        top = outputs.logits.topk(2, dim=-1)
        tokens = top.indices[..., 0].to(torch.uint8).cpu().numpy()
        margins = (top.values[..., 0] - top.values[..., 1]).float().cpu().numpy()
        inputs = rows.current["inputs"].to(torch.uint8).cpu().numpy()
        sure = halt_confidence(outputs.q_halt.float().cpu().numpy())
    return [
        _seen(number, tokens[n], margins[n], inputs[n], float(sure[n]))
        for n, number in enumerate(rows.numbers.tolist())
    ]


def read_out(
    tokens: npt.NDArray[np.uint8], inputs: npt.NDArray[np.uint8]
) -> tuple[Grid, tuple[int, int]]:
    """The grid in `tokens` [L], and where its input, and so it, has its top-left cell."""
    side = isqrt(len(tokens))
    top, left = divmod(int((inputs >= FIRST_COLOUR).argmax()), side)
    moved = np.full((side, side), PAD, np.uint8)
    moved[: side - top, : side - left] = tokens.reshape(side, side)[top:, left:]
    return tokens_to_grid(moved.ravel()), (top, left)


def _seen(
    number: int,
    tokens: npt.NDArray[np.uint8],
    margins: npt.NDArray[np.float32],
    inputs: npt.NDArray[np.uint8],
    confidence: float,
) -> AttemptResult:
    grid, (top, left) = read_out(tokens, inputs)
    side = isqrt(len(tokens))
    height, width = grid.shape
    inside = margins.reshape(side, side)[top : top + height, left : left + width]
    order = np.argsort(inside, axis=None, kind="stable")[:MOST_CELLS]
    places = [divmod(int(n), width) for n in order]
    return AttemptResult(
        row=number,
        tokens=tokens,
        grid=grid,
        confidence=confidence,
        least_confident=tuple((r, c, int(grid[r, c])) for r, c in places),
    )


def _ended(count: int, going: Sequence[int], device: torch.device) -> Tensor:
    ended = torch.ones(count, dtype=torch.bool)
    ended[list(going)] = False
    return ended.to(device)
