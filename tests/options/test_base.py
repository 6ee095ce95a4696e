"""Options of the base and the adapter; see test_table.py."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from options.table import Cases, World

from diffengine_sdxl.errors import UserError
from diffengine_sdxl.testing import write_tiny_sdxl

case = Cases()


@case('pretrained_model_name_or_path')
def base(world: World) -> None:
    world.placeholders['BASE'] = write_tiny_sdxl(world.tmp / 'other', channels=(8, 16, 24))
    assert world.model().unet.config.block_out_channels == [8, 16, 24]


@case('pretrained_vae_model_name_or_path')
def vae(world: World) -> None:
    world.placeholders['VAE'] = write_tiny_sdxl(world.tmp / 'other', vae_blocks=3)
    assert world.model().vae_factor == 4


@case('adapter_model_name_or_path')
def adapter(world: World) -> None:
    from diffusers import T2IAdapter
    net = T2IAdapter(channels=(16, 32, 64, 64), downscale_factor=16, adapter_type='full_adapter_xl')
    net.save_pretrained(world.tmp / 'adapter')
    world.placeholders['ADAPTER'] = world.tmp / 'adapter'
    loaded = world.model().adapters['adapter'].net.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in net.state_dict().items())


@pytest.fixture
def hub(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Write a hub cache with two revisions of 'some/sdxl'; go offline."""
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    repo = tmp_path / 'cache' / 'models--some--sdxl'
    for revision, commit in (('main', 'a' * 40), ('v2', 'b' * 40)):
        folder = repo / 'snapshots' / commit
        if revision == 'main':
            shutil.copytree(tiny_base, folder)
        else:
            write_tiny_sdxl(folder, channels=(8, 16, 24))
        (repo / 'refs').mkdir(exist_ok=True)
        (repo / 'refs' / revision).write_text(commit)
    yield tmp_path / 'cache'


@case('revision')
def revision(world: World, hub: Path) -> None:
    world.placeholders['REVISION'] = Path('v2')
    model = world.model(**{'model.pretrained': 'some/sdxl', 'model.cache_dir': str(hub)})
    assert model.unet.config.block_out_channels == [8, 16, 24]


@case('cache_dir')
def cache_dir(world: World, hub: Path) -> None:
    rows = world.tmp / 'rows.jsonl'
    rows.write_text(json.dumps({'image': 'a.png', 'conditioning_image': 'b.png', 'text': 'a circle'}))
    world.placeholders['CACHE'], world.data = hub, rows
    model = world.model(**{'model.pretrained': 'some/sdxl'})
    assert model.unet.config.block_out_channels == [16, 32, 64]
    assert world.dataset().data.cache_files[0]['filename'].startswith(str(hub))


@case('variant')
def variant(world: World, tiny_base: Path) -> None:
    from diffusers import DiffusionPipeline
    DiffusionPipeline.from_pretrained(tiny_base).save_pretrained(world.tmp / 'base', variant='half')
    world.placeholders['VARIANT'] = Path('half')
    base = {'model.pretrained': str(world.tmp / 'base')}
    assert world.model(**base).unet is not None
    world.overrides.clear()
    with pytest.raises(UserError, match='has no weights without a variant'):
        world.model(**base)


@case('tokenizer_name')
def tokenizer(world: World, tiny_base: Path) -> None:
    for name in ('tokenizer', 'tokenizer_2'):
        shutil.copytree(tiny_base / name, world.tmp / 'words' / name)
        path = world.tmp / 'words' / name / 'tokenizer_config.json'
        path.write_text(json.dumps({**json.loads(path.read_text()), 'model_max_length': 33}))
    world.placeholders['TOKENIZERS'] = world.tmp / 'words'
    model = world.model()
    assert (model.tokenizer.model_max_length, model.tokenizer_2.model_max_length) == (33, 33)


@case('gradient_checkpointing')
def gradient_checkpointing(world: World) -> None:
    assert world.model().unet.is_gradient_checkpointing


@case('enable_xformers_memory_efficient_attention')
def xformers(world: World) -> None:
    try:
        import xformers as package
    except ImportError:
        package = None
    if package is None:
        with pytest.raises(UserError, match='needs the package xformers'):
            world.model()
    else:
        assert any('XFormers' in type(p).__name__ for p in world.model().unet.attn_processors.values())


@case('mixed_precision')
def mixed_precision(world: World) -> None:
    model = world.model()
    assert (model.compute_dtype, model.unet.dtype, model.vae.dtype) == (torch.float16, torch.float16, torch.float32)
    assert world.optim_wrapper().loss_scaler is not None


@case('allow_tf32')
def allow_tf32(world: World) -> None:
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [b.allow_tf32 for b in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        world.runner()
        assert all(b.allow_tf32 for b in backends)
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


@pytest.mark.parametrize('option', case.checks)
def test_option(option: str, request: pytest.FixtureRequest) -> None:
    case.run(option, request)
