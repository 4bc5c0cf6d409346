"""Language model behind the solver: prompts are prefilled once, each attempt adds its own tokens.

No trainable value precedes the prompt, so its key-value cache is the same in every attempt. An
attempt appends [latent][text] to the cache and reads the last hidden state.

    prompt    T tokens, prefilled once, left-padded so that the attempt follows directly
    latent    [B, k, hidden], the TRM's state in the scale of token embeddings
    text      feedback on earlier attempts, the end of the chat turn, the cue
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
    """Key-value cache of a batch of prompts."""

    tokens: Tensor
    """[B, T] token ids, left-padded."""
    mask: Tensor
    """[B, T] bool, True at tokens and False at padding."""
    layers: tuple[tuple[Tensor, Tensor], ...]
    """Keys and values of each layer, [B, heads, T, d]; empty with prefix=problem."""

    def __len__(self) -> int:
        return len(self.tokens)

    def select(self, rows: Tensor) -> PromptCache:
        """Return the batch rows at the given indices."""
        return PromptCache(
            tokens=self.tokens[rows],
            mask=self.mask[rows],
            layers=tuple((keys[rows], values[rows]) for keys, values in self.layers),
        )

    @staticmethod
    def join(parts: Sequence[PromptCache], order: Sequence[int] | None = None) -> PromptCache:
        """Concatenate batches, padded to the longest prompt; row n is concatenated row order[n]."""
        longest = max(part.tokens.shape[1] for part in parts)
        length = padded_length(longest, PROBLEM_MULTIPLE, parts[0].tokens.device)

        def pad(tensor: Tensor, axis: int) -> Tensor:
            missing = length - tensor.shape[axis]
            after = 2 * (tensor.dim() - 1 - axis)
            return F.pad(tensor, (*(0,) * after, missing, 0)) if missing else tensor

        def concatenate(tensors: Sequence[Tensor], axis: int) -> Tensor:
            joined = torch.cat([pad(tensor, axis) for tensor in tensors])
            return joined if order is None else joined[list(order)]

        def layer(number: int) -> tuple[Tensor, Tensor]:
            keys, values = (
                concatenate([part.layers[number][index] for part in parts], 2) for index in (0, 1)
            )
            return keys, values

        return PromptCache(
            tokens=concatenate([part.tokens for part in parts], 1),
            mask=concatenate([part.mask for part in parts], 1),
            layers=tuple(layer(number) for number in range(len(parts[0].layers))),
        )


class Backbone:
    """Decoder-only transformers model with four operations: tokenize, prefill, read, generate.

    Not an nn.Module, so that a module that holds one does not include its weights in state_dict().
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
        """Causal language model; `model.model` is the decoder."""
        self.tokenizer = tokenizer
        self.revision = revision
        model.eval()
        model.requires_grad_(not config.frozen)
        weight = model.get_input_embeddings().weight
        self.hidden_size = int(weight.shape[1])
        self.dtype: torch.dtype = dtype or weight.dtype
        """Compute dtype; the weights may have a wider one."""
        self._casts = self.dtype != weight.dtype
        self._dropped: dict[str, bytes] = {}
        self.device: torch.device = weight.device
        self.embedding_scale = float(weight.detach().float().square().mean().sqrt())
        """Root mean square of the token embedding table."""
        self.head, self.tail = _chat_turn(tokenizer)
        """Text before and after the content of a user turn."""

    def identity(self) -> dict[str, Any]:
        """Return the name, revision and fingerprint that a checkpoint stores for a frozen model."""
        return {
            "model": self.config.model,
            "revision": self.revision,
            "fingerprint": self.fingerprint(),
        }

    def fingerprint(self) -> str:
        """Return the SHA-256 of up to 64 values of each tensor, which identifies the model.

        Buffers are included because they hold the RoPE frequencies, which the weights do not
        determine. Values are rounded to bfloat16, so the compute dtype does not change the hash.
        """
        tensors = self.model.state_dict() | dict(self.model.named_buffers())
        samples = {name: _sample(name, value) for name, value in tensors.items()} | self._dropped
        digest = hashlib.sha256()
        for _, sample in sorted(samples.items()):
            digest.update(sample)
        return digest.hexdigest()

    def drop_head(self) -> None:
        """Free the output head unless it is tied to the token embeddings.

        `generate` no longer works afterwards. The fingerprint does not change.
        """
        head = self.model.get_output_embeddings()
        if head.weight is self.model.get_input_embeddings().weight:
            return
        [name] = [name for name, module in self.model.named_modules() if module is head]
        for part, value in head.state_dict(prefix=f"{name}.").items():
            self._dropped[part] = _sample(part, value)
        setattr(self.model, name, None)

    def tokens(self, text: str) -> list[int]:
        """Tokenize part of a conversation; special tokens are parsed, none is added."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def text(self, tokens: Tokens) -> str:
        """Decode generated tokens without special tokens and surrounding whitespace."""
        decoded: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return decoded.strip()

    def prefill(self, prompts: Sequence[Tokens]) -> PromptCache:
        """Compute the key-value cache of `prompts`, llama.batch_size at a time.

        Gradients are recorded only if the model is not frozen. Batches hold prompts of similar
        length, because in the given order half of a batch would be padding.
        """
        size = self.config.batch_size
        if len(prompts) <= size:
            return self._prefill(prompts)
        order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
        parts = [
            self._prefill([prompts[n] for n in order[first : first + size]])
            for first in range(0, len(order), size)
        ]
        row_of = {n: row for row, n in enumerate(order)}
        return PromptCache.join(parts, [row_of[n] for n in range(len(prompts))])

    def read(
        self,
        prompts: PromptCache,
        latent: Tensor,
        texts: Sequence[Tokens],
        *,
        recompute: bool = True,
    ) -> Tensor:
        """Return the last hidden state [B, hidden] of [prompt][latent][text], in float32 or wider.

        Gradients flow into `latent` [B, k, hidden]. With `recompute`, backward recomputes each
        layer from its input (gradient checkpointing).
        """
        past, embedded, mask = self._attempt(prompts, latent, texts)
        layers = past.layers if past else [None] * len(self.model.model.layers)
        with self._autocast():
            hidden, _ = self._forward(embedded, mask, past, read_only_cache(layers), recompute)
        last = hidden[:, -1]
        return last.to(torch.promote_types(last.dtype, torch.float32))

    @torch.no_grad()
    def generate(
        self, prompts: PromptCache, latent: Tensor, texts: Sequence[Tokens], max_tokens: int
    ) -> list[list[int]]:
        """Decode greedily, each row up to its end token or `max_tokens` tokens."""
        past, embedded, mask = self._attempt(prompts, latent, texts)
        cache = DynamicCache(past.layers) if past else DynamicCache()
        # Keep the casted weights: every new token uses all of them again.
        with self._autocast(keep_casts=True):
            hidden, full_mask = self._forward(embedded, mask, past, cache)
            return self._decode(hidden[:, -1], full_mask, cache, max_tokens)

    def _decode(
        self, last: Tensor, mask: Tensor, cache: DynamicCache, max_tokens: int
    ) -> list[list[int]]:
        """Return the greedy continuation of each row of the hidden states `last` [B, hidden]."""
        embed, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        ends = self._end_tokens()
        generated: list[list[int]] = [[] for _ in last]
        active = torch.ones(len(last), dtype=torch.bool, device=self.device)
        for _ in range(max_tokens):
            token = head(last).argmax(-1)
            active = active & ~torch.isin(token, ends)
            for row in active.nonzero().flatten().tolist():
                generated[row].append(int(token[row]))
            if not active.any():
                break
            mask = torch.cat((mask, active[:, None]), dim=1)
            position = mask.sum(-1, keepdim=True) - 1
            embedded = embed(token[:, None]).to(self.dtype)
            last = self.model.model(None, mask.long(), position, cache, embedded)[0][:, -1]
        return generated

    def _prefill(self, prompts: Sequence[Tokens]) -> PromptCache:
        ids, mask = left_padded(prompts, PROBLEM_MULTIPLE, self.device)
        if self.config.prefix == "problem":
            return PromptCache(tokens=ids, mask=mask, layers=())
        trains = torch.is_grad_enabled() and not self.config.frozen
        # Always recompute when training: the activations of a full prompt take gigabytes.
        cache = recording_cache(len(self.model.model.layers)) if trains else DynamicCache()
        with torch.set_grad_enabled(trains), self._autocast():
            embedded = self.model.get_input_embeddings()(ids).to(self.dtype)
            self._forward(embedded, mask, None, cache, recompute=True)
        layers = tuple((layer.keys, layer.values) for layer in cache.layers)
        return PromptCache(tokens=ids, mask=mask, layers=layers)

    def _attempt(
        self, prompts: PromptCache, latent: Tensor, texts: Sequence[Tokens]
    ) -> tuple[PromptCache | None, Tensor, Tensor]:
        """Return an attempt's past (None with prefix=problem), its embeddings and their mask."""
        ids, mask = left_padded(texts, TEXT_MULTIPLE, self.device)
        if self.config.prefix == "problem":
            return None, *self._embed(latent, ids, mask, (prompts.tokens, prompts.mask))
        return prompts, *self._embed(latent, ids, mask, None)

    def _embed(
        self, latent: Tensor, ids: Tensor, mask: Tensor, front: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Return embeddings and mask of [latent][prompt, unless cached][text]."""
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
        """Return hidden states of the new positions, and the mask of past and new positions.

        `recompute` requires a cache that tolerates a second update with the same positions.
        """
        full_mask = torch.cat((past.mask, mask), dim=1) if past else mask
        positions = (full_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -embedded.shape[1] :]
        decoder = self.model.model
        checkpointed = recompute and torch.is_grad_enabled()
        with layers_recomputed(decoder) if checkpointed else nullcontext():
            # Positional arguments, because transformers is renaming the cache argument.
            return decoder(None, full_mask.long(), positions, cache, embedded)[0], full_mask

    def _autocast(self, keep_casts: bool = False) -> AbstractContextManager[Any]:
        """Return a context that computes in `dtype` if the weights are wider.

        Casted weights are not kept by default: together they are as large as the model.
        """
        if not self._casts:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype, cache_enabled=keep_casts)

    def _end_tokens(self) -> Tensor:
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        known = [end for end in (*ends, self.tokenizer.eos_token_id) if end is not None]
        return torch.tensor(known, dtype=torch.long, device=self.device)


def _chat_turn(tokenizer: Any) -> tuple[str, str]:
    """Return the text before and after a user message, from the chat template if there is one."""
    if not tokenizer.chat_template:
        return tokenizer.bos_token or "", ""
    marker = "<<problem>>"
    messages = [{"role": "user", "content": marker}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    head, _, tail = text.partition(marker)
    return head, tail


def _sample(name: str, value: Tensor) -> bytes:
    """Return a tensor's contribution to the fingerprint."""
    flat = value.detach().flatten()
    sample = flat[:: max(1, len(flat) // 64)][:64].to(torch.bfloat16).float()
    return f"{name} {list(value.shape)}".encode() + sample.cpu().numpy().tobytes()
