"""DreamBooth fine-tuning (Ruiz et al. 2023): UNet and text encoder learn a subject from a few pictures.

Read `train` from top to bottom: it is the whole run. What it computes is a pure function of the specification, the
data and the base model; being interrupted, watched or slowed down changes nothing.

Shapes: b samples of one forward pass (instance samples first, class samples after them), c latent channels, h x w
latent pixels, n token positions, d text width.
"""

import json
import logging
import math
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from google.protobuf.json_format import MessageToDict
from likeness.training.v1 import training_job_pb2 as pb
from transformers import CLIPTextModel

from services.diffusion.exporting import save_model_index, save_text_encoder, save_unet, save_vae
from services.diffusion.loading import load_components, open_model
from services.domain.errors import BadInput
from services.trainer import checkpoint as checkpoints
from services.trainer.conditioning import TextConditioner, posterior_encoder
from services.trainer.counters import Counters, Pace
from services.trainer.data import Concept, EpochPlan, LatentSource, Pair, PictureReader, Use, fingerprint
from services.trainer.drawings import has_prior
from services.trainer.execution import Execution, resolve_execution, schedule_name
from services.trainer.guards import WATCHED_EVERY, WeightWatch, remarks
from services.trainer.losses import NoiseSchedule, add_noise, micro_step_loss, per_sample_mse, training_target
from services.trainer.optim import (
    LearningRateSchedule,
    build_adamw,
    clip_jointly,
    peak_learning_rate,
    set_learning_rates,
)
from services.trainer.randomness import GENERATOR_VERSION, Purpose, library_seed, normal, uniform_integer
from services.trainer.run import Ending, Observer, Outcome, Progress, Request, Run, Stage
from services.trainer.support import HONOURED, check_supported

logger = logging.getLogger(__name__)

MAY_DIFFER_ON_RESUME = frozenset({"maxTrainSteps", "numTrainEpochs", "saveFullPrecision"})
LARGE_EPSILON = 1e-3
REPORT = "training.json"


