"""Adapters as bare files or folders: each kind in each layout is recognized, built and equal; others are named."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import CASES, ENCODER
from runs import train
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffengine_sdxl import rng
from diffengine_sdxl.adapters import lora_layers
from diffengine_sdxl.adapters.formats import files, kohya
from diffengine_sdxl.adapters.formats.detect import adapter_settings
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.registry import ADAPTERS
from diffengine_sdxl.testing import single_file, tiny_unet, tiny_vae, write_tiny_image_encoder
from diffengine_sdxl.testing.adapters import write_original_controlnet

Writer = Callable[[Path, Any, SDXL], Path]
PLUS = {'type': 'IPAdapter', 'architecture': 'plus'}
BASE = {'type': 'IPAdapter', 'architecture': 'base'}
SHAPES = 'diffengine_sdxl::shapes/base'
WORD = {'type': 'TextualInversion'}


@pytest.fixture(scope='module')
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_image_encoder(tmp_path_factory.mktemp('encoder') / 'encoder')


def attached(model: SDXL, config: dict[str, Any]) -> Any:
    adapter = ADAPTERS.build(config)
    adapter.name = 'a'
    adapter.attach(model)
    return adapter


def folder(out: Path, adapter: Any, model: SDXL) -> Path:
    """What `save` writes."""
    adapter.save(out / 'saved')
    return out / 'saved'


def only_file(out: Path, adapter: Any, model: SDXL) -> Path:
    """Its weights alone, under a name of no format."""
    path, = folder(out, adapter, model).glob('*.safetensors')
    return path.rename(out / 'any name.safetensors')


def part(out: Path, adapter: Any, model: SDXL) -> Path:
    """peft's folder of one part."""
    return folder(out, adapter, model) / 'unet'


def in_kohya(out: Path, adapter: Any, model: SDXL) -> Path:
    modules = {name: lora_layers.plain(getattr(model, name)) for name in ('unet', 'text_encoder', 'text_encoder_2')}
    kohya.write(out / 'x.safetensors', adapter.to_weights(), modules)
    return out / 'x.safetensors'


def old_lora(out: Path, adapter: Any, model: SDXL) -> Path:
    """diffusers' older keys, of the UNet alone, pickled."""
    state = load_file(only_file(out, adapter, model))
    torch.save({key.removeprefix('unet.').replace('lora_A', 'lora.down').replace('lora_B', 'lora.up'): value
                for key, value in state.items()}, out / 'old.bin')
    return out / 'old.bin'


def nested(out: Path, adapter: Any, model: SDXL) -> Path:
    """An IP-Adapter as the authors' pickles."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(only_file(out, adapter, model)).items():
        first, _, rest = key.partition('.')
        parts.setdefault(first, {})[rest] = value
    torch.save(parts, out / 'x.bin')
    return out / 'x.bin'


def tencent(out: Path, adapter: Any, model: SDXL) -> Path:
    """A T2I-Adapter with TencentARC's names, of two blocks a level."""
    def name(key: str) -> str:
        level, block, rest = re.fullmatch(r'(?:body\.(\d)\.)?(?:resnets\.(\d)\.)?(.+)', key).groups()  # type: ignore
        return f'body.{2 * int(level) + int(block or 0)}.{rest}' if level else rest
    state = load_file(only_file(out, adapter, model))
    torch.save({name(key.removeprefix('adapter.')): value for key, value in state.items()}, out / 'x.pth')
    return out / 'x.pth'


def pair(out: Path, adapter: Any, model: SDXL) -> Path:
    """A word in two files of diffusers' trainer."""
    for name, vectors in zip(('', '_2'), adapter.vectors.values(), strict=True):
        save_file({'<blue>': vectors.detach()}, out / f'learned_embeds{name}.safetensors')
    return out


def original(out: Path, adapter: Any, model: SDXL) -> Path:
    """A ControlNet as its authors write it."""
    return write_original_controlnet(out / 'original/x.pth', folder(out, adapter, model))


def a1111(out: Path, adapter: Any, model: SDXL) -> Path:
    for name, vectors in zip(('', '_2'), adapter.vectors.values(), strict=True):
        torch.save({'string_to_token': {'*': 265}, 'string_to_param': {'*': vectors.detach()}, 'name': 'thing'},
                   out / f'thing{name}.pt')
    return out / 'thing.pt'


