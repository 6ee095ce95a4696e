"""Adapters by name and file, in Python and on the command line: the same as if a config named them."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import SIZE, Here, adapters, asked, by_hand, config, picture, pictures
from kinds import CASES, WORD, build, shaken
from mmengine.config import Config
from torch import Tensor

from diffengine_sdxl.adapters.formats.modelspec import stamp
from diffengine_sdxl.commands.infer import command
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.inference.add_adapters import CAPTION_CHUNKS
from diffengine_sdxl.inference.inferencer import SDXLInferencer

Saved = Callable[[str], Path]
PROMPT = f'a red {WORD}'


@pytest.fixture(scope='module')
def saved(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Return the folder of an adapter of a kind that looks trained, an IP-Adapter's with its image encoder."""
    folder = tmp_path_factory.mktemp('saved')

    def saved(kind: str) -> Path:
        path = folder / kind
        if not path.exists():
            shaken(build(tiny_base, dict(a=CASES[kind].config)), CASES[kind]).adapters['a'].save(path)
            if 'ip_adapter' in kind:
                shutil.copytree(tiny_base.parent / 'image_encoder', path / 'image_encoder')
        return path
    return saved


def named(kind: str, folder: Path, **settings: Any) -> dict[str, Any]:
    """Return the config of such an adapter, in full."""
    case = CASES[kind].config
    encoder = dict(image_encoder=str(folder / 'image_encoder')) if 'image_encoder' in case else {}
    return {**case, **encoder, 'weights': str(folder), 'trainable': False, **settings}


def made(ours: SDXLInferencer, **call: Any) -> Tensor:
    latents: Tensor = ours(**{**dict(prompt=PROMPT, seed=5, output_type='latent'), **SIZE, **call})
    return latents


def in_config(base: Path, caption_chunks: int = 1, **adapters: Any) -> SDXLInferencer:
    cfg = config(base, adapters, steps=2)
    cfg.model.caption_chunks = caption_chunks
    return SDXLInferencer(cfg, device='cpu')


def in_python(base: Path, **adapters: Any) -> SDXLInferencer:
    return SDXLInferencer(config(base, steps=2), device='cpu', adapters=adapters)


@pytest.fixture(scope='module')
def plain(tiny_base: Path) -> Tensor:
    """The image without adapters."""
    return made(in_config(tiny_base))


@pytest.mark.parametrize('kind', CASES)
def test_each_kind_is_found(kind: str, saved: Saved, tiny_base: Path, plain: Tensor) -> None:
    """By its files; it reads the condition of its own name, and does not train. All LoRAs are of one type."""
    folder, reads = saved(kind), CASES[kind].condition_key is not None
    own = dict(condition_key='mine') if reads else {}
    given = dict(weights=folder, token=WORD) if kind == 'textual_inversion' else folder
    call = dict(conditions=dict(mine=picture())) if reads else {}
    ours = in_python(tiny_base, mine=given)
    got = made(ours, **call)
    if CASES[kind].config['type'] == 'LoRA':
        assert ours.cfg.model.adapters.mine == dict(type='LoRA', weights=str(folder), trainable=False)
    if CASES[kind].config['type'] != 'LoRA' or kind == 'lora':
        assert torch.equal(got, made(in_config(tiny_base, mine=named(kind, folder, **own)), **call))
    assert (got - plain).abs().max() > 1e-4
    config = ours.cfg.model.adapters.mine
    assert (config.trainable, config.get('condition_key')) == (False, 'mine' if reads else None)


def test_two_of_a_kind(saved: Saved, tiny_base: Path) -> None:
    """Each with an image of its own, and a scale in its dict; as text, path, or dict."""
    depth, sketch = saved('t2i_adapter'), saved('controlnet')
    first, second = picture(0), picture(1)
    ours = in_python(tiny_base, one=str(depth), two=dict(weights=depth, scale=0.4), three=sketch)
    call = dict(conditions=dict(one=first, two=second, three=first))
    expected = in_config(tiny_base, **{
        name: named(kind, folder, condition_key=name, **more) for name, kind, folder, more in (
            ('one', 't2i_adapter', depth, {}), ('two', 't2i_adapter', depth, dict(scale=0.4)),
            ('three', 'controlnet', sketch, {}))})
    got = made(ours, **call)
    assert torch.equal(got, made(expected, **call))
    assert not torch.equal(got, made(ours, conditions=dict(one=second, two=first, three=first)))
    with pytest.raises(UserError, match=r"Adapter 'two' \(T2IAdapter\) needs an image: give it in `conditions`"):
        made(ours, conditions=dict(one=first, three=first))


