"""TRMConfig rejects invalid fields and reports all of them at once."""

from __future__ import annotations

from typing import Any

import pytest

from hybrid.trm import TRM, TRMConfig


def test_all_invalid_fields_are_reported_at_once() -> None:
    wrong: dict[str, Any] = {
        "num_heads": 0,
        "L_layers": 0,
        "H_cycles": -1,
        "L_cycles": 0,
        "halt_max_steps": 0,
        "expansion": 0.0,
        "halt_exploration_prob": 1.5,
        "rope_theta": 0.5,
        "rms_norm_eps": float("nan"),
        "puzzle_emb_ndim": -1,
        "puzzle_emb_len": -1,
        "vocab_size": 0,
        "seq_len": 0,
        "num_puzzle_identifiers": 0,
        "hidden_size": 0,
    }
    with pytest.raises(ValueError) as caught:
        TRMConfig(**wrong)
    lines = str(caught.value).splitlines()
    for name, value in wrong.items():
        assert any(line.startswith(name + " ") and repr(value) in line for line in lines), name


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"hidden_size": 100, "num_heads": 8}, "hidden_size 100 is not a multiple of num_heads 8"),
        ({"hidden_size": 24, "num_heads": 8}, "must be even for rope"),
        ({"puzzle_emb_ndim": 9000}, "puzzle_emb_ndim 9000 does not fit in puzzle_emb_len 16"),
    ],
)
def test_inconsistent_sizes_raise_value_error(wrong: dict[str, int], match: str) -> None:
    base: dict[str, Any] = {"puzzle_emb_ndim": 0}
    with pytest.raises(ValueError, match=match):
        TRMConfig(**(base | wrong))


@pytest.mark.parametrize("wrong", [{"pos_encodings": "bogus"}, {"forward_dtype": "fp16"}], ids=str)
def test_unknown_choice_raises_value_error(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TRMConfig(**wrong)


def test_odd_head_width_is_valid_without_rotary() -> None:
    TRMConfig(hidden_size=24, num_heads=8, pos_encodings="none", puzzle_emb_ndim=0)


def test_positions_include_the_prefix_only_with_puzzle_embeddings() -> None:
    assert TRMConfig().positions == 916
    assert TRMConfig(puzzle_emb_ndim=0).positions == 900


def test_default_model_has_the_published_size() -> None:
    """The published model has seven million weights; its SwiGLU's inner width is 1536."""
    model = TRM(TRMConfig())
    assert model.blocks[0].mlp.down_proj.weight.shape == (512, 1536)
    layer = 512 * 512 * 4 + 512 * 3072 + 1536 * 512
    assert sum(p.numel() for p in model.parameters()) == 2 * layer + 2 * 12 * 512 + 2 * 512 + 2
