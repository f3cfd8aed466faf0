"""What OpenAPI says of the stablediffusionapi dialect is what is served."""

from typing import Any

import pytest

from services.gateway.sdapi import ROUTES
from tests.unit.gateway.harness import KEY
from tests.unit.gateway.sdapi_world import World, world


async def description(sd: World) -> dict[str, Any]:
    return dict((await sd.http.get("/openapi.json")).json()["paths"])


async def test_every_route_is_described_and_its_example_is_answered_in_form() -> None:
    async with world() as sd:
        sd.storage.add("", "sd-v1-5", sd.storage.models["", "pocket"].manifest)
        paths = await description(sd)
        assert {path for path in paths if path.startswith("/api/")} == set(ROUTES)
        for path in ROUTES:
            [body] = paths[path]["post"]["requestBody"]["content"].values()
            sent = body["example"] | {"key": KEY}
            answer = (await sd.http.post(path.replace("{id}", "1"), json=sent)).json()
            if path.endswith(("fine_tune", "fine_tune_v2", "_list", "load")):
                shown = paths[path]["post"]["responses"]["200"]["content"]["application/json"]["example"]
                assert type(answer) is type(shown), path
                assert isinstance(answer, list) or answer.keys() == shown.keys(), (path, answer)


@pytest.mark.parametrize("operation", ["fine_tune_status", "text_to_image"])
async def test_described_answers_have_the_keys_of_real_ones(operation: str) -> None:
    async with world() as sd:
        path = next(path for path, name in ROUTES.items() if name == operation)
        content = (await description(sd))[path]["post"]["responses"]["200"]["content"]
        shown = content["application/json"]["example"]
        if operation == "fine_tune_status":
            real = await sd.status(await sd.train())
        else:
            asked = await sd.post(path, {"model_id": "pocket", "prompt": "x"})
            await sd.draw(str(asked["id"]))
            real = await sd.post(f"/api/v3/fetch/{asked['id']}")
        assert real.keys() == shown.keys()


async def test_names_of_operations_are_their_own() -> None:
    async with world() as sd:
        names = [
            operation["operationId"]
            for path in (await description(sd)).values()
            for operation in path.values()
            if "operationId" in operation
        ]
    assert len(names) == len(set(names)) > len(ROUTES)