def test_another_file_for_an_adapter_of_the_config(saved: Saved, tiny_base: Path, tmp_path: Path) -> None:
    """Its other settings stay, not what located the old file; or another scale of the same file; or another kind."""
    def ours(mine: Any, **old: Any) -> SDXLInferencer:
        cfg = config(tiny_base, dict(mine=dict(type='T2IAdapter', condition_key='map', weights='gone', scale=0.4,
                                               **old)), steps=2)
        before = cfg.to_dict()
        inferencer = SDXLInferencer(cfg, device='cpu', adapters=dict(mine=mine))
        assert cfg.to_dict() == before
        return inferencer
    folder = saved('t2i_adapter')
    shutil.copytree(folder, tmp_path / 'sub')
    at = dict(subfolder='elsewhere', revision='r')
    expected = made(in_config(tiny_base, mine=named('t2i_adapter', folder, scale=0.4)),
                    conditions=dict(mine=picture()))
    for inferencer, place in ((ours(folder, **at), {}), (ours(dict(weights=tmp_path, subfolder='sub'), **at),
                                                         dict(subfolder='sub'))):
        assert inferencer.cfg.model.adapters.mine == dict(
            type='T2IAdapter', condition_key='map', scale=0.4, trainable=False, **place,
            weights=str(tmp_path if place else folder))
        assert torch.equal(made(inferencer, conditions=dict(mine=picture())), expected)
    kept = SDXLInferencer(config(tiny_base, dict(mine=dict(named('t2i_adapter', tmp_path), subfolder='sub')), steps=2),
                          device='cpu', adapters=dict(mine=dict(scale=0.4)))
    assert torch.equal(made(kept, conditions=dict(mine=picture())), expected)
    lora = ours(dict(type='LoRA', weights=saved('lora')), **at)
    assert lora.cfg.model.adapters.mine == dict(type='LoRA', weights=str(saved('lora')), trainable=False)
    assert torch.equal(made(lora), made(in_config(tiny_base, mine=named('lora', saved('lora')))))


def test_an_adapter_of_long_captions(saved: Saved, tiny_base: Path, tmp_path: Path) -> None:
    """Prompts are read as its captions, unless the request or the config says otherwise; stock reads embeddings."""
    shutil.copytree(saved('lora'), tmp_path / 'long')
    stamp(tmp_path / 'long', {CAPTION_CHUNKS: '2'})
    ours, short = (in_python(tiny_base, mine=folder) for folder in (tmp_path / 'long', saved('lora')))
    assert ours.cfg.model.caption_chunks == ours.model.caption_chunks == 2
    got, plain = made(ours), made(short)
    assert torch.equal(made(ours, prompt_syntax='plain'), plain) and (got - plain).abs().max() > 1e-4
    assert torch.equal(made(ours, prompt_syntax='long'), got)
    assert torch.equal(made(in_config(tiny_base, mine=named('lora', saved('lora')), caption_chunks=2)), got)
    embeds = ours.prompt_embeds('x ' * 100, negative_prompt='blurry')
    assert {name: tuple(value.shape) for name, value in embeds.items()} == {
        f'{negative}{name}': shape for negative in ('', 'negative_')
        for name, shape in (('prompt_embeds', (1, 154, 64)), ('pooled_prompt_embeds', (1, 32)))}
    stock = asked(ours.model.to_diffusers(), steps=2, output_type='latent', **embeds, **SIZE)
    assert torch.equal(made(ours, prompt='x ' * 100, negative_prompt='blurry'), stock)
    for value, sentence in (('99', "safetensors': caption_chunks=99 must be at most 32"),
                            ('1e3', "safetensors': caption_chunks='1e3' must be a whole number")):
        stamp(tmp_path / 'long', {CAPTION_CHUNKS: value})
        with pytest.raises(UserError, match=sentence):
            in_python(tiny_base, mine=tmp_path / 'long')


@pytest.mark.parametrize(('given', 'sentence'), [
    (dict(scale=0.5), "Adapter 'style' is not in the config, so it needs `weights`: a file, folder, hub id or link. "
                      "Did you mean 'styles'?"),
    (dict(type='LoRA', scale=0.5), 'does not name the `weights` of style'), ('./none', './none'),
    (None, 'so it needs `weights`'),
    (dict(weights='LORA', scael=0.5), "Adapter 'style': a LoRA has no 'scael'. Did you mean 'scale'?"),
    (dict(weights='LORA', type='Lora'), "type='Lora' is not a known"), ('BASE', 'so a base: model.pretrained='),
    (dict(weights='LORA', type='T2IAdapter'), 'could not be loaded'), ('TEXT', "cannot be read"),
    (dict(weights='LORA', trainable=True, rank=3), 'rank')])
def test_refused(given: Any, sentence: str, saved: Saved, tiny_base: Path, tmp_path: Path) -> None:
    """Before the models are built, where that can be."""
    (tmp_path / 'x.safetensors').write_text('x')
    places = {'LORA': str(saved('lora')), 'BASE': str(tiny_base), 'TEXT': str(tmp_path / 'x.safetensors')}
    given = ({key: places.get(value, value) for key, value in given.items()} if isinstance(given, dict)
             else places.get(given, given))
    with pytest.raises(UserError) as caught:
        SDXLInferencer(config(tiny_base, dict(styles=named('lora', saved('lora')))), device='cpu',
                       adapters=dict(style=given))
    assert sentence in str(caught.value)


