"""Sources of the base: folder, hub, single file, another VAE, configs alone; each fault is a UserError."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import original_format
import pytest
import torch
from diffusers import AutoencoderKL
from parity import generators, make_batch, picture_batch, sampler, set_scheduler, stock
from safetensors.torch import load_file, save_file

from diffengine_sdxl.errors import UserError
from diffengine_sdxl.loading.base import load_components
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.testing import tiny_unet, tiny_vae, write_tiny_sdxl

PARTS = ('unet', 'vae', 'text_encoder', 'text_encoder_2')
COMMITS = ('a' * 40, 'b' * 40)


def weights(model: Any) -> dict[str, torch.Tensor]:
    """All weights of a base, ours or stock's."""
    return {f'{part}.{k}': v for part in PARTS if getattr(model, part) is not None
            for k, v in getattr(model, part).state_dict().items()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys() and [k for k in a if not torch.equal(a[k], b[k])] == []


def test_folder(tiny_base: Path) -> None:
    """All weights, in fp32, in evaluation mode, frozen."""
    model = SDXL(pretrained=str(tiny_base))
    assert_equal(weights(model), weights(stock(tiny_base)))
    assert not any(p.requires_grad for p in model.parameters()) and model.state_dict() == {}
    assert not any(getattr(model, p).training for p in PARTS)
    assert model.vae_factor == 8 and model.size_divisor == 8


@pytest.mark.parametrize('blocks', [4, 3])
def test_another_vae(tiny_base: Path, tmp_path: Path, blocks: int) -> None:
    """A VAE's own folder, or the `vae` of a whole base; its factor is the model's."""
    vae = tiny_vae(blocks)
    vae.save_pretrained(tmp_path / 'alone')
    vae.save_pretrained(tmp_path / 'whole' / 'vae')
    for source in (tmp_path / 'alone', tmp_path / 'whole'):
        model = SDXL(pretrained=str(tiny_base), vae=str(source))
        assert_equal(dict(model.vae.state_dict()), dict(vae.state_dict()))
        assert model.vae_factor == 2 ** (blocks - 1)
        pipeline = stock(tiny_base, vae=AutoencoderKL.from_pretrained(tmp_path / 'alone'))
        expected = pipeline('a', height=32, width=48, num_inference_steps=1, output_type='pt',
                            generator=[torch.Generator().manual_seed(1)]).images
        assert torch.equal(model.decode(sampler(steps=1)(model, picture_batch(['a'], [1], (32, 48)))), expected)


def test_another_unet(tiny_base: Path, tmp_path: Path) -> None:
    """A UNet's own folder, the `unet` of a whole base, or a file of it alone; the base's own is not read."""
    other, base = write_tiny_sdxl(tmp_path / 'other', seed=5), shutil.copytree(tiny_base, tmp_path / 'base')
    shutil.rmtree(base / 'unet')
    file = shutil.copy(other / 'unet' / 'diffusion_pytorch_model.safetensors', tmp_path / 'unet.safetensors')
    expected = SDXL(pretrained=str(other)).unet
    for source, config in ((other, None), (other / 'unet', None), (file, str(tiny_base))):
        model = SDXL(pretrained=str(base), unet=str(source), config=config)
        assert_equal(dict(model.unet.state_dict()), dict(expected.state_dict()))
        assert f"with the UNet of '{source}'" in repr(model)
        assert_equal(dict(model.vae.state_dict()), dict(SDXL(pretrained=str(tiny_base)).vae.state_dict()))
    wide = write_tiny_sdxl(tmp_path / 'wide', hidden=48, cross_attention_dim=96)
    with pytest.raises(UserError, match='wide.* expects text of width 96; the text encoders output 64'):
        SDXL(pretrained=str(tiny_base), unet=str(wide))
    with pytest.raises(UserError, match='no such unet|nothing'):
        SDXL(pretrained=str(tiny_base), unet=str(tmp_path / 'nothing'))


def test_another_vae_stands_for_one_that_is_missing(tiny_base: Path, tmp_path: Path) -> None:
    """The base's own is not read."""
    shutil.copytree(tiny_base, tmp_path / 'base')
    shutil.rmtree(tmp_path / 'base' / 'vae')
    assert SDXL(pretrained=str(tmp_path / 'base'), vae=str(tiny_base)).vae_factor == 8
    with pytest.raises(UserError, match="no folder 'vae'"):
        SDXL(pretrained=str(tmp_path / 'base'))


@pytest.mark.parametrize(('dtype', 'expected'), [
    (None, ['float32'] * 4), ('bfloat16', ['bfloat16'] * 4),
    (dict(unet='bfloat16', vae='float16'), ['bfloat16', 'float16', 'float32', 'float32']),
    (dict(text_encoder_2='float64'), ['float32', 'float32', 'float32', 'float64'])])
def test_dtype_per_component(tiny_base: Path, dtype: Any, expected: list[str]) -> None:
    model = SDXL(pretrained=str(tiny_base), dtype=dtype)
    assert [{p.dtype for p in getattr(model, n).parameters()} for n in PARTS] == [{getattr(torch, e)} for e in expected]
    reference = weights(stock(tiny_base))
    assert all(torch.equal(v, reference[k].to(v.dtype)) for k, v in weights(model).items())
    if dtype is None or isinstance(dtype, dict) and 'vae' in dtype:
        assert torch.isfinite(sampler(steps=1)(model, picture_batch(['a'], [1]))).all()


@pytest.mark.parametrize('precision', ['fp16', 'bf16'])
@pytest.mark.parametrize('trainable', [(), ('unet',)])
def test_mixed_precision_stores(tiny_base: Path, precision: str, trainable: tuple[str, ...]) -> None:
    """Frozen parts in half but for the VAE, which overflows; what trains in fp32; `dtype` has the last word."""
    half = dict(fp16=torch.float16, bf16=torch.bfloat16)[precision]
    model = SDXL(pretrained=str(tiny_base), mixed_precision=precision, trainable=trainable)
    assert {n: getattr(model, n).dtype for n in PARTS} == dict(
        unet=torch.float32 if trainable else half, vae=torch.float32, text_encoder=half, text_encoder_2=half)
    given = SDXL(pretrained=str(tiny_base), mixed_precision=precision, dtype=dict(unet='float32', vae=str(half)[6:]))
    assert given.unet.dtype == torch.float32 and given.vae.dtype == half


def test_a_vae_is_in_half_precision_where_its_config_allows(tiny_base: Path, tmp_path: Path) -> None:
    """With `force_upcast` False, unless its dtype is given; one that another model shares stays as it is."""
    half, others = torch.bfloat16, dict.fromkeys((*PARTS[:1], *PARTS[2:]), torch.float32)
    for force_upcast in (True, False):
        vae = tiny_vae(4)
        vae.register_to_config(force_upcast=force_upcast)
        vae.save_pretrained(tmp_path / str(force_upcast))

    def dtype(force_upcast: bool, **settings: Any) -> torch.dtype:
        arguments = {'dtypes': others, 'half': half, **settings}
        parts = load_components(None, str(tmp_path / str(force_upcast)), str(tiny_base), None, seed=0, **arguments)
        found: torch.dtype = parts['vae'].dtype
        return found
    assert (dtype(False), dtype(True), dtype(False, half=None)) == (half, torch.float32, torch.float32)
    assert dtype(False, dtypes={**others, 'vae': torch.float32}) == torch.float32
    assert dtype(False, shared={'vae': vae}) == torch.float32


def hub_cache(folder: Path, *bases: Path, repo: str = 'me/tiny') -> Path:
    """A cache of the hub with one revision for each base: `main`, then `v1`, `v2` ..."""
    root = folder / f'models--{repo.replace("/", "--")}'
    for i, base in enumerate(bases):
        shutil.copytree(base, root / 'snapshots' / COMMITS[i])
        (root / 'refs').mkdir(exist_ok=True)
        (root / 'refs' / ('main' if i == 0 else f'v{i}')).write_text(COMMITS[i])
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, as with HF_HUB_OFFLINE=1 set before the start."""
    import diffusers.utils.hub_utils
    from huggingface_hub import constants
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(diffusers.utils.hub_utils, 'HF_HUB_OFFLINE', True)


def test_revision_and_cache_dir_of_the_hub(offline: None, tiny_base: Path, tmp_path: Path) -> None:
    """A hub id from the cache alone, each revision with its weights; the VAE's repository has its own."""
    other = write_tiny_sdxl(tmp_path / 'other', seed=1)
    cache = hub_cache(tmp_path / 'cache', tiny_base, other)
    for revision, base in ((None, tiny_base), ('v1', other)):
        model = SDXL(pretrained='me/tiny', revision=revision, cache_dir=str(cache))
        assert_equal(weights(model), weights(stock(base)))
    hub_cache(cache, tiny_base / 'vae', repo='me/vae')
    mixed = SDXL(pretrained='me/tiny', revision='v1', vae='me/vae', cache_dir=str(cache))
    assert_equal(dict(mixed.vae.state_dict()), dict(stock(tiny_base).vae.state_dict()))
    with pytest.raises(UserError, match="'me/tiny' is not a local file or folder.*HF_HUB_OFFLINE"):
        SDXL(pretrained='me/tiny', revision='v2', cache_dir=str(cache))


@pytest.mark.parametrize(('settings', 'name'), [
    (dict(pretrained='nobody/nothing'), 'nobody/nothing'), (dict(pretrained='nothing'), 'nothing'),
    (dict(vae='nobody/vae'), 'nobody/vae'),
    (dict(adapters=dict(a=dict(type='T2IAdapter', weights='nobody/adapter'))), 'nobody/adapter')])
def test_a_hub_id_without_network(offline: None, tiny_base: Path, tmp_path: Path, settings: dict[str, Any],
                                  name: str) -> None:
    """A quick sentence."""
    start = time.monotonic()
    with pytest.raises(UserError, match=f"'{name}' is not a local file or folder.*Check the name, the network"):
        SDXL(**{'pretrained': str(tiny_base), 'cache_dir': str(tmp_path), **settings})
    assert time.monotonic() - start < 5


def test_a_path_that_does_not_exist(tiny_base: Path) -> None:
    """It is no hub id, so the network is not blamed."""
    for settings in (dict(pretrained='/no/such/folder'), dict(pretrained=str(tiny_base), vae='/no/such/folder')):
        with pytest.raises(UserError, match="no file or folder '/no/such/folder'"):
            SDXL(**settings)


def test_variant(tiny_base: Path, tmp_path: Path) -> None:
    """fp16 files are found by the variant alone, and stored in the dtype that is asked for."""
    stock(tiny_base).to(dtype=torch.float16).save_pretrained(tmp_path, variant='fp16')
    assert (tmp_path / 'unet' / 'diffusion_pytorch_model.fp16.safetensors').is_file()
    model = SDXL(pretrained=str(tmp_path), variant='fp16')
    assert_equal(weights(model), {k: v.half().float() for k, v in weights(stock(tiny_base)).items()})
    with pytest.raises(UserError, match='unet.*has no weights without a variant'):
        SDXL(pretrained=str(tmp_path))
    with pytest.raises(UserError, match="has no weights of variant 'fp16' .* Omit `variant`"):
        SDXL(pretrained=str(tiny_base), variant='fp16')


def test_random_weights(tiny_base: Path) -> None:
    """From configs alone, keyed by the seed, of the same shapes as the folder's; the global generators don't matter."""
    first = SDXL(config=str(tiny_base), seed=1)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    second, third = SDXL(config=str(tiny_base), seed=1), SDXL(config=str(tiny_base), seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert_equal(weights(first), weights(second))
    a, b, c = weights(first), weights(third), weights(stock(tiny_base))
    assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in c.items()}
    assert not torch.equal(a['unet.conv_in.weight'], b['unet.conv_in.weight'])
    assert torch.isfinite(sampler(steps=1)(first, picture_batch(['a'], [1]))).all()
    assert SDXL(config=str(tiny_base), dtype='bfloat16').unet.dtype == torch.bfloat16


@pytest.mark.parametrize('suffix', ['.safetensors', '.ckpt'])
def test_single_file(tiny_base: Path, tmp_path: Path, suffix: str) -> None:
    """The pictures of the folder, also with the VAE of another file; offline by nature."""
    tensors = original_format.original_tensors(tiny_base)
    file = original_format.write(tmp_path / f'model{suffix}', tensors)
    model, expected = SDXL(pretrained=str(file), config=str(tiny_base)), SDXL(pretrained=str(tiny_base))
    assert_equal(weights(model), weights(expected))
    batch = picture_batch(['a'], [1])
    for name in ('EulerDiscreteScheduler', 'DDIMScheduler'):
        assert torch.equal(sampler(name, 2)(model, batch), sampler(name, 2)(expected, batch))
    other = write_tiny_sdxl(tmp_path / 'other', seed=1)
    vae = original_format.write(tmp_path / f'vae{suffix}', original_format.original_tensors(other))
    mixed = SDXL(pretrained=str(file), config=str(tiny_base), vae=str(vae), mixed_precision='bf16')
    assert_equal(dict(mixed.vae.state_dict()), dict(stock(other).vae.state_dict()))
    assert mixed.unet.dtype == torch.bfloat16 and mixed.vae.dtype == torch.float32


def copy_with(base: Path, folder: Path, **parts: Any) -> Path:
    """A copy of `base` whose index has other entries."""
    shutil.copytree(base, folder)
    index = json.loads((folder / 'model_index.json').read_text())
    (folder / 'model_index.json').write_text(json.dumps({k: v for k, v in {**index, **parts}.items() if v is not None}))
    return folder


def test_no_sdxl(tiny_base: Path, tmp_path: Path) -> None:
    """SD 1.5's index, SD 1.5's UNet, a folder of something else, a base whose UNet is missing."""
    sd15 = copy_with(tiny_base, tmp_path / 'sd15', text_encoder_2=None, tokenizer_2=None,
                     _class_name='StableDiffusionPipeline')
    with pytest.raises(UserError, match=r"sd15' has no 'text_encoder_2', so it is not an SDXL base"):
        SDXL(pretrained=str(sd15))
    unet = copy_with(tiny_base, tmp_path / 'unet')
    shutil.rmtree(unet / 'unet')
    tiny_unet(addition_embed_type=None, projection_class_embeddings_input_dim=None).save_pretrained(unet / 'unet')
    with pytest.raises(UserError, match=r"unet' is not an SDXL.*addition_embed_type=None.*Stable Diffusion 1\.x"):
        SDXL(pretrained=str(unet))
    shutil.rmtree(unet / 'unet')
    with pytest.raises(UserError, match="has no folder 'unet'"):
        SDXL(pretrained=str(unet))
    none = copy_with(tiny_base, tmp_path / 'none', unet=None)
    with pytest.raises(UserError, match="none' has no 'unet', so it is not an SDXL base"):
        SDXL(pretrained=str(none))
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match='empty.*has no model_index.json'):
        SDXL(pretrained=str(tmp_path / 'empty'))
    for pretrained in (None, str(tmp_path / 'empty')):
        with pytest.raises(UserError, match='model_index.json'):
            SDXL(pretrained=pretrained, config=str(tmp_path / 'empty'))


