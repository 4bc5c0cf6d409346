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
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from hybrid.llm.config import LlamaConfig
from hybrid.llm.padding import PROBLEM_MULTIPLE, TEXT_MULTIPLE, left_padded, padded_length
from hybrid.llm.recompute import layers_recomputed, read_only_cache, recording_cache

Tokens = Sequence[int]


@dataclass(frozen=True, kw_only=True)
class PromptCache:
    """Problems as the model remembers them."""

    tokens: Tensor
    """[B, T] padded on the left."""
    mask: Tensor
    """[B, T] bool: which are tokens."""
    layers: tuple[tuple[Tensor, Tensor], ...]
    """Keys and values of each layer, [B, heads, T, d]; none with prefix=problem."""

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, rows: Tensor) -> PromptCache:
        """Some of the rows."""
        return PromptCache(
            tokens=self.tokens[rows],
            mask=self.mask[rows],
            layers=tuple((keys[rows], values[rows]) for keys, values in self.layers),
        )

    @staticmethod
    def join(parts: Sequence[PromptCache], order: Sequence[int] | None = None) -> PromptCache:
        """Several batches as one, padded to the longest problem; row n is their row order[n]."""
        longest = max(part.tokens.shape[1] for part in parts)
        length = padded_length(longest, PROBLEM_MULTIPLE, parts[0].tokens.device)

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

        return PromptCache(
            tokens=one([part.tokens for part in parts], 1),
            mask=one([part.mask for part in parts], 1),
            layers=tuple(layer(number) for number in range(len(parts[0].layers))),
        )