def test_adapters_of_the_line(here: Here) -> None:
    """Found by their files, with lists and texts with commas among their settings; each reads its own image."""
    bare, whole = here.config('bare.py'), here.config('whole.py', adapters={
        **adapters(here.files, 'style', 'depth'),
        'edges': dict(adapters(here.files, 'depth')['depth'], condition_key='edges', active_range=(0, 0.5))})
    first, second = str(here.files / 'outline0.png'), str(here.files / 'outline1.png')
    odd = Path('a, b=c')
    shutil.copytree(here.files / 'depth', odd)
    expected = by_hand(whole, dict(conditions=dict(depth=first, edges=second), scales=dict(style=0.4)))
    here.infer(bare, '--adapter', f'style={here.files / "style"},scale=0.4',
               '--adapter', f'depth={here.files / "depth"}', '--adapter', f"edges='{odd}',active_range=(0,0.5)",
               '--condition', f'depth={first}', '--condition', f'edges={second}', '--out', 'A')
    assert list(pictures('A').values()) == expected
    image, = Path('A').glob('0*.png')
    here.infer(image, '--out', 'again')  # the PNG names what was found
    assert list(pictures('again').values()) == expected
    # One file for the only adapter that reads images; '=' in its name is no adapter's.
    shutil.copy(first, 'x=y.png')
    one = by_hand(here.config('one.py', adapters=adapters(here.files, 'depth')), dict(conditions=dict(depth=first)))
    for i, shown in enumerate(('x=y.png', './x=y.png', Path('x=y.png').absolute(), 'depth=x=y.png')):
        here.infer(bare, '--adapter', f'depth={here.files / "depth"}', '--condition', shown, '--out', f'B{i}')
        assert list(pictures(f'B{i}').values()) == one


def test_conditions_of_the_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a name they are for the only reader of images: a URL, or a file that exists, whatever its name."""
    monkeypatch.chdir(tmp_path)
    for name in ('a=b.png', 'depth=x.png', 'plain.png'):
        Path(name).touch()
    url = 'https://x.org/a.png?size=3&depth=1'

    def read(*items: str, **types: str | None) -> dict[str, Any]:
        return command._conditions(items, Config(dict(model=dict(adapters={
            name: kind and dict(type=kind) for name, kind in types.items()}))))
    only: dict[str, Any] = dict(depth='T2IAdapter', style='LoRA', gone=None)
    for item in (url, 'a=b.png', 'plain.png', 'not there.png', f'depth={url}', 'depth=a=b.png'):
        assert read(item, **only) == dict(depth=item.removeprefix('depth='))
    # An adapter's name goes before a file of that name.
    assert read('depth=x.png', **only) == dict(depth='x.png')
    several = dict(only, look='IPAdapter')
    assert read('look=p', 'look=q', 'look.mask=m', f'depth.image={url}', **several) == dict(
        look=dict(image=['p', 'q'], mask='m'), depth=url)
    assert read('a.png', 'b.png', **only) == dict(depth=['a.png', 'b.png'])
    assert read('style=nowhere.png', **several) == dict(style='nowhere.png')  # refused with the request
    for items, types, sentence in (
            (['plain.png'], several, r"'plain.png' names no adapter, and several read images \(depth, look\); write "
                                     '--condition NAME=plain.png'),
            ([url], dict(style='LoRA'), 'names no adapter, and no adapter of the config reads images'),
            (['a=b.png'], {}, 'no adapter of the config reads images'), (['depth='], only, "not 'depth='"),
            (['=x.png'], only, "takes ADAPTER=FILE or ADAPTER.mask=FILE, not '=x.png'"),
            (['depth.masks=x.png'], only, "not 'depth.masks=x.png'")):
        with pytest.raises(UserError, match=sentence):
            read(*items, **types)


@pytest.mark.parametrize(('item', 'sentence'), [
    *((item, f"--adapter takes NAME=SOURCE[,scale=0.8][,type=LoRA][,subfolder=...], not '{item}'")
      for item in ('style', 'style=', '=x', 'style=,scale=1')),
    ('style=x,scale', "--adapter 'style=x,scale': 'scale' in"), ('style=x,scale=1,scale=2', "'scale=2' in"),
    ('style=x,weights=y', "'weights=y' in"), ('style=x,a.b=1', "'a.b=1' in"),
    ('style=x,active_range=(0,0.5', "--adapter 'style=x,active_range=(0,0.5': the brackets")])
def test_adapters_of_the_line_that_are_refused(item: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        command._add_adapter(Config(dict(model=dict(adapters={}))), item)
    assert sentence in str(caught.value)