LAYOUTS: list[tuple[str, Writer, dict[str, Any]]] = [
    ('t2i_adapter', folder, {'type': 'T2IAdapter'}), ('t2i_adapter', only_file, {'type': 'T2IAdapter'}),
    ('t2i_adapter', tencent, {'type': 'T2IAdapter'}), ('controlnet', folder, {'type': 'ControlNet'}),
    ('controlnet', only_file, {'type': 'ControlNet'}), ('controlnet', original, {'type': 'ControlNet'}),
    ('ip_adapter', folder, BASE), ('ip_adapter', only_file, BASE), ('ip_adapter', nested, BASE),
    ('ip_adapter_plus', folder, PLUS), ('ip_adapter_plus', nested, PLUS),
    *((kind, form, {'type': 'LoRA'}) for kind, forms in {
        'lora': (folder, only_file, old_lora, in_kohya), 'lora_everywhere': (folder, in_kohya),
        'dora': (folder, in_kohya), 'dora_everywhere': (folder,), 'loha': (folder, part, in_kohya),
        'lokr': (folder, part, in_kohya), 'oft': (folder, part)}.items() for form in forms),
    ('textual_inversion', folder, WORD), ('textual_inversion', only_file, WORD), ('textual_inversion', a1111, WORD),
    ('textual_inversion', pair, {**WORD, 'token': '<blue>'})]


def test_every_kind_is_tried() -> None:
    assert {kind for kind, _, _ in LAYOUTS} == {*CASES}


@pytest.mark.parametrize(('kind', 'form', 'expected'), LAYOUTS, ids=lambda x: x if isinstance(x, str) else None)
def test_a_bare_source_is_enough(model: SDXL, encoder: Path, tmp_path: Path, kind: str, form: Writer,
                                 expected: dict[str, Any]) -> None:
    """Its settings, and with them an adapter of the same weights."""
    config = {key: str(encoder) if value == ENCODER else value for key, value in CASES[kind].config.items()}
    adapter = attached(model, config)
    with torch.no_grad():
        for i, parameter in enumerate(adapter.all_parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=rng.generator('shaken', i)))
    expected_weights = [value.detach().clone() for value in adapter.all_parameters()]
    try:
        source = form(tmp_path, adapter, model)
    finally:
        adapter.detach(model)
    if expected['type'] == 'IPAdapter':  # beside the file
        place = (source if source.is_dir() else source.parent) / 'image_encoder'
        shutil.copytree(encoder, place)
        expected = {**expected, 'image_encoder': str(place), 'image_encoder_subfolder': None}
    settings = adapter_settings(str(source))
    assert settings == expected
    if settings['type'] == 'TextualInversion':  # the name of the adapter, where the file has none
        settings = {'token': 'thing_of_mine', **settings}
    again = attached(model, {**settings, 'weights': str(source), 'trainable': False})
    try:
        values = again.all_parameters()
        assert all(torch.equal(a, b) for a, b in zip(values, expected_weights, strict=True)), kind
    finally:
        again.detach(model)


def test_a_header_alone(tmp_path: Path) -> None:
    """Of safetensors nothing but names and shapes; of a pickle, the same tensors, mapped."""
    save_file({'x': torch.ones(1000, 3)}, tmp_path / 'x.safetensors')
    tensor = files.read(tmp_path / 'x.safetensors', header_only=True).tensors['x']
    assert tensor.is_meta and tensor.shape == (1000, 3)
    for i, zipped in enumerate((True, False)):
        torch.save({'x': torch.ones(2)}, tmp_path / f'{i}.pt', _use_new_zipfile_serialization=zipped)
        assert files.read(tmp_path / f'{i}.pt', header_only=True).tensors['x'].sum() == 2


def test_an_export_says_more(tiny_base: Path, circles: Path, encoder: Path, tmp_path: Path) -> None:
    """What the weights don't show comes from the manifest, as the image encoder; also of a whole export."""
    ip = 'model.adapters.ip'
    train(tmp_path, {
        'model.pretrained': str(tiny_base), 'model.vae': None, 'mixed_precision': 'no', 'resolution': 32,
        'train_dataloader.num_workers': 0, 'train_cfg.max_iters': 1, 'default_hooks.checkpoint.interval': 1,
        'default_hooks.samples': None, 'optim_wrapper.accumulative_counts': 1, 'image_prompt_size': 64,
        'train_dataloader.dataset.source': str(circles), f'{ip}.image_encoder': str(encoder),
        f'{ip}.image_encoder_subfolder': None, f'{ip}.multi_image': 'average'}, name='stable_diffusion_xl_ip_adapter')
    export = tmp_path / 'step1'
    for source, more in ((export / 'ip', {}), (export / 'ip' / 'ip_adapter.safetensors', {}),
                         (export, {'subfolder': 'ip'})):
        settings = adapter_settings(str(source))
        assert settings == {'type': 'IPAdapter', 'image_encoder': str(encoder), 'image_encoder_subfolder': None,
                            'multi_image': 'average', 'scale': 1.0, **more}
    model = SDXL(pretrained=str(tiny_base), adapters=dict(a=dict(settings, weights=str(export), trainable=False)))
    assert model.adapters['a'].multi_image == 'average'
    assert adapter_settings(str(tmp_path), subfolder='step1') == {**settings, 'subfolder': 'step1/ip'}


