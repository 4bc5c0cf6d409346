"""The only importer of ray. `launch` decides whether a job needs it at all."""

from hybrid.cluster.launch import evaluate, pretrain

__all__ = ["evaluate", "pretrain"]
