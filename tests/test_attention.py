"""Attention processors: image tokens bitwise as in diffusers' processors, and none left after the last user."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, IPAdapterAttnProcessor2_0
from torch import Tensor, nn
from torch.nn import functional

from diffengine_sdxl import rng
from diffengine_sdxl.attention import (
    ImageLayers,
    ImagePrompts,
    block_scales,
    cross_attention_names,
    release,
    set_backend,
    use_image_prompts,
)
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.structures import ImageTokens
from diffengine_sdxl.testing import tiny_unet

NAME = 'down_blocks.1.attentions.0.transformer_blocks.0.attn2'


@pytest.fixture(scope='module')
def unet() -> Any:
    """As many attentions a block as SDXL's; none trains."""
    with rng.fork('unet'):
        return tiny_unet(layers_per_block=2).requires_grad_(False)


@pytest.fixture
def attention() -> Attention:
    with rng.fork('attention'):
        return Attention(query_dim=32, cross_attention_dim=24, heads=4, dim_head=8).requires_grad_(False)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


Prompt = tuple[ImageTokens, ImageLayers]


def prompt(num_images: int, scale: float | Tensor, seed: int, mask: Tensor | None = None, batch: int = 2) -> Prompt:
    """Return `num_images` of 4 tokens of a user of its own, with its layers in a block of weight 0.5."""
    with rng.fork('layers', seed):
        layers = ImageLayers(*(nn.Linear(24, 32, bias=False).requires_grad_(False) for _ in range(2)), weight=0.5)
    scale = scale if isinstance(scale, Tensor) else torch.tensor(scale, dtype=torch.float64)
    return ImageTokens(f'user {seed}', numbers(batch, num_images, 4, 24, seed=seed), {0.5: scale}, mask), layers


def ours(attention: Attention, prompts: list[Prompt], hidden: Tensor, text: Tensor, former: Any = None) -> Tensor:
    """Our processor with the layers of these users, called with their tokens."""
    processor = ImagePrompts(former)
    processor.layers = {image.user: layers for image, layers in prompts}
    return processor(attention, hidden, (text, [image for image, _ in prompts]))


def stock(attention: Attention, prompts: list[Prompt], hidden: Tensor, text: Tensor, masks: Any = None) -> Tensor:
    """diffusers' own processor with our layers."""
    processor = IPAdapterAttnProcessor2_0(32, 24, tuple(4 for _ in prompts), [float(i.scales[0.5]) for i, _ in prompts])
    processor.to_k_ip = nn.ModuleList([layers.to_k for _, layers in prompts])
    processor.to_v_ip = nn.ModuleList([layers.to_v for _, layers in prompts])
    return processor(attention, hidden, (text, [i.tokens for i, _ in prompts]), ip_adapter_masks=masks)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('masked', [False, True])
def test_several_image_prompts_are_bitwise_diffusers(attention: Attention, masked: bool, dtype: torch.dtype) -> None:
    """Three adapters of 1, 2 and 1 images, of other scales; with masks in two of them."""
    regions = (numbers(1, 3, 96, 64, seed=7) > 0).float()
    masks = [regions[:, :1], regions[:, 1:], None] if masked else [None] * 3
    prompts = [prompt(n, s, i, None if mask is None else mask.expand(2, -1, -1, -1))
               for i, ((n, s), mask) in enumerate(zip([(1, 1.0), (2, 0.7), (1, -0.3)], masks, strict=True))]
    hidden, text = numbers(2, 12 * 8, 32, seed=8).to(dtype), numbers(2, 7, 24, seed=9).to(dtype)
    attention.to(dtype)
    for image, layers in prompts:
        image.tokens = image.tokens.to(dtype)
        for layer in (layers.to_k, layers.to_v):
            layer.to(dtype)
    out = ours(attention, prompts, hidden, text)
    expected = stock(attention, prompts, hidden, text, masks if masked else None)
    assert out.dtype == dtype and torch.equal(out, expected)
    assert not torch.allclose(out, AttnProcessor2_0()(attention, hidden, text), atol=1e-2)


