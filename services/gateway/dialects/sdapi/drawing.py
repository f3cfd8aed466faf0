"""Pictures of this dialect: `dreambooth`, from text, from pictures and with masks, as canonical words and back.

JSON types are part of the contract: clients decode strictly. `meta` echoes effective values, complete from the first
answer on; the names of the pictures are fixed when the request is accepted, so that links can be promised.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from likeness.inference.v1 import generation_job_pb2 as pb
from likeness.job.v1 import job_pb2
from likeness.storage.v1 import model_pb2

from services.domain.errors import InvalidSpec, Violation
from services.domain.generation_spec import MAX_EMBEDDINGS, MAX_LORAS, resolve_generation_spec
from services.domain.rules import MAX_SEED, Range
from services.gateway.dialects.base import FINAL_STATES
from services.gateway.dialects.sdapi import schedulers
from services.gateway.dialects.sdapi.envelope import check_fields, spoken, whole_seconds
from services.gateway.dialects.sdapi.values import (
    NO,
    NULLISH,
    YES,
    Parameter,
    Picture,
    Reading,
    read_body,
    yes_no,
)

ENDPOINT = "dreambooth"
"""Name of all drawings in `JobOrigin.endpoint`, whichever path they came in by."""
MAX_PROMPT_CHARS = 4000
DEFAULT_SIZE_PX = 512
DEFAULT_STEPS = 30
DEFAULT_STRENGTH = 0.7
MOST_STEPS = 51
MAX_ID = 2**31
"""Ids lie below it, for clients that keep them in 32 bits."""
UNKNOWN_WAIT_S = 10.0
SECONDS_PER_DRAWING = 5.0
"""What one request that waits is taken to cost, while nothing better is known."""

SENTENCES = {
    "v3": "Try to fetch request after given estimated time",
    "v4": "Try to fetch request after seconds estimated",
}
"""Clients compare these as whole sentences."""
STYLE_WORDS = ("highly detailed", "sharp focus", "professional lighting")
QUALITY_WORDS = ("blurry", "low quality", "deformed", "watermark")
"""What `enhance_prompt` adds to the prompt and to the negative prompt, as far as it is not there yet."""

_SPELLED: Mapping[str, str] = {
    "num_images": "samples",
    "width_px": "width",
    "height_px": "height",
    "model": "model_id",
    "loras": "lora_model",
    "embeddings": "embeddings_model",
    "init_image_key": "init_image",
    "mask_image_key": "mask_image",
}
PICTURES = ("init_image", "mask_image")
"""Parameters that are pictures; a specification's fields have `_key` after these names."""
TEXT_SUFFIX = ".base64"
"""Ending of the address under which a picture is served as text."""
_NOT_OFFERED = "is not offered by this installation"
_SWITCHES = ("multi_lingual", "panorama", "self_attention", "highres_fix", "safety_checker")
"""Wishes that no engine here fulfils; asked for, they are errors."""
_ADD_ONS = ("vae",)


def _switch(name: str, meaning: str, default: bool = False, *aliases: str) -> Parameter:
    return Parameter(name, "switch", meaning, yes_no(default), aliases=aliases)


def _integer(
    name: str, low: int, high: int | None, default: int | None, meaning: str, *aliases: str
) -> Parameter:
    return Parameter(name, "integer", meaning, default, limit=Range(name, low, high), aliases=aliases)


