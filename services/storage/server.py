"""Puts the parts of storage together and serves them."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from likeness.access.v1.access_service_pb2_grpc import add_AccessServiceServicer_to_server
from likeness.storage.v1.storage_service_pb2_grpc import add_StorageServiceServicer_to_server

from services.adapters.egress import Egress, EgressPolicy
from services.adapters.grpc_server import GrpcServer
from services.adapters.settings import StorageSettings
from services.storage.access import Access, AccessServicer
from services.storage.archives import ArchiveLimits
from services.storage.blobs import Blobs
from services.storage.bootstrap import bootstrap
from services.storage.catalogue import DEFAULT_CATALOGUE, Catalogue, CataloguePlaces, read_catalogue
from services.storage.datasets import DatasetImporter, ImportLimits
from services.storage.documents import Documents, References
from services.storage.links import FileLinks, signing_key
from services.storage.model_imports import ModelImporter, ModelLimits
from services.storage.registry import ModelRegistry
from services.storage.retention import Retention
from services.storage.servicer import StorageServicer
from services.storage.stores import OpenStore, opened_store

STORAGE_SERVICE = "likeness.storage.v1.StorageService"
ACCESS_SERVICE = "likeness.access.v1.AccessService"


@dataclass(frozen=True, slots=True)
class Storage:
    """The running parts."""

    server: GrpcServer
    access: Access
    catalogue: Catalogue
    retention: Retention


async def serve(settings: StorageSettings) -> None:
    """Serves until SIGTERM; the catalogue's local models are imported meanwhile.

    Raises:
        InvalidSpec: the catalogue, the bootstrap key file, or the place of artifacts is wrong.
        Unavailable: nothing answers where artifacts are to be kept.
    """
    async with running(settings) as storage:
        work = (storage.catalogue.run(), storage.access.run(), storage.retention.run())
        await storage.server.run_until_signalled(*work)
        await storage.access.note_uses()


@asynccontextmanager
async def running(settings: StorageSettings) -> AsyncIterator[Storage]:
    """Opens the store and listens; leaves the background work to the caller."""
    async with opened_store(settings) as opened:
        documents = Documents(opened.store)
        access = Access(documents, _now_ms, time.monotonic)
        if settings.bootstrap_key_file is not None:
            await bootstrap(access, settings.bootstrap_key_file)
        servicer, catalogue = await _made(settings, opened, documents)
        server = GrpcServer(settings.storage_addr, grace_s=settings.grace_s, ready_fd=settings.ready_fd)
        server.add(add_StorageServiceServicer_to_server, servicer, STORAGE_SERVICE)
        server.add(add_AccessServiceServicer_to_server, AccessServicer(access), ACCESS_SERVICE)
        async with server:
            yield Storage(server, access, catalogue, Retention(opened.sweep))


async def _made(
    settings: StorageSettings, opened: OpenStore, documents: Documents
) -> tuple[StorageServicer, Catalogue]:
    store, work = opened.store, opened.work
    blobs = Blobs(store, work, opened.direct, opened.direct_bytes)
    registry = ModelRegistry(blobs, documents, _now_ms, settings.base_model)
    entries = read_catalogue(settings.models) if settings.models else DEFAULT_CATALOGUE
    places = CataloguePlaces(work)
    catalogue = Catalogue(entries, registry, blobs, documents, places)
    egress = Egress(EgressPolicy(allow=settings.egress_allow))
    datasets = DatasetImporter(store, egress, work, import_limits(settings))
    limits = ModelLimits(max_bytes=settings.max_model_bytes)
    models = ModelImporter(blobs, registry, egress, work, places.hub_endpoint, limits)
    links = FileLinks(await signing_key(documents), _now_ms)
    return StorageServicer(blobs, References(store), datasets, registry, catalogue, links, models), catalogue


def import_limits(settings: StorageSettings) -> ImportLimits:
    """What one import of pictures may cost, as the operator has set it."""
    red, green, blue = bytes.fromhex(settings.alpha_background.removeprefix("#"))
    return ImportLimits(
        max_archive_bytes=settings.max_archive_bytes,
        max_pixels=settings.max_image_pixels,
        background=(red, green, blue),
        archive=ArchiveLimits(
            max_files=settings.max_archive_files,
            max_unpacked_bytes=settings.max_unpacked_bytes,
            max_ratio=settings.max_archive_ratio,
        ),
    )


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
