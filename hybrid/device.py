"""The device a process computes on: choice, compilation, transfers, CPU threads."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from hybrid.errors import UserError
from hybrid.trm import TRM


def compute_device(use_gpu: bool) -> torch.device:
    """Return this process's GPU or the CPU; raise UserError if there is no GPU to use."""
    if use_gpu and not torch.cuda.is_available():
        raise UserError("cluster.use_gpu: torch sees no CUDA device here")
    return torch.device("cuda" if use_gpu else "cpu")


def compile_if_enabled(trm: TRM, compiles: bool) -> None:
    """Compile a TRM if `compiles`; raise UserError if this machine has no compiler."""
    if not compiles:
        return
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UserError(f"cluster.compile: {compiler} not found; install it or set it to false")
    trm.compile_recursion()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to the device without waiting for the work queued there."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def share_cores(workers_on_this_machine: int) -> None:
    """Use this worker's share of the cores for computation; Ray sets one thread by default."""
    torch.set_num_threads(max(1, _cores() // max(1, workers_on_this_machine)))


def _cores() -> int:
    """Return the CPUs this process may use: a container often has fewer than its machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(cores or 1, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # not Linux, an old kernel, or no quota ("max")
        return cores or 1
