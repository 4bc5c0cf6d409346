"""Hyperparameter search: space, trial records, ranking, and report. It does not import Ray."""

from hybrid.sweep.report import write_report
from hybrid.sweep.results import (
    Status,
    Trial,
    TrialRecord,
    best_yaml,
    format_ranking,
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
    "Status",
    "Trial",
    "TrialRecord",
    "best_yaml",
    "draw",
    "format_ranking",
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
