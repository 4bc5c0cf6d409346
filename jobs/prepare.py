"""Prepare a dataset: python jobs/prepare.py --config configs/X.yaml [section.key=value ...]."""

from hybrid.cli import main
from hybrid.dataset import prepare

if __name__ == "__main__":
    main(__doc__, lambda config: prepare(config.data, config.data_folder))
