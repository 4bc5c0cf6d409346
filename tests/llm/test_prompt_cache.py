"""Stored prompt caches equal computed ones, and other files are never used as one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hybrid.arc import Task
from hybrid.errors import UserError
from hybrid.llm import LlamaConfig, open_reader
from hybrid.llm.backbone import Backbone, PromptCache
from hybrid.llm.load import load_backbone
from hybrid.llm.prompt_cache import PromptCacheStore
from hybrid.llm.reader import Reader

Tiny = Callable[..., Backbone]
PROBLEMS = ([5, 6, 7, 8, 9], [20, 21], [30, 31, 32, 33, 34, 35, 36], [40])
TEXTS = ([50, 51, 52], [60], [70, 71], [80, 81])


def tensors(prompts: PromptCache) -> list[Tensor]:
    """Return the tensors with padding set to zero, because padding is never read."""
    mask = prompts.mask[:, None, :, None]
    layers = [tensor * mask for layer in prompts.layers for tensor in layer]
    return [prompts.tokens * prompts.mask, prompts.mask, *layers]


def read(backbone: Backbone, prompts: PromptCache) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(len(prompts), 2, backbone.hidden_size, generator=generator)
    return backbone.read(prompts, latent * backbone.embedding_scale, TEXTS[: len(prompts)])


def test_stored_cache_equals_computed_cache(tiny: Tiny, tmp_path: Path) -> None:
    backbone = tiny()
    assert PromptCacheStore(tmp_path, backbone).add(PROBLEMS) == 4
    store = PromptCacheStore(tmp_path, backbone)
    stored, live = store.prefill(PROBLEMS), backbone.prefill(PROBLEMS)
    for problem in PROBLEMS:
        saved = load_file(store.path(problem))
        assert set(saved) == {"keys", "values"}
        assert {value.shape for value in saved.values()} == {(2, 2, len(problem), 8)}
    for one, other in zip(tensors(stored), tensors(live), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    actual, expected = (read(backbone, prompts) for prompts in (stored, live))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_single_prompt_is_restored_bit_for_bit(tiny: Tiny, tmp_path: Path, dtype: str) -> None:
    """Prompts are cached one at a time, because the composition of a batch changes rounding."""
    backbone = tiny(dtype=dtype)
    store = PromptCacheStore(tmp_path, backbone)
    for problem in PROBLEMS:
        assert store.add([problem]) == 1
        live = backbone.prefill([problem])
        for stored in (store.prefill([problem]), store.prefill([problem])):
            assert all(map(torch.equal, tensors(stored), tensors(live)))


@pytest.mark.parametrize("stored", [[0], [1, 3], [2], [], [0, 1, 2, 3]])
def test_partly_stored_batch_keeps_its_row_order(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: list[int]
) -> None:
    """Only missing prompts are computed."""
    backbone = tiny()
    store = PromptCacheStore(tmp_path, backbone)
    store.add([PROBLEMS[n] for n in stored])
    expected = backbone.prefill(PROBLEMS)
    computed: list[list[int]] = []
    prefill = backbone.prefill

    def record(problems: list[list[int]]) -> PromptCache:
        computed.extend(problems)
        return prefill(problems)

    monkeypatch.setattr(backbone, "prefill", record)
    actual = store.prefill(PROBLEMS)
    assert computed == [problem for n, problem in enumerate(PROBLEMS) if n not in stored]
    for one, other in zip(tensors(actual), tensors(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_add_skips_stored_prompts(tiny: Tiny, tmp_path: Path) -> None:
    store = PromptCacheStore(tmp_path, tiny())
    assert store.add(PROBLEMS[:2]) == 2
    times = {path: path.stat().st_mtime_ns for path in store.folder.iterdir()}
    assert set(times) == {store.path(problem) for problem in PROBLEMS[:2]}
    assert store.add(PROBLEMS) == 2 and store.add(PROBLEMS) == 0 and store.add([]) == 0
    assert len(list(store.folder.iterdir())) == 4, "a temporary file is left"
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


def test_duplicate_prompt_is_computed_once(tiny: Tiny, tmp_path: Path) -> None:
    store = PromptCacheStore(tmp_path, tiny())
    assert store.add([PROBLEMS[0], PROBLEMS[1], PROBLEMS[0]]) == 2
    prompts = store.prefill([PROBLEMS[0], PROBLEMS[1], PROBLEMS[0]])
    assert prompts.mask.sum(1).tolist() == [5, 2, 5]


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_truncated_file_is_named(tiny: Tiny, tmp_path: Path, kept: int) -> None:
    store = PromptCacheStore(tmp_path, tiny())
    store.add(PROBLEMS)
    path = store.path(PROBLEMS[2])
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError) as caught:
        store.prefill(PROBLEMS)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert "delete it" in str(caught.value)


def test_killed_write_leaves_no_file(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write killed before the rename is repeated by the next call."""
    store = PromptCacheStore(tmp_path, tiny())

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            store.add(PROBLEMS[:1])
    assert not store.path(PROBLEMS[0]).exists() and not list(store.folder.iterdir())
    assert store.add(PROBLEMS[:1]) == 1


