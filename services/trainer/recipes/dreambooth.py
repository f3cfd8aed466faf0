"""DreamBooth fine-tuning (Ruiz et al. 2023): a model learns a subject from a few pictures, whole or by adapters.

Read `train` from top to bottom: it is the whole run. The updates themselves are `updates.UpdateLoop`, which all recipes
share. What is computed is a pure function of the specification, the data and the base model; being interrupted,
watched or slowed down changes nothing.
"""

from collections.abc import Iterable
from dataclasses import asdict

from likeness.training.v1 import training_job_pb2 as pb

from services.domain.errors import BadInput
from services.trainer.batches import Batch, BatchSource, prompt_caption
from services.trainer.captions import rules_of
from services.trainer.conditioning import TextConditioner, posterior_encoder
from services.trainer.data import Concept, EpochPlan, LatentSource, PictureReader, fingerprint
from services.trainer.drawings import has_prior
from services.trainer.execution import resolve_execution
from services.trainer.export import export
from services.trainer.history import StageTimes
from services.trainer.losses import noise_schedule_of
from services.trainer.needs import estimate
from services.trainer.report import configuration_of, prompt_remarks, setting_remarks, write_report
from services.trainer.run import Ending, Observer, Outcome, Run, Stage
from services.trainer.schedules import learning_rates, total_updates
from services.trainer.support import check_supported
from services.trainer.trained_model import load_trained_model, parts_of
from services.trainer.updates import UpdateLoop


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
    concepts = _concepts_in_use(run)
    observer.stage(Stage.LOADING)

    # --- the model: what trains is float32; what is computed in less is cast as it is used ------------------
    with times.of("loading"):
        model = load_trained_model(run, execution)
    parts = model.components
    schedule = noise_schedule_of(parts.scheduler_config, zero_terminal_snr=spec.zero_terminal_snr).to(device)

    # --- the data: which picture when, and as which latents and text vectors --------------------------------
    plan = EpochPlan(
        concepts,
        seed=spec.seed,
        train_batch_size=spec.train_batch_size,
        gradient_accumulation_steps=spec.gradient_accumulation_steps,
        balanced=spec.balance_concepts,
    )
    total = total_updates(spec, spec.num_train_epochs * plan.updates_per_epoch, parts_of(spec))
    reader = PictureReader(
        resolution=spec.resolution, center_crop=spec.center_crop, flip_probability=spec.flip_probability
    )
    encode_picture = posterior_encoder(parts.vae, device, execution.vae_dtype)
    latents = LatentSource(reader, encode_picture, scaling_factor=parts.scaling_factor, seed=spec.seed)
    conditioner = TextConditioner(
        parts.tokenizer,
        parts.text_encoder,
        max_length=parts.model_max_length,
        pad_tokens=spec.pad_tokens,
        trained=spec.train_text_encoder,
        clip_skip=spec.clip_skip,
    )
    rules = rules_of(spec)
    source = BatchSource(
        latents,
        schedule,
        seed=spec.seed,
        device=device,
        caption=lambda use: prompt_caption(use, rules),
        offset_noise=spec.offset_noise,
        min_snr_gamma=spec.min_snr_gamma,
    )

    def batches_of(update: int) -> list[Batch]:
        batches = [
            source.batch(
                [pair.instance for pair in pairs],
                [pair.class_use for pair in pairs if pair.class_use is not None],
            )
            for pairs in plan.micro_steps(update)
        ]
        if not any(batch.num_instance for batch in batches):
            _check_any_usable(concepts, latents.unusable)
        return batches

    # --- the updates, from where an earlier attempt stopped -------------------------------------------------
    configuration = configuration_of(run, fingerprint(concepts), execution, schedule)
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
    pictures = [picture for concept in concepts for picture in concept.pictures]
    warmup_steps = learning_rates(spec, "unet", total).warmup_steps
    warnings = prompt_remarks(conditioner, [picture.prompt for picture in pictures])
    warnings += _concept_remarks(concepts) + setting_remarks(spec, warmup_steps, total)
    warnings += [f"left out, it cannot be encoded: {name}" for name in latents.unusable]
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


def _check_any_usable(concepts: Iterable[Concept], unusable: Iterable[str]) -> None:
    instances = {picture.sample_id for concept in concepts for picture in concept.instance_pictures}
    if instances <= set(unusable):
        raise BadInput("the model's autoencoder can encode none of the pictures")


def _concept_remarks(concepts: Iterable[Concept]) -> list[str]:
    remark = "instance and class prompt are equal: the class term works against the instance term"
    return [
        remark
        for concept in concepts
        if concept.class_pictures and concept.instance_pictures[0].prompt == concept.class_pictures[0].prompt
    ]
