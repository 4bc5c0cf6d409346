"""One part of the GPU check in its own process, which `benchmarks.gpu` starts.

python -m benchmarks.gpu.part PART DEVICE FOLDER SCRATCH DEADLINE [tiny]

DEADLINE is in seconds since the epoch, so that imports count towards the time limit.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch

from benchmarks.gpu.session import Session


def main() -> None:
    part, device, out, scratch, deadline, *tiny = sys.argv[1:]
    session = Session(
        part=part,
        device=torch.device(device),
        tiny=bool(tiny),
        out=Path(out),
        scratch=Path(scratch),
        deadline=float(deadline),
    )
    importlib.import_module(f"benchmarks.gpu.{part}").run(session)


if __name__ == "__main__":
    main()
