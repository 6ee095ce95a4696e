"""IP-Adapter files and image encoders: supported ones, and an error for each that does not fit."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity import assert_same, stock
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffengine_sdxl import rng
from diffengine_sdxl.adapters.frozen_image_encoder import ImagePreprocessing
from diffengine_sdxl.adapters.image_projection import image_projection
from diffengine_sdxl.adapters.ip_adapter import IPAdapter
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.testing import write_tiny_image_encoder, write_tiny_sdxl

NAME = 'ip_adapter.safetensors'
ARCHITECTURES = pytest.mark.parametrize('architecture', ['base', 'plus'])


@pytest.fixture(scope='module')
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_image_encoder(tmp_path_factory.mktemp('encoder') / 'image_encoder')


def build(base: Path, encoder: Path, shake: bool = False, dtype: str | None = None, **settings: Any) -> SDXL:
    model = SDXL(pretrained=str(base), dtype=dtype, adapters=dict(a=dict(
        type='IPAdapter', image_encoder=str(encoder), image_encoder_subfolder=None, **settings)))
    if shake:
        with torch.no_grad():
            for key, parameter in model.adapters['a'].named_parameters():
                parameter.add_(torch.randn(parameter.shape, generator=rng.generator(key)).to(parameter.dtype))
    return model


def state(model: SDXL) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.adapters['a'].state_dict().items()}


def nested(flat: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """As the authors' `.bin` files are."""
    parts: dict[str, dict[str, Tensor]] = {'image_proj': {}, 'ip_adapter': {}}
    for key, value in flat.items():
        part, _, rest = key.partition('.')
        parts[part][rest] = value
    return parts


@ARCHITECTURES
@pytest.mark.parametrize('suffix', ['.safetensors', '.bin'])
def test_stock_reads_every_tensor_as_we_do(tiny_base: Path, encoder: Path, tmp_path: Path, architecture: str,
                                           suffix: str) -> None:
    """Projector, keys and values, bitwise, in diffusers' UNet; and ours again from the same file."""
    model = build(tiny_base, encoder, shake=True, architecture=architecture)
    adapter = model.adapters['a']
    adapter.save(tmp_path)
    assert os.listdir(tmp_path) == [NAME]
    name = f'other{suffix}'
    if suffix == '.bin':
        torch.save(nested(load_file(tmp_path / NAME)), tmp_path / name)
    else:
        save_file(load_file(tmp_path / NAME), tmp_path / name)
    (tmp_path / NAME).unlink()
    pipeline = stock(tiny_base)
    pipeline.load_ip_adapter(tmp_path, subfolder='', weight_name=name, image_encoder_folder=None)
    theirs = pipeline.unet.encoder_hid_proj.image_projection_layers[0]
    assert_same(theirs.state_dict(), adapter.projector.state_dict())
    processors = pipeline.unet.attn_processors
    for i, layer in enumerate(adapter.layers):
        own = processors[f'{layer}.processor'].state_dict()
        assert_same(own, {f'to_{x}_ip.0.weight': getattr(adapter, f'to_{x}')[i].weight.detach() for x in 'kv'})
    fresh = build(tiny_base, encoder, architecture=architecture)
    fresh.adapters['a'].load(tmp_path / name)
    given = build(tiny_base, encoder, architecture=architecture, weights=str(tmp_path), weight_name=name)
    for other in (fresh, given):
        assert_same(state(other), state(model))


