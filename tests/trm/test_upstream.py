"""Import and export of published checkpoints."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid.errors import UserError
from hybrid.trm import TRM, TRMConfig, upstream

Tiny = Callable[..., TRMConfig]
TABLE = "model.inner.puzzle_emb.weights"


@pytest.fixture
def model(tiny: Tiny) -> TRM:
    """Return a model without constant tensors, including its puzzle table."""
    model = TRM(tiny(), seed=5)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.puzzle_table.normal_(generator=generator)
        model.q_head.weight.normal_(generator=generator)
    return model


def same(a: TRM, b: TRM) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def load_error(source: Any, match: str, **arch: Any) -> str:
    with pytest.raises(UserError, match=match) as caught:
        upstream.load(source, **arch)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_exported_names_are_the_published_ones(tiny: Tiny) -> None:
    def names(**changes: Any) -> set[str]:
        return set(upstream.export(TRM(tiny(**changes)), prefix=""))

    heads = {"H_init", "L_init", "embed_tokens.embedding_weight", "lm_head.weight"}
    heads |= {"q_head.weight", "q_head.bias", "puzzle_emb.weights"}
    attention = {"self_attn.qkv_proj.weight", "self_attn.o_proj.weight"}
    over_sequence = {"mlp_t.gate_up_proj.weight", "mlp_t.down_proj.weight"}
    swiglu = {"mlp.gate_up_proj.weight", "mlp.down_proj.weight"}

    def full(mix: set[str], extra: set[str] = frozenset(), layers: int = 1) -> set[str]:
        blocks = {f"L_level.layers.{i}.{n}" for i in range(layers) for n in mix | swiglu}
        return {f"inner.{name}" for name in heads | extra | blocks}

    assert names(L_layers=2) == full(attention, layers=2)
    assert names(mlp_t=True) == full(over_sequence)
    assert names(pos_encodings="learned") == full(attention, {"embed_pos.embedding_weight"})
    assert names(puzzle_emb_ndim=0) == full(attention) - {"inner.puzzle_emb.weights"}


@pytest.mark.parametrize(
    "changes",
    [{}, {"mlp_t": True}, {"pos_encodings": "learned"}, {"puzzle_emb_ndim": 0}, {"L_layers": 2}],
    ids=str,
)
def test_export_and_load_round_trip(tiny: Tiny, changes: dict[str, Any]) -> None:
    model = TRM(tiny(**changes), seed=5)
    model.puzzle_table.normal_(generator=torch.Generator().manual_seed(0))
    loaded = upstream.load(upstream.export(model), **asdict(model.config))
    assert loaded.config == model.config and same(loaded, model)
    live = {
        value.untyped_storage().data_ptr() for value in model.state_dict().values() if value.numel()
    }
    assert not live & {v.untyped_storage().data_ptr() for v in loaded.state_dict().values()}


@pytest.mark.parametrize(
    "prefix", ["", "model.", "_orig_mod.", "_orig_mod.model.", "model._orig_mod."]
)
def test_wrapper_prefixes_are_removed(model: TRM, prefix: str) -> None:
    """The prefix `_orig_mod.` is from torch.compile, `model.` from the published loss head."""
    state = upstream.export(model, prefix=prefix)
    assert all(name.startswith(prefix + "inner.") for name in state)
    assert same(upstream.load(state, **asdict(model.config)), model)


def test_compiled_model_exports_the_same_names(model: TRM) -> None:
    compiled = torch.compile(model)
    assert upstream.export(compiled).keys() == upstream.export(model).keys()


def test_file_and_state_dict_load_equally(model: TRM, tmp_path: Path) -> None:
    path = tmp_path / "step_518071"
    torch.save(upstream.export(model), path)
    assert same(upstream.load(path, **asdict(model.config)), model)
    assert same(upstream.load(str(path), **asdict(model.config)), model)


class Payload:
    """Object that runs a command when unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def test_pickle_with_code_is_rejected_and_not_run(model: TRM, tmp_path: Path) -> None:
    path, proof = tmp_path / "evil.pt", tmp_path / "proof"
    torch.save(upstream.export(model) | {"x": Payload(f"touch {proof}")}, path)
    message = load_error(path, "not a torch checkpoint of plain tensors", **asdict(model.config))
    assert message.startswith(str(path)) and not proof.exists()


def test_other_files_are_rejected(model: TRM, tmp_path: Path) -> None:
    arch = asdict(model.config)
    load_error(tmp_path / "gone.pt", "gone.pt: no such checkpoint", **arch)
    (tmp_path / "text.pt").write_text("hello")
    load_error(tmp_path / "text.pt", "text.pt: not a torch checkpoint", **arch)
    (tmp_path / "cut.pt").write_bytes(b"")
    load_error(tmp_path / "cut.pt", "cut.pt: not a torch checkpoint", **arch)
    for content in (torch.zeros(3), {"model": {"a": torch.zeros(1)}}, {"step": 3}):
        torch.save(content, tmp_path / "other.pt")
        load_error(tmp_path / "other.pt", "other.pt: not a state dict", **arch)
    load_error(tmp_path, "not a torch checkpoint", **arch)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"L_cycles": None}, "L_cycles must be given"),
        ({"hidden_sizes": 3}, "unknown key 'hidden_sizes'.*hidden_size"),
        ({"no_ACT_continue": False}, "no_ACT_continue=False is not supported"),
        ({"H_layers": 2}, "H_layers=2 is not supported"),
        ({"hidden_size": 9, "L_layers": 0}, "L_layers must be at least 1.*hidden_size 9"),
    ],
)
def test_unsupported_config_is_rejected(model: TRM, change: dict[str, Any], match: str) -> None:
    arch = asdict(model.config) | change
    arch = {key: value for key, value in arch.items() if value is not None}
    load_error(upstream.export(model), "^arch: .*" + match, **arch)