def train(run: Run, observer: Observer) -> Outcome:
    """Trains, exports and returns what was delivered; see `run` for the parts.

    Raises:
        InvalidSpec: the specification asks for what this recipe does not do.
        BadInput: base model or pictures cannot be used.
        CheckpointMismatch, CheckpointDamaged: `run.resume_from` is not a checkpoint of this run.
    """
    # --- what is asked for, and how this device does it -----------------------------------------------------
    spec, device = run.spec, run.device
    check_supported(spec)
    execution = resolve_execution(spec, device)
    concepts = _concepts_in_use(run)
    observer.stage(Stage.LOADING)

    # --- the model: float32 weights; what is computed in less is cast as it is used -------------------------
    parts = load_components(run.model_folder, torch.float32, device)
    unet, text_encoder = parts.unet, parts.text_encoder
    _prepare_module(unet, trains=spec.train_unet)
    _prepare_module(text_encoder, trains=spec.train_text_encoder)
    parts.vae.requires_grad_(False)
    if not execution.fused_attention:
        unet.set_attn_processor(AttnProcessor())
        text_encoder.set_attn_implementation("eager")
    if spec.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        if spec.train_text_encoder:
            text_encoder.activation_checkpointing_enable({"use_reentrant": False})
    noise_schedule = _noise_schedule(parts.scheduler_config).to(device)

    # --- the data: which picture when, and as which latents and text vectors --------------------------------
    plan = EpochPlan(
        concepts,
        seed=spec.seed,
        train_batch_size=spec.train_batch_size,
        gradient_accumulation_steps=spec.gradient_accumulation_steps,
    )
    total = spec.max_train_steps or spec.num_train_epochs * plan.updates_per_epoch
    reader = PictureReader(resolution=spec.resolution, center_crop=spec.center_crop)
    encode_picture = posterior_encoder(parts.vae, device, execution.vae_dtype)
    latents = LatentSource(reader, encode_picture, scaling_factor=parts.scaling_factor, seed=spec.seed)
    conditioner = TextConditioner(
        parts.tokenizer,
        text_encoder,
        max_length=parts.model_max_length,
        pad_tokens=spec.pad_tokens,
        trained=spec.train_text_encoder,
    )
    warnings = _warnings(run, concepts, conditioner, total)

    # --- the optimizer: one group a model, each with its own peak -------------------------------------------
    groups = _trained_groups(spec, unet, text_encoder)
    parameters = {name: parameter for group in groups.values() for name, parameter in group.items()}
    optimizer = build_adamw(
        [list(group.values()) for group in groups.values()],
        betas=(spec.adam_beta1, spec.adam_beta2),
        epsilon=spec.adam_epsilon,
        weight_decay=spec.adam_weight_decay,
        eight_bit=execution.eight_bit,
    )
    watch = WeightWatch(parameters)
    scaler = torch.amp.GradScaler(device.type, enabled=execution.compute_dtype is torch.float16)

    # --- where an earlier attempt stopped -------------------------------------------------------------------
    configuration = _configuration(run, concepts, execution, noise_schedule)
    counters = Counters(decay_steps=spec.lr_decay_steps or total)
    resumed = (
        checkpoints.read(run.resume_from)
        if run.resume_from
        else checkpoints.read_newest(run.checkpoint_folder)
    )
    if resumed is not None:
        checkpoints.check_configuration(resumed, configuration, may_differ=MAY_DIFFER_ON_RESUME)
        checkpoints.restore(resumed, parameters, optimizer)
        counters = Counters(**resumed.state["counters"])
        scaler.load_state_dict(resumed.state["scaler"])
        logger.info("training goes on from a checkpoint", extra={"step": resumed.step})
    rates = [_learning_rates(spec, name, counters.decay_steps) for name in groups]

    def capture() -> checkpoints.Checkpoint:
        state = {
            "configuration": configuration,
            "counters": counters.as_json(),
            "epoch": plan.epoch_of(counters.update),
            "scaler": scaler.state_dict(),
            "schedule": [asdict(rate) for rate in rates],
            "versions": _versions(device),
        }
        return checkpoints.capture(parameters, optimizer, step=counters.update, state=state)

    # --- the updates ----------------------------------------------------------------------------------------
    observer.stage(Stage.TRAINING, execution.summary)
    writer = checkpoints.BackgroundWriter(run.checkpoint_folder)
    pace = Pace(run.checkpoint_interval_s)
    ending = Ending.TRAINED
    saved_step = counters.update
    try:
        while counters.update < total:
            wanted = observer.request()
            if wanted is Request.STOP:
                return Outcome(Ending.STOPPED, counters.update, counters.final_loss)
            if wanted is Request.YIELD:
                ending = Ending.YIELDED
                break
            if (wanted is Request.CHECKPOINT or pace.checkpoint_is_due) and saved_step < counters.update:
                if not _all_finite(parameters.values()):
                    ending = Ending.DIVERGED
                    break
                if not writer.busy:
                    with pace.checkpoint():
                        writer.start(capture())
                    saved_step = counters.update
            if (folder := writer.collect()) is not None:
                observer.checkpoint_saved(folder, checkpoints.step_of(folder))

            # One update: all its samples first, because the means of the loss run over the whole update.
            with pace.update():
                update = counters.update
                batches = [
                    _collate(pairs, latents, spec.seed, noise_schedule.num_timesteps, device)
                    for pairs in plan.micro_steps(update)
                ]
                instance_total = sum(batch.num_instance for batch in batches)
                class_total = sum(len(batch.prompts) - batch.num_instance for batch in batches)
                if not instance_total:
                    _check_any_usable(concepts, latents.unusable)
                    counters.pass_over()
                    continue
                set_learning_rates(optimizer, [rate.learning_rate(update) for rate in rates])
                optimizer.zero_grad(set_to_none=True)
                torch.manual_seed(library_seed(spec.seed, Purpose.DROPOUT, update))
                loss = torch.zeros((), device=device)
                for batch in batches:
                    if not batch.prompts:
                        continue
                    zt = add_noise(noise_schedule, batch.z0, batch.e, batch.t)
                    with _autocast(device, execution.compute_dtype):
                        conditioning = conditioner.vectors(batch.prompts)  # [b, n, d]
                        prediction = unet(
                            zt, batch.t, encoder_hidden_states=conditioning
                        ).sample  # [b, c, h, w]
                    target = training_target(noise_schedule, batch.z0, batch.e, batch.t)
                    part = micro_step_loss(
                        per_sample_mse(prediction, target),
                        num_instance=batch.num_instance,
                        instance_total=instance_total,
                        class_total=class_total,
                        prior_loss_weight=spec.prior_loss_weight,
                    )
                    scaler.scale(part).backward()  # type: ignore[no-untyped-call]
                    loss += part.detach()
                scaler.unscale_(optimizer)
                norm = clip_jointly(list(parameters.values()), spec.max_grad_norm)
                loss_value, norm_value = float(loss), float(norm)

                # Only finite gradients reach the weights.
                finite = math.isfinite(loss_value) and math.isfinite(norm_value)
                if finite:
                    watched = update % WATCHED_EVERY == 0
                    if watched:
                        watch.mark()
                    scaler.step(optimizer)
                    if watched:
                        counters.largest_change = max(counters.largest_change, watch.change())
                if scaler.is_enabled():
                    scaler.update(None if finite else scaler.get_scale() / 2)
                if not finite and scaler.is_enabled() and scaler.get_scale() >= 1:
                    continue  # float16 overflow: the same update again, with a smaller scale
                counters.note(loss_value, finite=finite, samples=instance_total + class_total)
            counters.elapsed_s += pace.last_update_s
            if not finite:
                counters_text = {"update": update, "loss": loss_value, "gradient_norm": norm_value}
                drawn = [(batch.sample_ids, batch.t.tolist(), batch.prompts) for batch in batches]
                logger.warning("update left out: it is not finite", extra={**counters_text, "samples": drawn})
            if counters.diverged or (scaler.is_enabled() and scaler.get_scale() < 1):
                ending = Ending.DIVERGED
                break
            observer.progress(
                Progress(
                    step=counters.update,
                    total_steps=total,
                    loss=loss_value,
                    learning_rate=rates[0].learning_rate(update),
                    gradient_norm=norm_value,
                    seconds_left=pace.seconds_per_update * (total - counters.update),
                    images_per_second=(instance_total + class_total) / pace.seconds_per_update,
                )
            )

        # --- what is left of it -----------------------------------------------------------------------------
        if (folder := writer.wait()) is not None:
            observer.checkpoint_saved(folder, checkpoints.step_of(folder))
        if not _all_finite(parameters.values()):
            ending = Ending.DIVERGED
        if ending is Ending.YIELDED:
            folder = checkpoints.write(run.checkpoint_folder, capture())
            observer.checkpoint_saved(folder, counters.update)
            return Outcome(ending, counters.update, counters.final_loss, checkpoint=folder)
    finally:
        writer.close()
    step = counters.update
    warnings += [f"left out, it cannot be encoded: {name}" for name in latents.unusable]
    warnings += remarks(counters.spikes, counters.largest_change, watch.drift())
    if ending is Ending.DIVERGED:
        warnings.append("training diverged: these are the last good weights")
        good = checkpoints.read_newest(run.checkpoint_folder) or resumed
        if good is not None:
            checkpoints.restore(good, parameters, optimizer)
            step = good.step
        elif not _all_finite(parameters.values()):
            return Outcome(ending, 0, counters.final_loss, warnings=tuple(warnings))

    # --- the trained parts, as a diffusers folder has them --------------------------------------------------
    observer.stage(Stage.EXPORTING)
    report = {
        "seed": spec.seed,
        "steps": step,
        "ending": ending.value,
        "configuration": configuration,
        "versions": _versions(device),
        "execution": execution.summary,
        "deterministic": execution.deterministic,
        "threads": torch.get_num_threads(),
        "skipped_updates": counters.skipped,
        "samples_seen": counters.samples,
    }
    files = _export(run, unet, text_encoder, report, warnings)
    return Outcome(
        ending,
        step,
        counters.final_loss,
        export_folder=run.export_folder,
        files=tuple(files),
        warnings=tuple(warnings),
        report=report,
        execution_summary=execution.summary,
    )


