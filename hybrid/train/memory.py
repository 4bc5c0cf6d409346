"""Memory of a training worker, from the config alone.

Activations are counted in bytes a position, as autograd saves them for backward. The counts were
taken from saved tensors on a CPU (tests/train/test_memory.py) and carried over to a GPU, where
attention saves its inputs in the dtype of the computation; a GPU has not confirmed them yet.

    D hidden size, N positions of a row, T tokens of a prompt, w bytes of a number
"""

from __future__ import annotations

from dataclasses import dataclass

from hybrid.config import Config
from hybrid.llm import Shape
from hybrid.trm import TRMConfig

LEARNED = 20
"""Bytes of a trained parameter: float32 weight, gradient, two moments and moving average."""
OPTIMIZER_STEP = 8
"""Bytes of a trained parameter that Adam-atan2 needs besides, while it moves the weights."""
Parts = dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Worker:
    """A worker's model and its rows."""

    config: Config
    trm: TRMConfig
    parameters: int
    """Trained parameters of the TRM."""
    adapters: int = 0
    """Trained parameters of the adapters."""
    shape: Shape | None = None
    """The language model; None where the TRM runs alone."""
    hybrid: bool
    identifiers: int
    """Rows of the puzzle table."""
    rows: int
    """Rows of the global batch that the worker computes."""
    micro: int
    """Rows of one forward and backward pass."""

    def parts(self) -> Parts:
        """Bytes by purpose; their sum is the peak."""
        parts = {
            "weights, gradients, moments and average": LEARNED * (self.parameters + self.adapters),
            "table": 4 * self.identifiers * self.trm.puzzle_emb_ndim,
            # The carry of a step and that of the next.
            "carry": 4 * self.rows * _state(self),
        }
        if not self.hybrid:
            return parts | {"activations": self.micro * (_cycle(self) + _working(self))}
        active = {"activations": self.micro * (_attempts(self) + _working(self))}
        if self.shape is None:
            return parts | active
        return parts | _language_model(self, self.shape, active)


def block_bytes(trm: TRMConfig, width: int, *, compiled: bool, on_cpu: bool) -> int:
    """Bytes that one block keeps of one row for backward."""
    D, N = trm.hidden_size, trm.positions
    wide = max(width, 4)  # of norms
    # Gate, up, their product; and silu(gate), which compiled kernels compute again.
    inner = (3 if compiled else 4) * width
    norms = 2 * D * (width if compiled else wide) + 8
    mlp = width * D + inner * _inner(D, trm.expansion)
    if trm.mlp_t:
        mix = width * D + inner * D * _inner(N, trm.expansion) // N
    else:
        # Input of the projection and of the output's; q, k rotated, and v as a view of q, k and v.
        mix = 2 * width * D + 5 * width * D + 4 * trm.num_heads
        if on_cpu and width < 4:  # where attention keeps its scores
            mix += width * trm.num_heads * N
    return N * (norms + mlp + mix)


def cycle_bytes(trm: TRMConfig, width: int, *, compiled: bool, on_cpu: bool) -> int:
    """Bytes that one cycle keeps of one row for backward."""
    block = block_bytes(trm, width, compiled=compiled, on_cpu=on_cpu)
    return block * trm.L_layers * (trm.L_cycles + 1)


def layer_bytes(shape: Shape, width: int, seen: int, *, learns: bool, masked: bool) -> int:
    """Bytes that a language model's layer keeps of one position, which attends to `seen`."""
    D, inner, kv = shape.hidden_size, shape.inner_size, shape.kv_width
    norms = 2 * D * max(width, 4)
    kept = norms + width * (2 * D + 2 * kv + 3 * inner)
    if learns:  # the inputs of the linear layers, under autocast one cast for each
        kept += width * ((8 if width < 4 else 5) * D + inner)
    return kept + masked * shape.query_groups * seen * width


def _language_model(worker: Worker, shape: Shape, active: Parts) -> Parts:
    llama = worker.config.llama
    learned = 0 if llama.frozen else shape.parameters - shape.head
    head = shape.head if llama.max_new_tokens else 0
    width = llama_width(worker.config)
    kept = shape.parameters - shape.head - learned + head
    parts = {
        "language model": LEARNED * learned + kept * (width if llama.frozen else max(width, 4)),
        **_cache(worker, shape),
        **active,
        "reading": _reading(worker, shape),
    }
    backward = parts["activations"] + parts["reading"]
    encoding = _encoding(worker, shape)
    if llama.frozen:
        parts["encoding, more than attempts need"] = max(0, encoding - backward)
    else:
        parts["encoding"] = encoding
        parts["moving the weights, more than attempts need"] = max(
            0, OPTIMIZER_STEP * learned - backward - encoding
        )
    return {name: size for name, size in parts.items() if size}