def test_unused_published_keys_are_accepted(model: TRM) -> None:
    extra = {"batch_size": 768, "H_layers": 0, "no_ACT_continue": True}
    loaded = upstream.load(upstream.export(model), **asdict(model.config), **extra)
    assert loaded.config == model.config


def test_all_mismatched_tensors_are_listed(model: TRM) -> None:
    state = upstream.export(model)
    del state["model.inner.lm_head.weight"], state["model.inner.H_init"]
    state["model.inner.H_level.layers.0.mlp.weight"] = torch.zeros(2)
    state["model.inner.L_init"] = torch.zeros(9)
    message = load_error(state, "state dict: ", **asdict(model.config))
    for part in (
        "missing inner.lm_head.weight",
        "missing inner.H_init",
        "unknown inner.H_level.layers.0.mlp.weight",
        "inner.L_init is [9], arch has [8]",
    ):
        assert part in message
    assert message.count(";") == 3


def test_puzzle_table_of_another_width_is_reported_with_its_shape(model: TRM) -> None:
    state = upstream.export(model) | {TABLE: torch.zeros(7, 9)}
    load_error(state, r"inner.puzzle_emb.weights is \[7, 9\]", **asdict(model.config))


def test_puzzle_embeddings_are_not_dropped_silently(model: TRM) -> None:
    """Loading with strict=False into a model without puzzle embeddings would ruin the score."""
    arch = asdict(model.config) | {"puzzle_emb_ndim": 0}
    load_error(
        upstream.export(model), "has puzzle embeddings, but arch has puzzle_emb_ndim=0", **arch
    )
    state = upstream.export(model)
    del state[TABLE]
    load_error(state, "missing inner.puzzle_emb.weights", **asdict(model.config))


@pytest.mark.parametrize("rows", [3, 9])
def test_puzzle_table_of_another_size_becomes_its_mean_row(
    model: TRM, rows: int, caplog: pytest.LogCaptureFixture
) -> None:
    arch = asdict(model.config) | {"num_puzzle_identifiers": rows}
    with caplog.at_level(logging.WARNING):
        loaded = upstream.load(upstream.export(model), **arch)
    mean = model.puzzle_table.mean(0)
    torch.testing.assert_close(loaded.puzzle_table, mean.expand(rows, -1))
    assert f"5 rows replaced by {rows} mean rows" in caplog.text
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours if n != "puzzle_table")


def test_puzzle_table_of_the_same_size_loads_without_a_warning(
    model: TRM, caplog: pytest.LogCaptureFixture
) -> None:
    upstream.load(upstream.export(model), **asdict(model.config))
    assert not caplog.records


def test_puzzle_rows_are_matched_by_name(model: TRM, caplog: pytest.LogCaptureFixture) -> None:
    old = ["<blank>", "a", "b", "c", "d"]
    new = ["<blank>", "c", "x", "a"]
    with caplog.at_level(logging.WARNING):
        loaded = upstream.load(
            upstream.export(model),
            identifiers=old,
            new_identifiers=new,
            **asdict(model.config) | {"num_puzzle_identifiers": 4},
        )
    table = model.puzzle_table
    assert torch.equal(loaded.puzzle_table[[0, 1, 3]], table[[0, 3, 1]])
    torch.testing.assert_close(loaded.puzzle_table[2], table.mean(0))
    assert "3 of 4 rows found by name" in caplog.text


def test_name_lists_of_the_wrong_length_are_rejected(model: TRM) -> None:
    arch = asdict(model.config) | {"num_puzzle_identifiers": 2}
    load_error(
        upstream.export(model),
        "identifiers: 1 and 2 names for tables of 5 and 2 rows",
        identifiers=["a"],
        new_identifiers=["a", "b"],
        **arch,
    )


def test_puzzle_rows_are_matched_by_name_in_a_table_of_the_same_size(model: TRM) -> None:
    old, new = list("abcde"), list("edcba")
    loaded = upstream.load(
        upstream.export(model), identifiers=old, new_identifiers=new, **asdict(model.config)
    )
    assert torch.equal(loaded.puzzle_table, model.puzzle_table.flip(0))


def test_export_shares_memory(model: TRM) -> None:
    """A copy of the published puzzle table would take 1.8 GB."""
    exported: dict[str, Tensor] = upstream.export(model)
    assert exported[TABLE].data_ptr() == model.puzzle_table.data_ptr()
