"""make bench: benchmarks, each in a process of its own, its table, its results in results/.

python -m benchmarks [NAME ...]
"""

from __future__ import annotations

import subprocess
import sys
import time

BENCHMARKS = {
    "steps": "benchmarks.steps",
    "vote": "benchmarks.vote",
    "stream": "benchmarks.stream",
    "checkpoints": "benchmarks.checkpoints",
    "attempt_cost": "benchmarks.attempt_cost",
    "ray_overhead": "benchmarks.ray_overhead",
}
"""The benchmarks of `make bench`, in order. `canvas` takes half an hour and runs by hand."""


def main() -> int:
    chosen = sys.argv[1:] or list(BENCHMARKS)
    unknown = [name for name in chosen if name not in BENCHMARKS]
    if unknown:
        print(f"error: {unknown[0]}: none of {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    worst = 0
    for name in chosen:
        print(f"\n{name}", flush=True)
        started = time.monotonic()
        done = subprocess.run([sys.executable, "-m", BENCHMARKS[name]])
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
        worst = max(worst, done.returncode)
    return worst


if __name__ == "__main__":
    sys.exit(main())