TEXT_TO_IMAGE = (
    Parameter("model_id", "text", "Id of a training, or of a catalogue model.", length=128),
    Parameter("prompt", "text", "What the picture shows.", required=True, length=MAX_PROMPT_CHARS),
    Parameter("negative_prompt", "text", "What it does not show.", length=MAX_PROMPT_CHARS),
    _integer("width", 64, 1024, DEFAULT_SIZE_PX, "Pixels; rounded to a multiple of 8."),
    _integer("height", 64, 1024, DEFAULT_SIZE_PX, "Pixels; rounded to a multiple of 8."),
    _integer("samples", 1, 4, 1, "Number of pictures; picture i has seed + i."),
    Parameter(
        "num_inference_steps",
        "integer",
        f"Denoising steps; clamped to 1..{MOST_STEPS}.",
        DEFAULT_STEPS,
        aliases=("steps",),
    ),
    Parameter("guidance_scale", "number", "Weight of the prompt.", 7.5, limit=Range("guidance_scale", 1, 20)),
    Parameter(
        "seed",
        "integer",
        "Seed of the first picture; absent or negative: drawn.",
        limit=Range("seed", -MAX_SEED, MAX_SEED - 4),
    ),
    Parameter("scheduler", "text", "Noise scheduler.", schedulers.DEFAULT, length=100),
    Parameter("algorithm_type", "text", "Variant of the DPM-Solver family.", length=100),
    _switch("use_karras_sigmas", "Karras' noise levels, where the scheduler knows them.", True),
    _integer("clip_skip", 1, 8, 1, "Layer of the text encoder from the end; 1 skips none.", "clipskip"),
    _switch("enhance_prompt", "Add words of style and quality to both prompts.", True),
    _switch("temp", "The picture's link lives for 24 hours instead of 7 days."),
    _switch("tomesd", "Token merging: not available, so that pictures are drawn without it."),
    _switch("multi_lingual", "Translation: yes is refused."),
    _switch("panorama", "Panoramas: yes is refused."),
    _switch("self_attention", "Self-attention guidance: yes is refused."),
    _switch("highres_fix", "Two passes: yes is refused."),
    _switch("safety_checker", "Classification: yes is refused.", False, "safetychecker"),
    _switch("base64", "Pictures in the answer itself, as base64."),
    Parameter(
        "lora_model",
        "models",
        f"Ids of LoRAs to add, at most {MAX_LORAS}: of trainings, or of the catalogue.",
        aliases=("lora",),
    ),
    Parameter(
        "lora_strength",
        "numbers",
        "Strength of each of them; a single one is for all.",
        1,
        limit=Range("lora_strength", 0, 2),
    ),
    Parameter(
        "embeddings_model",
        "models",
        f"Ids of textual inversion embeddings, at most {MAX_EMBEDDINGS}.",
        aliases=("embeddings",),
    ),
    Parameter("vae", "models", "Another VAE: refused."),
    Parameter("webhook", "link", "Address that is told of the end."),
    Parameter("track_id", "opaque", "Handed back in fetch and webhook."),
)
_FROM_A_PICTURE = tuple(
    replace(row, required=False) if row.name == "prompt" else row for row in TEXT_TO_IMAGE
)
IMAGE_TO_IMAGE = (
    *_FROM_A_PICTURE,
    Parameter(
        "init_image", "picture", "Picture to start from: an address, or the file in base64.", required=True
    ),
    Parameter(
        "strength",
        "number",
        "How far to move away from it: 1 ignores it.",
        DEFAULT_STRENGTH,
        limit=Range("strength", 0, 1),
    ),
)
INPAINT = (
    *IMAGE_TO_IMAGE,
    Parameter("mask_image", "picture", "White is repainted, black kept; as `init_image`.", required=True),
)
EXAMPLE = {
    "key": "lk-...",
    "model_id": "Qk3vT9xLm2",
    "prompt": "photo of adhik person on the beach",
    "negative_prompt": "blurry",
    "width": "512",
    "height": "512",
    "samples": "1",
    "num_inference_steps": "30",
    "seed": None,
    "guidance_scale": 7.5,
    "scheduler": schedulers.DEFAULT,
    "webhook": None,
    "track_id": None,
}
IMAGE_EXAMPLE = EXAMPLE | {"init_image": "https://files.example.org/1.png", "strength": 0.7}
INPAINT_EXAMPLE = IMAGE_EXAMPLE | {"mask_image": "https://files.example.org/mask.png"}