def test_the_layout_is_the_authors(tmp_path: Path, encoder: Path) -> None:
    """Names, shapes and numbering of h94/IP-Adapter's sdxl_models, at SDXL's own depths and another's widths."""
    base = write_tiny_sdxl(tmp_path / 'base', layers_per_block=2, transformer_layers_per_block=(1, 2, 10))
    model = build(base, encoder)
    model.adapters['a'].save(tmp_path / 'a')
    keys = load_file(tmp_path / 'a' / NAME)
    assert set(keys) == {'image_proj.proj.weight', 'image_proj.proj.bias', 'image_proj.norm.weight',
                         'image_proj.norm.bias', *(f'ip_adapter.{n}.to_{x}_ip.weight' for n in range(1, 140, 2)
                                                   for x in 'kv')}
    # Of the first and last cross-attentions in the authors' files: 640 wide in the first down block, 1280 in the mid.
    assert [keys[f'ip_adapter.{n}.to_k_ip.weight'].shape[0] for n in (1, 7, 9, 47, 49, 107, 109, 119, 121, 139)] == [
        32, 32, 64, 64, 64, 64, 32, 32, 64, 64]
    plus = build(base, encoder, architecture='plus', depth=4)
    plus.adapters['a'].save(tmp_path / 'plus')
    block = {f'image_proj.layers.{i}.{k}' for i in range(4) for k in (
        '0.norm1.weight', '0.norm1.bias', '0.norm2.weight', '0.norm2.bias', '0.to_q.weight', '0.to_kv.weight',
        '0.to_out.weight', '1.0.weight', '1.0.bias', '1.1.weight', '1.3.weight')}
    assert {k for k in load_file(tmp_path / 'plus' / NAME) if k.startswith('image_proj.')} == block | {
        'image_proj.latents', *(f'image_proj.{k}.{x}' for k in ('proj_in', 'proj_out', 'norm_out')
                                for x in ('weight', 'bias'))}


def test_a_fresh_projector_has_the_authors_widths() -> None:
    """For SDXL and CLIP ViT-H: those of ip-adapter_sdxl_vit-h and ip-adapter-plus_sdxl_vit-h."""
    with torch.device('meta'):
        plus, base = image_projection('plus', 1280, 2048), image_projection('base', 1024, 2048)
    shapes = {k: tuple(v.shape) for k, v in plus.state_dict().items()}
    assert shapes['latents'] == (1, 16, 1280) and shapes['proj_in.weight'] == (1280, 1280)
    assert shapes['layers.3.attn.to_q.weight'] == (1280, 1280) and 'layers.4.ln0.weight' not in shapes
    assert shapes['layers.0.ff.1.net.0.proj.weight'] == (5120, 1280) and shapes['proj_out.weight'] == (2048, 1280)
    assert {tuple(v.shape) for v in base.state_dict().values()} == {(8192, 1024), (8192,), (2048,)}


def test_weights_bring_their_own_sizes(tiny_base: Path, encoder: Path, tmp_path: Path) -> None:
    """Tokens, blocks, heads and widths that the config leaves open; half precision; a frozen one takes the base's."""
    model = build(tiny_base, encoder, shake=True, architecture='plus', num_tokens=5, depth=2, hidden=48, heads=3,
                  ff_mult=2)
    model.adapters['a'].save(tmp_path)
    given = build(tiny_base, encoder, architecture='plus', weights=str(tmp_path))
    assert_same(state(given), state(model))
    assert given.adapters['a'].projector.layers[0].attn.heads == 3
    half = {k: v.half() for k, v in load_file(tmp_path / NAME).items()}
    save_file(half, tmp_path / NAME)
    given = build(tiny_base, encoder, architecture='plus', weights=str(tmp_path))
    assert {p.dtype for p in given.adapters['a'].parameters()} == {torch.float32}
    assert_same(state(given), {k: v.half().float() for k, v in state(model).items()})
    frozen = build(tiny_base, encoder, dtype='bfloat16', architecture='plus', weights=str(tmp_path), trainable=False)
    assert {p.dtype for p in frozen.adapters['a'].parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match='makes 5 tokens.*num_tokens=16'):
        build(tiny_base, encoder, architecture='plus', weights=str(tmp_path), num_tokens=16)


