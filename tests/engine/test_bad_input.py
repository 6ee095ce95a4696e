"""Bad input to the command: one sentence that names the thing, exit code 1, no traceback, nothing lost."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from runs import command, curves, train

from diffengine_sdxl.testing import tiny_unet, write_tiny_sdxl


@pytest.fixture
def fails(tmp_path: Path, tiny: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command with options; the words of its one error. Nothing is left that looks like a result."""
    def run(options: dict[str, Any], work_dir: Path | None = None, **arguments: Any) -> str:
        capfd.readouterr()
        folder = work_dir or tmp_path / 'run'
        assert command(folder, {**tiny, **options}, **arguments) == 1
        said = capfd.readouterr().err
        errors = [line for line in said.splitlines() if line.startswith('error: ')]
        assert len(errors) == 1 and 'Traceback' not in said, said[-2000:]
        assert work_dir is not None or not list(folder.glob('step*')) and not list(folder.glob('.*'))
        return errors[0]
    return run


def copy_of(circles: Path, folder: Path, num_images: int = 4) -> Path:
    """Copy the first rows of the data, to damage them."""
    shutil.copytree(circles, folder)
    lines = (folder / 'metadata.jsonl').read_text().splitlines()[:num_images]
    (folder / 'metadata.jsonl').write_text('\n'.join(lines) + '\n')
    return folder