def test_each_dtype_and_model_has_its_own_folder(tiny: Tiny, tmp_path: Path) -> None:
    backbone, other = tiny(), tiny()
    with torch.no_grad():
        other.model.model.layers[0].mlp.up_proj.weight.mul_(1.1)
    models = (backbone, other, tiny(dtype="float32"), tiny(dtype="bfloat16"))
    assert len({PromptCacheStore(tmp_path, model).folder for model in models}) == 4
    assert PromptCacheStore(tmp_path, tiny()).folder == PromptCacheStore(tmp_path, backbone).folder


def test_same_weights_with_another_rope_have_another_folder(
    saved: Callable[[str], Path], models: Path, tmp_path: Path
) -> None:
    """The key-value cache depends on the RoPE frequencies as well."""
    folders = set()
    for theta in (1e4, 5e5):
        folder = saved(f"rope{theta:g}")
        config = json.loads((folder / "config.json").read_text())
        config["rope_parameters"]["rope_theta"] = theta
        (folder / "config.json").write_text(json.dumps(config))
        backbone = load_backbone(LlamaConfig(model=str(folder)), torch.device("cpu"), models)
        folders.add(PromptCacheStore(tmp_path, backbone).folder)
    assert len(folders) == 2


def test_reader_uses_the_store_if_the_config_enables_it(
    models: Path, tmp_path: Path, arc1: dict[str, Task]
) -> None:
    device = torch.device("cpu")
    folders = {"models": models, "prompt_cache": tmp_path}
    reader = open_reader(LlamaConfig(model="tiny-random", prompt_cache=True), device, **folders)
    assert isinstance(reader, Reader) and reader.store is not None
    prompts = [reader.prompt(arc1[name]) for name in ("25ff71a9", "d037b0a7")]
    live = reader.prefill(prompts)
    assert not list(tmp_path.iterdir()), "prefill wrote a file"
    reader.store.add([prompt.tokens for prompt in prompts])
    reader.backbone.prefill = None  # type: ignore[assignment, method-assign]
    for one, other in zip(tensors(reader.prefill(prompts)), tensors(live), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    plain = open_reader(LlamaConfig(model="tiny-random"), device, **folders)
    assert plain.store is None and plain.prefill(prompts) is not None


def test_smollm2_reads_the_same_from_disk(
    smollm2: Backbone, tmp_path: Path, arc1: dict[str, Task]
) -> None:
    reader = Reader(smollm2)
    problems = [reader.prompt(arc1[name]).tokens for name in ("25ff71a9", "d037b0a7")]
    store = PromptCacheStore(tmp_path, smollm2)
    store.add(problems)
    actual = read(smollm2, store.prefill(problems))
    expected = read(smollm2, smollm2.prefill(problems))
    assert ((actual - expected).norm(dim=1) / expected.norm(dim=1)).max() < 1e-4
