"""A search over keys of an experiment: its space, its ranking, its report. It sees no Ray."""

from hybrid.sweep.report import write_report
from hybrid.sweep.results import (
    Trial,
    best_yaml,
    describe,
    format_trial,
    ranked,
    read_reason,
    read_trial,
    write_reason,
    write_results,
    write_trial,
)
from hybrid.sweep.space import Axis, draw, parse_space, trial_config, trial_name

__all__ = [
    "Axis",
    "Trial",
    "best_yaml",
    "describe",
    "draw",
    "format_trial",
    "parse_space",
    "ranked",
    "read_reason",
    "read_trial",
    "trial_config",
    "trial_name",
    "write_reason",
    "write_report",
    "write_results",
    "write_trial",
]
