"""Partners: drawn by keys, row by row where that is possible, and only in training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import CASES, build, conditions, shaken
from parity import assert_same, grads, make_batch, t2i
from torch import Tensor

from diffengine_sdxl import rng
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.models.partners import draw_partners
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.structures import Batch

NUM = 6
#: Kinds that can be drawn; of those inside the base one of each way of computing.
KINDS = ['t2i_adapter', 'controlnet', 'ip_adapter', 'lora', 'lora_everywhere', 'dora', 'oft', 'lokr']
LEARNER = t2i(condition_key='learned')


def batch_for(kind: str) -> Batch:
    """Samples with the partner's condition and the learner's."""
    inputs = conditions(CASES[kind].config, dict(condition_key='learned'), num=NUM)
    return make_batch(NUM, conditions=inputs)


def beside(base: Path, kind: str, own: float | None = None, **partner: Any) -> SDXL:
    """A T2I-Adapter that trains beside a frozen adapter that looks trained; a `partner` if it has settings."""
    config = {**CASES[kind].config, **({} if own is None else {'scale': own})}
    model = shaken(build(base, dict(partner=config)), CASES[kind])
    weights = {n: p.detach().clone() for n, p in model.trainables()['partner']}
    model = build(base, dict(partner={**config, 'trainable': False}, learner=LEARNER),
                  **({'partners': dict(partner=partner)} if partner else {}))
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        for name, value in weights.items():
            parameters[name].copy_(value)
    return model


def prediction(model: SDXL, batch: Batch, train: bool = True) -> Tensor:
    """What a training step predicts, with gradients on."""
    model.train(train)
    noise = torch.randn(NUM, 4, 8, 8, generator=rng.generator('noise'))
    times = torch.tensor([900, 700, 500, 400, 300, 100])
    progress = (1 - times / 1000).unsqueeze(1).expand(-1, 2)
    return model.predict(noise, times, model.encode(batch), progress).detach()


@pytest.mark.parametrize('kind', KINDS)
def test_the_ends_are_all_and_nothing(tiny_base: Path, kind: str) -> None:
    """prob=1 is the adapter as it is; prob=0 the model without it; bitwise, and in the learner's gradients."""
    batch = batch_for(kind)
    always, never = beside(tiny_base, kind, prob=1.0), beside(tiny_base, kind, prob=0.0)
    plain, alone = beside(tiny_base, kind), build(tiny_base, dict(learner=LEARNER))
    expected, without = prediction(plain, batch), prediction(alone, batch)
    assert torch.equal(prediction(always, batch), expected)
    # Captions are read in one batch where an adapter is in a text encoder, else row by row.
    rounding = 1e-5 if kind == 'lora_everywhere' else 0
    assert (prediction(never, batch) - without).abs().max() <= rounding
    assert (expected - without).abs().max() > 1e-3
    # Outside of training it always acts.
    assert torch.equal(prediction(never, batch, train=False), prediction(plain, batch, train=False))
    if kind in ('t2i_adapter', 'lora'):
        for model, other in ((always, plain), (never, alone)):
            loss, found = grads(model, batch)
            its_loss, its_found = grads(other, batch)
            assert torch.equal(loss, its_loss)
            assert all('partner' not in name for name in found)
            assert_same(found, its_found)


@pytest.mark.parametrize('kind', ['t2i_adapter', 'controlnet', 'ip_adapter'])
def test_each_row_has_a_draw(tiny_base: Path, kind: str) -> None:
    """Rows on which it acts are those of prob=1 at the drawn scale, the others those of prob=0."""
    batch = batch_for(kind)
    model = beside(tiny_base, kind, prob=0.5, scale=0.5)
    acts = draw_partners(model.partners, batch, dict(model.adapters.items()))[0]['partner'][:, 0]
    assert set(acts.tolist()) == {0.0, 0.5}
    half, without = (prediction(beside(tiny_base, kind, own=scale), batch) for scale in (0.5, 0.0))
    rows = (acts > 0).view(-1, 1, 1, 1)
    assert torch.equal(prediction(model, batch), torch.where(rows, half, without))


def test_inside_the_base_a_batch_has_one_draw(tiny_base: Path) -> None:
    batch = batch_for('lora_everywhere')
    model = beside(tiny_base, 'lora_everywhere', prob=0.5, scale=(0.25, 0.75))
    seen = set()
    for number in range(8):
        keys = [f'{number}/{i}' for i in range(NUM)]
        drawn = Batch(**{**vars(batch), 'key': keys})
        strengths, factors = draw_partners(model.partners, drawn, dict(model.adapters.items()))
        factor = factors['partner']
        assert strengths['partner'][:, 0].tolist() == [float(factor > 0)] * NUM
        assert factor == 0 or 0.25 <= factor <= 0.75
        seen.add(factor > 0)
        if number < 4:
            other = beside(tiny_base, 'lora_everywhere', own=factor)
            assert torch.equal(prediction(model, drawn), prediction(other, drawn))
    assert seen == {True, False}
    prediction(model, batch, train=False)
    assert model.adapters['partner']._strength == 1