@ARCHITECTURES
def test_every_missing_or_misnamed_key_is_named(tiny_base: Path, encoder: Path, tmp_path: Path,
                                                architecture: str) -> None:
    """Each of them, when loaded and when given as weights; the adapter stays as it was."""
    model = build(tiny_base, encoder, shake=True, architecture=architecture, depth=1)
    model.adapters['a'].save(tmp_path)
    before, tensors = state(model), load_file(tmp_path / NAME)
    for i, key in enumerate(tensors):
        for changed, named in (({k: v for k, v in tensors.items() if k != key}, key),
                               ({(f'{k}_x' if k == key else k): v for k, v in tensors.items()}, f'{key}_x')):
            save_file(changed, tmp_path / NAME)
            with pytest.raises(ValueError, match=re.escape(named)):
                model.adapters['a'].load(tmp_path)
        if i % 8 == 0:
            with pytest.raises(ValueError, match=re.escape(f'{key}_x')):
                build(tiny_base, encoder, architecture=architecture, weights=str(tmp_path), depth=1)
    save_file({**tensors, max(tensors): tensors[max(tensors)][:-1]}, tmp_path / NAME)
    with pytest.raises(ValueError, match=re.escape(max(tensors)) + r' is \(\d+, 64\) instead of'):
        model.adapters['a'].load(tmp_path)
    assert_same(state(model), before)


@pytest.mark.parametrize(('keys', 'kind'), [
    (['image_proj.perceiver_resampler.proj_in.weight', 'image_proj.proj.0.weight'], 'FaceID plus'),
    (['image_proj.proj.0.weight', 'image_proj.proj.2.weight', 'image_proj.norm.weight'], 'FaceID'),
    (['image_proj.proj.0.weight', 'image_proj.proj.3.weight'], 'full face'),
    (['image_proj.proj.weight', 'ip_adapter.1.to_k_lora.down.weight'], 'FaceID.*LoRA'),
    (['unet.conv_in.weight'], 'is not an IP-Adapter'),
    (['image_proj.proj.weight', 'optimizer.x'], r'1 unknown \(optimizer')])
def test_other_kinds_are_refused_by_name(tiny_base: Path, encoder: Path, tmp_path: Path, keys: list[str],
                                         kind: str) -> None:
    save_file({key: torch.zeros(2, 2) for key in keys}, tmp_path / 'file.safetensors')
    with pytest.raises(ValueError, match=kind):
        build(tiny_base, encoder, weights=str(tmp_path / 'file.safetensors'))


@ARCHITECTURES
def test_what_was_made_for_others_is_refused(tiny_base: Path, encoder: Path, tmp_path: Path, architecture: str) -> None:
    """Another base, with both widths; another UNet of the same width; another image encoder; the other architecture."""
    bases: dict[str, dict[str, Any]] = {
        'wide': dict(hidden=48, cross_attention_dim=96), 'deep': dict(transformer_layers_per_block=(1, 1, 3)),
        'broad': dict(channels=(16, 48, 64))}
    for name, changes in bases.items():
        model = build(write_tiny_sdxl(tmp_path / name, **changes), encoder, architecture=architecture)
        model.adapters['a'].save(tmp_path / f'{name} adapter')
    own = build(tiny_base, encoder, architecture=architecture)
    for name, said in (('wide', 'tokens of 96 numbers; the base.s text has 64.*another base'),
                       ('deep', 'unknown.*ip_adapter'), ('broad', r'is \(48, 64\) instead of \(32, 64\)')):
        with pytest.raises(ValueError, match=said):
            build(tiny_base, encoder, architecture=architecture, weights=str(tmp_path / f'{name} adapter'))
        with pytest.raises(ValueError, match=said):
            own.adapters['a'].load(tmp_path / f'{name} adapter')
    own.adapters['a'].save(tmp_path / 'own')
    other = 'plus' if architecture == 'base' else 'base'
    with pytest.raises(ValueError,
                       match=f"is an IP-Adapter with architecture='{architecture}'; the config has '{other}'"):
        build(tiny_base, encoder, architecture=other, weights=str(tmp_path / 'own'))
    if architecture == 'base':
        another = write_tiny_image_encoder(tmp_path / 'another', projection=20)
        with pytest.raises(ValueError, match='embeddings of 24 numbers; the image encoder .*another. gives 20'):
            build(tiny_base, another, weights=str(tmp_path / 'own'))


