"""Evaluate: python jobs/evaluate.py --config configs/X.yaml [evaluation.checkpoint=DIR ...].

Run again to resume.
"""

from hybrid import storage
from hybrid.cli import main
from hybrid.config import Config
from hybrid.evaluate import describe
from hybrid.launch import evaluate


def run(config: Config) -> None:
    """Evaluate, then print the scores and the paths of the outputs."""
    outcome = evaluate(config)
    print(describe(outcome.results))
    for name in ("results.json", "submission.json", "report.html"):
        print(storage.uri(outcome.folder / name))


if __name__ == "__main__":
    main(__doc__, run)
