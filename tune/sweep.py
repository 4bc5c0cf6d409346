"""Search hyperparameters: python tune/sweep.py --config configs/sweep.yaml [section.key=value ...].

Run it again to resume.
"""

from hybrid import storage
from hybrid.cli import main
from hybrid.cluster.tuner import sweep
from hybrid.config import Config
from hybrid.sweep import describe


def run(config: Config) -> None:
    """Sweep, then print the ranking and where everything is."""
    trials, axes = sweep(config)
    print(describe(trials, axes))
    for name in ("sweep.parquet", "report.html", "best.yaml"):
        print(storage.uri(config.run_folder / name))


if __name__ == "__main__":
    main(__doc__, run, trains="hybrid")