@dataclass(frozen=True, slots=True)
class Wish:
    """A request for pictures, understood as far as that goes without its model.

    Attributes:
        model: id; "": none was given.
        webhook: address that is told of the end; "": none.
        values: all other values.
        scheduler: which, and how it was named.
        tips: what the caller should know of the answer.
    """

    model: str
    webhook: str
    values: Mapping[str, Any]
    scheduler: schedulers.Choice
    tips: tuple[str, ...]

    @property
    def pictures(self) -> dict[str, Picture]:
        """What is started from, by parameter."""
        return {name: self.values[name] for name in PICTURES if name in self.values}


@dataclass(frozen=True, slots=True)
class Kept:
    """What is kept with a drawing for its answers.

    Attributes:
        version: v3 or v4, which decides on a sentence.
        file_prefix: secret part of the pictures' names.
        track_id: the caller's own; None: none.
        scheduler: name that was asked for.
        temp: the links live for a day.
        base64: pictures are handed out as text.
        tips: what the caller should know.
        init_image: address of the picture that is started from; "": none.
        mask_image: address of the mask; "": none.
    """

    version: str
    file_prefix: str
    track_id: str | int | float | None = None
    scheduler: str = schedulers.DEFAULT
    temp: bool = False
    base64: bool = False
    tips: Sequence[str] = field(default_factory=tuple)
    init_image: str = ""
    mask_image: str = ""

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "version": self.version,
            "file_prefix": self.file_prefix,
            "track_id": self.track_id,
            "scheduler": self.scheduler,
            "temp": self.temp,
            "base64": self.base64,
            "tips": list(self.tips),
            "init_image": self.init_image,
            "mask_image": self.mask_image,
        }


def kept_of(document: Any) -> Kept:
    """What :meth:`Kept.document` made; defaults for a drawing that has none."""
    known = {item.name for item in fields(Kept)}
    given = document if isinstance(document, dict) else {}
    return Kept(**{"version": "v4", "file_prefix": ""} | {key: given[key] for key in given if key in known})


def read_drawing(given: Mapping[str, Any], rows: Sequence[Parameter]) -> Wish:
    """Reads the body of `dreambooth`, `img2img` or `inpaint`.

    Args:
        given: the body.
        rows: :data:`TEXT_TO_IMAGE`, :data:`IMAGE_TO_IMAGE` or :data:`INPAINT`.

    Raises:
        InvalidSpec: with every fault, in the caller's spelling.
    """
    reading = read_body(given, rows)
    _check_offered(reading)
    _check_upscale(reading, given.get("upscale"))
    scheduler = _read_scheduler(reading)
    check_fields(reading.missing, reading.faults)
    values = reading.values
    tips = _tips(given, values, scheduler)
    return Wish(values.get("model_id", ""), values.get("webhook", ""), values, scheduler, tuple(tips))


def _check_offered(reading: Reading) -> None:
    for name in _SWITCHES:
        if reading.values.get(name):
            reading.fault(name, _NOT_OFFERED)
    for name in _ADD_ONS:
        if reading.values.get(name):
            reading.fault(name, f"{_NOT_OFFERED}: {', '.join(reading.values[name])[:200]}")


def _check_upscale(reading: Reading, given: Any) -> None:
    word = str("" if given is None else given).strip().lower()
    if word in (YES - {"1"}) | {"2", "3"}:
        reading.fault("upscale", _NOT_OFFERED)
    elif word not in NO | NULLISH | {"1"}:
        reading.fault("upscale", "must be yes or no")


def _read_scheduler(reading: Reading) -> schedulers.Choice:
    values = reading.values
    try:
        schedulers.algorithm_of(values.get("algorithm_type", "none"))
        return schedulers.choice_of(values.get("scheduler", schedulers.DEFAULT))
    except InvalidSpec as error:
        reading.faults += error.violations
        return schedulers.Choice(schedulers.DEFAULT)