@dataclass(frozen=True, slots=True)
class _Batch:
    """One forward pass: z0, e [b, c, h, w] float32, t [b] int64, instance samples first."""

    z0: torch.Tensor
    e: torch.Tensor
    t: torch.Tensor
    prompts: tuple[str, ...]
    sample_ids: tuple[str, ...]
    num_instance: int


def _collate(
    pairs: Iterable[Pair], latents: LatentSource, seed: int, num_timesteps: int, device: torch.device
) -> _Batch:
    """Draws latents, noise and timesteps of one micro-step; a picture that cannot be encoded is left out."""
    pairs = list(pairs)
    instance = _encoded([pair.instance for pair in pairs], latents)
    chosen = instance + _encoded([pair.class_use for pair in pairs if pair.class_use is not None], latents)
    uses = [use for use, _ in chosen]
    shape = tuple(chosen[0][1].shape) if chosen else ()
    noise = [normal(shape, seed, Purpose.NOISE, *use.coordinates) for use in uses]
    t = [uniform_integer(num_timesteps, seed, Purpose.TIMESTEP, *use.coordinates) for use in uses]
    return _Batch(
        z0=torch.stack([z0 for _, z0 in chosen]).to(device) if chosen else torch.empty(0),
        e=torch.stack(noise).to(device) if chosen else torch.empty(0),
        t=torch.tensor(t, dtype=torch.int64, device=device),
        prompts=tuple(use.picture.prompt for use in uses),
        sample_ids=tuple(use.picture.sample_id for use in uses),
        num_instance=len(instance),
    )