def test_rows_may_have_scales_and_masks_of_their_own(attention: Attention) -> None:
    """[B, 1, 1] scales and [B, n, H, W] masks: each row as in a batch of its own."""
    mask, scale = torch.rand(2, 2, 64, 96, generator=torch.Generator().manual_seed(1)), torch.tensor([0.0, 0.75])
    image, layers = prompt(2, scale.view(2, 1, 1), 3, mask)
    hidden, text = numbers(2, 8 * 12, 32, seed=4), numbers(2, 7, 24, seed=5)
    out = ours(attention, [(image, layers)], hidden, text)
    for row in range(2):
        single = ImageTokens('one', image.tokens[row:row + 1], {0.5: scale[row]})
        expected = stock(attention, [(single, layers)], hidden[row:row + 1], text[row:row + 1], [mask[row:row + 1]])
        torch.testing.assert_close(out[row:row + 1], expected, rtol=1e-6, atol=1e-6)  # another batch size
    assert torch.equal(out[:1], ours(attention, [], hidden, text, AttnProcessor2_0())[:1])


def test_layers_can_be_copied_after_a_training_step() -> None:
    """As `to_diffusers` does with the UNet: what a step computed in another dtype belongs to its graph."""
    layers = ImageLayers(nn.Linear(2, 3), nn.Linear(2, 3))
    layers.copies = layers.to_k.weight.bfloat16(), layers.to_v.weight.bfloat16()
    copied = copy.deepcopy(layers)
    assert copied.copies is None and torch.equal(copied.weights[0], layers.to_k.weight)


