"""Models load completely and safely, or fail with a one-line error and a remedy."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub.errors import GatedRepoError
from transformers import AutoConfig

from hybrid.errors import UserError
from hybrid.llm import SHAPES, LlamaConfig, misnamed
from hybrid.llm.backbone import Backbone
from hybrid.llm.load import _error_message, _shape, load_backbone, shape
from hybrid.llm.tiny import tiny_random

CPU = torch.device("cpu")
Saved = Callable[[str], Path]
INVALID_CONFIG = {"num_attention_heads": 0, "hidden_size": "wide", "intermediate_size": 128}


def load(model: Path | str, cache: Path, **keys: Any) -> Backbone:
    return load_backbone(LlamaConfig(model=str(model), **keys), CPU, cache)


def refused(model: Path | str, cache: Path) -> str:
    """Return the error line of a model that must be rejected."""
    with pytest.raises(UserError) as caught:
        load(model, cache)
    line = str(caught.value)
    assert line.startswith("llama.model: ") and "\n" not in line and len(line) < 600
    return line


def change(folder: Path, name: str = "config.json", **keys: Any) -> Path:
    text = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(text | keys))
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(torch.arange(20)[None]).logits
    return output


# Names


@pytest.mark.parametrize(
    "name",
    [
        "Llama-3.2-8B",
        "meta-llama/Llama-3.2-8B",
        "llama-3.2-8b",
        "Llama-3.2-8B-Instruct",
        "META-LLAMA/llama-3.2-8b-instruct",
        "Llama-3.1-8B",
    ],
)
def test_unknown_llama_name_is_answered_with_known_names(name: str, tmp_path: Path) -> None:
    line = refused(name, tmp_path)
    assert name in line and "Llama-3.1-8B-Instruct" in line and "Llama-3.2-3B" in line
    [suggested] = re.findall(r"did you mean (\S+)\?", line)
    assert suggested in SHAPES and suggested.endswith("-Instruct") == name.lower().endswith("t")


def test_known_names_and_names_of_other_owners_are_accepted() -> None:
    others = ("meta-llama/Llama-3.2-11B-Vision", "unsloth/Llama-3.2-8B", "./Llama-3.2-8B")
    assert not any(map(misnamed, (*SHAPES, *others)))


# Missing and damaged models


@pytest.mark.parametrize("name", ["./nothing", "/nothing/at/all", "~/nothing", "nothing.gguf"])
def test_missing_path_is_named(name: str, tmp_path: Path) -> None:
    assert refused(name, tmp_path).endswith(f"{name}: no such file or folder")


def test_local_path_without_a_model_is_not_searched_on_the_hub(tmp_path: Path) -> None:
    """The name of the folder does not matter."""
    for name in ("empty", "connect4"):
        (tmp_path / name).mkdir()
        line = refused(tmp_path / name, tmp_path)
        assert "cannot be loaded" in line and "hub" not in line
    (tmp_path / "notes.txt").write_text("no model")
    assert "must be a folder or a .gguf file" in refused(tmp_path / "notes.txt", tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("kept", [0, 9, 0.5])
def test_truncated_file_gives_one_error_line(
    saved: Saved, tmp_path: Path, file: str, kept: float
) -> None:
    path = saved("model") / file
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if kept < 1 else int(kept)])
    assert "cannot be loaded (" in refused(path.parent, tmp_path)


@pytest.mark.parametrize(("key", "value"), INVALID_CONFIG.items())
def test_invalid_model_config_gives_one_error_line(
    saved: Saved, tmp_path: Path, key: str, value: Any
) -> None:
    folder = change(saved("model"), **{key: value})
    assert "cannot be loaded (" in refused(folder, tmp_path)
    if key != "intermediate_size":
        assert shape(LlamaConfig(model=str(folder))) is None


@pytest.mark.parametrize("keys", [{"num_hidden_layers": 3}, {"tie_word_embeddings": False}])
def test_missing_tensor_is_an_error(saved: Saved, tmp_path: Path, keys: dict[str, Any]) -> None:
    """Transformers would initialize it at random and only warn."""
    assert "tensors are missing" in refused(change(saved("model"), **keys), tmp_path)


def test_other_architecture_is_rejected(saved: Saved, tmp_path: Path) -> None:
    folder = change(saved("model"), model_type="gpt2", architectures=["GPT2LMHeadModel"])
    assert "not a LLaMA-like decoder" in refused(folder, tmp_path)


def test_broken_chat_template_gives_one_error_line(saved: Saved, tmp_path: Path) -> None:
    folder = change(saved("model"), "tokenizer_config.json", chat_template="{{ bad")
    assert "cannot be loaded (" in refused(folder, tmp_path)


def test_loaded_folder_is_the_saved_model(saved: Saved, tmp_path: Path) -> None:
    folder = saved("model")
    for dtype in ("float32", "bfloat16"):
        backbone = load(folder, tmp_path / "cache", dtype=dtype)
        other = tiny_random(getattr(torch, dtype))[0]
        assert torch.equal(logits(backbone.model), logits(other))
    assert not (tmp_path / "cache").exists()
    assert backbone.revision == "local"


# Remote code is never run


@pytest.mark.parametrize("kind", ["llama", "custom", "tokenizer"])
def test_code_next_to_a_model_is_not_run(
    saved: Saved, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user is not prompted either. A known architecture loads without the code."""
    folder, mark = saved("model"), tmp_path / "ran"
    (folder / "evil.py").write_text(
        f"open({str(mark)!r}, 'w').close()\n"
        "from transformers import LlamaConfig as C, LlamaForCausalLM as M\n"
        "from transformers import PreTrainedTokenizerFast as T\n"
    )
    classes = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoModel": "evil.M"}
    if kind == "tokenizer":
        tokenizers = {"AutoTokenizer": ["evil.T", "evil.T"]}
        change(folder, "tokenizer_config.json", auto_map=tokenizers, tokenizer_class="T")
    else:
        change(folder, model_type=kind, auto_map=classes)

    def confirm(*_: Any) -> str:
        mark.touch()
        return "y"

    monkeypatch.setattr("builtins.input", confirm)
    sizes = shape(LlamaConfig(model=str(folder)))
    assert (sizes is None) == (kind == "custom")
    if kind == "llama":
        load(folder, tmp_path)
    else:
        assert "needs remote code, which is never run" in refused(folder, tmp_path)
    assert not mark.exists()


