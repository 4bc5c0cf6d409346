"""Train the TRM: python jobs/pretrain.py --config configs/X.yaml [section.key=value ...].

Run again to resume.
"""

from hybrid.cli import main, print_result
from hybrid.config import Config
from hybrid.launch import pretrain


def run(config: Config) -> None:
    """Train, then print the result."""
    print_result(pretrain(config))


if __name__ == "__main__":
    main(__doc__, run)
