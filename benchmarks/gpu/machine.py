"""The machine: copy rate, matrix products and attention at the sizes of the published model."""

from __future__ import annotations

import statistics
from functools import partial

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.session import Session, median_seconds
from benchmarks.measure import commit, seconds_of

ROWS, POSITIONS, HEADS, HEAD_DIM = 192, 916, 8, 64
PREDICTED_NEW_SHAPE_MS = {"CUDNN_ATTENTION": "40-400"}
BACKENDS = {
    "cuda": (
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
    ),
    "cpu": (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH),
}


def run(session: Session) -> None:
    """Measure the rates of the device itself."""
    cuda = session.device.type == "cuda"
    session.record(
        "machine",
        device=torch.cuda.get_device_name() if cuda else "cpu",
        torch=torch.__version__,
        cuda=torch.version.cuda or "none",
        cudnn=torch.backends.cudnn.version() if cuda else "none",
        transformers=transformers.__version__,
        commit=commit(),
    )
    _copy_rate(session)
    _matrix_products(session)
    for backend in BACKENDS[session.device.type]:
        with session.measuring(backend.name):
            try:
                _attention(session, backend)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # a backend that this device or build lacks
                session.record(backend.name, failed=str(error).splitlines()[0][:150])


def _copy_rate(session: Session) -> None:
    with session.measuring("copy rate"):
        source = torch.zeros(2**20 if session.tiny else 2**30, device=session.device)
        target = torch.zeros_like(source)
        seconds = median_seconds(partial(target.copy_, source))
        session.record("copy rate", **{"GB/s": round(2 * 4 * len(source) / seconds / 1e9, 1)})


def _matrix_products(session: Session) -> None:
    rows = 64 if session.tiny else ROWS * POSITIONS
    square = 64 if session.tiny else 8192
    shapes = {
        "square": (square, square, square),
        "qkv_proj": (rows, 512, 1536),
        "o_proj": (rows, 512, 512),
        "gate_up_proj": (rows, 512, 3072),
        "down_proj": (rows, 1536, 512),
        "gradient of gate_up_proj": (3072, rows, 512),
    }
    for name, (m, k, n) in shapes.items():
        with session.measuring(name):
            a = torch.randn(m, k, device=session.device, dtype=session.dtype)
            b = torch.randn(k, n, device=session.device, dtype=session.dtype)
            seconds = median_seconds(partial(torch.matmul, a, b))
            session.record(
                name, shape=f"{m} x {k} x {n}", **{"TFLOP/s": _tera(2 * m * k * n, seconds)}
            )


def _attention(session: Session, backend: SDPBackend) -> None:
    """Rates of forward and backward, and the extra time of a first call with a new shape."""
    rows, positions = (2, 36) if session.tiny else (ROWS, POSITIONS)
    q, k, v = _heads(session, rows, positions)
    grad = torch.randn_like(q)
    operations = 4 * rows * HEADS * positions**2 * HEAD_DIM

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def both() -> object:
        return torch.autograd.grad(forward(), (q, k, v), grad)

    with sdpa_kernel(backend):
        forward_s, both_s = median_seconds(forward), median_seconds(both)
        extra = [_cost_of_shape(session, positions - 2 - n) for n in range(6)]
    session.record(
        backend.name,
        **{
            "forward TFLOP/s": _tera(operations, forward_s),
            "forward and backward TFLOP/s": _tera(3.5 * operations, both_s),
            "new shape ms": round(1000 * statistics.median(extra), 1),
            "predicted ms": session.predicted(PREDICTED_NEW_SHAPE_MS.get(backend.name)),
        },
    )


def _cost_of_shape(session: Session, positions: int) -> float:
    """Seconds that a first call takes longer than the second."""
    heads = _heads(session, 3, positions)

    def both() -> object:
        return torch.autograd.grad(F.scaled_dot_product_attention(*heads).sum(), heads)

    first = seconds_of(both)
    return first - seconds_of(both)


def _heads(session: Session, rows: int, positions: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys, values [rows, heads, positions, dim] in the model's memory layout."""
    shape = (rows, positions, 3, HEADS, HEAD_DIM)
    packed = torch.randn(shape, device=session.device, dtype=session.dtype)
    # Rotation leaves queries and keys contiguous, values stay a view of the projection.
    q, k = (packed[:, :, i].contiguous().transpose(1, 2).requires_grad_() for i in (0, 1))
    return q, k, packed[:, :, 2].transpose(1, 2).requires_grad_()


def _tera(operations: float, seconds: float) -> float:
    return round(operations / seconds / 1e12, 2)