class Backbone:
    """A decoder of transformers behind four verbs: tokenise, encode, read, generate.

    Not an nn.Module on purpose: whoever holds one does not get its weights into his state dict.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: LlamaConfig,
        revision: str,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.config = config
        self.model = model
        """The causal language model; `model.model` is the decoder."""
        self.tokenizer = tokenizer
        self.revision = revision
        model.eval()
        model.requires_grad_(not config.frozen)
        weight = model.get_input_embeddings().weight
        self.hidden_size = int(weight.shape[1])
        self.dtype: torch.dtype = dtype or weight.dtype
        """The dtype of the forward pass; the weights may be wider."""
        self._casts = self.dtype != weight.dtype
        self._dropped: dict[str, bytes] = {}
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
        tensors = self.model.state_dict() | dict(self.model.named_buffers())
        samples = {name: _sample(name, value) for name, value in tensors.items()} | self._dropped
        digest = hashlib.sha256()
        for _, sample in sorted(samples.items()):
            digest.update(sample)
        return digest.hexdigest()

    def drop_head(self) -> None:
        """Free the output head, unless it shares the token embeddings; `generate` needs it.

        The fingerprint keeps the head's share.
        """
        head = self.model.get_output_embeddings()
        if head.weight is self.model.get_input_embeddings().weight:
            return
        [name] = [name for name, module in self.model.named_modules() if module is head]
        for part, value in head.state_dict(prefix=f"{name}.").items():
            self._dropped[part] = _sample(part, value)
        setattr(self.model, name, None)

    def tokens(self, text: str) -> list[int]:
        """Token ids of a piece of the conversation; names of special tokens are those tokens."""
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def text(self, tokens: Tokens) -> str:
        """What a reader sees of generated tokens."""
        found: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return found.strip()

    def prefill(self, problems: Sequence[Tokens]) -> PromptCache:
        """Problems [B] of token ids, `batch_size` at a time. Without gradient if frozen.

        Problems of like length go together: in the order they come, half of a batch is padding.
        """
        size = self.config.batch_size
        if len(problems) <= size:
            return self._prefill(problems)
        order = sorted(range(len(problems)), key=lambda n: len(problems[n]))
        parts = [
            self._prefill([problems[n] for n in order[first : first + size]])
            for first in range(0, len(order), size)
        ]
        place = {n: at for at, n in enumerate(order)}
        return PromptCache.join(parts, [place[n] for n in range(len(problems))])

    def read(
        self,
        encoding: PromptCache,
        latent: Tensor,
        texts: Sequence[Tokens],
        *,
        recompute: bool = True,
    ) -> Tensor:
        """[B, hidden] float32 at least: the last hidden state behind [problem][latent][text].

        `latent` [B, k, hidden]; gradient flows into it. With `recompute` backward computes each
        layer again and keeps its input alone.
        """
        past, embedded, mask = self._attempt(encoding, latent, texts)
        layers = past.layers if past else [None] * len(self.model.model.layers)
        with self._autocast():
            hidden, _ = self._forward(embedded, mask, past, read_only_cache(layers), recompute)
        last = hidden[:, -1]
        return last.to(torch.promote_types(last.dtype, torch.float32))

    @torch.no_grad()
    def generate(
        self, encoding: PromptCache, latent: Tensor, texts: Sequence[Tokens], most: int
    ) -> list[list[int]]:
        """Greedy continuations of up to `most` tokens, all rows at once, each to its end token."""
        past, embedded, mask = self._attempt(encoding, latent, texts)
        cache = DynamicCache(past.layers) if past else DynamicCache()
        # Casts are kept from token to token: each token uses every weight again.
        with self._autocast(keep_casts=True):
            hidden, seen = self._forward(embedded, mask, past, cache)
            return self._continue(hidden[:, -1], seen, cache, most)

    def _continue(
        self, last: Tensor, seen: Tensor, cache: DynamicCache, most: int
    ) -> list[list[int]]:
        """Tokens that follow the hidden states `last` [B, hidden], greedily."""
        embed, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        ends = self._end_tokens()
        written: list[list[int]] = [[] for _ in last]
        going = torch.ones(len(last), dtype=torch.bool, device=self.device)
        for _ in range(most):
            token = head(last).argmax(-1)
            going = going & ~torch.isin(token, ends)
            for row in going.nonzero().flatten().tolist():
                written[row].append(int(token[row]))
            if not going.any():
                break
            seen = torch.cat((seen, going[:, None]), dim=1)
            position = seen.sum(-1, keepdim=True) - 1
            embedded = embed(token[:, None]).to(self.dtype)
            last = self.model.model(None, seen.long(), position, cache, embedded)[0][:, -1]
        return written

    def _prefill(self, problems: Sequence[Tokens]) -> PromptCache:
        ids, mask = left_padded(problems, PROBLEM_MULTIPLE, self.device)
        if self.config.prefix == "problem":
            return PromptCache(tokens=ids, mask=mask, layers=())
        learns = torch.is_grad_enabled() and not self.config.frozen
        # With gradient always recomputed: activations of a whole prompt are gigabytes.
        cache = recording_cache(len(self.model.model.layers)) if learns else DynamicCache()
        with torch.set_grad_enabled(learns), self._autocast():
            embedded = self.model.get_input_embeddings()(ids).to(self.dtype)
            self._forward(embedded, mask, None, cache, recompute=True)
        layers = tuple((layer.keys, layer.values) for layer in cache.layers)
        return PromptCache(tokens=ids, mask=mask, layers=layers)

    def _attempt(
        self, encoding: PromptCache, latent: Tensor, texts: Sequence[Tokens]
    ) -> tuple[PromptCache | None, Tensor, Tensor]:
        """Past of an attempt, None with prefix=problem; its embedded positions and their mask."""
        ids, mask = left_padded(texts, TEXT_MULTIPLE, self.device)
        if self.config.prefix == "problem":
            return None, *self._embed(latent, ids, mask, (encoding.tokens, encoding.mask))
        return encoding, *self._embed(latent, ids, mask, None)

    def _embed(
        self, latent: Tensor, ids: Tensor, mask: Tensor, front: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """[latent][problem, if it is not in the past][text], and its mask."""
        embed = self.model.get_input_embeddings()
        parts, masks = [latent.to(self.dtype)], [mask.new_ones(latent.shape[:2])]
        for part, part_mask in (*((front,) if front else ()), (ids, mask)):
            parts.append(embed(part).to(self.dtype))
            masks.append(part_mask)
        return torch.cat(parts, dim=1), torch.cat(masks, dim=1)

    def _forward(
        self,
        embedded: Tensor,
        mask: Tensor,
        past: PromptCache | None,
        cache: Any,
        recompute: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Hidden states of the new positions, the mask of them and of the past.

        `recompute` needs a cache that can be updated again.
        """
        seen = torch.cat((past.mask, mask), dim=1) if past else mask
        positions = (seen.long().cumsum(-1) - 1).clamp_min(0)[:, -embedded.shape[1] :]
        decoder = self.model.model
        again = recompute and torch.is_grad_enabled()
        with layers_recomputed(decoder) if again else nullcontext():
            # By position: transformers is renaming the argument that takes the cache.
            return decoder(None, seen.long(), positions, cache, embedded)[0], seen

    def _autocast(self, keep_casts: bool = False) -> AbstractContextManager[Any]:
        """Compute in `dtype` where the weights are wider.

        Casts are not kept by default: those of all weights together are as large as a model.
        """
        if not self._casts:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype, cache_enabled=keep_casts)

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


def _sample(name: str, value: Tensor) -> bytes:
    """A tensor's share of the fingerprint."""
    flat = value.detach().flatten()
    picked = flat[:: max(1, len(flat) // 64)][:64].to(torch.bfloat16).float()
    return f"{name} {list(value.shape)}".encode() + picked.cpu().numpy().tobytes()
