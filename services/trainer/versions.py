"""Versions: models of a training that is not over, each made of one of its checkpoints.

They are made in a process of their own: loading a model and drawing with it, as a proof demands, would hold the
training up and disturb the state that libraries keep for a whole process. What is published is what the end of a
training at that update would publish.
"""

from pathlib import Path

from services.trainer import checkpoint as checkpoints
from services.trainer.counters import Counters
from services.trainer.execution import resolve_execution
from services.trainer.export import export
from services.trainer.history import History
from services.trainer.moving_average import MovingAverage
from services.trainer.report import write_report
from services.trainer.run import Ending, Observer, Outcome, Run, Stage
from services.trainer.trained_model import load_trained_model
from services.trainer.updates import packed_state


def publish_version(run: Run, checkpoint: Path, observer: Observer) -> Outcome:
    """Writes the weights of a checkpoint as a model, as the end of a training does, and reads them back.

    Args:
        run: what the training was asked for; `workdir` gets the export.
        checkpoint: folder of the checkpoint; with `save_optimizer` it is published too.
        observer: hears that the export has begun.

    Raises:
        BadInput: the base model cannot be used.
        CheckpointMismatch, CheckpointDamaged: the folder is not a checkpoint of this run.
        ExportMismatch: what was written is not what was trained.
    """
    observer.stage(Stage.EXPORTING)
    found = checkpoints.read(checkpoint, with_optimizer=False)
    model = load_trained_model(run, resolve_execution(run.spec, run.device))
    checkpoints.restore_weights(found, model.parameters)
    average = MovingAverage(model.parameters, run.spec.ema_decay)
    average.restore(found.average, found.state["average_updates"])
    state = packed_state(checkpoint, run.export_folder) if run.spec.save_optimizer else {}
    with average.in_place():
        exported = export(run, model)
    report = {
        "seed": run.spec.seed,
        "steps": found.step,
        "ending": "goes on",
        "configuration": found.state["configuration"],
        "weights": "moving average" if average.enabled else "last",
        "clip_skip": run.spec.clip_skip,
        "proof_difference": exported.difference,
        "history": History.restored(found.state["history"]).as_json(),
        "versions": found.state["versions"],
    }
    written = write_report(run.export_folder, report)
    return Outcome(
        Ending.TRAINED,
        found.step,
        Counters(**found.state["counters"]).final_loss,
        export_folder=run.export_folder,
        files=(*exported.files, written),
        other_formats={**exported.other_formats, **state},
        warnings=exported.warnings,
        report=report,
    )