def _tips(given: Mapping[str, Any], values: Mapping[str, Any], scheduler: schedulers.Choice) -> list[str]:
    tips = []
    if scheduler.row.runs_as:
        tips.append(f"{scheduler.name} makes noise of pictures; {scheduler.row.runs_as} is run in its place.")
    if scheduler.name == "LCMScheduler":
        tips.append("LCMScheduler needs a model that was distilled for it.")
    if values.get("tomesd"):
        tips.append("tomesd is not available; the picture is drawn without it.")
    if given.get("control_image"):
        tips.append("control_image is ignored.")
    if any(mark in values.get("prompt", "") for mark in ("((", ":1.", ":0.")):
        tips.append("Weights in the prompt are not applied; they are read as text.")
    return tips


def spec_of(
    wish: Wish, model: model_pb2.Model, drawn_seed: int, keys: Mapping[str, str] | None = None
) -> pb.GenerationSpec:
    """The drawing that is wished for.

    Args:
        wish: what was asked for.
        model: the one to draw with; words that call a catalogue model's subject are put before the prompt.
        drawn_seed: seed of a request that names none, or a negative one.
        keys: artifact keys of the wish's pictures, by parameter.

    Raises:
        InvalidSpec: with every fault, in the caller's spelling.
    """
    values, row = wish.values, wish.scheduler.row
    prompt, negative = _prompts(values, [] if model.project_id else model.manifest.trigger_words)
    seed = values.get("seed", -1)
    asked_karras = (
        values.get("use_karras_sigmas", True) if wish.scheduler.karras is None else wish.scheduler.karras
    )
    spec = pb.GenerationSpec(
        model=model.model,
        prompt=prompt,
        negative_prompt=negative,
        width_px=_rounded(values.get("width", DEFAULT_SIZE_PX)),
        height_px=_rounded(values.get("height", DEFAULT_SIZE_PX)),
        num_images=values.get("samples", 1),
        num_inference_steps=_steps(values.get("num_inference_steps", DEFAULT_STEPS), wish.scheduler.name),
        guidance_scale=values.get("guidance_scale", 7.5),
        scheduler=row.value,
        seed=seed if seed >= 0 else drawn_seed,
        use_karras_sigmas=asked_karras and row.karras,
        solver_algorithm=_algorithm(values, wish.scheduler),
        clip_skip=values.get("clip_skip", 0),
        loras=_loras(values),
        embeddings=[pb.Embedding(model=name) for name in values.get("embeddings_model", ())],
        init_image_key=(keys or {}).get("init_image", ""),
        mask_image_key=(keys or {}).get("mask_image", ""),
    )
    if spec.init_image_key:
        spec.strength = values.get("strength", DEFAULT_STRENGTH)
    try:
        return resolve_generation_spec(spec)
    except InvalidSpec as error:
        raise in_callers_words(error) from error


def _loras(values: Mapping[str, Any]) -> list[pb.LoraWeight]:
    names, strengths = values.get("lora_model", ()), values.get("lora_strength", [1.0])
    # A single strength is for all; of several, those that are missing are 1.
    filler = strengths[0] if len(strengths) == 1 else 1.0
    padded = [*strengths, *(filler for _ in names)]
    return [
        pb.LoraWeight(model=name, strength=strength) for name, strength in zip(names, padded, strict=False)
    ]


def _add_ons_echoed(spec: pb.GenerationSpec) -> dict[str, Any]:
    """Of `meta`: a number where one strength is for all, else a text."""
    strengths = [f"{lora.strength:g}" for lora in spec.loras]
    one = float(strengths[0]) if strengths else 1.0
    alike = len(set(strengths)) <= 1
    return {
        "embeddings": ",".join(entry.model for entry in spec.embeddings) or None,
        "lora": ",".join(lora.model for lora in spec.loras) or None,
        "lora_strength": (int(one) if one.is_integer() else one) if alike else ",".join(strengths),
    }


