"""Pool of evaluation actors with several questions in flight and replacement of lost actors."""

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
from hybrid.evaluate.records import Prediction
from hybrid.evaluate.run import PredictAll

log = logging.getLogger(__name__)

IN_FLIGHT = 2
"""Questions queued per actor, so that it does not wait for the driver between two."""
WAIT_FOR_NODES_S = 1800.0
"""Seconds to wait for a lost node when no actor is alive."""


class Evaluator:
    """Actor that holds a predictor; `actors_on_this_machine` sets its share of the CPU cores."""

    def __init__(self, job: Job, checkpoint: str, actors_on_this_machine: int) -> None:
        share_cores(actors_on_this_machine)
        self.job = job
        self.checkpoint = checkpoint
        self.predictor: TRMPredictor | HybridPredictor | None = None

    def ready(self) -> None:
        """Return once the actor has started."""

    def predict(self, question: Question) -> Prediction:
        """Predict the outputs of a question."""
        if self.predictor is None:  # in __init__ a UserError would kill the actor
            job = self.job
            if storage.is_uri(self.checkpoint):  # this node's cached copy
                job = replace(job, checkpoint=read(storage.folder(self.checkpoint)))
            self.predictor = open_predictor(job)
        return self.predictor.predict(question)


def predict_on_ray(config: Config) -> PredictAll:
    """Return a function that answers questions on actors, in order of completion."""

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
    """Actors by index. A question returns to the queue if its actor dies."""

    def __init__(self, config: Config, job: Job, size: int) -> None:
        nodes = max(1, sum(node["Alive"] for node in ray.nodes()))
        options = {
            "num_cpus": config.cluster.cpus_per_worker,
            "num_gpus": 1 if config.cluster.use_gpu else 0,
            "scheduling_strategy": "SPREAD",
        }
        self.actor_class = ray.remote(**options)(Evaluator)
        checkpoint = storage.uri(job.checkpoint.folder)
        self.arguments = ray.put(job), checkpoint, -(-size // nodes)
        self.replacements = config.cluster.max_failures
        self.pending: dict[int, dict[Any, Question]] = {n: {} for n in range(size)}
        self.actors: dict[int, Any] = {}
        self.starting: dict[Any, int] = {}
        for index in self.pending:
            self._start(index)

    def _start(self, index: int) -> None:
        self.actors[index] = self.actor_class.remote(*self.arguments)
        self.starting[self.actors[index].ready.remote()] = index

    def run(self, questions: Sequence[Question]) -> Iterator[Prediction]:
        """Yield one prediction per question, in order of completion."""
        queue = deque(questions)
        while queue or any(self.pending.values()):
            for index, pending in self.pending.items():
                alive = index not in self.starting.values()
                while alive and queue and len(pending) < IN_FLIGHT:
                    question = queue.popleft()
                    pending[self.actors[index].predict.remote(question)] = question
            refs = [*self.starting, *(ref for pending in self.pending.values() for ref in pending)]
            none_alive = len(self.starting) == len(self.actors)
            timeout = WAIT_FOR_NODES_S if none_alive else None
            done, _ = ray.wait(refs, num_returns=1, timeout=timeout)
            if not done:
                raise UserError(
                    f"cluster.num_workers: no evaluation actor could be placed for"
                    f" {WAIT_FOR_NODES_S / 60:.0f} minutes; check `ray status` for missing nodes"
                )
            yield from self._handle(done[0], queue)

    def _handle(self, ref: Any, queue: deque[Question]) -> Iterator[Prediction]:
        """Handle a completed reference: a started actor, a prediction, or an actor's death."""
        index = self.starting.get(ref)
        if index is None:
            index = next(index for index, pending in self.pending.items() if ref in pending)
        try:
            prediction = ray.get(ref)
        except (RayActorError, ObjectLostError) as error:
            queue.extendleft(self.pending[index].values())
            self.pending[index].clear()
            self.starting.pop(ref, None)
            self._replace(index, error)
        except UserError as error:
            # Ray's message is a traceback; the original exception is in `cause`.
            raise UserError(str(getattr(error, "cause", error))) from None
        else:
            if self.starting.pop(ref, None) is None:
                del self.pending[index][ref]
                yield prediction

    def _replace(self, index: int, error: RayActorError | ObjectLostError) -> None:
        if not getattr(error, "preempted", False):  # drained nodes do not count
            if self.replacements == 0:
                raise error
            self.replacements -= 1
        reason = str(error).partition("\n")[0]
        log.warning("evaluation actor %d lost, starting another: %s", index, reason)
        self._start(index)
