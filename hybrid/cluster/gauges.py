"""Numbers on the Ray dashboard (and in Prometheus, if it reads the nodes' metrics ports)."""

from __future__ import annotations

from collections.abc import Mapping

from ray.util.metrics import Gauge

SHOWN = {
    "loss": "training loss",
    "exact_accuracy": "share of rows of the last steps that are exactly right",
    "samples_per_s": "training rows a second, over all workers",
    "waiting_for_rows": "share of the time that rank 0 spends on getting rows",
    "step": "optimiser steps done",
    "validation_right": "held-out test outputs right",
    "tasks_done": "evaluation tasks answered",
    "tasks_total": "evaluation tasks asked",
}


class Gauges:
    """arc_hybrid_<name> for each name in SHOWN, tagged with the run."""

    def __init__(self, run: str) -> None:
        self.gauges: dict[str, Gauge] = {}
        self.tags = {"run": run}

    def set(self, metrics: Mapping[str, float]) -> None:
        """Set those of `metrics` that are shown."""
        for name in SHOWN.keys() & metrics.keys():
            if name not in self.gauges:
                self.gauges[name] = Gauge(f"arc_hybrid_{name}", SHOWN[name], tag_keys=("run",))
            self.gauges[name].set(float(metrics[name]), tags=self.tags)
