"""Batches, conditioning rows, active ranges, and the UNet's arguments."""

from dataclasses import fields
from typing import Any

import pytest
import torch
from parity import images, make_batch
from torch import Tensor

from diffengine_sdxl.errors import UserError
from diffengine_sdxl.pixel_values import as_floats
from diffengine_sdxl.structures import Batch, Conditioning, ImageTokens, UNetCall, to_device, where


def conditioning(num: int, start: float = 0.0, **kwargs: Any) -> Conditioning:
    row = torch.arange(num) + start
    adapters = {'a': {'x': row.view(-1, 1), 'y': 2 * row.view(-1, 1, 1)}, 'b': {'x': -row}}
    return Conditioning(row.view(-1, 1, 1).expand(-1, 3, 2), row.view(-1, 1).expand(-1, 5),
                        row.view(-1, 1).expand(-1, 6), adapters, **kwargs)


def call(num: int = 2, **kwargs: Any) -> UNetCall:
    """A call of the UNet with `num` rows."""
    return UNetCall(**{**dict(sample=torch.zeros(num, 4, 8, 8), timestep=torch.tensor(3), progress=torch.zeros(num, 2),
                              text=torch.zeros(num, 7, 6), pooled=torch.zeros(num, 5), time_ids=torch.zeros(num, 6)),
                       **kwargs})


def test_rows_of_a_conditioning() -> None:
    """Of every tensor, also of adapters and of optional UNet inputs; None stays None."""
    row = torch.arange(5.0)
    both = conditioning(5, channels=row.view(5, 1, 1, 1), timestep_cond=row.view(5, 1))
    for index in (slice(2, 5), torch.tensor([2, 3, 4]), torch.tensor([False, False, True, True, True])):
        part = both.rows(index)
        for name in ('text', 'pooled', 'time_ids', 'channels', 'timestep_cond'):
            assert torch.equal(getattr(part, name), getattr(both, name)[2:])
        assert torch.equal(part.adapters['a']['x'], both.adapters['a']['x'][2:])
    assert len(both.text) == 5 and conditioning(2).rows(slice(1)).channels is None


@pytest.mark.parametrize('shape', [(3,), (3, 4), (3, 2, 2, 2)])
def test_where_touches_no_number(shape: tuple[int, ...]) -> None:
    """Rows are selected without arithmetic: NaN and infinity of the other row have no effect."""
    null, value = torch.full(shape, float('nan')), torch.randn(shape)
    drop = torch.tensor([False, True, False])
    rows = where(drop, null, value)
    assert torch.equal(rows[~drop], value[~drop]) and rows[drop].isnan().all()
    assert torch.equal(where(drop, torch.zeros(shape), null.fill_(float('inf')))[drop], torch.zeros(shape)[drop])


@pytest.mark.parametrize(('active_range', 'begin', 'end', 'inside'), [
    ((0.2, 0.6), 0.2, 0.4, True), ((0.2, 0.6), 0.4, 0.6, True), ((0.2, 0.6), 0.1, 0.3, False),
    ((0.2, 0.6), 0.5, 0.7, False), ((0.0, 0.7), 0.6, 0.7, True), ((0.0, 1 / 3), 0.0, 1 / 3, True),
    ((0.7, 1.0), 0.7, 0.8, True), ((0.5, 1.0), 0.4, 0.5, False)])
def test_a_step_is_inside_when_it_begins_and_ends_inside(active_range: tuple[float, float], begin: float, end: float,
                                                         inside: bool) -> None:
    """Both bounds are included, though progress is fp32 and ranges are not."""
    progress = torch.tensor([[begin, end]]).expand(2, 2)
    gate = call(progress=progress).gate(active_range, 'one')
    assert gate is None if inside else gate is not None and gate.tolist() == [0, 0]
    training = call(progress=progress, training=True).gate(active_range, 'one')
    assert training is not None and training.tolist() == [float(inside)] * 2 and training.dtype == torch.float32