def _prompts(values: Mapping[str, Any], trigger_words: Sequence[str]) -> tuple[str, str]:
    prompt, negative = values.get("prompt", ""), values.get("negative_prompt", "")
    absent = [word for word in trigger_words if word.lower() not in prompt.lower()]
    prompt = ", ".join([*absent, prompt] if prompt else absent)
    if values.get("enhance_prompt", True):
        prompt, negative = _with_words(prompt, STYLE_WORDS), _with_words(negative, QUALITY_WORDS)
    return prompt, negative


def _with_words(text: str, words: Sequence[str]) -> str:
    """The text with those words after it that it has not; without any that would make it too long."""
    absent = [word for word in words if word not in text.lower()]
    longer = ", ".join([part for part in (text, *absent) if part])
    return longer if len(longer) <= MAX_PROMPT_CHARS else text


def _algorithm(values: Mapping[str, Any], choice: schedulers.Choice) -> pb.SolverAlgorithm:
    if not choice.name.startswith("DPMSolver"):
        return pb.SOLVER_ALGORITHM_UNSPECIFIED
    return schedulers.algorithm_of(values.get("algorithm_type") or choice.algorithm or "none")


def _rounded(pixels: int) -> int:
    return max(64, round(pixels / 8) * 8)


def _steps(asked: int, scheduler: str) -> int:
    most = schedulers.LCM_STEPS if scheduler == "LCMScheduler" else MOST_STEPS
    return min(max(asked, 1), most)


def in_callers_words(error: InvalidSpec) -> InvalidSpec:
    """An error about a specification with the fields of the request that made it."""
    told = []
    for fault in error.violations:
        name = fault.field.partition("[")[0]  # of a list's element the list is named
        told.append(Violation(_SPELLED.get(name, name), fault.rule))
    return InvalidSpec(told)


# --- bodies --------------------------------------------------------------------------------------------------


def picture_names(job: pb.GenerationJob, kept: Kept, suffix: str = ".png") -> list[str]:
    """File names of a drawing's pictures, known before they are drawn."""
    return [f"{index}-{kept.file_prefix}{suffix}" for index in range(job.spec.num_images)]


def picture_links(job: pb.GenerationJob, kept: Kept, base_url: str, suffix: str = ".png") -> list[str]:
    """Addresses of the pictures. Whoever has one may read it, as long as the drawing's record is kept."""
    root = f"{base_url}/generations/{job.project_id}/{job.job_id}"
    return [f"{root}/{name}" for name in picture_names(job, kept, suffix)]


def picture_key(job: pb.GenerationJob, kept: Kept, name: str) -> str:
    """Artifact key of the picture of this name, as a file or as text; "": there is none, or not yet."""
    suffix = TEXT_SUFFIX if name.endswith(TEXT_SUFFIX) else ".png"
    names = picture_names(job, kept, suffix) if kept.file_prefix else []
    index = names.index(name) if name in names else len(job.result.images)
    return job.result.images[index].key if index < len(job.result.images) else ""


def body_of(
    job: pb.GenerationJob,
    kept: Kept,
    base_url: str,
    now_ms: int,
    waiting: int = 0,
    texts: Sequence[str] = (),
) -> dict[str, Any]:
    """The answer that shows a drawing: finished, under way, or failed.

    Args:
        job: the drawing.
        kept: what is kept with it.
        base_url: what addresses begin with.
        now_ms: the present, milliseconds since 1970.
        waiting: drawings that come first, for the estimate.
        texts: the pictures in base64, where that was asked for; they take the place of their addresses.
    """
    if job.state == job_pb2.JOB_STATE_SUCCEEDED:
        return _success_body(job, kept, base_url, texts)
    if job.state in FINAL_STATES:
        return _failed_body(job, kept)
    return _processing_body(job, kept, base_url, seconds_left(job, now_ms, waiting))


