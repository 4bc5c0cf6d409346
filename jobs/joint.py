"""Train the hybrid: python jobs/joint.py --config configs/X.yaml [section.key=value ...].

Run it again to resume.
"""

from hybrid.cli import main, say_result
from hybrid.cluster import joint
from hybrid.config import Config


def run(config: Config) -> None:
    """Train, then say what was learned."""
    say_result(joint(config))


if __name__ == "__main__":
    main(__doc__, run, trains="hybrid")
