"""arc-hybrid: train and evaluate hybrid ARC-AGI solvers on one laptop or a Ray cluster."""

__version__ = "0.1.0"