@pytest.mark.parametrize(('option', 'words'), [
    ({'train_cfg.max_iter': 3}, ["'max_iter'", "Did you mean 'max_iters'"]),
    ({'model.adapters.adapter.type': 'T2IAdaptr'}, ["type='T2IAdaptr'", 'adapter', "Did you mean 'T2IAdapter'",
                                                    'diffengine_sdxl/adapters']),
    ({'train_dataloader.dataset.image_column': 'picture'}, ["'picture'", "'image'"]),
    ({'train_dataloader.dataset.conditioning_image_column': None}, ["'adapter' reads 'conditioning_image'"]),
    ({'resolution': 36}, ['36 x 36', '8', 'resolution']),
    ({'resolution': 40}, ['40 x 40', "'adapter'", '16', 'resolution']),
    ({'resolution': 'big'}, ["'big'"]),
    ({'model.pretrained': 'nobody/no-such-sdxl'}, ['nobody/no-such-sdxl', 'network']),
    ({'model.vae': 'nobody/no-such-vae'}, ['nobody/no-such-vae', 'network']),
    ({'train_dataloader.dataset.source': 'nobody/no-such-data'}, ['nobody/no-such-data', 'local copy']),
    ({'model.adapters.adapter.weights': 'nobody/no-such-adapter'}, ['nobody/no-such-adapter']),
    ({'load_from': 'nowhere.pth'}, ["'nowhere.pth'"]),
    ({'model.mixed_precision': 'fp8'}, ["'fp8'", "'bf16'"]),
    ({'optim_wrapper.accumulative_counts': 0}, ['accumulative_counts=0']),
    ({'train_dataloader.batch_size': 0}, ['batch_size']),
    ({'optim_wrapper.optimizer.lr': -1}, ['-1']),
    ({'optim_wrapper.paramwise_cfg.lr.adaptr': 1}, ["'adaptr'", "Did you mean 'adapter'"]),
], ids=str)
def test_options(option: dict[str, Any], words: list[str], fails: Callable[..., str],
                 monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    said = fails(option)
    assert all(word in said for word in words), said


def test_a_config_that_is_not_there(fails: Callable[..., str]) -> None:
    assert "Did you mean 'tiny_t2i_adapter'" in fails({}, name='tiny_t2iadapter.py')


@pytest.mark.parametrize(('which', 'num_workers'), [('images', 2), ('conditioning_images', 0)])
def test_a_truncated_image(which: str, num_workers: int, circles: Path, tmp_path: Path, fails: Callable[..., str],
                           tiny: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    """Refused by its name; or, with on_bad_image='skip', skipped, warned of and counted."""
    data = copy_of(circles, tmp_path / 'data')
    path = data / which / '00002.png'
    path.write_bytes(path.read_bytes()[:-40])
    options = {'train_dataloader.dataset.source': str(data), 'train_dataloader.num_workers': num_workers}
    said = fails(options)
    assert 'row 2' in said and 'cut off' in said and ('conditioning_image' in said) == (which != 'images')
    options['train_dataloader.dataset.on_bad_image'] = 'skip'
    assert command(tmp_path / 'run', {**tiny, **options}) == 0
    captured = capfd.readouterr()
    # 4 steps of 2 from 4 rows: the bad one was due twice.
    assert '2 unreadable images were skipped' in captured.out + captured.err
    assert len(curves(tmp_path / 'run')) == 4


def test_a_file_that_is_not_an_image(circles: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    data = copy_of(circles, tmp_path / 'data')
    (data / 'images' / '00001.png').write_text('not an image')
    assert 'row 1' in fails({'train_dataloader.dataset.source': str(data)})


def test_a_condition_of_another_aspect_ratio(circles: Path, tmp_path: Path, fails: Callable[..., str],
                                             tiny: dict[str, Any]) -> None:
    """Refused with both sizes; another size of the same aspect ratio is resized."""
    data = copy_of(circles, tmp_path / 'data')
    for i in range(4):
        Image.new('RGB', (32, 32)).save(data / 'conditioning_images' / f'{i:05d}.png')
    options = {'train_dataloader.dataset.source': str(data)}
    train(tmp_path / 'fine', {**tiny, **options, 'train_cfg.max_iters': 1})
    for i in range(4):
        Image.new('RGB', (48, 32)).save(data / 'conditioning_images' / f'{i:05d}.png')
    said = fails(options)
    assert '32 x 48' in said and '64 x 64' in said and 'aspect ratio' in said


@pytest.mark.parametrize('kind', ['folder', 'rows', 'nothing'])
def test_an_empty_data_set(kind: str, tmp_path: Path, circles: Path, fails: Callable[..., str]) -> None:
    data = tmp_path / 'data'
    if kind != 'nothing':
        data.mkdir()
    if kind == 'rows':
        (data / 'train.jsonl').write_text('')
    said = fails({'train_dataloader.dataset.source': str(data)})
    assert str(data) in said and ('empty' in said or kind == 'nothing')


def test_a_missing_caption_column_is_refused_with_the_columns(fails: Callable[..., str]) -> None:
    said = fails({'train_dataloader.dataset.caption_column': 'caption'})
    assert "'caption'" in said and "'text'" in said


def test_a_base_without_a_unet(tiny_base: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    base = shutil.copytree(tiny_base, tmp_path / 'base')
    shutil.rmtree(base / 'unet')
    said = fails({'model.pretrained': str(base)})
    assert str(base) in said and "'unet'" in said
    index = json.loads((base / 'model_index.json').read_text())
    (base / 'model_index.json').write_text(json.dumps({k: v for k, v in index.items() if k != 'unet'}))
    assert "has no 'unet'" in fails({'model.pretrained': str(base)})
    (base / 'model_index.json').unlink()
    assert 'model_index.json' in fails({'model.pretrained': str(base)})


def test_a_base_that_is_stable_diffusion_1(tiny_base: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    """With its own layout, and with a UNet of SD 1.5 in an SDXL folder."""
    from diffusers import UNet2DConditionModel
    base = shutil.copytree(tiny_base, tmp_path / 'base')
    UNet2DConditionModel(
        block_out_channels=(16, 32), down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'), norm_num_groups=8,
        up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'), cross_attention_dim=32, layers_per_block=1,
        attention_head_dim=2, sample_size=8).save_pretrained(base / 'unet')
    said = fails({'model.pretrained': str(base)})
    assert str(base) in said and 'not an SDXL' in said and 'Stable Diffusion 1.x' in said
    index = json.loads((base / 'model_index.json').read_text())
    for name in ('text_encoder_2', 'tokenizer_2'):
        index.pop(name)
    (base / 'model_index.json').write_text(json.dumps(index))
    assert 'SDXL' in fails({'model.pretrained': str(base)})


def test_a_base_of_another_layout(tmp_path: Path, fails: Callable[..., str]) -> None:
    """The refiner's four blocks."""
    base = write_tiny_sdxl(tmp_path / 'base', channels=(16, 32, 32, 32), attention_head_dim=(1, 2, 2, 2),
                           down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D',
                                             'DownBlock2D'),
                           up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'),
                           transformer_layers_per_block=(1, 1, 1, 1))
    said = fails({'model.pretrained': str(base)})
    assert "'adapter'" in said and 'refiner' in said


def test_weights_that_do_not_fit(tiny_base: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    """A base with a key missing, an adapter of another width: which keys, which file."""
    from safetensors.torch import load_file, save_file
    base = shutil.copytree(tiny_base, tmp_path / 'base')
    path = base / 'unet' / 'diffusion_pytorch_model.safetensors'
    state = load_file(path)
    state['conv_inn.bias'] = state.pop('conv_in.bias')
    save_file(state, path, metadata={'format': 'pt'})
    said = fails({'model.pretrained': str(base)})
    assert 'conv_in.bias' in said and 'conv_inn.bias' in said and str(base) in said
    from diffusers import T2IAdapter
    T2IAdapter(channels=[8, 16, 32, 32], downscale_factor=16, adapter_type='full_adapter_xl').save_pretrained(
        tmp_path / 'adapter')
    said = fails({'model.adapters.adapter.weights': str(tmp_path / 'adapter')})
    assert str(tmp_path / 'adapter') in said and 'another base' in said


def test_a_truncated_checkpoint(tmp_path: Path, tiny: dict[str, Any], fails: Callable[..., str]) -> None:
    """Named; an older one can be taken, and the damaged file is not touched."""
    work_dir = tmp_path / 'work'
    train(work_dir, tiny, die_at=4)
    whole = (work_dir / 'step4.pth').read_bytes()
    (work_dir / 'step4.pth').write_bytes(whole[:5000])
    said = fails({}, work_dir, resume='auto')
    assert str(work_dir / 'step4.pth') in said and 'truncated' in said and '--resume PATH' in said
    assert (work_dir / 'step4.pth').stat().st_size == 5000
    assert command(work_dir, tiny, resume=str(work_dir / 'step2.pth')) == 0
    assert torch.load(work_dir / 'step4.pth', weights_only=True)['meta']['step'] == 4


def test_a_work_dir_of_another_run(tmp_path: Path, tiny: dict[str, Any], fails: Callable[..., str]) -> None:
    work_dir = tmp_path / 'work'
    train(work_dir, tiny, die_at=2)
    before = {p: p.read_bytes() for p in work_dir.rglob('*') if p.is_file()}
    assert '--resume' in fails({}, work_dir)
    said = fails({'randomness.seed': 9, 'model.null_prompt': 'empty'}, work_dir, resume='auto')
    assert 'seed was 0, is now 9' in said and "model.null_prompt was None, is now 'empty'" in said
    assert {p: p.read_bytes() for p in work_dir.rglob('*') if p.is_file()} == before


def test_a_sample_that_cannot_be_read(tmp_path: Path, tiny: dict[str, Any], fails: Callable[..., str]) -> None:
    """Before the first step, not after an hour."""
    del tiny['default_hooks.samples']
    said = fails({'default_hooks.samples.prompts': '[a]', 'default_hooks.samples.conditions.adapter': 'nowhere.png'})
    assert 'nowhere.png' in said
    said = fails({'default_hooks.samples.prompts': '[a]', 'default_hooks.samples.conditions.adaptr': 'nowhere.png'})
    assert "'adaptr'" in said and "Did you mean 'adapter'" in said
    said = fails({'default_hooks.samples.size': 40})
    assert '40 x 40' in said


def test_the_unet_is_the_real_class() -> None:
    """What the tests above spoil is a whole UNet."""
    assert tiny_unet().config.addition_embed_type == 'text_time'
