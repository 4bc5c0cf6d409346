"""Names and sizes of known models, for memory estimates without a download."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes that determine the memory use of a decoder."""

    parameters: int
    """Total parameter count, including the output head."""
    head: int = 0
    """Parameter count of the output head; 0 if it is tied to the token embeddings."""
    layers: int
    hidden_size: int
    inner_size: int
    """Intermediate size of a layer's MLP."""
    kv_width: int
    """Number of key-value heads times head size."""
    query_groups: int
    """Number of query heads per key-value head."""

    @property
    def kv_values_per_token(self) -> int:
        """Return the number of values that the key-value cache holds per token."""
        return 2 * self.layers * self.kv_width

    def __str__(self) -> str:
        return f"{self.parameters:,} ({self.layers} layers of {self.hidden_size})"


_VOCABULARY = 128_256


def _llama(parameters: int, layers: int, hidden: int, inner: int, kv: int, groups: int) -> Shape:
    return Shape(
        parameters=parameters,
        # The 1B and 3B models tie the head to the token embeddings.
        head=0 if parameters < 8e9 else _VOCABULARY * hidden,
        layers=layers,
        hidden_size=hidden,
        inner_size=inner,
        kv_width=kv,
        query_groups=groups,
    )


_1B = _llama(1_235_814_400, 16, 2048, 8192, 512, 4)
_3B = _llama(3_212_749_824, 28, 3072, 8192, 1024, 3)
_8B = _llama(8_030_261_248, 32, 4096, 14336, 1024, 4)
_70B = _llama(70_553_706_496, 80, 8192, 28672, 1024, 8)
_405B = _llama(405_853_388_800, 126, 16384, 53248, 1024, 16)
SHAPES = {
    f"meta-llama/{name}{suffix}": shape
    for name, shape in {
        "Llama-3.2-1B": _1B,
        "Llama-3.2-3B": _3B,
        "Llama-3.1-8B": _8B,
        "Llama-3.1-70B": _70B,
        "Llama-3.1-405B": _405B,
    }.items()
    for suffix in ("", "-Instruct")
}
"""Sizes by model name, from the models' config files."""
SHAPES["meta-llama/Llama-3.3-70B-Instruct"] = _70B
SHAPES["smollm2-135m"] = Shape(
    parameters=134_515_008,
    layers=30,
    hidden_size=576,
    inner_size=1536,
    kv_width=192,
    query_groups=3,
)


_TEXT_MODEL = re.compile(r"(?:(meta-llama)/)?(Llama-3\.\d-\d+B(?:-\w+)?)", re.IGNORECASE)


def is_path(model: str) -> bool:
    """Return whether a model name is a local path, judged by the name alone."""
    return model.startswith((".", "/", "~")) or model.endswith(".gguf")


def misnamed(model: str) -> str | None:
    """Return an error for a name that resembles a Llama 3 text model but is none, else None."""
    match = _TEXT_MODEL.fullmatch(model)
    if not match or model in SHAPES or "vision" in model.lower():
        return None
    names = [known.removeprefix("meta-llama/") for known in SHAPES if "/" in known]
    near = get_close_matches(match[2], names, n=1, cutoff=0)[0]
    return (
        f"llama.model: no model is called {model!r}; did you mean meta-llama/{near}?"
        f" Known models: {', '.join(names)}"
    )
