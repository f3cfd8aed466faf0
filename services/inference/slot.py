"""One picture in the engine: where it stands between noise and latents, and with which others it can share a call.

A request for several pictures becomes several slots, since pictures of one request need nothing of each other.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from likeness.inference.v1 import generation_job_pb2 as pb
from torch import Tensor

from services.diffusion.drawing import Drawing, Row, begin, encode_context, size_px
from services.diffusion.embeddings import Embedding, with_words
from services.diffusion.init_images import InitImage
from services.diffusion.loading import Components
from services.diffusion.lora_rows import LoraRows, Worn
from services.diffusion.prompts import tokenize
from services.diffusion.samplers import Sampler
from services.domain.errors import InvalidSpec
from services.domain.generation_spec import check_offered
from services.inference.adapters import NO_LORAS, WornLoras


@dataclass(frozen=True, slots=True)
class SlotKey:
    """What slots must have in common to share a UNet call.

    Attributes:
        model: name of the UNet's weights.
        branches: 1 without guidance, 2 with.
        positions: token positions that the UNet attends to.
    """

    model: str
    latent_shape: tuple[int, ...]
    branches: int
    positions: int


@dataclass(slots=True, eq=False)
class Slot:
    """One picture on its way.

    Attributes:
        job: the request it belongs to.
        number: its place within the request, from 0.
        latents: float32 [1, c, h, w].
        context: [branches, n, d], unconditional first.
        done: UNet calls made.
        device_s: seconds that the device worked for it, its share of batched calls.
        init_image: what it starts from; None: noise.
        loras: what its rows of the UNet's input wear.
    """

    job: str
    number: int
    drawing: Drawing
    components: Components
    sampler: Sampler
    latents: Tensor
    context: Tensor
    key: SlotKey
    done: int = 0
    device_s: float = 0.0
    last_tick: int = field(default=-1)
    init_image: InitImage | None = None
    loras: Worn = ()

    @property
    def is_finished(self) -> bool:
        """All UNet calls are made."""
        return self.done >= self.sampler.calls

    @property
    def row(self) -> Row:
        """Its row in the next UNet call."""
        return Row(self.sampler, self.latents, self.done)

    @property
    def size_px(self) -> tuple[int, int]:
        """Width and height of the finished picture."""
        return size_px(self.components, self.drawing)


def drawings_of(spec: pb.GenerationSpec) -> list[Drawing]:
    """The pictures that a request asks for; picture i has the seed + i.

    Raises:
        InvalidSpec: naming each wish that this engine does not fulfil.
    """
    faults = check_offered(spec)
    if faults:
        raise InvalidSpec(faults)
    first = Drawing(
        prompt=spec.prompt,
        negative_prompt=spec.negative_prompt,
        width_px=spec.width_px,
        height_px=spec.height_px,
        num_inference_steps=spec.num_inference_steps,
        guidance_scale=spec.guidance_scale,
        guidance_rescale=spec.guidance_rescale,
        scheduler=spec.scheduler,
        use_karras_sigmas=spec.use_karras_sigmas,
        algorithm=spec.solver_algorithm,
        eta=spec.eta,
        clip_skip=max(1, spec.clip_skip),
        seed=spec.seed,
        strength=spec.strength if spec.init_image_key else None,
    )
    return [replace(first, seed=spec.seed + number) for number in range(spec.num_images)]


@torch.inference_mode()
def open_slots(
    job: str,
    model: str,
    components: Components,
    drawings: Sequence[Drawing],
    loras: WornLoras = NO_LORAS,
    init_image: InitImage | None = None,
    embeddings: Sequence[Embedding] = (),
) -> list[Slot]:
    """Make the slots of one request; equal prompts are encoded once.

    Args:
        job: name of the request.
        model: name of the UNet's weights; slots of the same can share a call.
        components: the model.
        drawings: pictures that differ in nothing but their seeds.
        loras: what they wear, fitted to these components.
        init_image: what they start from; None: noise.
        embeddings: words that their prompts may use beside the model's own.

    Raises:
        InvalidSpec: the model or its scheduler cannot do what is asked.
    """
    started = time.perf_counter()
    prompts = 2 if drawings[0].is_guided else 1
    with LoraRows([loras.text_encoder] * prompts).worn():
        context = encode_context(components, drawings[0], embeddings)
    share_s = (time.perf_counter() - started) / len(drawings)
    slots = []
    for number, drawing in enumerate(drawings):
        sampler, latents = begin(components, drawing, init_image)
        key = SlotKey(model, tuple(latents.shape), context.shape[0], context.shape[1])
        slot = Slot(job, number, drawing, components, sampler, latents, context, key)
        slot.device_s, slot.loras, slot.init_image = share_s, loras.unet, init_image
        slots.append(slot)
    return slots


def worded(drawings: Sequence[Drawing], embeddings: Sequence[Embedding]) -> list[Drawing]:
    """A request's pictures with the words of those embeddings in their prompts that neither prompt uses."""
    prompt, negative = with_words(drawings[0].prompt, drawings[0].negative_prompt, embeddings)
    return [replace(drawing, prompt=prompt, negative_prompt=negative) for drawing in drawings]


def truncation_warnings(
    components: Components, drawing: Drawing, embeddings: Sequence[Embedding] = ()
) -> list[str]:
    """One sentence for each prompt that does not fit the model's text encoder."""
    prompts = {"prompt": drawing.prompt, "negative prompt": drawing.negative_prompt}
    length = components.model_max_length
    tokens = tokenize(components.tokenizer, list(prompts.values()), length, embeddings=embeddings)
    return [
        f"the {name} is too long for this model; left out: {text}"
        for name, text in zip(prompts, tokens.dropped, strict=True)
        if text
    ]
