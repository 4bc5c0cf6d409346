"""The only importer of ray. `launch` decides whether a job needs it at all."""

from hybrid.cluster.launch import encode, evaluate, joint, pretrain

__all__ = ["encode", "evaluate", "joint", "pretrain"]
