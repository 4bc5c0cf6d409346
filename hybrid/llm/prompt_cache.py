"""Prompt key-value caches on disk: one safetensors file per prompt, named after its content.

    <paths.prompt_cache>/<model fingerprint and dtype>/<SHA-256 of the tokens>.safetensors
        keys, values   [layers, heads, T, d]

A frozen model always computes the same cache for the same tokens, so the file name identifies the
content. Files are written to a temporary name and renamed, so a killed job leaves no partial file.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hybrid import storage
from hybrid.errors import UserError, make_folder
from hybrid.llm.backbone import Backbone, PromptCache, Tokens


class PromptCacheStore:
    """Folder of prompt caches of one model and dtype."""

    def __init__(self, root: Path, backbone: Backbone) -> None:
        dtype = str(backbone.dtype).removeprefix("torch.")
        self.folder = root / f"{backbone.fingerprint()[:16]}-{dtype}"
        self.backbone = backbone

    def path(self, prompt: Tokens) -> Path:
        """Return the file of a prompt, which need not exist."""
        digest = hashlib.sha256(np.array(prompt, np.int64).tobytes()).hexdigest()
        return self.folder / f"{digest}.safetensors"

    def prefill(self, prompts: Sequence[Tokens]) -> PromptCache:
        """Return the cache of `prompts`, loaded from disk if stored and computed otherwise."""
        caches = [self._load(prompt) for prompt in prompts]
        missing = [n for n, cache in enumerate(caches) if cache is None]
        if missing:
            computed = self.backbone.prefill([prompts[n] for n in missing])
            for row, n in enumerate(missing):
                caches[n] = computed.select(torch.tensor([row], device=self.backbone.device))
        return PromptCache.join([cache for cache in caches if cache is not None])

    def add(self, prompts: Sequence[Tokens]) -> int:
        """Compute and write the caches of prompts that are not stored; return their number."""
        unique = dict.fromkeys(map(tuple, prompts))
        missing = [prompt for prompt in unique if not storage.exists(self.path(prompt))]
        if not missing:
            return 0
        make_folder(self.folder)
        computed = self.backbone.prefill(missing)
        for row, prompt in enumerate(missing):
            length = len(prompt)
            tensors = {
                name: torch.stack([layer[index][row, :, -length:] for layer in computed.layers])
                for index, name in enumerate(("keys", "values"))
            }
            path = self.path(prompt)
            partial = path.with_suffix(f".{uuid4().hex}.partial")
            try:
                save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, partial)
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
            storage.upload(path)
        return len(missing)

    def _load(self, prompt: Tokens) -> PromptCache | None:
        path = self.path(prompt)
        if not path.exists():  # files never change, so an existing copy needs no new download
            storage.download(path)
        if not path.exists():
            return None
        device = self.backbone.device
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                keys, values = file.get_tensor("keys"), file.get_tensor("values")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a valid prompt cache ({error}); delete it") from error
        tokens = torch.tensor([list(prompt)], device=device)
        layers = zip(keys[:, None], values[:, None], strict=True)
        return PromptCache(
            tokens=tokens,
            mask=torch.ones_like(tokens, dtype=torch.bool),
            layers=tuple((key, value) for key, value in layers),
        )
