"""One file holds a whole SDXL: every tensor finds its place, or the file is refused with a sentence."""

import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import original_format
import pytest
import torch
from torch import Tensor

from diffengine_sdxl import testing
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.loading import single_file
from diffengine_sdxl.loading.single_file import (
    REFINER_FILES,
    SDXL_FILES,
    empty_model,
    load_single_file,
    load_single_part,
)

MODELS = ('unet', 'vae', 'text_encoder', 'text_encoder_2')
UNET_KEY = 'model.diffusion_model.input_blocks.0.0.weight'


@pytest.fixture(scope='module')
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return testing.write_tiny_sdxl(tmp_path_factory.mktemp('base'))


@pytest.fixture(scope='module')
def tensors(base: Path) -> dict[str, Tensor]:
    return original_format.original_tensors(base)


def assert_same_weights(got: Any, expected: Any) -> None:
    a, b = got.state_dict(), expected.state_dict()
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def stock(base: Path) -> Any:
    from diffusers import StableDiffusionXLPipeline
    return StableDiffusionXLPipeline.from_pretrained(base)


@pytest.mark.parametrize('suffix', ['.safetensors', '.ckpt'])
def test_gives_the_weights_of_the_folder(base: Path, tensors: dict[str, Tensor], tmp_path: Path, suffix: str) -> None:
    parts = load_single_file(original_format.write(tmp_path / f'x{suffix}', tensors), config=base)
    pipeline = stock(base)
    assert set(parts) == {*MODELS, 'tokenizer', 'tokenizer_2', 'scheduler', 'index', 'folder'}
    for name in MODELS:
        assert_same_weights(parts[name], getattr(pipeline, name))
        assert type(parts[name]) is type(getattr(pipeline, name))
        assert not parts[name].training
        buffers = dict(getattr(pipeline, name).named_buffers())
        assert all(torch.equal(b, buffers[k]) for k, b in parts[name].named_buffers())
    for name in ('tokenizer', 'tokenizer_2'):
        assert parts[name]('a cat').input_ids == getattr(pipeline, name)('a cat').input_ids
        assert parts[name].pad_token == getattr(pipeline, name).pad_token
    assert dict(parts['scheduler'].config) == dict(pipeline.scheduler.config)


@pytest.mark.parametrize('vae_blocks', [4, 3])
def test_equals_the_loader_of_diffusers(tmp_path: Path, vae_blocks: int) -> None:
    from diffusers import StableDiffusionXLPipeline
    base = original_format.write_tiny_with_two_widths(tmp_path / 'base')
    testing.tiny_vae(vae_blocks).save_pretrained(base / 'vae')
    file = original_format.write(tmp_path / 'x.safetensors', original_format.original_tensors(base))
    pipeline = StableDiffusionXLPipeline.from_single_file(str(file), config=str(base))
    parts = load_single_file(file, config=base)
    for name in MODELS:
        assert_same_weights(parts[name], getattr(pipeline, name))


def test_dtypes_are_per_component_and_the_file_is_let_go(base: Path, tensors: dict[str, Tensor],
                                                         tmp_path: Path) -> None:
    file = original_format.write(tmp_path / 'x.safetensors', {k: v.half() for k, v in tensors.items()})
    parts = load_single_file(file, config=base, dtypes={'unet': torch.bfloat16, 'text_encoder_2': torch.float16})
    assert {n: parts[n].dtype for n in MODELS} == {'unet': torch.bfloat16, 'vae': torch.float32,
                                                   'text_encoder': torch.float32, 'text_encoder_2': torch.float16}
    before = parts['text_encoder_2'].text_model.final_layer_norm.weight.clone()
    with file.open('r+b') as handle:  # in place, as a mapped file would see it
        handle.write(bytes(file.stat().st_size))
    assert torch.equal(parts['text_encoder_2'].text_model.final_layer_norm.weight, before)


