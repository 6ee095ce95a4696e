"""The report on training data: by the command, and in a work_dir."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diffengine_sdxl.commands import cli
from diffengine_sdxl.datasets import CaptionFolder
from diffengine_sdxl.engine.data_report import caption_limit, log_data_report
from diffengine_sdxl.errors import run_command
from diffengine_sdxl.testing.circles import draw_circle
from diffengine_sdxl.testing.models import tiny_tokenizer

MIXTURE = """
_base_ = ['diffengine_sdxl::lora/stable_diffusion_xl_lora_text_to_image.py']
model = dict(pretrained=BASE, vae=None)
resolution, image_size = 32, 'bucket'
folder = [*_base_.to_size, *_base_.to_inputs]
buckets = dict(type='BucketSampler', resolution='$resolution', step=8)
train_dataloader = dict(batch_size=2, num_workers=0, sampler='$buckets', dataset=dict(
    _delete_=True, type='Mixture', weights=dict(a=3), sets=dict(
    a=dict(type='CaptionFolder', source=DATA, default_caption='LONG', transforms='$folder'),
    b=dict(type='CaptionFolder', source=DATA, default_caption='', transforms='$folder'))))
optim_wrapper = dict(accumulative_counts=2)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images of 64 pixels, without captions."""
    for i in range(3):
        (tmp_path / 'data').mkdir(exist_ok=True)
        draw_circle(i, 64)[0].save(tmp_path / 'data' / f'{i}.png')
    return tmp_path / 'data'


def test_the_command(folder: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a mixture with buckets; no weights are read."""
    text = MIXTURE.replace('BASE', repr(str(tiny_base))).replace('DATA', repr(str(folder)))
    (tmp_path / 'own.py').write_text(text.replace('LONG', 'x' * 80))
    args = cli.parse('data', [str(tmp_path / 'own.py')])
    assert run_command('data', args) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ['The training data:', '  a: 3 rows, 4 of the 6 samples of an epoch',
                         '    3 captions, 1 different, 0 empty, the longest of 82 tokens']
    assert lines[3].startswith('    3 are longer than the 77 tokens that are read: ')
    assert '    3 captions, 1 different, 3 empty, the longest of 2 tokens' in lines
    assert lines.count('    3 images: all 64 x 64 (height x width)') == 2
    assert any('32 x 32: 6 images' in line for line in lines)
    args.cfg_options = ['model.caption_chunks=2', 'buckets.resolution=128']
    assert run_command('data', args) == 1
    out, err = capsys.readouterr()
    assert 'the longest of 2 chunks of 75 tokens' in out and 'are longer' not in out
    assert "6 of 6 images fit no bucket" in err
    args.cfg_options = [f'{mode}_dataloader=None' for mode in ('train', 'val', 'test')]
    assert run_command('data', args) == 1 and 'nothing to report' in capsys.readouterr().err


def test_a_training_keeps_it(folder: Path, tmp_path: Path) -> None:
    logged: list[str] = []
    tokenizer = tiny_tokenizer()
    loader = SimpleNamespace(dataset=CaptionFolder(folder, default_caption='a word'), sampler=None)
    runner: Any = SimpleNamespace(
        bare_model=SimpleNamespace(tokenizer=None, tokenizer_2=tokenizer, caption_chunks=1), train_dataloader=loader,
        work_dir=str(tmp_path), log_lines=logged.append)
    log_data_report(runner)
    assert 'the longest of 7 tokens' in logged[0] and (tmp_path / 'data_report.txt').read_text() == logged[0] + '\n'


def test_chunks_are_counted_as_they_are_read() -> None:
    """The tiny tokenizer has a token for each letter; a chunk ends after the last sentence that fits, or word."""
    texts = ['', 'a' * 75, 'a' * 76, 'a' * 70 + '. ' + 'b' * 75, 'a' * 70 + '. ' + 'b' * 76, 'ab ' * 50]
    limit = caption_limit([tiny_tokenizer(), tiny_tokenizer()], 3)
    assert list(limit.count(texts)) == [1, 1, 2, 2, 3, 2] and limit.most == 3
    assert limit.unit == ('chunk of 75 tokens', 'chunks of 75 tokens')
    assert list(caption_limit([tiny_tokenizer()], 1).count(texts[:3])) == [2, 77, 78]
