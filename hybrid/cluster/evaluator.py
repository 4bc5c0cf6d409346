"""Evaluation actors: plain actors, a few questions in flight, lost ones replaced."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError

from hybrid import storage
from hybrid.checkpoint import read
from hybrid.cluster.gauges import Gauges
from hybrid.cluster.runtime import cluster
from hybrid.config import Config
from hybrid.device import share_cores
from hybrid.errors import UserError
from hybrid.evaluate import HybridPredictor, Job, Question, TRMPredictor, open_predictor
from hybrid.evaluate.run import PredictAll
from hybrid.evaluate.trm_predictor import Prediction

log = logging.getLogger(__name__)

IN_FLIGHT = 2
"""Questions an actor holds: the next one is there when the last is done."""
WAIT_FOR_NODES_S = 1800.0
"""A lost node may come back; so long nobody need be there to answer."""


class Evaluator:
    """One actor: a solver that lives as long as the evaluation."""

    def __init__(self, job: Job, checkpoint: str, actors_on_this_machine: int) -> None:
        share_cores(actors_on_this_machine)
        self.job = job
        self.checkpoint = checkpoint
        self.solver: TRMPredictor | HybridPredictor | None = None

    def ready(self) -> None:
        """Returns when the actor lives."""

    def solve(self, question: Question) -> Prediction:
        """See Solver.solve. The solver is opened here: what the user did wrong must not look like
        the death of an actor.
        """
        if self.solver is None:
            job = self.job
            if storage.is_uri(self.checkpoint):  # another machine has another copy
                job = replace(job, checkpoint=read(storage.folder(self.checkpoint)))
            self.solver = open_predictor(job)
        return self.solver.solve(question)


def predict_on_ray(config: Config) -> PredictAll:
    """Answers questions on `cluster.num_workers` actors, in the order they are done."""

    def predict_all(job: Job, questions: Sequence[Question]) -> Iterator[Prediction]:
        size = min(config.cluster.num_workers, len(questions))
        with cluster(config, workers=size):
            gauges = Gauges(config.logging.run)
            gauges.set({"tasks_total": len(questions), "tasks_done": 0})
            for done, prediction in enumerate(_Pool(config, job, size).run(questions), start=1):
                gauges.set({"tasks_done": done})
                yield prediction

    return predict_all


class _Pool:
    """Actors by number; a question is given to one that lives, and comes back if it dies."""

    def __init__(self, config: Config, job: Job, size: int) -> None:
        machines = max(1, sum(node["Alive"] for node in ray.nodes()))
        options = {
            "num_cpus": config.cluster.cpus_per_worker,
            "num_gpus": 1 if config.cluster.use_gpu else 0,
            "scheduling_strategy": "SPREAD",
        }
        self.actor_class = ray.remote(**options)(Evaluator)
        place = storage.uri(job.checkpoint.folder)
        self.arguments = ray.put(job), place, -(-size // machines)
        self.replacements = config.cluster.max_failures
        self.held: dict[int, dict[Any, Question]] = {n: {} for n in range(size)}
        self.actors: dict[int, Any] = {}
        self.starting: dict[Any, int] = {}
        for number in self.held:
            self._start(number)

    def _start(self, number: int) -> None:
        self.actors[number] = self.actor_class.remote(*self.arguments)
        self.starting[self.actors[number].ready.remote()] = number

    def run(self, questions: Sequence[Question]) -> Iterator[Prediction]:
        """Every question is answered once; those a lost actor held go back into the queue."""
        waiting = deque(questions)
        while waiting or any(self.held.values()):
            for number, mine in self.held.items():
                alive = number not in self.starting.values()
                while alive and waiting and len(mine) < IN_FLIGHT:
                    question = waiting.popleft()
                    mine[self.actors[number].solve.remote(question)] = question
            refs = [*self.starting, *(ref for mine in self.held.values() for ref in mine)]
            nobody = len(self.starting) == len(self.actors)
            timeout = WAIT_FOR_NODES_S if nobody else None
            done, _ = ray.wait(refs, num_returns=1, timeout=timeout)
            if not done:
                raise UserError(
                    f"cluster.num_workers: no evaluation actor could be placed for"
                    f" {WAIT_FOR_NODES_S / 60:.0f} minutes; is a node gone for good?"
                )
            yield from self._take(done[0], waiting)

    def _take(self, ref: Any, waiting: deque[Question]) -> Iterator[Prediction]:
        """What came of one reference: an actor that lives now, an answer, or a death."""
        number = self.starting.get(ref)
        if number is None:
            number = next(number for number, mine in self.held.items() if ref in mine)
        try:
            prediction = ray.get(ref)
        except (RayActorError, ObjectLostError) as error:
            waiting.extendleft(self.held[number].values())
            self.held[number].clear()
            self.starting.pop(ref, None)
            self._replace(number, error)
        except UserError as error:
            # Ray has made a traceback of it; what was raised is its cause.
            raise UserError(str(getattr(error, "cause", error))) from None
        else:
            if self.starting.pop(ref, None) is None:
                del self.held[number][ref]
                yield prediction

    def _replace(self, number: int, error: RayActorError | ObjectLostError) -> None:
        if not getattr(error, "preempted", False):  # a node that was taken away is nobody's fault
            if self.replacements == 0:
                raise error
            self.replacements -= 1
        why = str(error).partition("\n")[0]
        log.warning("evaluation actor %d lost, starting another: %s", number, why)
        self._start(number)
