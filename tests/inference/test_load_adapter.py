"""Another adapter of the same shapes in a running inferencer; and adapters in the base's half precision."""

from pathlib import Path
from typing import Any

import pytest
import torch
from asking import config
from kinds import CASES, build, shaken
from torch import Tensor

from diffengine_sdxl.errors import UserError
from diffengine_sdxl.inference.inferencer import SDXLInferencer
from diffengine_sdxl.models.compiled import compile_blocks

CALL: dict[str, Any] = dict(prompt='a red circle', seed=5, height=32, width=32, guidance_scale=1, num_inference_steps=1,
                            output_type='latent')


@pytest.fixture(scope='module')
def loras(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two LoRAs of one rank, and one of another."""
    folder = tmp_path_factory.mktemp('loras')
    for name, rank in (('a', 4), ('b', 4), ('larger', 8)):
        model = build(tiny_base, {name: {**CASES['lora'].config, 'rank': rank}})
        shaken(model, CASES['lora']).adapters[name].save(folder / name)
    return {path.name: path for path in folder.iterdir()}


def inferencer(base: Path, lora: Path, **changes: Any) -> SDXLInferencer:
    cfg = config(base, dict(style=dict(type='LoRA', weights=str(lora))))
    cfg.model.update(changes)
    return SDXLInferencer(cfg, device='cpu')


def test_another_lora_compiles_nothing_again(tiny_base: Path, loras: dict[str, Path]) -> None:
    """The latents are those of an inferencer that was made with it."""
    ours, graphs = inferencer(tiny_base, loras['a']), []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward
    undo = compile_blocks(ours.model.unet.mid_block, backend=count)  # some blocks are enough, and fast
    before, number = ours(**CALL), len(graphs)
    ours.load_adapter('style', loras['b'])
    got = ours(**CALL)
    undo()
    assert 0 < number == len(graphs) and not torch.allclose(got, before, atol=1e-3)
    assert torch.equal(got, inferencer(tiny_base, loras['b'])(**CALL))
    assert ours.cfg.model.adapters.style == dict(type='LoRA', weights=str(loras['b']))
    with pytest.raises(UserError, match="alpha / rank|another rank"):
        ours.load_adapter('style', loras['larger'])
    with pytest.raises(UserError, match="no adapter 'stile' to load .*; there are style. Did you mean 'style'"):
        ours.load_adapter('stile', loras['b'])
    assert torch.equal(got, ours(**CALL))  # what is refused changes nothing


def test_adapters_are_in_half_precision_with_the_base(tiny_base: Path, loras: dict[str, Path]) -> None:
    """Though the config says that they train; another one that is loaded later too. Nothing is under autocast."""
    ours, autocast = inferencer(tiny_base, loras['a'], mixed_precision='bf16'), set()
    ours.model.unet.register_forward_pre_hook(lambda *_: autocast.add(torch.is_autocast_enabled('cpu')))
    fresh: Tensor = inferencer(tiny_base, loras['b'], mixed_precision='bf16')(**CALL)
    ours.load_adapter('style', loras['b'])
    assert torch.equal(ours(**CALL), fresh) and autocast == {False}
    assert {p.dtype for p in ours.model.adapters['style'].all_parameters()} == {torch.bfloat16}
    pipeline = ours.model.to_diffusers()
    assert {p.dtype for p in pipeline.unet.parameters()} == {torch.bfloat16}
