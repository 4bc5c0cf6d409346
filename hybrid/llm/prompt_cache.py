"""Problem encodings on disk: one safetensors file a problem, named by what it was made from.

    <paths.prompt_cache>/<model fingerprint and dtype>/<SHA-256 of the tokens>.safetensors
        keys, values   [layers, heads, T, d]

A frozen model's encoding of a text never changes, so nothing else need be known to reuse one. Files
appear by renaming: what a killed job has written is whole.
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
    """The encodings of one model."""

    def __init__(self, root: Path, backbone: Backbone) -> None:
        dtype = str(backbone.dtype).removeprefix("torch.")
        self.folder = root / f"{backbone.fingerprint()[:16]}-{dtype}"
        self.backbone = backbone

    def path(self, problem: Tokens) -> Path:
        """The file of a problem, which may not be there."""
        digest = hashlib.sha256(np.array(problem, np.int64).tobytes()).hexdigest()
        return self.folder / f"{digest}.safetensors"

    def prefill(self, problems: Sequence[Tokens]) -> PromptCache:
        """Problems as one batch, from disk where they are there, encoded now where not."""
        found = [self._load(problem) for problem in problems]
        missing = [n for n, one in enumerate(found) if one is None]
        if missing:
            made = self.backbone.prefill([problems[n] for n in missing])
            for place, n in enumerate(missing):
                found[n] = made.take(torch.tensor([place], device=self.backbone.device))
        return PromptCache.join([one for one in found if one is not None])

    def add(self, problems: Sequence[Tokens]) -> int:
        """Encode and write those that are not there; returns how many that were."""
        different = dict.fromkeys(map(tuple, problems))
        missing = [problem for problem in different if not storage.exists(self.path(problem))]
        if not missing:
            return 0
        make_folder(self.folder)
        made = self.backbone.prefill(missing)
        for row, problem in enumerate(missing):
            length = len(problem)
            tensors = {
                name: torch.stack([layer[which][row, :, -length:] for layer in made.layers])
                for which, name in enumerate(("keys", "values"))
            }
            path = self.path(problem)
            partial = path.with_suffix(f".{uuid4().hex}.partial")
            try:
                save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, partial)
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
            storage.upload(path)
        return len(missing)

    def _load(self, problem: Tokens) -> PromptCache | None:
        path = self.path(problem)
        if not path.exists():  # an encoding never changes: a copy once made will do
            storage.download(path)
        if not path.exists():
            return None
        device = self.backbone.device
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                keys, values = file.get_tensor("keys"), file.get_tensor("values")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a problem encoding ({error}); delete it") from error
        tokens = torch.tensor([list(problem)], device=device)
        layers = zip(keys[:, None], values[:, None], strict=True)
        return PromptCache(
            tokens=tokens,
            mask=torch.ones_like(tokens, dtype=torch.bool),
            layers=tuple((one, other) for one, other in layers),
        )
