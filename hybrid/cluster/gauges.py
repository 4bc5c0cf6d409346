"""Gauges for the Ray dashboard, and for Prometheus if it scrapes the nodes' metrics ports."""

from __future__ import annotations

from collections.abc import Mapping

from ray.util.metrics import Gauge

SHOWN = {
    "loss": "training loss",
    "exact_accuracy": "share of rows that are exactly right, over the last steps",
    "samples_per_s": "training rows per second, over all workers",
    "waiting_for_rows": "share of time that rank 0 waits for rows",
    "step": "completed optimizer steps",
    "validation_right": "held-out test outputs right",
    "tasks_done": "evaluation tasks answered",
    "tasks_total": "evaluation tasks in total",
}


class Gauges:
    """Gauges arc_hybrid_<name> for each name in SHOWN, tagged with the run's name."""

    def __init__(self, run: str) -> None:
        self.gauges: dict[str, Gauge] = {}
        self.tags = {"run": run}

    def set(self, metrics: Mapping[str, float]) -> None:
        """Set the gauges of the metrics that SHOWN lists; ignore the others."""
        for name in SHOWN.keys() & metrics.keys():
            if name not in self.gauges:
                self.gauges[name] = Gauge(f"arc_hybrid_{name}", SHOWN[name], tag_keys=("run",))
            self.gauges[name].set(float(metrics[name]), tags=self.tags)