def test_a_refiner_has_its_encoder_first(base: Path, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    index = json.loads((base / 'model_index.json').read_text())
    index.update(text_encoder=[None, None], tokenizer=[None, None])
    folder = tmp_path / 'refiner'
    folder.mkdir()
    for part in ('unet', 'vae', 'text_encoder_2', 'tokenizer_2', 'scheduler'):
        (folder / part).symlink_to(base / part)
    (folder / 'model_index.json').write_text(json.dumps(index))
    moved = {k.replace('embedders.1.', 'embedders.0.'): v for k, v in tensors.items() if 'embedders.0.' not in k}
    file = original_format.write(tmp_path / 'x.safetensors', moved)
    parts = load_single_file(file, config=folder)
    assert parts['text_encoder'] is None and parts['tokenizer'] is None
    assert_same_weights(parts['text_encoder_2'], stock(base).text_encoder_2)
    with pytest.raises(UserError, match='it is an SDXL refiner'):
        load_single_file(file, config=base)


@pytest.mark.parametrize(('part', 'prefix'), [('vae', 'first_stage_model.'), ('unet', 'model.diffusion_model.')])
def test_a_part_alone(part: str, prefix: str, base: Path, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    """Of itself alone, in both layouts, and out of a whole model."""
    alone = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    for file in (original_format.write(tmp_path / 'alone.safetensors', alone),
                 original_format.write(tmp_path / 'whole.ckpt', tensors),
                 base / part / 'diffusion_pytorch_model.safetensors'):
        assert_same_weights(load_single_part(part, file, config=base), getattr(stock(base), part))
    without = {k: v for k, v in tensors.items() if not k.startswith(prefix)}
    file = original_format.write(tmp_path / 'without.safetensors', without)
    assert load_single_file(file, config=base, skip={part})[part] is None
    with pytest.raises(UserError, match=f'no {part}'):
        load_single_file(file, config=base)
    with pytest.raises(UserError, match=f'has no {part}'.replace('unet', 'UNet').replace('vae', 'VAE')):
        load_single_part(part, file, config=base)
    for key in (next(iter(alone)), 'a_key_of_no_model' if part == 'unet' else 'decoder.a_key_of_no_model'):
        odd = {**alone, key: torch.ones(1)}
        with pytest.raises(UserError, match=f'(another shape|are unexpected).*{re.escape(key)}'):
            load_single_part(part, original_format.write(tmp_path / 'odd.safetensors', odd), config=base)


@pytest.mark.parametrize(('change', 'sentence'), [
    (lambda t: t.pop(UNET_KEY), f'1 tensors are missing .{UNET_KEY}'),
    (lambda t: [t.pop(k) for k in list(t) if 'middle_block.1.' in k], r'tensors are missing .* \.\.\.\)'),
    (lambda t: t.pop('first_stage_model.decoder.up.2.upsample.conv.bias'), 'decoder.up.2.upsample.conv.bias'),
    (lambda t: t.pop('conditioner.embedders.1.model.text_projection'), '1 tensors are missing .*text_projection'),
    (lambda t: t.update({'model.diffusion_model.extra.weight': torch.zeros(1)}), '1 tensors are unexpected .*extra'),
    (lambda t: t.update({'first_stage_model.encoder.down.9.x': torch.zeros(1)}), '1 tensors are unexpected .*down.9'),
    (lambda t: t.update({UNET_KEY: torch.zeros(16, 9, 3, 3)}), r'another shape .*\[16, 9, 3, 3\].*\[16, 4, 3, 3\]'),
])
def test_refuses_what_does_not_fit(base: Path, tensors: dict[str, Tensor], tmp_path: Path, change: Any,
                                   sentence: str) -> None:
    changed = dict(tensors)
    change(changed)
    with pytest.raises(UserError, match=sentence):
        load_single_file(original_format.write(tmp_path / 'x.safetensors', changed), config=base)


def test_counts_the_tensors_that_it_used(base: Path, tensors: dict[str, Tensor], tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(single_file, 'print_log', lambda line, logger: lines.append(line))
    with_ema = {**tensors, 'model_ema.decay': torch.zeros(1)}
    load_single_file(original_format.write(tmp_path / 'x.safetensors', with_ema), config=base)
    # position_ids, logit_scale and the EMA's decay
    assert f'{len(with_ema) - 3} of {len(with_ema)} tensors used' in lines[0]


@pytest.mark.parametrize(('keys', 'kind'), [
    ({'model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight': (320, 768),
      'first_stage_model.encoder.conv_in.weight': (1,), 'cond_stage_model.transformer.x': (1,)},
     'a Stable Diffusion 1.x'),
    ({'model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight': (320, 1024)},
     'a Stable Diffusion 2.x'),
    ({'model.diffusion_model.joint_blocks.0.x': (1,)}, 'a Stable Diffusion 3'),
    ({'lora_unet_mid_block.lora_down.weight': (1,)}, 'a LoRA'),
    ({'down_blocks.0.resnets.0.conv1.weight': (1,)}, "a UNet or VAE in diffusers' layout"),
    ({'something.else': (1,)}, "it holds 1 tensors such as .'something.else'"),
])
def test_names_what_is_no_sdxl(tmp_path: Path, keys: dict[str, tuple[int, ...]], kind: str) -> None:
    file = original_format.write(tmp_path / 'x.safetensors', {k: torch.zeros(s) for k, s in keys.items()})
    with pytest.raises(UserError, match=f'not a whole SDXL .*{kind}'):
        load_single_file(file)


class Trap:
    """Unpickled, this makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize(('protocol', 'sentence'), [
    (None, r"would run code \('\w+\.mkdir'\)"), (2, r"would run code \('\w+\.mkdir'\)"),
    (4, 'holds more than tensors')], ids=['torch.save', 'old pickle', 'new pickle'])
@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, protocol: int | None, sentence: str) -> None:
    mark, file = tmp_path / 'mark', tmp_path / 'x.ckpt'
    content = {'state_dict': {'a': torch.zeros(1)} if protocol is None else {}, 'callback': Trap(mark)}
    if protocol is None:
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content, protocol=protocol))
    with pytest.raises(UserError, match=sentence) as refusal:
        load_single_file(file)
    assert not mark.exists()
    assert 'weights_only' not in str(refusal.value)
    if protocol is None:  # the trap is a real one
        torch.load(file, weights_only=False)
    else:
        pickle.loads(file.read_bytes())
    assert mark.is_dir()


@pytest.mark.parametrize('suffix', ['.safetensors', '.ckpt'])
@pytest.mark.parametrize('part', [0.0, 0.5, 0.999])
def test_a_truncated_file(tensors: dict[str, Tensor], tmp_path: Path, suffix: str, part: float) -> None:
    file = original_format.write(tmp_path / f'x{suffix}', tensors)
    whole = file.read_bytes()
    file.write_bytes(whole[:int(part * len(whole))])
    with pytest.raises(UserError, match=f"x{suffix}' cannot be read; it is truncated"):
        load_single_file(file)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match='missing.safetensors. is neither a file'):
        load_single_file(tmp_path / 'missing.safetensors')
    file = tmp_path / 'pointer.safetensors'
    file.write_text('version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n')
    with pytest.raises(UserError, match='git lfs pull'):
        load_single_file(file)
    with pytest.raises(UserError, match=r'no model_index\.json'):
        load_single_file(file, config=tmp_path)


@pytest.mark.parametrize(('source', 'asked'), [
    ('https://huggingface.co/org/repo/blob/main/sub/x.safetensors', ('org/repo', 'sub/x.safetensors', 'main')),
    ('https://huggingface.co/org/re.po/resolve/v1/x.ckpt?download=true', ('org/re.po', 'x.ckpt', 'v1')),
    ('org/repo/x.safetensors', ('org/repo', 'x.safetensors', None)),
])
def test_links_to_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str,
                          asked: tuple[str, str, str | None]) -> None:
    import huggingface_hub
    calls = []

    def download(repo: str, name: str, revision: str | None, cache_dir: str | None) -> str:
        calls.append((repo, name, revision))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', download)
    assert single_file.is_single_file(source)
    assert single_file.resolve_file(source) == tmp_path
    assert calls == [asked]
    with pytest.raises(UserError, match='nor a link to one on the hub'):
        single_file.resolve_file('https://example.com/x.safetensors')


def test_the_hub_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(UserError, match="'x.safetensors' of 'org/repo' cannot be downloaded from the hub"):
        load_single_file('org/repo/x.safetensors', cache_dir=str(tmp_path))


def test_the_packaged_configs_are_those_of_sdxl() -> None:
    models = {name: empty_model(name, SDXL_FILES) for name in MODELS}
    assert {n: sum(p.numel() for p in m.parameters()) for n, m in models.items()} == {
        'unet': 2_567_463_684, 'vae': 83_653_863, 'text_encoder': 123_060_480, 'text_encoder_2': 694_659_840}
    assert all(p.is_meta for m in models.values() for p in m.parameters())
    keys = {o.key for n, m in models.items() for o in single_file.find_origins(n, m, n).values()}
    # sd_xl_base_1.0.safetensors has 2,515 tensors, of which position_ids and logit_scale are no weights.
    assert len(keys) == 2513
    assert models['vae'].config['scaling_factor'] == 0.13025 and models['vae'].config['force_upcast']


def test_the_packaged_tokenizers_are_those_of_clip() -> None:
    from diffusers import EulerDiscreteScheduler
    from transformers import CLIPTokenizer
    for name, pad in (('tokenizer', 49407), ('tokenizer_2', 0)):
        tokenizer = CLIPTokenizer.from_pretrained(SDXL_FILES, subfolder=name)
        assert len(tokenizer) == 49408
        assert tokenizer.convert_tokens_to_ids(['<|startoftext|>', '<|endoftext|>']) == [49406, 49407]
        ids = tokenizer('a photo of a cat', padding='max_length').input_ids
        assert ids == [49406, 320, 1125, 539, 320, 2368, 49407] + 70 * [pad]
        assert tokenizer('naïve café 東京').input_ids == [49406, 1097, 35689, 563, 15304, 48338, 21078, 361, 49407]
    scheduler = EulerDiscreteScheduler.from_pretrained(SDXL_FILES, subfolder='scheduler')
    ours, theirs = dict(scheduler.config), dict(testing.sdxl_scheduler().config)
    assert {k: v for k, v in ours.items() if k[0] != '_'} == {k: v for k, v in theirs.items() if k[0] != '_'}


def test_a_refiner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is known by its tensors; what it has of its own comes with the package, the rest is the base's."""
    from diffusers import StableDiffusionXLImg2ImgPipeline
    folder = testing.write_tiny_refiner(tmp_path / 'refiner')
    file = original_format.write(tmp_path / 'x.safetensors', original_format.original_tensors(folder))
    pipeline = StableDiffusionXLImg2ImgPipeline.from_pretrained(folder)
    parts = load_single_file(file, config=folder)
    assert parts['text_encoder'] is parts['tokenizer'] is None and not parts['index']['force_zeros_for_empty_prompt']
    for name in ('unet', 'vae', 'text_encoder_2'):
        assert_same_weights(parts[name], getattr(pipeline, name))
    monkeypatch.setattr(single_file, 'REFINER_FILES', folder)
    assert_same_weights(load_single_file(file)['unet'], pipeline.unet)
    monkeypatch.undo()
    with pytest.raises(UserError, match='does not fit the configs'):  # too small for what the package has
        load_single_file(file)
    unet = empty_model('unet', REFINER_FILES)
    # The published UNet's 4.52 GB in fp16.
    assert sum(p.numel() for p in unet.parameters()) == 2_259_526_660
    names = {f'model.diffusion_model.{key}' for key in original_format.unet_tensors(unet)}
    assert names == {origin.key for origin in single_file.find_origins('unet', unet, single_file.UNET).values()}
