"""Checkpoints: whole or not there, by name, for both optimizers; what does not belong is refused."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from services.trainer import checkpoint as checkpoints
from services.trainer.checkpoint import CheckpointDamaged, CheckpointMismatch
from services.trainer.optim import build_adamw, set_learning_rates

BOTH = pytest.mark.parametrize("eight_bit", [False, True], ids=["32-bit", "8-bit"])


class Toy:
    """Two tensors, one of them large enough for 8-bit moments, and their optimizer."""

    def __init__(
        self, *, eight_bit: bool, order: tuple[str, ...] = ("large", "small"), dim: int = 64
    ) -> None:
        generator = torch.Generator().manual_seed(1)
        values = {
            "large": torch.randn(dim, 64, generator=generator),
            "small": torch.randn(64, generator=generator),
        }
        self.parameters = {name: torch.nn.Parameter(values[name]) for name in order}
        self.optimizer = build_adamw(
            [list(self.parameters.values())],
            betas=(0.9, 0.99),
            epsilon=1e-8,
            weight_decay=0.01,
            eight_bit=eight_bit,
        )

    def step(self, number: int) -> None:
        for offset, name in enumerate(("large", "small")):
            generator = torch.Generator().manual_seed(1000 * offset + number)
            parameter = self.parameters[name]
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        set_learning_rates(self.optimizer, [1e-2])
        self.optimizer.step()

    def save(self, folder: Path, step: int) -> Path:
        state = {"configuration": {"seed": 7, "rate": 0.1}, "counters": {"update": step}}
        captured = checkpoints.capture(self.parameters, self.optimizer, step=step, state=state)
        return checkpoints.write(folder, captured)


@BOTH
def test_a_restored_optimizer_goes_on_bit_for_bit(eight_bit: bool, tmp_path: Path) -> None:
    undisturbed = Toy(eight_bit=eight_bit)
    for number in range(10):
        undisturbed.step(number)
    first = Toy(eight_bit=eight_bit)
    for number in range(4):
        first.step(number)
    folder = first.save(tmp_path, 4)
    second = Toy(eight_bit=eight_bit)
    checkpoints.restore(checkpoints.read(folder), second.parameters, second.optimizer)
    for number in range(4, 10):
        second.step(number)
    for name, parameter in undisturbed.parameters.items():
        assert torch.equal(parameter, second.parameters[name])
        ours, theirs = undisturbed.optimizer.state[parameter], second.optimizer.state[second.parameters[name]]
        assert ours.keys() == theirs.keys()
        for entry, value in ours.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[entry])), (name, entry)


@BOTH
def test_state_follows_names_and_not_the_order_of_parameters(eight_bit: bool, tmp_path: Path) -> None:
    first, second = Toy(eight_bit=eight_bit), Toy(eight_bit=eight_bit, order=("small", "large"))
    first.step(0)
    checkpoints.restore(checkpoints.read(first.save(tmp_path, 1)), second.parameters, second.optimizer)
    first.step(1)
    second.step(1)
    assert all(torch.equal(first.parameters[name], second.parameters[name]) for name in first.parameters)


def test_eight_bit_moments_are_stored_as_eight_bits(tmp_path: Path) -> None:
    toy = Toy(eight_bit=True)
    toy.step(0)
    stored = checkpoints.read(toy.save(tmp_path, 1))
    assert stored.optimizer["large::state1"].dtype is torch.uint8
    assert stored.optimizer["small::state1"].dtype is torch.float32
    assert stored.scalars == {"large::step": 1, "small::step": 1}


def test_moments_keep_the_memory_layout_of_their_weights(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last))
    optimizer = build_adamw([[weight]], betas=(0.9, 0.99), epsilon=1e-8, weight_decay=0.0, eight_bit=False)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    before = optimizer.state[weight]["exp_avg"].clone()
    captured = checkpoints.capture({"w": weight}, optimizer, step=1, state={})
    restored = checkpoints.read(checkpoints.write(tmp_path, captured))
    checkpoints.restore(restored, {"w": weight}, optimizer)
    assert optimizer.state[weight]["exp_avg"].stride() == weight.stride()
    assert torch.equal(optimizer.state[weight]["exp_avg"], before)


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    toy = Toy(eight_bit=False)
    for step in (1, 2, 3, 10):
        toy.save(tmp_path, step)
    assert [folder.name for folder in checkpoints.finished(tmp_path)] == ["step-00000010", "step-00000003"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000010"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [cut, flip_a_bit, Path.unlink], ids=["cut", "altered", "missing"])
@pytest.mark.parametrize(
    "file", [checkpoints.WEIGHTS, checkpoints.OPTIMIZER, checkpoints.STATE, checkpoints.MANIFEST]
)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    file: str, damage: object, tmp_path: Path
) -> None:
    toy = Toy(eight_bit=False)
    toy.step(0)
    toy.save(tmp_path, 1)
    newest = toy.save(tmp_path, 2)
    if file == checkpoints.MANIFEST and damage is flip_a_bit:
        (newest / file).write_text((newest / file).read_text().replace("sha256", "sha255"))
    else:
        assert callable(damage)
        damage(newest / file)
    with pytest.raises(CheckpointDamaged):
        checkpoints.read(newest)
    found = checkpoints.read_newest(tmp_path)
    assert found is not None
    assert found.step == 1


def test_a_manifest_that_names_a_file_outside_its_folder_is_damage(tmp_path: Path) -> None:
    newest = Toy(eight_bit=False).save(tmp_path, 1)
    manifest = json.loads((newest / checkpoints.MANIFEST).read_text())
    manifest["files"].append({"name": "../secret", "size_bytes": 0, "sha256": ""})
    (newest / checkpoints.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointDamaged, match="outside"):
        checkpoints.read(newest)


def test_files_that_fit_their_manifest_and_are_no_weights_are_damage(tmp_path: Path) -> None:
    newest = Toy(eight_bit=False).save(tmp_path, 1)
    (newest / checkpoints.WEIGHTS).write_bytes(b"not tensors")
    manifest = json.loads((newest / checkpoints.MANIFEST).read_text())
    for entry in manifest["files"]:
        data = (newest / entry["name"]).read_bytes()
        entry |= {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (newest / checkpoints.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointDamaged):
        checkpoints.read(newest)


def test_without_any_whole_checkpoint_there_is_none(tmp_path: Path) -> None:
    assert checkpoints.read_newest(tmp_path / "nowhere") is None
    cut(Toy(eight_bit=False).save(tmp_path, 1) / checkpoints.WEIGHTS)
    assert checkpoints.read_newest(tmp_path) is None


def test_an_unfinished_write_is_not_a_checkpoint(tmp_path: Path) -> None:
    finished = Toy(eight_bit=False).save(tmp_path, 1)
    finished.rename(tmp_path / ".step-00000002.99")
    assert checkpoints.finished(tmp_path) == []


def test_another_configuration_is_refused_by_name_unless_it_may_differ(tmp_path: Path) -> None:
    stored = checkpoints.read(Toy(eight_bit=False).save(tmp_path, 1))
    other = {"seed": 8, "rate": 0.2}
    with pytest.raises(CheckpointMismatch, match="another rate, seed"):
        checkpoints.check_configuration(stored, other, may_differ=frozenset())
    with pytest.raises(CheckpointMismatch, match="another seed"):
        checkpoints.check_configuration(stored, other, may_differ=frozenset({"rate"}))
    checkpoints.check_configuration(stored, {"seed": 7, "rate": 9}, may_differ=frozenset({"rate"}))


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    stored = checkpoints.read(Toy(eight_bit=False).save(tmp_path, 1))
    other = Toy(eight_bit=False, dim=32)
    with pytest.raises(CheckpointMismatch, match="not those of this model"):
        checkpoints.restore(stored, other.parameters, other.optimizer)


def test_the_manifest_describes_every_file(tmp_path: Path) -> None:
    folder = Toy(eight_bit=False).save(tmp_path, 5)
    manifest = json.loads((folder / checkpoints.MANIFEST).read_text())
    listed = {entry["name"]: entry["size_bytes"] for entry in manifest["files"]}
    others = {
        path.name: path.stat().st_size for path in folder.iterdir() if path.name != checkpoints.MANIFEST
    }
    assert listed == others
    assert manifest["step"] == checkpoints.step_of(folder) == 5


def test_the_background_writer_reports_a_folder_once_and_raises_what_failed(tmp_path: Path) -> None:
    toy = Toy(eight_bit=False)
    captured = checkpoints.capture(toy.parameters, toy.optimizer, step=1, state={})
    writer = checkpoints.BackgroundWriter(tmp_path / "good")
    writer.start(captured)
    assert writer.wait() == tmp_path / "good" / "step-00000001"
    assert writer.collect() is None
    writer.close()
    (tmp_path / "file").write_text("in the way")
    blocked = checkpoints.BackgroundWriter(tmp_path / "file")
    blocked.start(captured)
    with pytest.raises(OSError, match="file"):
        blocked.wait()
    blocked.close()
