"""What all mains share: arguments, --dry-run, and exit codes."""

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
    """Reports a wrong command line as any other wrong input is: one line, no usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help shows the usage)")


def main(usage: str | None, run: Callable[[Config], Any], trains: str = "trm") -> NoReturn:
    """Parse the command line, run, exit: 0 done, 2 wrong input (one line), 1 anything else.

    `trains`: trm or hybrid, what a dry run estimates the memory of.
    """
    parser = _Parser(description=usage)
    parser.add_argument("--config", required=True, help="YAML file of an experiment")
    parser.add_argument("--dry-run", action="store_true", help="say what would run, and exit")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    console = logging.StreamHandler()
    console.setLevel(logging.WARNING)
    logging.basicConfig(handlers=[console], format="%(levelname)s %(message)s")
    signal.signal(signal.SIGTERM, _stop)
    try:
        # Intermixed: overrides may stand on both sides of --dry-run.
        arguments = parser.parse_intermixed_args()
        config = configs.load(arguments.config, arguments.overrides)
        _check_paths_outlive_job(config)
        if arguments.dry_run:
            print(configs.dump(config))
            print(estimate(config, trains))
        else:
            run(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (Stopped, KeyboardInterrupt) as stopped:
        print(f"stopped: {str(stopped) or 'the same command goes on'}", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)


def _check_paths_outlive_job(config: Config) -> None:
    """UserError if a submitted job would write into the folder that Ray has unpacked it in."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        return
    here = f"{os.getcwd()}/"
    for key, place in asdict(config.paths).items():
        if f"{place}/".startswith(here):
            raise UserError(
                f"paths.{key}={place.removeprefix(here)}: in a submitted job this is a folder of"
                " Ray's that goes with the job; give an absolute path or a URI"
            )


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """Ends a job as an error would: what it has opened is closed on the way out."""
    raise Stopped


def print_result(result: Result) -> None:
    """What a training run has learned, and where it is."""
    if result.trained is not None:
        before = "not measured" if result.untrained is None else f"{result.untrained:.1%}"
        print(f"training pairs exactly right: untrained {before}, trained {result.trained:.1%}")
    if result.validation is not None:
        print(f"held-out test outputs right within two attempts: {result.validation.rate}")
    print(f"step {result.step}: {storage.uri(result.checkpoint)}")