def test_a_pickle_with_code_is_not_opened(tiny_base: Path, encoder: Path, tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / 'ran'),)

    torch.save({'image_proj': {}, 'ip_adapter': Code()}, tmp_path / 'bad.bin')
    with pytest.raises(ValueError, match='holds more than tensors'):
        build(tiny_base, encoder, weights=str(tmp_path / 'bad.bin'))
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('kind', ['siglip', 'dinov2', 'whole clip', 'whole siglip'])
@torch.no_grad()
def test_other_image_encoders(tiny_base: Path, tmp_path: Path, kind: str) -> None:
    """By their config: SigLIP's and DINOv2's pooled outputs; a whole CLIP or SigLIP gives its half that sees."""
    import transformers as hf
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32,
                  patch_size=8)
    text = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=16)
    with rng.fork(kind):
        whole: Any = {
            'siglip': lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**vision)),
            'dinov2': lambda: hf.Dinov2Model(hf.Dinov2Config(**vision, mlp_ratio=2)),
            'whole clip': lambda: hf.CLIPModel(hf.CLIPConfig(
                vision_config={**vision, 'projection_dim': 20}, text_config=text, projection_dim=20)),
            'whole siglip': lambda: hf.SiglipModel(hf.SiglipConfig(vision_config=vision, text_config=text))}[kind]()
    whole.save_pretrained(tmp_path)
    # Read back: what is mapped from a file lies elsewhere in its cache line, which matrix products can tell.
    whole = type(whole).from_pretrained(tmp_path).requires_grad_(False)
    square = {'height': 32, 'width': 32}
    processor = {'siglip': lambda: hf.SiglipImageProcessorPil(size=square),
                 'dinov2': lambda: hf.BitImageProcessorPil(size={'shortest_edge': 40}, crop_size=square)}
    if kind in processor:
        processor[kind]().save_pretrained(tmp_path)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8))
    for architecture in ('base', 'plus'):
        model = build(tiny_base, tmp_path, architecture=architecture)
        adapter = model.adapters['a']
        pixels = adapter.encoder.normalize(adapter.read_image(picture, (64, 64)))
        if kind in processor:
            assert torch.equal(pixels, processor[kind]()(picture, return_tensors='pt').pixel_values)
        sees = whole.vision_model if kind.startswith('whole') else whole
        output = sees(pixel_values=pixels, output_hidden_states=True)
        expected = output.hidden_states[-2] if architecture == 'plus' else (
            whole.visual_projection(output.pooler_output) if kind == 'whole clip' else output.pooler_output)
        assert torch.equal(adapter.encoder.embed(pixels, architecture == 'plus'), expected)


def test_the_shipped_base_has_an_image_encoder(tmp_path: Path) -> None:
    """Its processor lies in 'feature_extractor', as in diffusers' folders."""
    shapes = 'diffengine_sdxl::shapes/base'
    model = SDXL(pretrained=shapes, adapters=dict(a=dict(
        type='IPAdapter', image_encoder=shapes, image_encoder_subfolder='image_encoder')))
    assert model.adapters['a'].encoder.preprocessing.size == 64 and model.adapters['a'].encoder.width(False) == 64
    assert 'cross-attentions' in repr(model) and 'reference' in repr(model)


def copied(encoder: Path, *places: Path) -> None:
    for place in places:
        shutil.copytree(encoder, place)


