"""Joint training of a language model with bfloat16 compute and float32 weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hybrid.checkpoint import read
from hybrid.config import Config
from hybrid.context import LocalContext
from hybrid.evaluate.hybrid_predictor import HybridPredictor
from hybrid.llm import Reader
from hybrid.train import Joint
from hybrid.train.loop import train

HybridConfig = Callable[..., Config]
CPU = LocalContext(torch.device("cpu"))
PROBLEM, TEXT = [5, 6, 7, 8, 9], [50, 51, 52]


class Recorder(Joint):
    """Joint module that records the language model's initial weights."""

    made: Recorder

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        Recorder.made = self
        self.before = {name: value.clone() for name, value in self.llama().items()}

    def llama(self) -> dict[str, Tensor]:
        parameters = self.state.optimizer.parameters.items()
        return {name: value.detach() for name, value in parameters if name.startswith("llama.")}


@torch.no_grad()
def hidden(reader: Reader) -> Tensor:
    backbone = reader.backbone
    latent = torch.full((1, 2, backbone.hidden_size), backbone.embedding_scale)
    return backbone.read(backbone.prefill([PROBLEM]), latent, [TEXT])


def test_small_updates_change_every_weight_and_reach_evaluation(
    hybrid_config: HybridConfig,
) -> None:
    config = hybrid_config(
        "a",
        training={"steps": 30, "weight_decay": 0, "lr_warmup_steps": 0, "max_attempts": 1},
        llama={"frozen": False, "lr": 1e-5, "dtype": "bfloat16"},
    )
    result = train(config, CPU, Recorder)
    module = Recorder.made
    assert module.reader is not None and module.reader.backbone.dtype == torch.bfloat16
    saved = {part: read(result.checkpoint).tensors(part) for part in ("model", "ema")}
    for name, weight in module.llama().items():
        had_gradient = module.state.optimizer.v[name] > 0
        assert had_gradient.any(), name
        assert (weight != module.before[name])[had_gradient].all(), name
        changed = saved["ema"][name] != module.before[name]
        assert changed[had_gradient].float().mean() > 0.99, name
        assert {tensors[name].dtype for tensors in saved.values()} == {torch.float32}
    predictor = HybridPredictor(read(result.checkpoint), config, CPU.device)
    assert predictor.model.reader is not None
    with module.state.ema.applied():
        assert torch.equal(hidden(module.reader), hidden(predictor.model.reader))
    assert not torch.equal(hidden(module.reader), hidden(predictor.model.reader))
