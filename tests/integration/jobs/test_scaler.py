"""KEDA's external scaler over real gRPC and a real log: what an autoscaler hears while jobs wait, run and end."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from likeness.inference.v1.generation_job_pb2 import GenerationResult
from likeness.scaling.v1 import external_scaler_pb2 as pb
from likeness.scaling.v1.external_scaler_pb2_grpc import ExternalScalerStub

from services.adapters.grpc_client import Channel
from services.adapters.jetstream import JetStreamPlatform
from services.domain.errors import InvalidSpec
from tests.integration.jobs.harness import Api, eventually, serving, worker
from tests.integration.nats_server import NatsServer
from tests.unit.jobs.harness import drawing


@pytest.fixture
async def api(own_nats_server: NatsServer) -> AsyncIterator[Api]:
    opening = JetStreamPlatform.open([own_nats_server.url], monitor_url=own_nats_server.monitor_url)
    async with await opening as platform, serving(platform) as api:
        yield api


async def value(stub: ExternalScalerStub, name: str) -> float:
    answer = await stub.GetMetrics(pb.GetMetricsRequest(metricName=name))
    (found,) = answer.metricValues
    assert found.metricName == name
    assert found.metricValue >= found.metricValueFloat > found.metricValue - 1
    return found.metricValueFloat


async def test_the_numbers_follow_jobs_that_wait_run_and_end(api: Api) -> None:
    async with Channel(api.address) as channel:
        stub = ExternalScalerStub(channel)
        told: list[bool] = []
        listening = asyncio.create_task(keep(stub, told))
        await eventually(lambda: told == [False])
        for name in ("a", "b", "c"):
            await api.core.records.write(drawing(name, now_ms=api.core.records.now_ms() - 5000), 0)
        await eventually(lambda: told == [False, True])
        assert [await value(stub, name) for name in ("waiting", "jobs")] == [3, 3]
        assert 5 <= await value(stub, "oldest_wait_s") < 60
        async with worker(api) as client:
            (job,) = await client.take()
            assert [await value(stub, name) for name in ("waiting", "jobs")] == [2, 3]
            await job.finished(GenerationResult())
            for _ in range(2):
                (job,) = await client.take()
                await job.finished(GenerationResult())
        await eventually(lambda: told == [False, True, False])
        assert [await value(stub, name) for name in ("waiting", "jobs", "oldest_wait_s")] == [0, 0, 0]
        assert not (await stub.IsActive(pb.ScaledObjectRef())).result
        listening.cancel()


async def keep(stub: ExternalScalerStub, told: list[bool]) -> None:
    async for each in stub.StreamIsActive(pb.ScaledObjectRef()):
        told.append(each.result)


async def test_a_trigger_chooses_its_number_and_target_and_hears_what_is_wrong(api: Api) -> None:
    async with Channel(api.address) as channel:
        stub = ExternalScalerStub(channel)

        async def spec(**metadata: str) -> pb.MetricSpec:
            answer = await stub.GetMetricSpec(pb.ScaledObjectRef(scalerMetadata=metadata))
            (found,) = answer.metricSpecs
            return found

        assert await spec() == pb.MetricSpec(metricName="jobs", targetSize=1, targetSizeFloat=1)
        wanted = pb.MetricSpec(metricName="oldest_wait_s", targetSize=3, targetSizeFloat=2.5)
        assert await spec(metric="oldest_wait_s", target="2.5", scalerAddress="x:1") == wanted
        with pytest.raises(InvalidSpec, match="must be one of waiting, jobs, oldest_wait_s"):
            await spec(metric="lag")
        for target in ("0", "-1", "many", "nan", "inf"):
            with pytest.raises(InvalidSpec, match="must be a number above 0"):
                await spec(target=target)
        with pytest.raises(InvalidSpec):
            await stub.GetMetrics(pb.GetMetricsRequest(metricName="s0-jobs"))


def test_the_calls_are_named_as_keda_names_them() -> None:
    service = pb.DESCRIPTOR.services_by_name["ExternalScaler"]
    assert service.full_name == "externalscaler.ExternalScaler"
    assert [method.name for method in service.methods] == [
        "IsActive",
        "StreamIsActive",
        "GetMetricSpec",
        "GetMetrics",
    ]
