"""What is published is read back first: a fault of any writer or loader keeps the model from being published."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from likeness.training.v1 import training_job_pb2 as pb
from safetensors.torch import load_file, save_file

from services.diffusion.drawing import Drawing, draw_latents
from services.diffusion.exporting import save_text_encoder, save_unet
from services.diffusion.loading import load_components, load_single_file
from services.diffusion.lora import Factors, LoraWeights
from services.diffusion.lora_files import write_kohya
from services.domain.artifacts import SINGLE_FILE_NAME
from services.domain.errors import ExportMismatch, InvalidSpec
from services.trainer import adapters, export, whole_files
from services.trainer.export import assemble, compare_drawings
from services.trainer.shared_files import shared_paths
from services.trainer.support import check_supported
from tests.single_file_folder import write_single_file_folder
from tests.unit.trainer.harness import Bench, complete_spec

ONE_STEP: dict[str, Any] = {"max_train_steps": 1}
LORA: dict[str, Any] = {"method": pb.TRAINING_METHOD_LORA, "lora": pb.LoraSettings(rank=2, alpha=1)}
PROOF = Drawing("a dog", num_inference_steps=2, width_px=16, height_px=16, guidance_scale=1.0)


def change_a_weight(path: Path) -> None:
    tensors = load_file(path)
    name = sorted(tensors)[3]
    tensors[name].view(-1)[0] += 1e-4
    save_file(tensors, path, metadata={"format": "pt"})


def lose_a_weight(path: Path) -> None:
    tensors = load_file(path)
    del tensors[sorted(tensors)[3]]
    save_file(tensors, path, metadata={"format": "pt"})


def change_the_configuration(path: Path) -> None:
    config = path.with_name("config.json")
    values = json.loads(config.read_text())
    values["norm_num_groups"] = 4
    config.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (
            change_a_weight,
            "diffusion_pytorch_model.safetensors was not published: .* is not what was trained",
        ),
        (lose_a_weight, "was not published: 1 names differ"),
        (change_the_configuration, "read back from its files it draws otherwise"),
    ],
    ids=["a weight", "a name", "the configuration"],
)
def test_a_unet_that_was_not_written_as_it_is_is_not_published(
    damage: Callable[[Path], None], complaint: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_damaged(unet: Any, folder: Path, dtype: Any) -> list[Path]:
        files = save_unet(unet, folder, dtype)
        damage(folder / files[0])
        return files

    monkeypatch.setattr(export, "save_unet", save_damaged)
    with pytest.raises(ExportMismatch, match=complaint):
        bench.train(complete_spec(**ONE_STEP))


def test_a_part_that_does_not_reach_the_folder_is_noticed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The file is right, and nobody lists it: the base's text encoder would be drawn with.
    monkeypatch.setattr(export, "save_text_encoder", lambda *a: save_text_encoder(*a) and [])
    with pytest.raises(ExportMismatch, match="draws otherwise"):
        bench.train(complete_spec(max_train_steps=3, learning_rate=1e-2))


def test_an_adapter_file_with_another_alpha_is_not_published(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_other(weights: LoraWeights, *arguments: Any) -> None:
        modules = {name: Factors(f.a, f.b, f.rank) for name, f in weights.modules.items()}
        write_kohya(LoraWeights(modules), *arguments)

    monkeypatch.setattr(adapters, "write_kohya", write_other)
    with pytest.raises(ExportMismatch, match=r"kohya\.safetensors was not published"):
        bench.train(complete_spec(**LORA, **ONE_STEP))


def test_an_adapter_that_is_not_loaded_is_noticed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "adapter_name", lambda number: f"adapter-{number}.safetensors")
    with pytest.raises(ExportMismatch, match="draws otherwise"):
        bench.train(complete_spec(**LORA, max_train_steps=3, learning_rate=1e-1))


@pytest.mark.parametrize("values", [{}, LORA], ids=["full", "LoRA"])
def test_files_of_16_bits_draw_nearly_the_same(values: dict[str, Any], bench: Bench) -> None:
    trained = bench.train(complete_spec(save_full_precision=False, **values, **ONE_STEP))
    assert 0 < trained.report()["proof_difference"] < 0.02
    exact = bench.train(complete_spec(**values, **ONE_STEP), name="exact")
    assert exact.report()["proof_difference"] < 1e-5


def test_the_proof_leaves_nothing_behind(bench: Bench) -> None:
    trained = bench.train(complete_spec(**ONE_STEP))
    assert {path.name for path in trained.run.workdir.iterdir()} == {"export"}


def test_a_model_that_draws_nothing_finite_is_compared_by_its_tensors_only(bench: Bench) -> None:
    broken, whole = load_components(bench.model_folder), load_components(bench.model_folder)
    with torch.no_grad():
        broken.unet.conv_out.weight.fill_(3e38)
    assert compare_drawings(broken, whole, PROOF, tolerance=1e-3) is None
    with pytest.raises(ExportMismatch):
        compare_drawings(whole, broken, PROOF, tolerance=1e-3)
    assert compare_drawings(whole, whole, PROOF, tolerance=1e-3) == 0.0


@pytest.mark.parametrize("values", [{}, LORA], ids=["full", "LoRA"])
def test_a_training_of_a_single_file_is_read_back_too(
    values: dict[str, Any], bench: Bench, sd1_model_dir: Path
) -> None:
    folder = write_single_file_folder(sd1_model_dir, bench.folder / "single")
    trained = bench.train(complete_spec(**values, **ONE_STEP), model_folder=folder)
    assert trained.report()["proof_difference"] < 1e-4
    assemble(trained.run, trained.outcome.files[:-1], bench.folder / "model")
    assert (bench.folder / "model" / SINGLE_FILE_NAME).exists() == bool(values)
    base = draw_latents(load_components(folder), PROOF)
    assert not torch.equal(draw_latents(load_components(bench.folder / "model"), PROOF), base)


FOLDER = ["unet/a", "unet/lora-000.safetensors", "text_encoder/lora-000.safetensors", "vae/b"]
SINGLE = ["model.safetensors", "config/unet/config.json", "config/tokenizer/t", "config/scheduler/s"]


@pytest.mark.parametrize(
    ("base", "changed", "low_rank", "expected"),
    [
        (FOLDER, ["unet"], True, {path: path for path in FOLDER}),
        (FOLDER, ["unet"], False, {path: path for path in FOLDER if path != FOLDER[1]}),
        (SINGLE, ["unet"], True, {path: path for path in SINGLE}),
        (SINGLE, ["unet"], False, {"tokenizer/t": SINGLE[2], "scheduler/s": SINGLE[3]}),
    ],
    ids=["LoRA of a folder", "part of a folder", "LoRA of a file", "part of a file"],
)
def test_a_trained_model_shares_what_it_did_not_change(
    base: list[str], changed: list[str], low_rank: bool, expected: dict[str, str]
) -> None:
    assert shared_paths(base, changed=changed, low_rank=low_rank) == expected


WHOLE = [pb.EXPORT_FORMAT_SINGLE_FILE, pb.EXPORT_FORMAT_CKPT]


@pytest.mark.parametrize("full", [True, False], ids=["32 bits", "16 bits"])
@pytest.mark.parametrize("values", [{}, LORA], ids=["full", "LoRA"])
def test_export_formats_are_published_beside_the_model(
    values: dict[str, Any], full: bool, bench: Bench, sd1_model_dir: Path
) -> None:
    spec = complete_spec(
        export_formats=WHOLE, save_full_precision=full, max_train_steps=2, learning_rate=1e-2, **values
    )
    trained = bench.train(spec, model_folder=sd1_model_dir)
    folder, formats = trained.run.export_folder, trained.outcome.other_formats
    assert set(formats) == {"single_file", "ckpt"} | ({"lora_diffusers", "lora_kohya"} if values else set())
    single, pickled = folder / formats["single_file"], folder / formats["ckpt"]
    tensors = load_file(single)
    # The loader of the library reads it, and it draws what the model draws.
    read = load_single_file(single, sd1_model_dir)
    assemble(trained.run, trained.outcome.files[:-1], bench.folder / "model")
    expected = draw_latents(load_components(bench.folder / "model"), PROOF)
    difference = (draw_latents(read, PROOF) - expected).norm() / expected.norm()
    assert float(difference) < (1e-4 if full else 0.02)
    assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {
        torch.float32 if full else torch.float16
    }
    checkpoint = torch.load(pickled, weights_only=True)["state_dict"]
    assert checkpoint.keys() == tensors.keys()
    assert all(torch.equal(checkpoint[name], tensor) for name, tensor in tensors.items())


def test_a_single_file_that_lost_a_weight_on_its_way_is_not_published(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = whole_files._WRITERS[pb.EXPORT_FORMAT_SINGLE_FILE]

    def save_changed(components: Any, path: Path, dtype: Any) -> None:
        real[2](components, path, dtype)
        change_a_weight(path)

    changed = {pb.EXPORT_FORMAT_SINGLE_FILE: (*real[:2], save_changed)}
    monkeypatch.setattr(whole_files, "_WRITERS", changed)
    with pytest.raises(ExportMismatch, match=r"model\.safetensors was not published"):
        bench.train(complete_spec(export_formats=WHOLE, **ONE_STEP))


@pytest.mark.parametrize(
    ("formats", "rule"),
    [
        ([pb.EXPORT_FORMAT_SINGLE_FILE, pb.EXPORT_FORMAT_LORA_KOHYA], r"\[1\]: needs method LORA or LOCON"),
        ([pb.EXPORT_FORMAT_UNSPECIFIED], r"\[0\]: must be a known format"),
        ([99], r"\[0\]: must be a known format"),
    ],
    ids=["of adapters", "unspecified", "unknown"],
)
def test_a_format_that_a_training_does_not_have_is_refused(formats: list[int], rule: str) -> None:
    with pytest.raises(InvalidSpec, match=f"export_formats{rule}"):
        check_supported(complete_spec(export_formats=formats))