def test_gates_of_each_row() -> None:
    """In training, rows have different timesteps; the full range has no gate."""
    progress = torch.tensor([[0.1, 0.1], [0.5, 0.5], [0.9, 0.9]])
    for training in (True, False):
        one = call(3, progress=progress, training=training)
        assert one.gate((0.0, 1.0), 'one') is None
        gate = one.gate((0.4, 1.0), 'one')
        assert gate is not None and gate.tolist() == [0, 1, 1]


def features(scale: float = 1.0, width: int = 2) -> list[Tensor]:
    """Two feature maps."""
    return [torch.full((2, width, 4, 4), scale), torch.full((2, 3, 2, 2), 2 * scale)]


def test_feature_maps_sum_and_are_fresh_each_call() -> None:
    """The UNet pops from its list; ours stays. The dtype is the sample's."""
    one = call(sample=torch.zeros(2, 4, 8, 8, dtype=torch.bfloat16))
    assert 'down_intrablock_additional_residuals' not in one.kwargs()
    one.check_consumed()
    added = features()
    one.add_residuals(added)
    one.add_residuals(features(0.5))
    for _ in range(2):
        passed = one.kwargs()['down_intrablock_additional_residuals']
        assert [float(f.mean()) for f in passed] == [1.5, 3.0] and passed[0].dtype == torch.bfloat16
        passed.clear()
        one.check_consumed()
    assert [float(f.mean()) for f in added] == [1, 2]
    with pytest.raises(UserError, match=r'feature maps of different shapes: \[\(2, 2, 4, 4\).*\(2, 5, 4, 4\)'):
        one.add_residuals(features(width=5))
    one.kwargs()['down_intrablock_additional_residuals'].pop(0)
    with pytest.raises(UserError, match=r'used 1 of 2 feature maps; those of shape \[\(3, 2, 2\)\].*\(8, 8\)'):
        one.check_consumed()


def test_the_arguments_of_the_unet() -> None:
    import inspect

    from diffusers import UNet2DConditionModel
    one = call()
    one.add_residuals(features())
    kwargs = one.kwargs()
    assert set(kwargs) <= set(inspect.signature(UNet2DConditionModel.forward).parameters)
    assert kwargs['sample'] is one.sample and kwargs['timestep'] is one.timestep
    assert kwargs['encoder_hidden_states'] is one.text
    assert kwargs['added_cond_kwargs'] == {'text_embeds': one.pooled, 'time_ids': one.time_ids}


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_offsets_of_the_embeddings_sum(dtype: torch.dtype) -> None:
    """In the offsets' precision, to the embeddings' dtype; each adapter sees the prompt's own; rows stay apart."""
    text, pooled = torch.randn(3, 7, 6).to(dtype), torch.randn(3, 5).to(dtype)
    weights = torch.tensor([1.0, 0.5, 0.0], requires_grad=True)
    one, other = (call(3, text=text, pooled=pooled) for _ in range(2))
    offsets = [(torch.randn(3, 1, 6), None), (torch.randn(3, 7, 6), torch.randn(1, 5)), (None, torch.randn(3, 5))]
    for added, order in ((one, (0, 1, 2)), (other, (2, 1, 0))):
        for i in order:
            assert added.text is text and added.pooled is pooled
            added.add_text(*(None if o is None else o * weights.view(3, *[1] * (o.dim() - 1)) for o in offsets[i]))
        added.add_text(pooled=torch.full((3, 5), 1e-4), text=torch.full((1, 1, 6), 1e-4))
    for added in (one, other):
        kwargs = added.kwargs()
        embeds = {'text': kwargs['encoder_hidden_states'], 'pooled': kwargs['added_cond_kwargs']['text_embeds']}
        for i, (name, own) in enumerate((('text', text), ('pooled', pooled))):
            total = sum(pair[i].double() * weights.double().view(3, *[1] * (own.dim() - 1))
                        for pair in offsets if pair[i] is not None)  # type: ignore[union-attr]
            expected = own.double() + total + 1e-4
            assert embeds[name].dtype == dtype
            torch.testing.assert_close(embeds[name], expected.to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-6,
                                       atol=1e-6)
        assert torch.autograd.grad(embeds['text'].double().sum(), weights)[0].abs().min() > 0