def _cache(worker: Worker, shape: Shape) -> Parts:
    """Keys and values of the problems."""
    config, rows = worker.config, worker.micro
    if config.llama.prefix == "problem":
        return {}
    tokens = rows * config.llama.max_prompt_tokens
    # Batches are joined by copying, and so are the rows that go on to the next attempt of a window.
    copied = rows > config.llama.batch_size or (rows > 1 and _window(config) > 1)
    gradient = not config.llama.frozen
    size = tokens * shape.kv_values_per_token * llama_width(config)
    return {
        f"cache of {tokens} prompt tokens at most": size,
        "its copy" + " and gradient" * gradient: (copied + gradient) * size,
    }


def _reading(worker: Worker, shape: Shape) -> int:
    """Bytes that backward through a window of attempts needs in the language model."""
    config, llama, window = worker.config, worker.config.llama, _window(worker.config)
    width, learns = llama_width(config), not llama.frozen
    before = llama.prefix == "problem"
    new = _attempt_tokens(config) + (llama.max_prompt_tokens if before else 0)
    seen = new if before else new + llama.max_prompt_tokens
    layer, gradients = (
        new * layer_bytes(shape, width, seen, learns=learns, masked=masked)
        for masked in (True, False)
    )
    # The last norm, the mask that all layers share.
    once = new * (4 + 2 * width) * shape.hidden_size + new * seen
    # Keys and values behind the remembered ones, and their gradients.
    appended = 0 if before else seen * 2 * shape.kv_width * width
    casts = width * (shape.parameters - shape.head) if learns and width < 4 else 0
    if config.training.recompute:
        inputs = shape.layers * new * shape.hidden_size * width
        one = layer + gradients + 2 * appended
        return worker.micro * (window * (inputs + once) + one) + casts // shape.layers
    every = shape.layers * (layer + appended) + once
    return window * (worker.micro * every + casts)


def _encoding(worker: Worker, shape: Shape) -> int:
    """Bytes that encoding problems needs, the cache aside."""
    config, llama = worker.config, worker.config.llama
    if llama.prefix == "problem":
        return 0
    width, T = llama_width(config), llama.max_prompt_tokens
    rows = min(llama.batch_size, worker.micro)
    layer = layer_bytes(shape, width, T, learns=not llama.frozen, masked=True)
    at_once = rows * T * (layer + T)
    if llama.frozen:
        return at_once
    return at_once + worker.micro * T * shape.layers * shape.hidden_size * width


def _attempts(worker: Worker) -> int:
    """Bytes of one row that backward through a window of attempts needs in TRM and adapters."""
    config, H_cycles = worker.config, worker.trm.H_cycles
    steps = _window(config) * config.training.act_steps
    adapters = 0
    if worker.shape is not None:  # both states normed in float32
        adapters = _window(config) * 16 * worker.trm.positions * worker.trm.hidden_size
    if not config.training.recompute:
        return adapters + steps * H_cycles * _cycle(worker)
    # The states before each cycle, the question and the last state.
    return adapters + steps * (2 * H_cycles + 2) * _state(worker) + _cycle(worker)


def _cycle(worker: Worker) -> int:
    cluster = worker.config.cluster
    return cycle_bytes(
        worker.trm,
        trm_width(worker.config),
        compiled=cluster.compiles,
        on_cpu=not cluster.use_gpu,
    )


def _working(worker: Worker) -> int:
    """Gradients of activations while backward is inside a block: about as much as it keeps."""
    return _cycle(worker) // (worker.trm.L_layers * (worker.trm.L_cycles + 1))


def _state(worker: Worker) -> int:
    """Bytes of z_H or z_L of one row."""
    return worker.trm.positions * worker.trm.hidden_size * trm_width(worker.config)


def _attempt_tokens(config: Config) -> int:
    """Latent, feedback and cue (33 tokens by default, docs/log.md), with room to spare."""
    text = 32 + 64 * config.feedback.history + 2 * config.llama.max_new_tokens
    return config.adapter.prefix_tokens + text


def _window(config: Config) -> int:
    return min(config.training.bptt_attempts, config.training.max_attempts)


def _inner(width: int, expansion: float) -> int:
    return -(round(expansion * width * 2 / 3) // -256) * 256


def trm_width(config: Config) -> int:
    """Bytes of a number in the TRM's computation."""
    return _width(config.trm.forward_dtype, config)


def llama_width(config: Config) -> int:
    """Bytes of a number in the language model's computation."""
    return _width(config.llama.dtype, config)


def _width(dtype: str, config: Config) -> int:
    known = {"bfloat16": 2, "float32": 4, "float64": 8}
    return known.get(dtype, 2 if config.cluster.use_gpu else 4)
