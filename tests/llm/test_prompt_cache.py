"""Encodings made beforehand are those made now, and nothing else is taken for one."""

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


def tensors(encoding: PromptCache) -> list[Tensor]:
    """Its tensors, padding blanked: nobody looks at what is there."""
    mask = encoding.mask[:, None, :, None]
    layers = [tensor * mask for layer in encoding.layers for tensor in layer]
    return [encoding.tokens * encoding.mask, encoding.mask, *layers]


def read(backbone: Backbone, encoding: PromptCache) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(len(encoding), 2, backbone.hidden_size, generator=generator)
    return backbone.read(encoding, latent * backbone.embedding_scale, TEXTS[: len(encoding)])


def test_what_is_stored_is_what_would_be_made(tiny: Tiny, tmp_path: Path) -> None:
    backbone = tiny()
    assert PromptCacheStore(tmp_path, backbone).add(PROBLEMS) == 4
    store = PromptCacheStore(tmp_path, backbone)
    stored, live = store.prefill(PROBLEMS), backbone.prefill(PROBLEMS)
    for problem in PROBLEMS:
        kept = load_file(store.path(problem))
        assert set(kept) == {"keys", "values"}
        assert {value.shape for value in kept.values()} == {(2, 2, len(problem), 8)}
    for one, other in zip(tensors(stored), tensors(live), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    found, wanted = (read(backbone, encoding) for encoding in (stored, live))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_it_is_read_back_to_the_bit(tiny: Tiny, tmp_path: Path, dtype: str) -> None:
    """One at a time: how a batch is put together rounds otherwise."""
    backbone = tiny(dtype=dtype)
    store = PromptCacheStore(tmp_path, backbone)
    for problem in PROBLEMS:
        assert store.add([problem]) == 1
        live = backbone.prefill([problem])
        for stored in (store.prefill([problem]), store.prefill([problem])):
            assert all(map(torch.equal, tensors(stored), tensors(live)))


@pytest.mark.parametrize("there", [[0], [1, 3], [2], [], [0, 1, 2, 3]])
def test_rows_keep_their_order_when_some_are_there(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: list[int]
) -> None:
    """And only what is not there is encoded."""
    backbone = tiny()
    store = PromptCacheStore(tmp_path, backbone)
    store.add([PROBLEMS[n] for n in there])
    wanted = backbone.prefill(PROBLEMS)
    made: list[list[int]] = []
    encode = backbone.encode

    def watched(problems: list[list[int]]) -> PromptCache:
        made.extend(problems)
        return encode(problems)

    monkeypatch.setattr(backbone, "encode", watched)
    found = store.prefill(PROBLEMS)
    assert made == [problem for n, problem in enumerate(PROBLEMS) if n not in there]
    for one, other in zip(tensors(found), tensors(wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_add_skips_what_is_there(tiny: Tiny, tmp_path: Path) -> None:
    store = PromptCacheStore(tmp_path, tiny())
    assert store.add(PROBLEMS[:2]) == 2
    times = {path: path.stat().st_mtime_ns for path in store.folder.iterdir()}
    assert set(times) == {store.path(problem) for problem in PROBLEMS[:2]}
    assert store.add(PROBLEMS) == 2 and store.add(PROBLEMS) == 0 and store.add([]) == 0
    assert len(list(store.folder.iterdir())) == 4, "something else than encodings is left"
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


def test_a_problem_given_twice_is_made_once(tiny: Tiny, tmp_path: Path) -> None:
    store = PromptCacheStore(tmp_path, tiny())
    assert store.add([PROBLEMS[0], PROBLEMS[1], PROBLEMS[0]]) == 2
    encoding = store.prefill([PROBLEMS[0], PROBLEMS[1], PROBLEMS[0]])
    assert encoding.mask.sum(1).tolist() == [5, 2, 5]


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_truncated_file_is_named(tiny: Tiny, tmp_path: Path, kept: int) -> None:
    store = PromptCacheStore(tmp_path, tiny())
    store.add(PROBLEMS)
    path = store.path(PROBLEMS[2])
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError) as caught:
        store.prefill(PROBLEMS)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert "delete it" in str(caught.value)


def test_a_killed_write_is_taken_for_nothing(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before the rename: the next one makes it as if nothing had been."""
    store = PromptCacheStore(tmp_path, tiny())

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            store.add(PROBLEMS[:1])
    assert not store.path(PROBLEMS[0]).exists() and not list(store.folder.iterdir())
    assert store.add(PROBLEMS[:1]) == 1


def test_another_dtype_or_model_has_another_folder(tiny: Tiny, tmp_path: Path) -> None:
    backbone, other = tiny(), tiny()
    with torch.no_grad():
        other.model.model.layers[0].mlp.up_proj.weight.mul_(1.1)
    models = (backbone, other, tiny(dtype="float32"), tiny(dtype="bfloat16"))
    assert len({PromptCacheStore(tmp_path, model).folder for model in models}) == 4
    assert PromptCacheStore(tmp_path, tiny()).folder == PromptCacheStore(tmp_path, backbone).folder


def test_the_same_weights_with_another_rope_have_another_folder(
    saved: Callable[[str], Path], models: Path, tmp_path: Path
) -> None:
    """What is remembered depends on the config too."""
    folders = set()
    for theta in (1e4, 5e5):
        folder = saved(f"rope{theta:g}")
        config = json.loads((folder / "config.json").read_text())
        config["rope_parameters"]["rope_theta"] = theta
        (folder / "config.json").write_text(json.dumps(config))
        backbone = load_backbone(LlamaConfig(model=str(folder)), torch.device("cpu"), models)
        folders.add(PromptCacheStore(tmp_path, backbone).folder)
    assert len(folders) == 2


def test_a_reader_reads_them_when_the_config_says_so(
    models: Path, tmp_path: Path, arc1: dict[str, Task]
) -> None:
    device = torch.device("cpu")
    places = {"models": models, "prompt_cache": tmp_path}
    reader = open_reader(LlamaConfig(model="tiny-random", prompt_cache=True), device, **places)
    assert isinstance(reader, Reader) and reader.store is not None
    prompts = [reader.prompt(arc1[name]) for name in ("25ff71a9", "d037b0a7")]
    live = reader.prefill(prompts)
    assert not list(tmp_path.iterdir()), "reading wrote something"
    reader.store.add([prompt.tokens for prompt in prompts])
    reader.backbone.encode = None  # type: ignore[assignment, method-assign]
    for one, other in zip(tensors(reader.prefill(prompts)), tensors(live), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    plain = open_reader(LlamaConfig(model="tiny-random"), device, **places)
    assert plain.store is None and plain.prefill(prompts) is not None


def test_smollm2_is_read_alike_from_disk(
    smollm2: Backbone, tmp_path: Path, arc1: dict[str, Task]
) -> None:
    reader = Reader(smollm2)
    problems = [reader.prompt(arc1[name]).tokens for name in ("25ff71a9", "d037b0a7")]
    store = PromptCacheStore(tmp_path, smollm2)
    store.add(problems)
    found = read(smollm2, store.prefill(problems))
    wanted = read(smollm2, smollm2.prefill(problems))
    assert ((found - wanted).norm(dim=1) / wanted.norm(dim=1)).max() < 1e-4
