"""Estimate of a training worker's memory from the config alone.

Activations are counted in bytes per position, as autograd saves them for backward. The counts were
measured on the CPU (tests/train/test_memory.py) and extended to GPUs, where attention saves its
inputs in the compute dtype. They have not been confirmed on a GPU.

    D: hidden size, N: positions of a row, T: prompt tokens, width: bytes of a number
"""

from __future__ import annotations

from dataclasses import dataclass

from hybrid.config import Config
from hybrid.llm import Shape
from hybrid.trm import TRMConfig

TRAINED_BYTES = 20
"""Bytes per trained parameter: float32 weight, gradient, two moments and EMA."""
UPDATE_BYTES = 8
"""Additional bytes per trained parameter during the Adam-atan2 update."""
Parts = dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Worker:
    """The model and the rows of a worker."""

    config: Config
    trm: TRMConfig
    parameters: int
    """Trained parameters of the TRM."""
    adapters: int = 0
    """Trained parameters of the adapters."""
    shape: Shape | None = None
    """The language model; None if the TRM runs alone."""
    hybrid: bool
    identifiers: int
    """Rows of the puzzle table."""
    rows: int
    """Rows of the global batch on this worker."""
    micro: int
    """Rows of one forward and backward pass (micro-batch)."""

    def parts(self) -> Parts:
        """Return bytes by purpose; their sum is the peak."""
        parts = {
            "weights, gradients, moments and EMA": TRAINED_BYTES
            * (self.parameters + self.adapters),
            "table": 4 * self.identifiers * self.trm.puzzle_emb_ndim,
            # The carries of two consecutive steps.
            "carry": 4 * self.rows * _state(self),
        }
        if not self.hybrid:
            return parts | {"activations": self.micro * (_cycle(self) + _gradients(self))}
        activations = {"activations": self.micro * (_attempts(self) + _gradients(self))}
        if self.shape is None:
            return parts | activations
        return parts | _language_model(self, self.shape, activations)


def block_bytes(trm: TRMConfig, width: int, *, compiled: bool, on_cpu: bool) -> int:
    """Return the bytes that one block saves per row for backward."""
    D, N = trm.hidden_size, trm.positions
    norm_width = max(width, 4)
    # Gate, up, their product, and silu(gate) unless compiled kernels recompute it.
    inner = (3 if compiled else 4) * width
    norms = 2 * D * (width if compiled else norm_width) + 8
    mlp = width * D + inner * _inner(D, trm.expansion)
    if trm.mlp_t:
        mix = width * D + inner * D * _inner(N, trm.expansion) // N
    else:
        # Inputs of both projections, rotated q and k, and v as a view of the joint q, k, v.
        mix = 2 * width * D + 5 * width * D + 4 * trm.num_heads
        if on_cpu and width < 4:  # attention saves its scores
            mix += width * trm.num_heads * N
    return N * (norms + mlp + mix)


def cycle_bytes(trm: TRMConfig, width: int, *, compiled: bool, on_cpu: bool) -> int:
    """Return the bytes that one cycle saves per row for backward."""
    block = block_bytes(trm, width, compiled=compiled, on_cpu=on_cpu)
    return block * trm.L_layers * (trm.L_cycles + 1)


def layer_bytes(shape: Shape, width: int, seen: int, *, learns: bool, masked: bool) -> int:
    """Return the bytes that an LLM layer saves per position, which attends to `seen` positions."""
    D, inner, kv = shape.hidden_size, shape.inner_size, shape.kv_width
    norms = 2 * D * max(width, 4)
    saved = norms + width * (2 * D + 2 * kv + 3 * inner)
    if learns:  # inputs of the linear layers, each with its own cast under autocast
        saved += width * ((8 if width < 4 else 5) * D + inner)
    return saved + masked * shape.query_groups * seen * width


def _language_model(worker: Worker, shape: Shape, activations: Parts) -> Parts:
    llama = worker.config.llama
    trained = 0 if llama.frozen else shape.parameters - shape.head
    head = shape.head if llama.max_new_tokens else 0
    width = llama_width(worker.config)
    frozen = shape.parameters - shape.head - trained + head
    parts = {
        "language model": TRAINED_BYTES * trained
        + frozen * (width if llama.frozen else max(width, 4)),
        **_cache(worker, shape),
        **activations,
        "reading": _reading(worker, shape),
    }
    backward = parts["activations"] + parts["reading"]
    prefill = _prefill(worker, shape)
    if llama.frozen:
        parts["prefill, beyond the attempts"] = max(0, prefill - backward)
    else:
        parts["prefill"] = prefill
        parts["optimizer step, beyond the attempts"] = max(
            0, UPDATE_BYTES * trained - backward - prefill
        )
    return {name: size for name, size in parts.items() if size}


