"""Checkpoints that torch has pickled: tensors come out bit for bit, programs do not run."""

import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from services.domain.errors import BadInput
from services.storage.torch_files import convert, is_torch_archive

NAME = "model.diffusion_model.weight"


def converted(state: Any, folder: Path) -> dict[str, torch.Tensor]:
    path = folder / "model.ckpt"
    torch.save(state, path)
    with zipfile.ZipFile(path) as archive:
        assert is_torch_archive(archive)
        convert(archive, folder / "model.safetensors")
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("nested", [True, False], ids=["under state_dict", "bare"])
def test_tensors_of_every_type_come_out_bit_for_bit(nested: bool, tmp_path: Path) -> None:
    large = torch.randn(40, 30)
    state = {
        "model.diffusion_model.half": torch.randn(3, 5).half(),
        "model.diffusion_model.parameter": torch.nn.Parameter(torch.randn(4)),
        "first_stage_model.part_of_another": large[10:20],
        "first_stage_model.number": torch.tensor(2.5, dtype=torch.float64),
        "cond_stage_model.position_ids": torch.arange(77).unsqueeze(0),
        "cond_stage_model.brain": torch.randn(7).bfloat16(),
        "cond_stage_model.empty": torch.empty(0, 3),
    }
    others = {"model_ema.decay": torch.tensor(0.9), "global_step": 5}
    content = {"state_dict": {**state, **others}, "epoch": 3} if nested else {**state, **others}
    found = converted(content, tmp_path)
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].dtype is tensor.dtype
        assert torch.equal(found[name], tensor.detach()), name


class Program:
    """Pickles as a call of whatever it is given."""

    def __init__(self, *call: Any) -> None:
        self._call = call

    def __reduce__(self) -> Any:
        return self._call[0], self._call[1:]


def test_a_pickle_that_calls_anything_is_refused_and_nothing_is_called(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    state = {NAME: torch.ones(2), "z": Program(Path.touch, mark)}
    with pytest.raises(BadInput, match="only tensors are read"):
        converted(state, tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize("call", [(eval, "1"), (getattr, "", "join"), (bytearray, 9)])
def test_builtins_are_refused_too(call: tuple[Any, ...], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"asks for (builtins|__builtin__)"):
        converted({NAME: Program(*call)}, tmp_path)


def archive_of(folder: Path, index: bytes, **entries: bytes) -> zipfile.ZipFile:
    path = folder / "made.ckpt"
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("archive/data.pkl", index)
        for name, data in entries.items():
            made.writestr(f"archive/{name.replace('__', '/')}", data)
    return zipfile.ZipFile(path)


@pytest.mark.parametrize(
    "index",
    [b"", b"not a pickle", pickle.dumps([1]), pickle.dumps({"a": 1}), pickle.dumps({"state_dict": 7})],
    ids=["empty", "garbage", "a list", "no tensors", "a number"],
)
def test_an_index_that_says_nothing_of_a_model_is_refused(index: bytes, tmp_path: Path) -> None:
    with archive_of(tmp_path, index) as archive, pytest.raises(BadInput, match="checkpoint"):
        convert(archive, tmp_path / "out")


def test_missing_numbers_are_refused(tmp_path: Path) -> None:
    torch.save({NAME: torch.ones(64)}, tmp_path / "whole.ckpt")
    with zipfile.ZipFile(tmp_path / "whole.ckpt") as whole:
        top = whole.namelist()[0].split("/")[0]
        index = whole.read(f"{top}/data.pkl")
    for entries in ({}, {"data__0": b"\0" * 9}):
        with (
            archive_of(tmp_path, index, **entries) as archive,
            pytest.raises(BadInput, match="lacks the num"),
        ):
            convert(archive, tmp_path / "out")


def test_tensors_that_do_not_lie_row_by_row_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="does not lie in memory"):
        converted({NAME: torch.ones(3, 4).t()}, tmp_path)


def test_bare_pickles_are_not_taken_for_archives(tmp_path: Path) -> None:
    with archive_of(tmp_path, b"") as archive:
        assert is_torch_archive(archive)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as made:
        made.writestr("a/b/data.pkl", b"")
    with zipfile.ZipFile(tmp_path / "other.zip") as archive:
        assert not is_torch_archive(archive)


def test_the_file_begins_each_tensor_where_its_type_may_begin(tmp_path: Path) -> None:
    converted({f"{NAME}.a": torch.ones(3).half(), f"{NAME}.b": torch.ones(5)}, tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    assert header[f"{NAME}.b"]["data_offsets"] == [0, 20]
    assert header[f"{NAME}.a"]["data_offsets"] == [20, 26]
