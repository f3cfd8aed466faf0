"""Captioned fine-tuning: a model learns from pictures of any shape, each with a caption of its own.

Read `train` from top to bottom: it is the whole run. The updates themselves are `updates.UpdateLoop`, which all recipes
share; what an epoch is made of is `captioned.CaptionedPlan`. What is computed is a pure function of the specification,
the data and the base model; being interrupted, watched or slowed down changes nothing.
"""

import logging
from dataclasses import asdict

from google.protobuf.json_format import MessageToDict

from services.domain.errors import BadInput
from services.trainer import data_report
from services.trainer.batches import Batch, BatchSource
from services.trainer.buckets import BucketReader, bucket_sizes
from services.trainer.captioned import CaptionedPlan, CaptionedUse
from services.trainer.captions import CaptionedPicture, fingerprint, rules_of, written_caption
from services.trainer.conditioning import TextConditioner, posterior_encoder
from services.trainer.data import LatentSource
from services.trainer.execution import resolve_execution
from services.trainer.export import export
from services.trainer.history import StageTimes
from services.trainer.losses import noise_schedule_of
from services.trainer.needs import estimate
from services.trainer.report import configuration_of, setting_remarks, write_report
from services.trainer.run import Ending, Observer, Outcome, Run, Stage
from services.trainer.schedules import learning_rates, total_updates
from services.trainer.support import check_supported
from services.trainer.trained_model import load_trained_model, parts_of
from services.trainer.updates import UpdateLoop

logger = logging.getLogger(__name__)


def train(run: Run, observer: Observer) -> Outcome:
    """Trains, exports and returns what was delivered; see `run` for the parts.

    Raises:
        InvalidSpec: the specification asks for what this recipe does not do, or this base model cannot.
        BadInput: base model or pictures cannot be used.
        CheckpointMismatch, CheckpointDamaged: `run.resume_from` is not a checkpoint of this run.
        ExportMismatch: what was written is not what was trained.
    """
    # --- what is asked for, and how this device does it -----------------------------------------------------
    spec, device, times = run.spec, run.device, StageTimes()
    check_supported(spec)
    execution = resolve_execution(spec, device)
    if run.captioned is None or not run.captioned.pictures:
        raise BadInput("there is no picture to train on")
    pictures = run.captioned.pictures
    observer.stage(Stage.LOADING)

    # --- the model: what trains is float32; what is computed in less is cast as it is used ------------------
    with times.of("loading"):
        model = load_trained_model(run, execution)
    parts = model.components
    schedule = noise_schedule_of(parts.scheduler_config, zero_terminal_snr=spec.zero_terminal_snr).to(device)

    # --- the data: which picture when, at which size, with which caption ------------------------------------
    plan = CaptionedPlan(
        pictures,
        seed=spec.seed,
        buckets=bucket_sizes(spec.resolution),
        train_batch_size=spec.train_batch_size,
        gradient_accumulation_steps=spec.gradient_accumulation_steps,
        epochs=spec.num_train_epochs,
        rules=rules_of(spec),
        rated_final_percent=spec.rated_dataset_final_percent if spec.rated_dataset else None,
    )
    total = total_updates(spec, plan.total_updates, parts_of(spec))
    reader = BucketReader(seed=spec.seed, crop_jitter=spec.crop_jitter, centre=spec.center_crop)
    encode_picture = posterior_encoder(parts.vae, device, execution.vae_dtype)
    latents = LatentSource[CaptionedUse](
        reader, encode_picture, scaling_factor=parts.scaling_factor, seed=spec.seed
    )
    conditioner = TextConditioner(
        parts.tokenizer,
        parts.text_encoder,
        max_length=parts.model_max_length,
        pad_tokens=spec.pad_tokens,
        trained=spec.train_text_encoder,
        clip_skip=spec.clip_skip,
    )
    source = BatchSource[CaptionedUse](
        latents,
        schedule,
        seed=spec.seed,
        device=device,
        caption=lambda use: use.caption,
        weight=lambda use: use.weight,
        offset_noise=spec.offset_noise,
        min_snr_gamma=spec.min_snr_gamma,
    )

    def batches_of(update: int) -> list[Batch]:
        batches = [source.batch(uses) for uses in plan.micro_steps(update)]
        if not any(batch.prompts for batch in batches):
            _check_any_usable(pictures, latents.unusable)
        return batches

    # --- the updates, from where an earlier attempt stopped -------------------------------------------------
    configuration = configuration_of(run, fingerprint(pictures), execution, schedule)
    loop = UpdateLoop(
        run,
        model,
        execution,
        schedule,
        conditioner,
        configuration=configuration,
        batches_of=batches_of,
        total=total,
        times=times,
    )
    loop.resume()
    planned = estimate(run, execution, total - loop.counters.update)
    observer.stage(Stage.TRAINING, execution.summary)
    ending = loop.run(observer)
    if ending in (Ending.STOPPED, Ending.YIELDED):
        return Outcome(ending, loop.counters.update, loop.counters.final_loss, checkpoint=loop.checkpoint)

    # --- what its owner should know -------------------------------------------------------------------------
    used = data_report.completed(
        run.captioned.report,
        plan.assignments,
        lost_words=conditioner.truncated(sorted({written_caption(picture) for picture in pictures})),
        unusable=latents.unusable,
        never_used=plan.never_used,
    )
    logger.info("data: %s", data_report.summary(used))
    warnings = data_report.remarks(used)
    warnings += setting_remarks(spec, learning_rates(spec, "unet", total).warmup_steps, total)
    warnings += loop.remarks()
    step = loop.counters.update
    if ending is Ending.DIVERGED:
        warnings.append("training diverged: these are the last good weights")
        last_good = loop.back_to_last_good()
        if last_good is None:
            return Outcome(ending, 0, loop.counters.final_loss, warnings=tuple(warnings))
        step = last_good

    # --- the trained weights as files, read back, and the report --------------------------------------------
    observer.stage(Stage.EXPORTING)
    state = loop.publish_state() if ending is Ending.TRAINED else {}
    loop.let_go()
    with times.of("exporting"), loop.average.in_place():
        exported = export(run, model)
    report = {
        "seed": spec.seed,
        "steps": step,
        "ending": ending.value,
        "configuration": configuration,
        "data": MessageToDict(used, preserving_proto_field_name=True),
        "weights": "moving average" if loop.average.enabled else "last",
        "clip_skip": spec.clip_skip,
        "proof_difference": exported.difference,
        "estimate": asdict(planned) if planned else None,
        **loop.report(),
    }
    written = write_report(run.export_folder, report)
    return Outcome(
        ending,
        step,
        loop.counters.final_loss,
        export_folder=run.export_folder,
        files=(*exported.files, written),
        other_formats={**exported.other_formats, **state},
        warnings=(*warnings, *exported.warnings),
        report=report,
        execution_summary=execution.summary,
    )


def _check_any_usable(pictures: tuple[CaptionedPicture, ...], unusable: list[str]) -> None:
    if {picture.sample_id for picture in pictures} <= set(unusable):
        raise BadInput("the model's autoencoder can encode none of the pictures")
