"""Train the TRM: python jobs/pretrain.py --config configs/X.yaml [section.key=value ...].

Run it again to resume.
"""

from hybrid.cli import main
from hybrid.cluster import pretrain
from hybrid.config import Config


def run(config: Config) -> None:
    """Train, then say what was learned."""
    result = pretrain(config)
    if result.trained is not None:
        before = "not measured" if result.untrained is None else f"{result.untrained:.1%}"
        print(f"training pairs exactly right: untrained {before}, trained {result.trained:.1%}")
    print(f"step {result.step}: {result.checkpoint}")


if __name__ == "__main__":
    main(__doc__, run)
