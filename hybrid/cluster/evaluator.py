"""Evaluation actors: plain actors, a few questions in flight, lost ones replaced."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError

from hybrid.cluster.runtime import cluster
from hybrid.config import Config
from hybrid.context import share_cores
from hybrid.errors import UserError
from hybrid.evaluate import HybridAnswerer, Job, Question, Solver, open_solver
from hybrid.evaluate.run import SolveAll
from hybrid.evaluate.solve import Prediction

log = logging.getLogger(__name__)

IN_FLIGHT = 2
"""Questions an actor holds: the next one is there when the last is done."""


class Evaluator:
    """One actor: a solver that lives as long as the evaluation."""

    def __init__(self, job: Job, actors_on_this_machine: int) -> None:
        share_cores(actors_on_this_machine)
        self.job = job
        self.solver: Solver | HybridAnswerer | None = None

    def solve(self, question: Question) -> Prediction:
        """See Solver.solve. The solver is opened here: what the user did wrong must not look like
        the death of an actor.
        """
        if self.solver is None:
            self.solver = open_solver(self.job)
        return self.solver.solve(question)


def ray_solve_all(config: Config) -> SolveAll:
    """Answers questions on `cluster.num_workers` actors, in the order they are done."""

    def solve_all(job: Job, questions: Sequence[Question]) -> Iterator[Prediction]:
        with cluster(config):
            pool = _Pool(config, job, min(config.cluster.num_workers, len(questions)))
            yield from pool.run(questions)

    return solve_all


class _Pool:
    def __init__(self, config: Config, job: Job, size: int) -> None:
        self.config = config
        machines = max(1, sum(node["Alive"] for node in ray.nodes()))
        options = {"num_cpus": config.cluster.cpus_per_worker}
        if config.cluster.use_gpu:
            options["num_gpus"] = 1
        self.actor_class = ray.remote(**options)(Evaluator)
        self.arguments = ray.put(job), -(-size // machines)
        self.replacements = config.cluster.max_failures
        self.actors = {n: self._start() for n in range(size)}

    def _start(self) -> Any:
        return self.actor_class.remote(*self.arguments)

    def run(self, questions: Sequence[Question]) -> Iterator[Prediction]:
        """Every question is answered once; those a lost actor held go back into the queue."""
        waiting = deque(questions)
        held: dict[int, dict[Any, Question]] = {number: {} for number in self.actors}
        while waiting or any(held.values()):
            for number, mine in held.items():
                while waiting and len(mine) < IN_FLIGHT:
                    question = waiting.popleft()
                    mine[self.actors[number].solve.remote(question)] = question
            (done,), _ = ray.wait([ref for mine in held.values() for ref in mine], num_returns=1)
            number = next(number for number, mine in held.items() if done in mine)
            try:
                prediction = ray.get(done)
            except RayActorError as error:
                waiting.extendleft(held[number].values())
                held[number].clear()
                self._replace(number, error)
            except UserError as error:
                # Ray has made a traceback of it; what was raised is its cause.
                raise UserError(str(getattr(error, "cause", error))) from None
            else:
                del held[number][done]
                yield prediction

    def _replace(self, number: int, error: RayActorError) -> None:
        if self.replacements == 0:
            raise error
        self.replacements -= 1
        log.warning("evaluation actor %d lost, starting another: %s", number, error)
        self.actors[number] = self._start()