def write_manifest(out: Path, contents: list[str], **adapters: Any) -> Path:
    out.mkdir(parents=True)
    (out / 'manifest.json').write_text(json.dumps({
        'step': 1, 'contents': contents, 'ema': False, 'config': {'model': {'adapters': adapters}}}))
    return out


def test_settings_of_a_manifest(tmp_path: Path) -> None:
    """A word's token; nothing of where its training began, of the data, or that makes a registry import a module."""
    export = write_manifest(tmp_path / 'step1', ['word'], word=dict(
        type='TextualInversion', token='<x>', num_vectors=2, weights='old', subfolder='s', weight_name='w',
        revision='r', trainable=True, condition_key='c', mask='m', _scope_='os'))
    assert adapter_settings(str(export)) == {
        'type': 'TextualInversion', 'token': '<x>', 'num_vectors': 2, 'subfolder': 'word'}
    (export / 'word').mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(export / 'word')
        assert adapter_settings('.')['token'] == '<x>'


def tensors(path: Path, *keys: str, **shapes: tuple[int, ...]) -> Path:
    """A file of such tensors."""
    path.parent.mkdir(exist_ok=True)
    content = {**{key: torch.zeros(2, 3) for key in keys}, **{key: torch.zeros(size) for key, size in shapes.items()}}
    save_file(content, path) if path.suffix == '.safetensors' else torch.save(content, path)
    return path


def config(path: Path, **values: Any) -> Path:
    """A folder with such a config.json or model_index.json."""
    path.parent.mkdir()
    path.write_text(json.dumps(values))
    return path.parent


def test_the_image_encoder_of_a_base(tmp_path: Path) -> None:
    """Named where it gives as many numbers as the file reads, so that a config with these settings says it."""
    for width, more in ((64, {'image_encoder': SHAPES, 'image_encoder_subfolder': 'image_encoder'}), (65, {})):
        path = tensors(tmp_path / 'x.safetensors', **{'image_proj.proj.weight': (8, width)})
        assert adapter_settings(str(path), SHAPES) == {**BASE, **more}


