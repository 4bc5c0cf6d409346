"""Language model fixtures: a tiny model per test, the real small model once per session."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor

from hybrid.llm.backbone import Backbone
from hybrid.llm.config import LlamaConfig
from hybrid.llm.load import load_backbone
from hybrid.llm.tiny import tiny_random

CPU = torch.device("cpu")
Hidden = Callable[..., Tensor]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of converted models, shared by the session."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def tiny(models: Path) -> Callable[..., Backbone]:
    """tiny(key=value) -> a new tiny-random model in float64 with enlarged weights.

    Initial weights are so small that attention hardly distinguishes positions. With larger weights
    a wrong position or mask changes the result by far more than rounding.
    """

    def load(**keys: Any) -> Backbone:
        config = LlamaConfig(**{"model": "tiny-random", "dtype": "float64", **keys})
        backbone = load_backbone(config, CPU, models)
        with torch.no_grad():
            for name, weight in backbone.model.named_parameters():
                if weight.dim() == 2:
                    weight.mul_(16 if "proj" in name else 4)
        return backbone

    return load


@pytest.fixture(scope="session")
def smollm2(models: Path) -> Backbone:
    """SmolLM2-135M-Instruct in float32, frozen; tests must not modify it."""
    return load_backbone(LlamaConfig(dtype="float32", batch_size=4), CPU, models)


@pytest.fixture(scope="session")
def one_forward() -> Hidden:
    """one_forward(backbone, *parts) -> hidden states [T, hidden] of one row in one forward pass.

    A part is token ids or embeddings [k, hidden]. Uses no padding, mask or cache, and the SDPA
    attention of transformers.
    """

    def hidden(backbone: Backbone, *parts: Sequence[int] | Tensor) -> Tensor:
        embed = backbone.model.get_input_embeddings()
        rows = [
            part if isinstance(part, Tensor) else embed(torch.tensor(list(part))) for part in parts
        ]
        embedded = torch.cat([row.to(backbone.dtype) for row in rows])[None]
        attention = backbone.model.config._attn_implementation
        backbone.model.set_attn_implementation("sdpa")
        output = backbone.model.model(inputs_embeds=embedded, use_cache=False)
        backbone.model.set_attn_implementation(attention)
        states: Tensor = output.last_hidden_state[0]
        return states

    return hidden


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[str], Path]:
    """saved(name) -> a folder with the tiny model, written by save_pretrained."""

    def save(name: str) -> Path:
        model, tokenizer = tiny_random(torch.float32)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def as_gguf(tmp_path: Path) -> Callable[..., Path]:
    """as_gguf(without=TENSOR) -> the tiny model as a GGUF file, without one tensor if given."""

    def write(without: str = "") -> Path:
        (tmp_path / "gguf").mkdir()
        write_gguf(tmp_path / "gguf" / "small.gguf", without)
        return tmp_path / "gguf" / "small.gguf"

    return write


def write_gguf(file: Path, without: str) -> None:
    """Write the tiny model as llama.cpp does: other names, interleaved query and key rows."""
    model, tokenizer = tiny_random(torch.float32)
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    vocabulary[-1] = "ab"  # replaces a byte that no grid contains
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([control] * 2 + [normal] * (len(vocabulary) - 2))
    writer.add_token_merges(["a b"])  # at least one merge is required
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, value in model.state_dict().items():
        if name in ("lm_head.weight", without):  # the head is tied
            continue
        for part, count in heads.items():
            if part in name:
                halves = value.reshape(count, 2, -1, config.hidden_size)
                value = halves.swapaxes(1, 2).reshape(value.shape)
        writer.add_tensor(
            names.get_name(name, try_suffixes=(".weight",)), value.contiguous().numpy()
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
