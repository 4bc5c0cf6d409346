"""A prepared dataset on disk, and the stream of training rows it defines."""

from hybrid.dataset.config import DataConfig
from hybrid.dataset.prepare import prepare
from hybrid.dataset.store import Dataset
from hybrid.dataset.stream import Stream

__all__ = ["DataConfig", "Dataset", "Stream", "prepare"]