def _cache(worker: Worker, shape: Shape) -> Parts:
    """Return the bytes of the prompt cache."""
    config, rows = worker.config, worker.micro
    if config.llama.prefix == "problem":
        return {}
    tokens = rows * config.llama.max_prompt_tokens
    # Concatenating batches copies the cache; so does selecting rows for a window's next attempt.
    copied = rows > config.llama.batch_size or (rows > 1 and _window(config) > 1)
    gradient = not config.llama.frozen
    size = tokens * shape.kv_values_per_token * llama_width(config)
    return {
        f"cache of at most {tokens} prompt tokens": size,
        "cache copy" + " and gradient" * gradient: (copied + gradient) * size,
    }


def _reading(worker: Worker, shape: Shape) -> int:
    """Return the bytes that backward through a window of attempts needs in the language model."""
    config, llama, window = worker.config, worker.config.llama, _window(worker.config)
    width, learns = llama_width(config), not llama.frozen
    uncached = llama.prefix == "problem"
    new = _attempt_tokens(config) + (llama.max_prompt_tokens if uncached else 0)
    seen = new if uncached else new + llama.max_prompt_tokens
    layer, gradients = (
        new * layer_bytes(shape, width, seen, learns=learns, masked=masked)
        for masked in (True, False)
    )
    # The last norm, and the mask shared by all layers.
    once = new * (4 + 2 * width) * shape.hidden_size + new * seen
    # Keys and values appended to the cache, and their gradients.
    appended = 0 if uncached else seen * 2 * shape.kv_width * width
    casts = width * (shape.parameters - shape.head) if learns and width < 4 else 0
    if config.training.recompute:
        inputs = shape.layers * new * shape.hidden_size * width
        one = layer + gradients + 2 * appended
        return worker.micro * (window * (inputs + once) + one) + casts // shape.layers
    all_layers = shape.layers * (layer + appended) + once
    return window * (worker.micro * all_layers + casts)


def _prefill(worker: Worker, shape: Shape) -> int:
    """Return the bytes that prefilling prompts needs without the cache itself."""
    config, llama = worker.config, worker.config.llama
    if llama.prefix == "problem":
        return 0
    width, T = llama_width(config), llama.max_prompt_tokens
    rows = min(llama.batch_size, worker.micro)
    layer = layer_bytes(shape, width, T, learns=not llama.frozen, masked=True)
    peak = rows * T * (layer + T)
    if llama.frozen:
        return peak
    return peak + worker.micro * T * shape.layers * shape.hidden_size * width


def _attempts(worker: Worker) -> int:
    """Return the bytes per row that backward through a window needs in TRM and adapters."""
    config, H_cycles = worker.config, worker.trm.H_cycles
    steps = _window(config) * config.training.act_steps
    adapters = 0
    if worker.shape is not None:  # both states are normalized in float32
        adapters = _window(config) * 16 * worker.trm.positions * worker.trm.hidden_size
    if not config.training.recompute:
        return adapters + steps * H_cycles * _cycle(worker)
    # The states before each cycle, the input embedding and the last state.
    return adapters + steps * (2 * H_cycles + 2) * _state(worker) + _cycle(worker)


def _cycle(worker: Worker) -> int:
    cluster = worker.config.cluster
    return cycle_bytes(
        worker.trm,
        trm_width(worker.config),
        compiled=cluster.compiles,
        on_cpu=not cluster.use_gpu,
    )


def _gradients(worker: Worker) -> int:
    """Return the bytes of activation gradients in one block: about as many as the block saves."""
    return _cycle(worker) // (worker.trm.L_layers * (worker.trm.L_cycles + 1))


def _state(worker: Worker) -> int:
    """Return the bytes of z_H or z_L of one row."""
    return worker.trm.positions * worker.trm.hidden_size * trm_width(worker.config)


def _attempt_tokens(config: Config) -> int:
    """Return an upper bound on tokens of latent, feedback and cue (default 33, docs/log.md)."""
    text = 32 + 64 * config.feedback.history + 2 * config.llama.max_new_tokens
    return config.adapter.prefix_tokens + text


def _window(config: Config) -> int:
    return min(config.training.bptt_attempts, config.training.max_attempts)


def _inner(width: int, expansion: float) -> int:
    return -(round(expansion * width * 2 / 3) // -256) * 256


def trm_width(config: Config) -> int:
    """Return the bytes of a number in the TRM's compute dtype."""
    return _width(config.trm.forward_dtype, config)


def llama_width(config: Config) -> int:
    """Return the bytes of a number in the language model's compute dtype."""
    return _width(config.llama.dtype, config)


def _width(dtype: str, config: Config) -> int:
    known = {"bfloat16": 2, "float32": 4, "float64": 8}
    return known.get(dtype, 2 if config.cluster.use_gpu else 4)
