"""Search hyperparameters: python tune/sweep.py --config configs/sweep.yaml [section.key=value ...].

Run again to resume.
"""

from hybrid import storage
from hybrid.cli import main
from hybrid.cluster.tuner import sweep
from hybrid.config import Config
from hybrid.sweep import format_ranking


def run(config: Config) -> None:
    """Run the sweep, then print the ranking and the paths of its outputs."""
    trials, axes = sweep(config)
    print(format_ranking(trials, axes))
    for name in ("sweep.parquet", "report.html", "best.yaml"):
        print(storage.uri(config.run_folder / name))


if __name__ == "__main__":
    main(__doc__, run, kind="hybrid")
