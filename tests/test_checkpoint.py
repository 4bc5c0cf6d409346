"""Checkpoints are atomic, and damaged files are detected and reported by name."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from helpers import stop_in_seal

from hybrid.checkpoint import newest, prune, read, seal, write_tensors
from hybrid.errors import UserError

Start = Callable[..., BaseProcess]

FILES = ["config.yaml", "slots_0.safetensors", "slots_1.safetensors", "state.json"]


def write(folder: Path, value: float = 1.0) -> Path:
    partial = folder.with_suffix(".partial")
    for rank in range(2):
        tensors = {"a": torch.full((2, 3), value), "flags": torch.tensor([True, False])}
        write_tensors(partial, f"slots_{rank}", tensors)
    seal(partial, folder, {"step": 4, "nested": {"x": [1, 2.5, None]}}, {"config.yaml": "a: 1\n"})
    return folder


def test_a_checkpoint_round_trips(tmp_path: Path) -> None:
    checkpoint = read(write(tmp_path / "runs" / "step_00000004"))
    assert {path.name for path in checkpoint.folder.iterdir()} == set(FILES)
    assert checkpoint.state["step"] == 4 and checkpoint.state["nested"] == {"x": [1, 2.5, None]}
    assert [path.stem for path in checkpoint.files("slots_")] == ["slots_0", "slots_1"]
    tensors = checkpoint.tensors("slots_1")
    assert torch.equal(tensors["a"], torch.ones(2, 3))
    assert tensors["flags"].tolist() == [True, False]


def test_the_digest_depends_only_on_the_content(tmp_path: Path) -> None:
    one, same, other = (
        read(write(tmp_path / name / "step_00000004", value)).digest
        for name, value in (("a", 1.0), ("b", 1.0), ("c", 1.0 + 1e-7))
    )
    assert one == same != other


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_detected_anywhere(tmp_path: Path, name: str) -> None:
    """In state.json only letters and digits are flipped, because whitespace does not count."""
    path = write(tmp_path / "step_00000004") / name
    data = path.read_bytes()
    offsets = [i for i, byte in enumerate(data) if name != "state.json" or chr(byte).isalnum()]
    for i in offsets[:: max(1, len(offsets) // 60)] + offsets[-1:]:
        path.write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
        with pytest.raises(UserError, match=name):
            read(path.parent)
    path.write_bytes(data)
    read(path.parent)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0.0, 0.5, None])
def test_a_truncated_or_missing_file_is_reported_by_name(
    tmp_path: Path, name: str, keep: float | None
) -> None:
    path = write(tmp_path / "step_00000004") / name
    if keep is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(UserError, match=name):
        read(path.parent)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{not json", "cannot be read"),
        ("\xff\xfe", "cannot be read"),
        ("[1, 2]", "not a checkpoint of format 2"),
        ('{"format": 1, "files": {}}', "checkpoint format 1, but this version reads format 2"),
        ('{"format": 2}', "not a checkpoint of format 2"),
        ('{"format": 2, "files": {}}', "damaged"),
    ],
)
def test_a_malformed_state_json_is_reported(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "step_00000004") / "state.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=rf"state\.json: {message}"):
        read(path.parent)


def test_a_sealed_file_that_is_not_safetensors_is_reported(tmp_path: Path) -> None:
    partial, folder = tmp_path / "step_00000004.partial", tmp_path / "step_00000004"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"\x80\x04pickled")
    seal(partial, folder, {}, {})
    with pytest.raises(UserError, match=r"model\.safetensors: not a safetensors file"):
        read(folder)


def test_a_missing_folder_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no checkpoint here"):
        read(tmp_path / "nowhere")
    assert newest(tmp_path / "nowhere") is None


def test_a_partial_folder_is_not_a_checkpoint(tmp_path: Path) -> None:
    write(tmp_path / "step_00000002")
    write_tensors(tmp_path / "step_00000004.partial", "model", {"a": torch.ones(2)})
    found = newest(tmp_path)
    assert found is not None and found.folder.name == "step_00000002"
    with pytest.raises(UserError, match="no checkpoint here"):
        read(tmp_path / "step_00000004.partial")


def test_killing_a_save_keeps_the_previous_checkpoint(tmp_path: Path, start: Start) -> None:
    """Kill the process after all files including state.json are written, before the rename."""
    write(tmp_path / "step_00000002")
    partial = tmp_path / "step_00000004.partial"
    write_tensors(partial, "model", {"a": torch.ones(2)})
    reached = multiprocessing.get_context("forkserver").Event()
    process = start(stop_in_seal, partial, tmp_path / "step_00000004", reached)
    assert reached.wait(60)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (partial / "state.json").exists()
    found = newest(tmp_path)
    assert found is not None and found.folder.name == "step_00000002"


def test_damaged_checkpoints_are_skipped_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (2, 4, 6, 10):
        write(tmp_path / f"step_{step:08d}", step)
    (tmp_path / "step_00000010" / "config.yaml").write_text("a: 2\n")
    (tmp_path / "step_00000006" / "state.json").unlink()
    with caplog.at_level(logging.WARNING):
        found = newest(tmp_path)
    assert found is not None and found.folder.name == "step_00000004"
    assert [("0010" in m, "0006" in m) for m in caplog.messages] == [(True, False), (False, True)]


def test_newest_raises_if_all_checkpoints_are_damaged(tmp_path: Path) -> None:
    for step in (2, 4):
        (write(tmp_path / f"step_{step:08d}") / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"step_00000004/config\.yaml: missing"):
        newest(tmp_path)


def test_prune_keeps_the_checkpoint_just_written(tmp_path: Path) -> None:
    """The run skipped a damaged step 8, resumed from step 4 and wrote step 6."""
    for step in (2, 4, 6, 8):
        write(tmp_path / f"step_{step:08d}")
    write_tensors(tmp_path / "step_00000007.partial", "model", {"a": torch.ones(2)})
    prune(tmp_path / "step_00000006", keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000004", "step_00000006"]
    prune(tmp_path / "step_00000006", keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000006"]


def test_writing_a_checkpoint_again_replaces_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "step_00000004", 1.0)
    (folder / "stray.safetensors").write_text("")
    write(folder, 2.0)
    assert read(folder).tensors("slots_0")["a"].unique().tolist() == [2.0]
    assert not (folder / "stray.safetensors").exists()


def test_tensor_views_and_tensors_with_grad_are_written_by_value(tmp_path: Path) -> None:
    base = torch.arange(6.0).view(2, 3)
    with_grad = (base.requires_grad_() * 2).T
    write_tensors(tmp_path / "p", "model", {"view": base[:, 1:], "with_grad": with_grad})
    seal(tmp_path / "p", tmp_path / "step_00000001", {}, {})
    tensors = read(tmp_path / "step_00000001").tensors("model")
    assert tensors["view"].tolist() == [[1, 2], [4, 5]]
    assert tensors["with_grad"].tolist() == [[0, 6], [2, 8], [4, 10]]