LORA_1 = {'lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight': (4, 768)}
LORA_2 = {'unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight': (4, 1024)}
OTHERS: dict[str, tuple[Callable[[Path], Path], str]] = {
    'nothing known': (lambda p: tensors(p / 'x.safetensors', 'a.b', 'c', 'd', 'e'),
                      r'holds 4 entries \(a.b, c, d ...\). If you know its kind, set `type` to one of LoRA, T2I'),
    'empty': (lambda p: tensors(p / 'x.safetensors'), r'0 entries \(none\)'),
    'no safetensors': (lambda p: (p / 'x.safetensors').write_text('x') and p / 'x.safetensors', 'cannot be read'),
    'a base, whole': (lambda p: config(p / 'x/model_index.json', _class_name='StableDiffusionXLPipeline'),
                      "a whole model .StableDiffusionXLPipeline., so a base: model.pretrained='.*x'"),
    'an older base, whole': (lambda p: config(p / 'x/model_index.json', _class_name='StableDiffusionPipeline'),
                             'not an SDXL'),
    'an older single file': (lambda p: tensors(p / 'x.ckpt', 'model.diffusion_model.input_blocks.0.0.weight',
                                               'cond_stage_model.transformer.x'), 'Stable Diffusion 1.x or 2.x'),
    'a LoRA of 1.x': (lambda p: tensors(p / 'x.safetensors', **LORA_1), 'a LoRA for Stable Diffusion 1.x: .* 768 wide'),
    'a LoRA of 2.x': (lambda p: tensors(p / 'x.safetensors', **LORA_2), 'a LoRA for Stable Diffusion 2.x: .*1024 wide'),
    'a LoRA of one encoder': (lambda p: tensors(p / 'x.pt', 'lora_te_text_model_x.lora_down.weight'), r'lora_te_\*'),
    'an IP-Adapter of 1.x': (lambda p: tensors(p / 'x.safetensors', 'image_proj.proj.weight',
                                               **{'ip_adapter.1.to_k_ip.weight': (320, 768)}), 'an IP-Adapter for S'),
    'FaceID': (lambda p: tensors(p / 'x.safetensors', 'image_proj.proj.0.weight'), 'of the kind FaceID'),
    'a T2I-Adapter of 1.x': (lambda p: tensors(p / 'x.pth', 'body.0.block1.weight', **{
        'conv_in.weight': (320, 192, 3, 3)}), 'a T2I-Adapter for Stable Diffusion 1.x'),
    'a light T2I-Adapter': (lambda p: tensors(p / 'x.pth', 'body.0.body.0.block1.weight', 'body.0.out_conv.weight'),
                            'a T2I-Adapter for Stable Diffusion 1.x'),
    'a T2I-Adapter folder of 1.x': (lambda p: config(p / 'x/config.json', _class_name='T2IAdapter',
                                                     adapter_type='full_adapter'), 'of type full_adapter, made for'),
    'a T2I-Adapter without config': (lambda p: tensors(p / 'x/y.pth', 'body.0.block1.weight', **{
        'conv_in.weight': (16, 768, 3, 3)}).parent, 'give the file itself'),
    'a ControlNet of 1.x': (lambda p: config(p / 'x/config.json', _class_name='ControlNetModel',
                                             cross_attention_dim=768), 'a ControlNet for Stable Diffusion 1.x'),
    'a ControlNet file of 2.x': (lambda p: tensors(p / 'x.pth', 'control_model.input_hint_block.0.weight', **{
        'control_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight': (320, 1024)}),
                                 'a ControlNet for Stable Diffusion 2.x: .*1024 wide'),
    'ControlLLLite': (lambda p: tensors(p / 'x.safetensors', 'lllite_unet_a.down.0.weight', 'b'), 'ControlLLLite'),
    'a Flux': (lambda p: tensors(p / 'x.safetensors', 'double_blocks.0.img_attn.qkv.weight', 'b'), 'a Flux'),
    'another class': (lambda p: config(p / 'x/config.json', _class_name='ControlNetXSAdapter'),
                      'a model of class ControlNetXSAdapter; supported are LoRA, T2IAdapter'),
    'a word of 1.x': (lambda p: tensors(p / 'x.pt', emb_params=(2, 768)), 'inversion for Stable Diffusion 1.x'),
    'latents': (lambda p: tensors(p / 'x.safetensors', latents=(1, 4, 8, 8)), 'no adapter that is recognized'),
    'a checkpoint': (lambda p: torch.save({'state_dict': {}, 'meta': {}, 'message_hub': {}}, p / 'step2.pth') or p,
                     'a checkpoint of a training; give the export of its step'),
    'two adapters': (lambda p: write_manifest(p / 'x', ['a', 'b', 'pipeline'], a={}, b={}),
                     "holds the adapters a, b; give one of their folders, as '.*x/a'"),
    'a trained base': (lambda p: write_manifest(p / 'x', ['pipeline']), "model.pretrained='.*x/pipeline'"),
    'a type of nobody': (lambda p: write_manifest(p / 'x', ['a'], a=dict(type='os.mkdir')),
                         "of type 'os.mkdir', which no imported module registers"),
    'no config': (lambda p: write_manifest(p / 'x', ['a']), "does not hold the config of 'a'"),
    'two files': (lambda p: tensors(p / 'x/1.pt', 'a').parent.joinpath('2.pt').write_bytes(b'') or p / 'x',
                  'weight files .1.pt, 2.pt.; name one with weight_name'),
    'nothing': (lambda p: p / 'missing.safetensors', 'There is no file or folder')}


@pytest.mark.parametrize('case', OTHERS)
def test_what_is_no_adapter_is_named(tmp_path: Path, case: str) -> None:
    """In a sentence that says where to give it, or that there is none of SDXL's."""
    write, sentence = OTHERS[case]
    with pytest.raises(UserError, match=sentence):
        adapter_settings(str(write(tmp_path)))


def test_models_are_named(tiny_base: Path, encoder: Path, tmp_path: Path) -> None:
    """A base, UNet, VAE or image encoder, as folder and as file of either layout: with the key of the config for it."""
    whole = single_file.write(tmp_path / 'whole.safetensors', single_file.original_tensors(tiny_base))
    for name, net in (('unet', tiny_unet()), ('vae', tiny_vae())):
        net.save_pretrained(tmp_path / name)
        own = getattr(single_file, f'{name}_tensors')(net)
        save_file({key: value.contiguous() for key, value in own.items()}, tmp_path / f'original_{name}.safetensors')
    for source, key in ((whole, 'model.pretrained'), (tmp_path / 'unet', 'model.unet'), (tmp_path / 'vae', 'model.vae'),
                        (tmp_path / 'unet/diffusion_pytorch_model.safetensors', 'model.unet'),
                        (tmp_path / 'vae/diffusion_pytorch_model.safetensors', 'model.vae'),
                        (tmp_path / 'original_unet.safetensors', 'model.unet'),
                        (tmp_path / 'original_vae.safetensors', 'model.vae'), (encoder, 'image_encoder')):
        with pytest.raises(UserError, match=f"{key}='{re.escape(str(source))}'"):
            adapter_settings(str(source))
    with pytest.raises(UserError, match=f"image_encoder='{re.escape(str(encoder))}'"):
        adapter_settings(str(encoder / 'model.safetensors'))
