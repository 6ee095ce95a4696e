"""The objective that repairs a set of adapters, against the same loss computed by hand with models of one adapter."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import CASES, build, conditions, shaken
from parity import make_batch, t2i

from diffengine_sdxl import rng
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.models.sdxl import SDXL

KINDS = ('ip_adapter', 'lora', 't2i_adapter')
CONFIGS: dict[str, dict[str, Any]] = {kind: CASES[kind].config for kind in KINDS}


@pytest.fixture(scope='module')
def trained(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Configs of three finished adapters."""
    folder = tmp_path_factory.mktemp('trained')
    model = shaken(build(tiny_base, CONFIGS), *(CASES[kind] for kind in KINDS))
    for kind, adapter in model.adapters.items():
        adapter.save(folder / kind)
    return {kind: {**CONFIGS[kind], 'weights': str(folder / kind)} for kind in KINDS}


def repairing(base: Path, configs: dict[str, dict[str, Any]], **settings: Any) -> SDXL:
    """A model that repairs, and one step away from what it was."""
    encoder = str(base.parent / 'image_encoder')
    configs = {k: {n: encoder if n == 'image_encoder' else v for n, v in c.items()} for k, c in configs.items()}
    model = SDXL(pretrained=str(base), adapters=configs, objective=dict(type='JointDistill', alone=2.0), **settings)
    model.train()
    return model


def moved(model: SDXL, deviation: float = 0.02) -> SDXL:
    """Change what trains."""
    with torch.no_grad():
        for name, parameters in model.trainables().items():
            for i, (_, p) in enumerate(parameters):
                p.add_(deviation * torch.randn(p.shape, generator=rng.generator('moved', name, i)))
    return model


def test_the_second_term_is_the_distance_from_the_former_adapter(
        tiny_base: Path, trained: dict[str, dict[str, Any]]) -> None:
    """Predictions of a model that was built with the drawn adapter alone, as it was and as it is; every adapter."""
    model, seen = repairing(tiny_base, trained), set()
    batch = make_batch(2, conditions=conditions(*CONFIGS.values()))
    assert model(batch, mode='loss')['loss_alone'] == 0
    moved(model)
    for number in range(12):
        batch.key = [f'{number}/{i}' for i in range(2)]
        losses = model(batch, mode='loss')
        name = KINDS[rng.key_seed('joint distillation', 11, batch.key[0], 3) % 3]
        if name in seen:
            continue
        seen.add(name)
        former = repairing(tiny_base, {name: trained[name]})
        now = moved(repairing(tiny_base, {name: trained[name]}))
        drawn = now.objective.inputs(now, batch)
        latents, noise, _, times = drawn
        progress = (1 - times / 1000).unsqueeze(1).expand(-1, 2)
        outputs = [m.predict(m.schedule.add_noise(latents, noise, times), times, m.encode(batch), progress)
                   for m in (former, now)]
        expected = 2 * (outputs[0] - outputs[1]).square().mean().item()
        assert losses['loss_alone'].item() == pytest.approx(expected, rel=1e-5) and expected > 0
    assert seen == set(KINDS)


def test_the_first_term_is_that_of_denoise(tiny_base: Path, trained: dict[str, dict[str, Any]]) -> None:
    """Bitwise, with its gradients: the passes of one adapter leave nothing behind."""
    model = moved(repairing(tiny_base, trained))
    before = copy.deepcopy({n: p.detach() for n, p in model.named_parameters()})
    batch = make_batch(2, conditions=conditions(*CONFIGS.values()))
    losses = model(batch, mode='loss')
    plain = moved(repairing(tiny_base, trained))
    plain.objective = type(plain.objective).__base__()
    expected = plain(batch, mode='loss')['loss']
    assert torch.equal(losses['loss'], expected)
    losses['loss'].backward()
    expected.backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.detach(), before[name])
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, theirs[name].grad)


def test_gradients_of_the_second_term_reach_the_drawn_adapter_only(
        tiny_base: Path, trained: dict[str, dict[str, Any]]) -> None:
    model = moved(repairing(tiny_base, trained))
    batch = make_batch(2, conditions=conditions(*CONFIGS.values()))
    model(batch, mode='loss')['loss_alone'].backward()
    name = KINDS[rng.key_seed('joint distillation', 11, batch.key[0], 3) % 3]
    # At its own strength, also where partners are drawn off.
    alone = model(batch, mode='loss')['loss_alone']
    drawn = moved(repairing(tiny_base, trained, partners={kind: dict(prob=0.0) for kind in KINDS}))
    assert torch.equal(drawn(batch, mode='loss')['loss_alone'], alone) and alone > 0
    with_gradient = {kind for kind, parameters in model.trainables().items()
                     for _, p in parameters if p.grad is not None and p.grad.any()}
    assert with_gradient == {name}


@pytest.mark.parametrize(('settings', 'words'), [
    (dict(trainable=['unet']), 'trains adapters only'), (dict(gradient_checkpointing=True), 'gradient checkpointing')])
def test_what_it_cannot_do_is_refused(tiny_base: Path, trained: dict[str, dict[str, Any]], settings: dict[str, Any],
                                      words: str) -> None:
    with pytest.raises(UserError, match=words):
        repairing(tiny_base, trained, **settings)(make_batch(2, conditions=conditions(*CONFIGS.values())), mode='loss')


def test_a_fresh_adapter_is_refused(tiny_base: Path) -> None:
    with pytest.raises(UserError, match="'one' starts from nothing; set model.adapters.one.weights"):
        SDXL(pretrained=str(tiny_base), adapters=dict(one=t2i()), objective=dict(type='JointDistill'))
    for alone in (0, -1, True, float('inf')):
        with pytest.raises(UserError, match='must be a positive number'):
            SDXL(pretrained=str(tiny_base), objective=dict(type='JointDistill', alone=alone))
