"""A search over keys of an experiment: its space, its ranking, its report. It sees no Ray."""

from hybrid.sweep.ranking import (
    Trial,
    best_yaml,
    describe,
    note_reason,
    note_trial,
    ranked,
    read_reason,
    read_trial,
    say_trial,
    write_results,
)
from hybrid.sweep.report import write_report
from hybrid.sweep.space import Axis, draw, parse_space, trial_config, trial_name

__all__ = [
    "Axis",
    "Trial",
    "best_yaml",
    "describe",
    "draw",
    "note_reason",
    "note_trial",
    "parse_space",
    "ranked",
    "read_reason",
    "read_trial",
    "say_trial",
    "trial_config",
    "trial_name",
    "write_report",
    "write_results",
]
