"""One part of the GPU check, in a process of its own; `benchmarks.gpu` starts it.

python -m benchmarks.gpu.part PART DEVICE FOLDER SECONDS [tiny]
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.gpu.session import Session


def main() -> None:
    part, device, out, seconds, *tiny = sys.argv[1:]
    with tempfile.TemporaryDirectory() as scratch:
        session = Session(
            part=part,
            device=torch.device(device),
            tiny=bool(tiny),
            out=Path(out),
            scratch=Path(scratch),
            seconds=float(seconds),
        )
        importlib.import_module(f"benchmarks.gpu.{part}").run(session)


if __name__ == "__main__":
    main()