def test_no_offset_is_the_prompt() -> None:
    """Bitwise, as one of 0 is; beside image tokens too."""
    one = call(text=torch.randn(2, 7, 6).bfloat16(), pooled=torch.randn(2, 5).bfloat16())
    assert one.kwargs()['encoder_hidden_states'] is one.text
    one.add_text(torch.zeros(2, 7, 6), torch.zeros(2, 5))
    assert torch.equal(one.kwargs()['encoder_hidden_states'], one.text)
    assert torch.equal(one.kwargs()['added_cond_kwargs']['text_embeds'], one.pooled)
    one.add_text(torch.ones(1, 1, 6))
    one.add_image_tokens(ImageTokens('a', torch.zeros(2, 1, 4, 6), {}))
    moved, images = one.kwargs()['encoder_hidden_states']
    assert torch.equal(moved, (one.text.float() + 1).bfloat16()) and len(images) == 1


@pytest.mark.parametrize(('text', 'pooled', 'words'), [
    ((2, 7, 8), None, r'adds \[2, 7, 8\] to the text embeddings, which are \[2, 7, 6\].*another base'),
    ((2, 6), None, 'text embeddings'), ((3, 1, 6), None, 'text embeddings'), ((2, 3, 6), None, 'text embeddings'),
    (None, (2, 4), r'adds \[2, 4\] to the pooled'), (None, (5,), 'pooled'), (None, (2, 1), 'pooled')])
def test_offsets_that_do_not_fit(text: Any, pooled: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        call().add_text(*(None if shape is None else torch.zeros(shape) for shape in (text, pooled)))


def test_pixels_become_floats_by_a_table() -> None:
    """All 256 values are bitwise torchvision's `to_tensor` and `normalize`, on any device; floats are left alone."""
    pixels = torch.arange(256).byte().view(1, 1, 16, 16).expand(2, 3, -1, -1)
    expected = pixels.float().div(255)
    assert torch.equal(as_floats(pixels), expected)
    assert torch.equal(as_floats(pixels, centred=True), expected.sub(0.5).div(0.5))
    on_device = as_floats(pixels.to('meta'), centred=True)
    assert on_device.is_meta and on_device.shape == pixels.shape and on_device.dtype == torch.float32
    assert as_floats(expected, centred=True) is expected


def test_to_device() -> None:
    """Every tensor moves, also in dicts, except what the host reads; the batch itself is unchanged."""
    batch = make_batch(2, drop={'text': torch.tensor([True, False])}, weight=torch.ones(2), mask=torch.ones(2, 1, 8, 8),
                       drawn={'noise': torch.ones(2, 4, 8, 8), 'timestep': torch.tensor([1, 2])})
    moved, collated = to_device(batch, 'meta'), to_device(vars(batch), 'meta')
    assert {name for name, value in moved.drawn.items() if value.is_meta} == {'noise'}
    assert Batch(**collated).drawn['noise'].is_meta and not collated['drop']['text'].is_meta  # before it is packed, too
    for name in ('time_ids', 'img', 'weight', 'mask'):
        assert getattr(moved, name).device.type == 'meta' and getattr(batch, name).device.type == 'cpu'
    assert moved.conditions['conditioning_image'].device.type == 'meta'
    assert moved.drop['text'].device.type == 'cpu'
    assert moved.epoch.device.type == moved.seed.device.type == 'cpu'
    assert moved.text == batch.text and moved.key == batch.key and len(moved) == 2
    assert Batch.names() == {f.name for f in fields(Batch)} >= {'img', 'text', 'time_ids', 'key', 'epoch', 'seed'}
    assert images(1).shape == (1, 3, 64, 64)
