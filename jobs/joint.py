"""Train the hybrid: python jobs/joint.py --config configs/X.yaml [section.key=value ...].

Run again to resume.
"""

from hybrid.cli import main, print_result
from hybrid.config import Config
from hybrid.launch import joint


def run(config: Config) -> None:
    """Train, then print the result."""
    print_result(joint(config))


if __name__ == "__main__":
    main(__doc__, run, kind="hybrid")