class _CreatesFile:
    """Object whose unpickling creates a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_pickled_weights_are_never_loaded(saved: Saved, tmp_path: Path) -> None:
    folder, mark = saved("model"), tmp_path / "ran"
    (folder / "model.safetensors").unlink()
    weights = {**tiny_random(torch.float32)[0].state_dict(), "x": _CreatesFile(mark)}
    torch.save(weights, folder / "pytorch_model.bin")
    assert "pickled weights are never read" in refused(folder, tmp_path)
    assert not mark.exists()


# The hub


def test_hub_id_without_network_fails_at_once_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With HF_HUB_OFFLINE=1 (set after import) not even an address lookup is allowed."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("resolved an address"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    started, line = time.monotonic(), refused("owner/missing", tmp_path)
    assert "unreachable" in line and "hf download" in line and "smollm2-135m" in line
    assert time.monotonic() - started < 5


def test_sizes_are_not_requested_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    request = "huggingface_hub.file_download.get_hf_file_metadata"
    monkeypatch.setattr(request, lambda *_, **__: pytest.fail("sent a request to the hub"))
    assert shape(LlamaConfig(model="owner/missing")) is None


@pytest.mark.parametrize("wrapped", [False, True])
def test_gated_model_error_names_the_licence_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrapped: bool
) -> None:
    """Transformers sometimes wraps the error in another one."""
    response: Any = SimpleNamespace(headers={}, request=None)

    def gated(*_: Any, **__: Any) -> None:
        error = GatedRepoError("403: you are not in the list", response=response)
        if not wrapped:
            raise error
        raise OSError("You are trying to\naccess a gated repo.") from error

    monkeypatch.setattr(AutoConfig, "from_pretrained", gated)
    line = refused("meta-llama/Llama-3.1-8B", tmp_path)
    assert "https://huggingface.co/meta-llama/Llama-3.1-8B " in line and "HF_TOKEN" in line


def test_cyclic_error_chain_is_handled() -> None:
    first, second = OSError("first"), OSError("second")
    first.__cause__, second.__cause__ = second, first
    assert "first" in _error_message("owner/missing", first)


# Memory and sizes


def test_model_larger_than_the_memory_is_rejected_before_reading(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved("model")
    (folder / "model.safetensors").unlink()
    memory = SimpleNamespace(available=26_848 * 4 - 1)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    assert "as float32, this machine has 0.0 GiB free; choose a" in refused(folder, tmp_path)
    memory.available += 1
    assert "has no model.safetensors" in refused(folder, tmp_path)


def test_shape_counts_every_parameter(smollm2: Backbone, saved: Saved) -> None:
    real = {"smollm2-135m": smollm2.model, "tiny-random": tiny_random(torch.float32)[0]}
    for name, model in real.items():
        sizes = shape(LlamaConfig(model=name))
        assert sizes is not None and sizes == _shape(model.config)
        assert sizes.parameters == sum(weight.numel() for weight in model.parameters())
        cache = model.model(torch.zeros(1, 7, dtype=torch.long), use_cache=True)[1]
        cached = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
        assert sizes.kv_values_per_token * 7 == cached, name
    assert shape(LlamaConfig(model=str(saved("model")))) == shape(LlamaConfig(model="tiny-random"))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", (4096, 14336, 32, 32, False)),
        ("meta-llama/Llama-3.2-1B", (2048, 8192, 16, 32, True)),
        ("meta-llama/Llama-3.3-70B-Instruct", (8192, 28672, 80, 64, False)),
    ],
)
def test_known_shapes_match_the_real_architecture(
    name: str, sizes: tuple[int, int, int, int, bool]
) -> None:
    hidden, inner, layers, heads, tied = sizes
    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    assert SHAPES[name] == _shape(config) == shape(LlamaConfig(model=name))
    assert SHAPES[name].parameters == sum(weight.numel() for weight in model.parameters())


# The output head


def untied(folder: Path) -> Path:
    """Save the tiny model with an untied output head."""
    model, tokenizer = tiny_random(torch.float32)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(2 * model.lm_head.weight.detach())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_unused_head_is_dropped_without_changing_the_fingerprint(
    tmp_path: Path,
) -> None:
    folder = untied(tmp_path / "untied")
    with_head = load(folder, tmp_path, max_new_tokens=1)
    without_head = load(folder, tmp_path)
    assert with_head.model.lm_head is not None and without_head.model.lm_head is None
    names = {name for name, _ in without_head.model.named_parameters()}
    assert names == {name for name, _ in without_head.model.model.named_parameters(prefix="model")}
    assert without_head.identity() == with_head.identity()
    with torch.no_grad():
        without_head.model.model.norm.weight[5] += 0.1
    assert without_head.fingerprint() != with_head.fingerprint()
    latent = torch.ones(1, 2, 32)
    read = [
        one.read(one.prefill([[5, 6, 7]]), latent, [[8]])
        for one in (load(folder, tmp_path), with_head)
    ]
    assert torch.equal(*read)


def test_tied_head_is_kept(saved: Saved, tmp_path: Path) -> None:
    model = load(saved("model"), tmp_path).model
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_trained_model_needs_memory_for_float32(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved("model")
    memory = SimpleNamespace(available=26_848 * 4 - 1)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    assert load(folder, tmp_path, dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(UserError, match=r"as float32, .*llama\.frozen=true$"):
        load(folder, tmp_path, dtype="bfloat16", frozen=False)