def _check_any_usable(concepts: Iterable[Concept], unusable: Iterable[str]) -> None:
    instances = {picture.sample_id for concept in concepts for picture in concept.instance_pictures}
    if instances <= set(unusable):
        raise BadInput("the model's autoencoder can encode none of the pictures")


def _encoded(uses: Iterable[Use], latents: LatentSource) -> list[tuple[Use, torch.Tensor]]:
    drawn = [(use, latents.latents(use)) for use in uses]
    return [(use, z0) for use, z0 in drawn if z0 is not None]


def _concepts_in_use(run: Run) -> tuple[Concept, ...]:
    """Returns the concepts; those that train without prior preservation lose their class pictures.

    A weight of zero means no class term at all: bit for bit the run without prior preservation.
    """
    weighted = run.spec.prior_loss_weight > 0
    asked = [*run.spec.concepts, *[pb.Concept()] * (len(run.concepts) - len(run.spec.concepts))]
    return tuple(
        concept if weighted and has_prior(run.spec, wish) else Concept(concept.instance_pictures)
        for concept, wish in zip(run.concepts, asked, strict=True)
    )


def _prepare_module(module: UNet2DConditionModel | CLIPTextModel, *, trains: bool) -> None:
    # The text encoder recomputes activations only in training mode, so the modes are explicit.
    module.requires_grad_(trains)
    module.train(trains)


def _noise_schedule(config: Mapping[str, Any]) -> NoiseSchedule:
    schedule = DDPMScheduler.from_config(dict(config))
    return NoiseSchedule(schedule.alphas_cumprod.float(), str(schedule.config.prediction_type))


def _trained_groups(
    spec: pb.TrainingSpec, unet: UNet2DConditionModel, text_encoder: CLIPTextModel
) -> dict[str, dict[str, torch.nn.Parameter]]:
    """Returns the trained parameters by model, then by name."""
    models = {"unet": unet} if spec.train_unet else {}
    if spec.train_text_encoder:
        models["text_encoder"] = text_encoder
    return {
        model: {f"{model}.{name}": parameter for name, parameter in module.named_parameters()}
        for model, module in models.items()
    }


