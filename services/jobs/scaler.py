"""KEDA's external scaler: how many jobs wait and run, for a cluster that adds and removes workers by it.

It reads the index of one api replica, as everything else that is only told does, and knows no worker and no device. A
trigger chooses one of three numbers in its metadata, and how much of it one worker is meant for:

    metric: waiting         jobs that a worker could take now
    metric: jobs            those, and the ones that workers have (default)
    metric: oldest_wait_s   seconds that the oldest waiting job has waited
    target: "4"             above 0, default 1
"""

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Final

from likeness.scaling.v1 import external_scaler_pb2 as pb
from likeness.scaling.v1.external_scaler_pb2_grpc import ExternalScalerServicer

from services.domain.errors import InvalidSpec
from services.jobs.index import JobIndex

SERVICE: Final = "externalscaler.ExternalScaler"
METRICS: Final = ("waiting", "jobs", "oldest_wait_s")
LOOK_S: Final = 0.5
"""Time between two looks for a change that a stream must tell."""


class Scaler(ExternalScalerServicer):
    """The numbers of one kind of jobs.

    Args:
        index: what this replica knows.
        now_ms: the present by the job log's clock, milliseconds since 1970.
        look_s: seconds between two looks of a stream.
    """

    def __init__(self, index: JobIndex, now_ms: Callable[[], int], look_s: float = LOOK_S) -> None:
        self._index = index
        self._now_ms = now_ms
        self._look_s = look_s

    def numbers(self) -> dict[str, float]:
        """The three numbers at this moment, by name."""
        counts = self._index.counts()
        with_workers = sum(self._index.running_by_project.values())
        waited_ms = max(0, self._now_ms() - counts.oldest_ready_ms) if counts.ready else 0
        return {
            "waiting": counts.ready,
            "jobs": counts.ready + with_workers,
            "oldest_wait_s": waited_ms / 1000,
        }

    @property
    def _active(self) -> bool:
        return self.numbers()["jobs"] > 0

    async def IsActive(self, request: pb.ScaledObjectRef, context: Any) -> pb.IsActiveResponse:
        """Whether jobs wait or run."""
        return pb.IsActiveResponse(result=self._active)

    async def StreamIsActive(
        self, request: pb.ScaledObjectRef, context: Any
    ) -> AsyncIterator[pb.IsActiveResponse]:
        """Whether jobs wait or run, now and at each change."""
        told: bool | None = None
        while True:
            if told is not self._active:
                told = self._active
                yield pb.IsActiveResponse(result=told)
            await asyncio.sleep(self._look_s)

    async def GetMetricSpec(self, request: pb.ScaledObjectRef, context: Any) -> pb.GetMetricSpecResponse:
        """The number that the trigger chose, and its target.

        Raises:
            InvalidSpec: there is no such number, or the target is not above 0.
        """
        target = target_of(request.scalerMetadata)
        spec = pb.MetricSpec(
            metricName=metric_of(request.scalerMetadata),
            targetSize=math.ceil(target),
            targetSizeFloat=target,
        )
        return pb.GetMetricSpecResponse(metricSpecs=[spec])

    async def GetMetrics(self, request: pb.GetMetricsRequest, context: Any) -> pb.GetMetricsResponse:
        """The present value of a number.

        Raises:
            InvalidSpec: there is no such number.
        """
        value = self.numbers()[checked_metric(request.metricName)]
        told = pb.MetricValue(
            metricName=request.metricName, metricValue=math.ceil(value), metricValueFloat=value
        )
        return pb.GetMetricsResponse(metricValues=[told])


def metric_of(metadata: Mapping[str, str]) -> str:
    """The number that a trigger chose."""
    return checked_metric(metadata.get("metric", "jobs"))


def checked_metric(name: str) -> str:
    """A number's name.

    Raises:
        InvalidSpec: there is no such number.
    """
    if name not in METRICS:
        raise InvalidSpec(f"must be one of {', '.join(METRICS)}", "metric")
    return name


def target_of(metadata: Mapping[str, str]) -> float:
    """How much of the number is meant for one worker.

    Raises:
        InvalidSpec: not a number above 0.
    """
    try:
        target = float(metadata.get("target", "1"))
    except ValueError:
        target = 0.0
    if not 0 < target < math.inf:
        raise InvalidSpec("must be a number above 0", "target")
    return target