FILES = {'unet': 'unet/diffusion_pytorch_model.safetensors', 'vae': 'vae/diffusion_pytorch_model.safetensors',
         'text_encoder': 'text_encoder/model.safetensors', 'text_encoder_2': 'text_encoder_2/model.safetensors'}


@pytest.mark.parametrize('part', PARTS)
def test_weights_with_a_key_missing_or_misnamed(tiny_base: Path, tmp_path: Path, part: str) -> None:
    """Named, never filled with random numbers."""
    shutil.copytree(tiny_base, tmp_path / 'base')
    path = tmp_path / 'base' / FILES[part]
    state = load_file(path)
    key = sorted(k for k in state if 'weight' in k)[3]
    renamed = {(f'{k}_x' if k == key else k): v for k, v in state.items()}
    for changed, words in (({k: v for k, v in state.items() if k != key}, '1 missing keys'),
                           (renamed, f'1 missing keys .*1 unexpected keys.*{key.split(".")[-2]}.weight_x')):
        save_file(changed, path, metadata={'format': 'pt'})
        with pytest.raises(UserError, match=f"base/{part}' don't fit: {words}"):
            SDXL(pretrained=str(tmp_path / 'base'))
    # Another width, and a truncated file.
    save_file({**state, key: torch.zeros(3)}, path, metadata={'format': 'pt'})
    with pytest.raises(UserError, match=f'base/{part}'):
        SDXL(pretrained=str(tmp_path / 'base'))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=f'base/{part}/.* cannot be read; it is truncated'):
        SDXL(pretrained=str(tmp_path / 'base'))