def _success_body(job: pb.GenerationJob, kept: Kept, base_url: str, texts: Sequence[str]) -> dict[str, Any]:
    links = picture_links(job, kept, base_url, TEXT_SUFFIX if texts else ".png")[: len(job.result.images)]
    body = {
        "status": "success",
        "generationTime": float(job.result.device_seconds),
        "id": int(job.job_id),
        "output": list(texts) or links,
        "proxy_links": links,
        "webhook_status": "",
        "meta": meta_of(job, kept),
        "track_id": kept.track_id,
    }
    tips = [*kept.tips, *job.result.warnings]
    return body | ({"tip": " ".join(tips)} if tips else {})


def _processing_body(job: pb.GenerationJob, kept: Kept, base_url: str, eta: int) -> dict[str, Any]:
    sentence = SENTENCES.get(kept.version, SENTENCES["v4"])
    return {
        "status": "processing",
        "tip": " ".join(kept.tips) or "Ask again at fetch_result, or name a webhook.",
        "eta": eta,
        **spoken(sentence),
        "webhook_status": "",
        "fetch_result": f"{base_url}/api/v3/dreambooth/fetch/{job.job_id}",
        "id": int(job.job_id),
        "output": [],
        "meta": meta_of(job, kept),
        "future_links": picture_links(job, kept, base_url, TEXT_SUFFIX if kept.base64 else ".png"),
        "track_id": kept.track_id,
    }


def _failed_body(job: pb.GenerationJob, kept: Kept) -> dict[str, Any]:
    return {
        "status": "failed",
        "id": int(job.job_id),
        **spoken(job.error.message or "Failed, Try Again"),
        "output": [],
        "track_id": kept.track_id,
    }


def webhook_body(job: pb.GenerationJob, kept: Kept, base_url: str) -> dict[str, Any]:
    """What a webhook receives at the end; always the pictures' addresses."""
    return body_of(job, kept, base_url, 0)


def seconds_left(job: pb.GenerationJob, now_ms: int, waiting: int) -> int:
    """Seconds until the pictures are there: from the share that is done, else from how many come first."""
    begun = job.times.start_time.ToMilliseconds() if job.times.HasField("start_time") else 0
    share = job.progress.fraction
    if begun and 0 < share < 1:
        return whole_seconds((now_ms - begun) / 1000 * (1 - share) / share)
    return whole_seconds(UNKNOWN_WAIT_S + SECONDS_PER_DRAWING * waiting)


def meta_of(job: pb.GenerationJob, kept: Kept) -> dict[str, Any]:
    """The echo of a request: what really happens, not what was sent."""
    spec, row = job.spec, schedulers.SCHEDULERS.get(kept.scheduler)
    return {
        "prompt": spec.prompt,
        "model_id": spec.model,
        "negative_prompt": spec.negative_prompt,
        "scheduler": row.runs_as or kept.scheduler if row else kept.scheduler,
        "scheduler_requested": kept.scheduler,
        "safetychecker": "no",
        "safety_checker": "no",
        "W": spec.width_px,
        "H": spec.height_px,
        "guidance_scale": float(spec.guidance_scale),
        "seed": spec.seed,
        "steps": spec.num_inference_steps,
        "n_samples": spec.num_images,
        "full_url": "no",
        "upscale": "no",
        "multi_lingual": "no",
        "panorama": "no",
        "self_attention": "no",
        "highres_fix": "no",
        **_add_ons_echoed(spec),
        "clip_skip": max(1, spec.clip_skip),
        "temp": yes_no(kept.temp),
        "base64": yes_no(kept.base64),
        "tomesd": "no",
        "use_karras_sigmas": yes_no(spec.use_karras_sigmas),
        "vae": None,
        "outdir": "out",
        "file_prefix": kept.file_prefix,
        **_meta_of_pictures(spec, kept),
    }


def _meta_of_pictures(spec: pb.GenerationSpec, kept: Kept) -> dict[str, Any]:
    """What is started from; nothing where that is noise."""
    if not spec.init_image_key:
        return {}
    started = {"init_image": kept.init_image, "strength": float(spec.strength)}
    return started | ({"mask_image": kept.mask_image} if spec.mask_image_key else {})
