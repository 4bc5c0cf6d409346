"""Run benchmarks, each in its own process, and write their results to benchmarks/results/.

Usage: python -m benchmarks [NAME ...]. Without names it runs all, as `make bench` does.
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
"""Modules that `make bench` runs, in order. `canvas` takes half an hour; run it separately."""


def main() -> int:
    chosen = sys.argv[1:] or list(BENCHMARKS)
    unknown = [name for name in chosen if name not in BENCHMARKS]
    if unknown:
        known = ", ".join(BENCHMARKS)
        print(f"error: {unknown[0]}: unknown benchmark, use one of {known}", file=sys.stderr)
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