@pytest.mark.parametrize(('name', 'content'), [
    ('model_index.json', b'{'), ('model_index.json', b'[]'), ('model_index.json', b'\xff'), ('unet/config.json', b'{'),
    ('unet/config.json', b'{}'), ('unet/config.json', b'{"block_out_channels": 3}'), ('text_encoder/config.json', b'['),
    ('text_encoder/config.json', b'{"hidden_size": "x"}'), ('tokenizer/tokenizer.json', b'{'),
    ('scheduler/scheduler_config.json', b'x')])
def test_damaged_settings_are_user_errors(name: str, content: bytes, tiny_base: Path, tmp_path: Path) -> None:
    """In the folder of a base, and as configs of random weights or of a single file."""
    shutil.copytree(tiny_base, tmp_path / 'base')
    (tmp_path / 'base' / name).write_bytes(content)
    file = original_format.write(tmp_path / 'x.safetensors', original_format.original_tensors(tiny_base))
    base = str(tmp_path / 'base')
    for settings in (dict(pretrained=base), dict(config=base), dict(pretrained=str(file), config=base)):
        with pytest.raises(UserError, match=str(tmp_path)):
            SDXL(**settings)


def test_a_base_that_takes_its_guidance_as_an_input(tmp_path: Path) -> None:
    """A distilled LCM's UNet samples as stock's, by the guidance scale that it reads, and is not trained."""
    folder = write_tiny_sdxl(tmp_path / 'lcm', time_cond_proj_dim=15)
    model, pipeline = SDXL(pretrained=str(folder), objective=dict(type='Denoise'), trainable=['unet']), stock(folder)
    set_scheduler(pipeline, 'LCMScheduler')
    made = [sampler('LCMScheduler', 3, scale)(model, picture_batch(['a cat'], [3])) for scale in (8.0, 2.0)]
    expected = pipeline('a cat', height=64, width=64, num_inference_steps=3, guidance_scale=8.0, output_type='latent',
                        generator=generators([3])).images
    assert torch.equal(made[0], expected) and not torch.equal(*made)
    with pytest.raises(UserError, match='guidance scale as input'):
        model(make_batch(), mode='loss')