@pytest.mark.parametrize('size', [(1024, 1024), (832, 1216), (1344, 768), (96, 160), (48, 80), (40, 72)])
def test_a_mask_falls_on_the_right_queries(attention: Attention, size: tuple[int, int]) -> None:
    """At every level of the UNet; as in diffusers if 32 divides the sides, correct also where its guess is wrong."""
    height, width = size[0] // 8, size[1] // 8
    mask = torch.zeros(1, 1, *size)
    mask[..., size[1] // 2:] = 1
    image = prompt(1, 1.0, 0, mask, batch=1)
    for level in range(3):
        hidden, text = numbers(1, height * width, 32, seed=level), numbers(1, 7, 24, seed=9)
        out = ours(attention, [image], hidden, text)
        plain = AttnProcessor2_0()(attention, hidden, text)
        small = functional.interpolate(mask, (height, width), mode='bicubic')[0].flatten(1)
        untouched = (out == plain).all(-1)
        assert torch.equal(untouched, small == 0) and untouched.any() and not untouched.all()
        if size[0] % 32 == size[1] % 32 == 0:
            theirs = IPAdapterMaskProcessor.downsample(mask[:, 0], 1, height * width, 32)[..., 0]
            assert torch.equal(theirs, small)
            assert torch.equal(out, stock(attention, [image], hidden, text, [mask]))
        height, width = (height + 1) // 2, (width + 1) // 2


def test_without_image_prompts_the_former_processor_computes(unet: Any) -> None:
    """Whatever it was; also in a layer without image tokens."""
    formers = dict(unet.attn_processors)
    slow = AttnProcessor()
    unet.get_submodule(NAME).set_processor(slow)
    call = dict(sample=numbers(2, 4, 8, 8), timestep=torch.tensor(500), added_cond_kwargs={
        'text_embeds': numbers(2, 32), 'time_ids': torch.full((2, 6), 64.0)})
    text = numbers(2, 77, 64)
    expected = unet(**call, encoder_hidden_states=text).sample
    use_image_prompts(unet, 'user 0', {})
    assert torch.equal(unet(**call, encoder_hidden_states=text).sample, expected)
    nowhere, _ = prompt(1, 1.0, 0)
    assert torch.equal(unet(**call, encoder_hidden_states=(text, [nowhere])).sample, expected)
    assert {n for n, p in unet.attn_processors.items() if isinstance(p, ImagePrompts)} == {
        n for n in formers if n.endswith('attn2.processor')}
    release(unet, 'user 0')
    assert unet.get_submodule(NAME).processor is slow
    unet.get_submodule(NAME).set_processor(formers[f'{NAME}.processor'])
    assert all(p is formers[n] for n, p in unet.attn_processors.items())


def test_processors_go_with_their_last_user(unet: Any) -> None:
    """A name used twice gives two keys; an unknown one changes nothing; no reference to the UNet is kept."""
    formers = dict(unet.attn_processors)
    keys = [use_image_prompts(unet, user, {}) for user in ('a', 'b', 'b')]
    assert keys[:2] == ['a', 'b'] and len(set(keys)) == 3
    for key in (keys[0], 'nobody', keys[1]):
        release(unet, key)
        assert isinstance(unet.get_submodule(NAME).processor, ImagePrompts)
    release(unet, keys[2])
    assert all(p is formers[n] for n, p in unet.attn_processors.items())
    other = tiny_unet()
    use_image_prompts(other, 'a', {})
    gone = weakref.ref(other)
    del other
    gc.collect()
    assert gone() is None


class Kernel(AttnProcessor2_0):
    """Stands in for a backend's processor; xformers itself needs a GPU."""


def test_a_backend_is_set_beneath_image_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """They stay, with the backend's processor below; a backend that is not installed changes nothing."""
    unet = tiny_unet()
    _, layers = prompt(1, 1.0, 0)
    use_image_prompts(unet, 'a', {NAME: layers})
    monkeypatch.setattr(unet, 'enable_xformers_memory_efficient_attention', lambda: unet.set_attn_processor(Kernel()))
    set_backend(unet, 'xformers')
    processors = unet.attn_processors
    assert {n.rpartition('.attn')[2][0]: type(p) for n, p in processors.items()} == {'1': Kernel, '2': ImagePrompts}
    assert all(isinstance(p.former, Kernel) and list(p.layers) == ['a'] for p in processors.values()
               if isinstance(p, ImagePrompts))
    assert unet.get_submodule(NAME).processor.layers == {'a': layers}

    def missing() -> None:
        raise ModuleNotFoundError('no xformers')

    monkeypatch.setattr(unet, 'enable_xformers_memory_efficient_attention', missing)
    with pytest.raises(UserError, match='no xformers'):
        set_backend(unet, 'xformers')
    release(unet, 'a')
    assert {type(p) for p in unet.attn_processors.values()} == {Kernel}


def test_names_are_in_the_order_of_ip_adapter_files(unet: Any) -> None:
    """Key 2 i + 1 of a file is the processor at that index of the whole list: attn1 and attn2 alternate."""
    names, processors = cross_attention_names(unet), list(unet.attn_processors)
    assert [f'{n}.processor' for n in names] == [processors[2 * i + 1] for i in range(len(names))]
    assert len(names) == 2 + 2 * 2 + 3 * 2 + 3 + 2 == len(processors) / 2
    assert names[0].startswith('down_blocks.1') and names[-1].startswith('mid_block')


@pytest.mark.parametrize('blocks', [
    {'up': {'block_0': [0.0, 1.0, 0.0]}}, {'down': {'block_2': [0.0, 1.0]}, 'up': {'block_0': [0.0, 1.0, 0.0]}},
    {'down': 0.25, 'mid': 0.5, 'up': {'block_0': 2.0, 'block_1': [1.0, 0.0, -0.5]}}, {'mid': [0.5], 'up': 1}])
def test_scales_of_blocks_are_those_of_diffusers(unet: Any, blocks: dict[str, Any]) -> None:
    """As diffusers' `set_ip_adapter_scale` gives them to the layers."""
    from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales
    prefixes = _maybe_expand_lora_scales(unet, [blocks], default_scale=0.0)[0]
    expected = {n: s for n in cross_attention_names(unet) for p, s in prefixes.items() if n.startswith(f'{p}.') and s}
    assert block_scales(unet, blocks) == expected and expected


def test_aspects_are_blocks_of_sdxl(unet: Any) -> None:
    """InstantStyle's, as diffusers' documentation writes them."""
    style, layout = {'up': {'block_0': [0.0, 1.0, 0.0]}}, {'down': {'block_2': [0.0, 1.0]}}
    assert block_scales(unet, 'style') == block_scales(unet, style)
    assert block_scales(unet, 'layout') == block_scales(unet, layout)
    assert block_scales(unet, 'style_layout') == block_scales(unet, {**style, **layout})
    assert block_scales(unet, None) == dict.fromkeys(cross_attention_names(unet), 1.0)


@pytest.mark.parametrize(('blocks', 'message'), [
    ('layout', r'down_blocks\.2\.attentions\.1, which this base does not have.*up_blocks\.0\.attentions\.1'),
    ('colour', "blocks='colour'.*'style'"), (['up'], r"blocks=\['up'\] is unknown; .*or name the blocks"),
    ({'side': 1.0}, "'side'"), ({'up': {'block_7': 1.0}}, r'up_blocks\.7'),
    ({'down': {'block_0': 1.0}}, r'down_blocks\.0'), ({'up': {'block_0': [1.0, 1.0, 1.0]}}, 'has 2 attentions'),
    ({'up': {'block_0': 'all'}}, "'all'"), ({'up': 0.0}, 'no scale other than 0'),
    ({'mid': {'block_0': 1.0}}, 'mid_block')])
def test_unknown_blocks_are_refused(blocks: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        block_scales(tiny_unet(), blocks)