def _learning_rates(spec: pb.TrainingSpec, model: str, decay_steps: int) -> LearningRateSchedule:
    own = model == "text_encoder" and spec.HasField("text_encoder_learning_rate")
    peak = peak_learning_rate(
        spec.text_encoder_learning_rate if own else spec.learning_rate,
        scale_lr=spec.scale_learning_rate,
        train_batch_size=spec.train_batch_size,
        gradient_accumulation_steps=spec.gradient_accumulation_steps,
    )
    return LearningRateSchedule(
        schedule_name(spec), peak, spec.lr_warmup_steps, decay_steps, spec.lr_num_cycles
    )


def _autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32)


def _all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def _configuration(
    run: Run, concepts: tuple[Concept, ...], execution: Execution, schedule: NoiseSchedule
) -> dict[str, Any]:
    """Returns everything that decides the weights, as JSON values; where the data came from is not among it."""
    fields = MessageToDict(run.spec, always_print_fields_with_no_presence=True)
    camel = {field.json_name for field in run.spec.DESCRIPTOR.fields if field.name in HONOURED - {"concepts"}}
    return {name: value for name, value in fields.items() if name in camel} | {
        "model": run.model_digest,
        "data": fingerprint(concepts),
        "device": run.device.type,
        "execution": execution.summary,
        "predictionType": schedule.prediction_type,
        "generator": GENERATOR_VERSION,
    }


def _versions(device: torch.device) -> dict[str, str]:
    packages = ("likeness", "torch", "diffusers", "transformers", "bitsandbytes", "numpy")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {package: version(package) for package in packages} | {"device": name}


def _warnings(run: Run, concepts: tuple[Concept, ...], conditioner: TextConditioner, total: int) -> list[str]:
    """Returns remarks on settings that are legal and hardly meant."""
    spec = run.spec
    prompts = sorted({picture.prompt for concept in concepts for picture in concept.pictures})
    lost = conditioner.truncated(prompts)
    warnings = [f'prompt "{prompt}" is too long; not used: "{rest}"' for prompt, rest in lost.items()]
    for concept in concepts:
        if concept.class_pictures and concept.instance_pictures[0].prompt == concept.class_pictures[0].prompt:
            warnings.append(
                "instance and class prompt are equal: the class term works against the instance term"
            )
    if spec.adam_epsilon >= LARGE_EPSILON:
        warnings.append(f"adam_epsilon {spec.adam_epsilon:g} is so large that hardly anything is learned")
    if spec.lr_warmup_steps > total and schedule_name(spec) != "constant":
        warnings.append("warm-up is longer than the training: the peak learning rate is never reached")
    return warnings


def _export(
    run: Run,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    report: Mapping[str, Any],
    warnings: list[str],
) -> list[Path]:
    """Writes what was trained, what the base cannot share, and the report; returns the files relative to the folder."""
    spec, folder = run.spec, run.export_folder
    trained = [
        module for module, on in ((unet, spec.train_unet), (text_encoder, spec.train_text_encoder)) if on
    ]
    dtype = torch.float32 if spec.save_full_precision else torch.float16
    if dtype is torch.float16 and not all(
        _all_finite(p.half() for p in module.parameters()) for module in trained
    ):
        dtype = torch.float32
        warnings.append("published in 32 bits: some weights are too large for 16")
    files = save_unet(unet, folder, dtype) if spec.train_unet else []
    if spec.train_text_encoder:
        files = [*files, *save_text_encoder(text_encoder, folder, dtype)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REPORT).write_text(json.dumps(report, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return [*files, *_export_frozen(run), Path(REPORT)]


def _export_frozen(run: Run) -> list[Path]:
    """Writes the frozen parts of a base that is one file, unchanged; those of a folder are shared as they lie."""
    base, spec, folder = open_model(run.model_folder, torch.float32), run.spec, run.export_folder
    if base.has_part_files:
        return []
    files = [save_model_index(folder, str(base.scheduler_config().get("_class_name", "DDIMScheduler")))]
    files += save_vae(base.load_vae(), folder)
    if not spec.train_unet:
        files += save_unet(base.load_unet(), folder)
    if not spec.train_text_encoder:
        files += save_text_encoder(base.load_text_encoder(), folder)
    return files