def test_an_image_encoder_in_its_folder(tiny_base: Path, encoder: Path, tmp_path: Path) -> None:
    """As it is, or in 'image_encoder' or 'models/image_encoder'; several or none there are refused."""
    copied(encoder, tmp_path / 'base' / 'image_encoder', tmp_path / 'repo' / 'models' / 'image_encoder')
    for folder, inner in ((encoder, None), (tmp_path / 'base', 'image_encoder'),
                          (tmp_path / 'repo', 'models/image_encoder')):
        model = SDXL(pretrained=str(tiny_base), adapters=dict(a=dict(type='IPAdapter', image_encoder=str(folder))))
        assert model.adapters['a'].encoder_source == (str(folder), inner)
    copied(encoder, tmp_path / 'base' / 'models' / 'image_encoder')
    for folder, sentence in ((tmp_path / 'base', 'several image encoders; set image_encoder_subfolder to one of image'),
                             (tmp_path, 'holds no image encoder: neither it nor a folder image_encoder or models/')):
        with pytest.raises(UserError, match=sentence):
            SDXL(pretrained=str(tiny_base), adapters=dict(a=dict(type='IPAdapter', image_encoder=str(folder))))


@ARCHITECTURES
def test_an_image_encoder_that_nobody_names(tiny_base: Path, encoder: Path, tmp_path: Path, architecture: str) -> None:
    """h94's layout, by width: beside the file or in 'models'; then the base's own; else a sentence that asks for it."""
    import transformers as hf
    base = shutil.copytree(tiny_base, tmp_path / 'base')
    build(base, encoder, shake=True, architecture=architecture).adapters['a'].save(tmp_path / 'repo' / 'sdxl_models')
    settings: dict[str, Any] = dict(architecture=architecture, trainable=False,
                                    weights=str(tmp_path / 'repo' / 'sdxl_models' / NAME))

    model = SDXL(pretrained=str(base))

    def place() -> tuple[Any, str | None]:
        adapter = IPAdapter(**settings)
        adapter.name = 'a'
        adapter.attach(model)
        assert adapter.encoder.width(adapter.plus) == hidden
        adapter.detach(model)
        return adapter.encoder_source
    beside, models, own = (tmp_path / x / 'image_encoder' for x in ('repo/sdxl_models', 'repo/models', 'base'))
    hidden = 24 if architecture == 'base' else 32
    with pytest.raises(UserError, match=f"'a': set image_encoder= .*sdxl_models/{NAME}' .*It reads {hidden} numbers"):
        place()
    vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=32,
                  patch_size=8)
    hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**{**vision, 'hidden_size': 48}, projection_dim=40)
                                     ).save_pretrained(beside)
    copied(encoder, own)
    assert place() == (str(base), 'image_encoder')
    copied(encoder, models)
    assert place() == (str(models), None)
    text = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=16)
    shutil.rmtree(beside)
    hf.CLIPModel(hf.CLIPConfig(vision_config={**vision, 'projection_dim': 99}, text_config=text, projection_dim=24)
                 ).save_pretrained(beside)
    with pytest.raises(UserError, match='several image encoders near .*sdxl_models'):
        place()
    shutil.rmtree(models)
    assert place() == (str(beside), None)


def test_settings_of_image_processors() -> None:
    """Old ones with bare numbers, none at all; refused: images that are not square, and values that are invalid."""
    old = ImagePreprocessing.from_config({'size': 40, 'crop_size': 32, 'resample': 2, 'do_normalize': False}, 8, 'x')
    assert old == ImagePreprocessing(32, 'bilinear', 40, False, (0.0,) * 3, (1.0,) * 3)
    assert ImagePreprocessing.from_config({}, 32, 'x') == ImagePreprocessing(32)
    for settings in ({'size': {'shortest_edge': 32}, 'do_center_crop': False}, {'size': {'height': 32, 'width': 48}}):
        with pytest.raises(UserError, match="'x' takes images.*only square"):
            ImagePreprocessing.from_config(settings, 32, 'x')
    for settings, words in (({'resample': 9}, 'resample=9'), ({'size': {'shortest_edge': '32'}}, "size='32'"),
                            ({'image_mean': [0.5]}, r'image_mean=\[0.5\]'), ({'image_std': 'x'}, "image_std='x'")):
        with pytest.raises(UserError, match=f"image encoder 'x' is invalid: .*{words}"):
            ImagePreprocessing.from_config(settings, 32, 'x')
