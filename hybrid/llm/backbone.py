"""The language model as the solver sees it: problems are encoded once, attempts cost their tokens.

A problem's key-value cache is computed without anything trainable before it, so it does not change
between attempts: an attempt appends [latent][text] to it and reads the last hidden state.

    problem   T tokens, encoded once, padded on the left so that attempts follow at once
    latent    [B, k, hidden], the TRM's state in the scale of token embeddings
    text      what was said of the attempts so far, the end of the chat turn, the cue
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from hybrid.llm.config import LlamaConfig

Tokens = Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """Problems as the model remembers them."""

    tokens: Tensor
    """[B, T] padded on the left."""
    mask: Tensor
    """[B, T] bool: which are tokens."""
    layers: tuple[tuple[Tensor, Tensor], ...]
    """Keys and values of each layer, [B, heads, T, d]; none with prefix=problem."""

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, rows: Tensor) -> Encoding:
        """Some of the rows."""
        return Encoding(
            tokens=self.tokens[rows],
            mask=self.mask[rows],
            layers=tuple((keys[rows], values[rows]) for keys, values in self.layers),
        )

    @staticmethod
    def join(parts: Sequence[Encoding], order: Sequence[int] | None = None) -> Encoding:
        """Several batches as one, padded to the longest problem; row n is their row order[n]."""
        length = max(part.tokens.shape[1] for part in parts)

        def pad(tensor: Tensor, axis: int) -> Tensor:
            missing = length - tensor.shape[axis]
            after = 2 * (tensor.dim() - 1 - axis)
            return F.pad(tensor, (*(0,) * after, missing, 0)) if missing else tensor

        def one(tensors: Sequence[Tensor], axis: int) -> Tensor:
            whole = torch.cat([pad(tensor, axis) for tensor in tensors])
            return whole if order is None else whole[list(order)]

        def layer(number: int) -> tuple[Tensor, Tensor]:
            keys, values = (
                one([part.layers[number][which] for part in parts], 2) for which in (0, 1)
            )
            return keys, values

        return Encoding(
            tokens=one([part.tokens for part in parts], 1),
            mask=one([part.mask for part in parts], 1),
            layers=tuple(layer(number) for number in range(len(parts[0].layers))),
        )


class Backbone:
    """A decoder of transformers behind four verbs: tokenise, encode, read, generate.

    Not an nn.Module on purpose: whoever holds one does not get its weights into his state dict.
    """

    def __init__(self, model: Any, tokenizer: Any, config: LlamaConfig, revision: str) -> None:
        self.config = config
        self.model = model
        """The causal language model; `model.model` is the decoder."""
        self.tokenizer = tokenizer
        self.revision = revision
        model.eval()
        model.requires_grad_(not config.frozen)
        weight = model.get_input_embeddings().weight
        self.hidden_size = int(weight.shape[1])
        self.dtype: torch.dtype = weight.dtype
        self.device: torch.device = weight.device
        self.embedding_scale = float(weight.detach().float().square().mean().sqrt())
        """Root mean square of a token embedding's numbers."""
        self.head, self.tail = _turn(tokenizer)
        """What stands before and after the text of a user's turn."""

    def identity(self) -> dict[str, Any]:
        """Name, revision and fingerprint: what a checkpoint keeps of a frozen model."""
        return {
            "model": self.config.model,
            "revision": self.revision,
            "fingerprint": self.fingerprint(),
        }

    def fingerprint(self) -> str:
        """SHA-256 over 64 numbers of every tensor: another model, or another version, has another.

        The rope's frequencies, which stand in the config, are among the model's buffers.
        Numbers are rounded to bfloat16 first, so that the dtype it computes in does not count.
        """
        digest = hashlib.sha256()
        tensors = self.model.state_dict() | dict(self.model.named_buffers())
        for name, value in sorted(tensors.items()):
            flat = value.detach().flatten()
            picked = flat[:: max(1, len(flat) // 64)][:64].to(torch.bfloat16).float()
            digest.update(f"{name} {list(value.shape)}".encode() + picked.cpu().numpy().tobytes())
        return digest.hexdigest()

    def tokens(self, text: str) -> list[int]:
        """Token ids of a piece of the conversation; names of special tokens are those tokens."""
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def text(self, tokens: Tokens) -> str:
        """What a reader sees of generated tokens."""
        found: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return found.strip()

    def encode(self, problems: Sequence[Tokens]) -> Encoding:
        """Problems [B] of token ids, `batch_size` at a time. Without gradient if frozen.

        Problems of like length go together: in the order they come, half of a batch is padding.
        """
        size = self.config.batch_size
        if len(problems) <= size:
            return self._encode(problems)
        order = sorted(range(len(problems)), key=lambda n: len(problems[n]))
        parts = [
            self._encode([problems[n] for n in order[first : first + size]])
            for first in range(0, len(order), size)
        ]
        place = {n: at for at, n in enumerate(order)}
        return Encoding.join(parts, [place[n] for n in range(len(problems))])

    def read(
        self, encoding: Encoding, latent: Tensor, texts: Sequence[Tokens], *, recompute: bool = True
    ) -> Tensor:
        """[B, hidden] float32 at least: the last hidden state behind [problem][latent][text].

        `latent` [B, k, hidden]; gradient flows into it. With `recompute` the activations are made
        again for backward instead of kept.
        """
        ids, mask = self._left_padded(texts)
        front = (encoding.tokens, encoding.mask) if self.config.prefix == "problem" else None
        embedded, mask = self._embed(latent, ids, mask, front)
        past = None if front else encoding

        def run(embedded: Tensor) -> Tensor:
            return self._forward(embedded, mask, past)[0][:, -1]

        if recompute and torch.is_grad_enabled():
            # No dropout anywhere: there is no generator state to keep.
            last = checkpoint(run, embedded, use_reentrant=False, preserve_rng_state=False)
        else:
            last = run(embedded)
        assert isinstance(last, Tensor)
        return last.to(torch.promote_types(last.dtype, torch.float32))

    @torch.no_grad()
    def generate(
        self, encoding: Encoding, latent: Tensor, texts: Sequence[Tokens], most: int
    ) -> list[list[int]]:
        """Greedy continuations of up to `most` tokens, all rows at once, each to its end token."""
        ids, mask = self._left_padded(texts)
        front = (encoding.tokens, encoding.mask) if self.config.prefix == "problem" else None
        embedded, mask = self._embed(latent, ids, mask, front)
        embed = self.model.get_input_embeddings()
        ends = self._end_tokens()
        past = None if front else encoding
        hidden, cache, seen = self._forward(embedded, mask, past)
        written: list[list[int]] = [[] for _ in texts]
        going = torch.ones(len(texts), dtype=torch.bool, device=self.device)
        for _ in range(most):
            token = self.model.get_output_embeddings()(hidden[:, -1]).argmax(-1)
            going = going & ~torch.isin(token, ends)
            for row in going.nonzero().flatten().tolist():
                written[row].append(int(token[row]))
            if not going.any():
                break
            seen = torch.cat((seen, going[:, None]), dim=1)
            position = seen.sum(-1, keepdim=True) - 1
            decoder = self.model.model
            hidden = decoder(None, seen.long(), position, cache, embed(token[:, None]))[0]
        return written

    def _encode(self, problems: Sequence[Tokens]) -> Encoding:
        ids, mask = self._left_padded(problems)
        if self.config.prefix == "problem":
            return Encoding(tokens=ids, mask=mask, layers=())
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.frozen):
            embedded = self.model.get_input_embeddings()(ids)
            _, cache, _ = self._forward(embedded, mask, None)
        layers = tuple((layer.keys, layer.values) for layer in cache.layers)
        return Encoding(tokens=ids, mask=mask, layers=layers)

    def _embed(
        self, latent: Tensor, ids: Tensor, mask: Tensor, front: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """[latent][problem, if it is not in the past][text], and its mask."""
        embed = self.model.get_input_embeddings()
        parts, masks = [latent.to(self.dtype)], [mask.new_ones(latent.shape[:2])]
        for part, part_mask in (*((front,) if front else ()), (ids, mask)):
            parts.append(embed(part))
            masks.append(part_mask)
        return torch.cat(parts, dim=1), torch.cat(masks, dim=1)

    def _forward(
        self, embedded: Tensor, mask: Tensor, past: Encoding | None
    ) -> tuple[Tensor, DynamicCache, Tensor]:
        """Hidden states of the new positions, the cache with them in it, the mask of both."""
        cache = DynamicCache(past.layers) if past and past.layers else DynamicCache()
        seen = torch.cat((past.mask, mask), dim=1) if past else mask
        positions = (seen.long().cumsum(-1) - 1).clamp_min(0)[:, -embedded.shape[1] :]
        # By position: transformers is renaming the argument that takes the cache.
        hidden = self.model.model(None, seen.long(), positions, cache, embedded)[0]
        return hidden, cache, seen

    def _left_padded(self, rows: Sequence[Tokens]) -> tuple[Tensor, Tensor]:
        assert all(rows), "a row without tokens: its last position would be padding"
        length = max(len(row) for row in rows)
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        mask = torch.zeros(len(rows), length, dtype=torch.bool)
        for number, row in enumerate(rows):
            ids[number, -len(row) :] = torch.tensor(list(row))
            mask[number, -len(row) :] = True
        return ids.to(self.device), mask.to(self.device)

    def _end_tokens(self) -> Tensor:
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        found = [end for end in (*ends, self.tokenizer.eos_token_id) if end is not None]
        return torch.tensor(found, dtype=torch.long, device=self.device)


def _turn(tokenizer: Any) -> tuple[str, str]:
    """What a user's turn begins and ends with, from the chat template where there is one."""
    if not tokenizer.chat_template:
        return tokenizer.bos_token or "", ""
    mark = "<<problem>>"
    turn = [{"role": "user", "content": mark}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    head, _, tail = text.partition(mark)
    return head, tail
