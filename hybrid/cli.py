"""Command line of all jobs: arguments, --dry-run, and exit codes."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from types import FrameType
from typing import Any, NoReturn

from hybrid import config as configs
from hybrid import storage
from hybrid.config import Config
from hybrid.errors import Stopped, UserError
from hybrid.train import Result, estimate


class _Parser(argparse.ArgumentParser):
    """Parser that reports a wrong command line as a one-line UserError without the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def main(usage: str | None, run: Callable[[Config], Any], kind: str = "trm") -> NoReturn:
    """Parse the command line, run the job, exit: 0 success, 2 wrong input (one line), 1 otherwise.

    `kind`: checkpoint kind (trm or hybrid) whose training memory a dry run estimates.
    """
    parser = _Parser(description=usage)
    parser.add_argument("--config", required=True, help="YAML config file (path or URI)")
    parser.add_argument("--dry-run", action="store_true", help="print config and estimates only")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    console = logging.StreamHandler()
    console.setLevel(logging.WARNING)
    logging.basicConfig(handlers=[console], format="%(levelname)s %(message)s")
    signal.signal(signal.SIGTERM, _stop)
    try:
        # Intermixed, so that overrides may come before and after --dry-run.
        arguments = parser.parse_intermixed_args()
        config = configs.load(arguments.config, arguments.overrides)
        _check_paths_outlive_job(config)
        if arguments.dry_run:
            print(configs.dump(config))
            print(estimate(config, kind))
        else:
            run(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (Stopped, KeyboardInterrupt) as stopped:
        print(f"stopped: {str(stopped) or 'run the same command to resume'}", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)


def _check_paths_outlive_job(config: Config) -> None:
    """Raise UserError if a submitted job would write to its working directory: Ray deletes it."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        return
    working_dir = f"{os.getcwd()}/"
    for key, path in asdict(config.paths).items():
        if f"{path}/".startswith(working_dir):
            raise UserError(
                f"paths.{key}={path.removeprefix(working_dir)}: Ray deletes the working directory"
                " of a submitted job; give an absolute path or a URI"
            )


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """Raise Stopped, so that the job unwinds and closes its resources."""
    raise Stopped


def print_result(result: Result) -> None:
    """Print the accuracies of a training run, its last step and its checkpoint."""
    before, after = result.train_accuracy_before, result.train_accuracy_after
    if after is not None:
        untrained = "not measured" if before is None else f"{before:.1%}"
        print(f"exact match on training pairs: untrained {untrained}, trained {after:.1%}")
    if result.validation is not None:
        print(f"held-out test outputs solved with two guesses: {result.validation.rate}")
    print(f"step {result.step}: {storage.uri(result.checkpoint)}")