def test_a_draw_has_a_part_of_sampling(tiny_base: Path) -> None:
    """Rows that lie outside (0.2, 0.6) are those of a model without it."""
    batch = batch_for('t2i_adapter')
    model = beside(tiny_base, 't2i_adapter', prob=1.0, start=0.2, end=0.6)
    inside = torch.tensor([False, True, True, True, False, False]).view(-1, 1, 1, 1)
    acting, without = (prediction(beside(tiny_base, 't2i_adapter', own=scale), batch) for scale in (1.0, 0.0))
    assert torch.equal(prediction(model, batch), torch.where(inside, acting, without))


def test_draws_depend_on_the_sample_only(tiny_base: Path) -> None:
    """Not on the batch; another epoch, name or key is another draw. Shares and ranges are as asked."""
    model = build(tiny_base, dict(one=t2i(), two=t2i()), partners=dict(
        one=dict(prob=0.3, scale=(0.5, 1.0), start=(0.0, 0.2), end=(0.6, 1.0)), two=dict(prob=0.3)))
    adapters, num = dict(model.adapters.items()), 400
    fields = dict(text=[''] * num, time_ids=torch.zeros(num, 6), key=[f'{i}' for i in range(num)],
                  epoch=torch.zeros(num, dtype=torch.int64), seed=torch.zeros(num, dtype=torch.int64))
    whole = draw_partners(model.partners, Batch(**fields), adapters)[0]
    part = draw_partners(model.partners, Batch(**{k: v[7:9] for k, v in fields.items()}), adapters)[0]
    assert torch.equal(part['one'], whole['one'][7:9])
    later = draw_partners(model.partners, Batch(**{**fields, 'epoch': torch.ones(num, dtype=torch.int64)}), adapters)[0]
    assert not torch.equal(later['one'], whole['one'])
    acts = {name: table[:, 0] > 0 for name, table in whole.items()}
    assert not torch.equal(acts['one'], acts['two'])
    for on in acts.values():
        assert 0.23 < on.float().mean() < 0.37
    table = whole['one'][acts['one']]
    for column, (low, high) in enumerate(((0.5, 1.0), (0.0, 0.2), (0.6, 1.0))):
        values = table[:, column]
        assert low <= values.min() < low + 0.1 * (high - low) and high - 0.1 * (high - low) < values.max() <= high


def test_partners_may_train(tiny_base: Path) -> None:
    """All that trains has a gradient in every step, also one that does not act: it is 0."""
    configs: dict[str, Any] = {name: CASES[name].config for name in ('t2i_adapter', 'lora_everywhere', 'ip_adapter')}
    for prob in (0.0, 1.0):
        model = shaken(build(tiny_base, configs, partners={name: dict(prob=prob) for name in configs}),
                       *(CASES[name] for name in sorted(configs)))
        found = grads(model, make_batch(2, conditions=conditions(*configs.values())))[1]
        for parameters in model.trainables().values():
            assert all(bool(found[name].any()) == (prob == 1) for name, _ in parameters
                       if prob == 0 or 'bias' not in name)


@pytest.mark.parametrize(('partners', 'words'), [
    (dict(two=dict(prob=0.5)), "model.partners.two: no adapter has this name; model.adapters has one"),
    (dict(one=0.5), 'model.partners.one=0.5 must be a dict'),
    (dict(one=dict(prb=0.5)), "has no setting 'prb'.*Did you mean 'prob'"),
    (dict(one=dict(prob=1.5)), r'one.prob=1.5 must be a number in \[0, 1\]'),
    (dict(one=dict(prob=True)), 'one.prob=True must be'),
    (dict(one=dict(scale=(1.0, 0.5))), r'one.scale=\(1.0, 0.5\) must be a number or \(low, high\), from 0'),
    (dict(one=dict(scale='half')), "one.scale='half' must be a number"),
    (dict(one=dict(end=1.5)), 'one.end=1.5 must be .* from 0 to 1'),
    (dict(one=dict(start=(0, 0.5), end=(0.4, 1))), 'every start must come before every end')])
def test_invalid_partners_are_refused(tiny_base: Path, partners: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build(tiny_base, dict(one=t2i()), partners=partners)


@pytest.mark.parametrize(('kind', 'partner', 'words'), [
    ('textual_inversion', dict(), 'acts where a caption has it'), ('oft', dict(scale=0.5), 'The scale of an OFT'),
    ('oft', dict(scale=(0, 1)), 'a rotation, has one scale'),
    ('lora_everywhere', dict(start=(0.0, 0.3)), 'prompts are encoded once'),
    ('lora_everywhere', dict(end=(0.5, 1.0)), 'prompts are encoded once')])
def test_what_cannot_be_drawn_is_refused(tiny_base: Path, kind: str, partner: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build(tiny_base, dict(one=CASES[kind].config), partners=dict(one=partner))


def test_none_removes_an_inherited_partner(tiny_base: Path) -> None:
    """And an adapter that the config takes out takes its partner with it."""
    assert build(tiny_base, dict(one=t2i()), partners=dict(one=None)).partners == {}
    assert SDXL(pretrained=str(tiny_base), adapters=dict(one=t2i(), two=None),
                partners=dict(two=dict(prob=0.5))).partners == {}
