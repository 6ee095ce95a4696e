"""tools/infer.py with errors in a row, a bug, a full disk, or Ctrl-C; finished images stay."""

import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import MADE, Here, by_hand, pictures
from torch import Tensor

from diffengine_sdxl import limits
from diffengine_sdxl.commands.infer.image_folder import ImageFolder
from diffengine_sdxl.commands.infer.untrusted import read_png
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.inference.inferencer import Job, SDXLInferencer


def rows(*settings: dict[str, Any]) -> Path:
    Path('rows.jsonl').write_text('\n'.join(map(json.dumps, settings)))
    return Path('rows.jsonl')


def failing(here: Here, fault: Callable[[list[int]], None]) -> list[list[int]]:
    """Call `fault` with the seeds of each job before it runs; return all jobs' seeds, in order."""
    real, seen = SDXLInferencer.forward, []

    def forward(self: Any, inputs: Job, *args: Any, **kwargs: Any) -> Tensor:
        seeds = inputs.first.batch.seed.tolist()
        seen.append(seeds)
        fault(seeds)
        return real(self, inputs, *args, **kwargs)
    here.patch.setattr(SDXLInferencer, 'forward', forward)
    return seen


@pytest.mark.parametrize('batch_size', [1, 3])
def test_rows_fail_in_many_ways(here: Here, batch_size: int) -> None:
    """A lone surrogate, too much memory, an overflow: each is named by its line, and the other rows are made."""
    config = here.config()
    rows(dict(prompt='a cat'), dict(prompt='a \ud800 b'), dict(height=80_000_000, width=80_000_000),
         dict(target_size=[1e300, 5]), dict(prompt='a hen', negative_prompt='\udfff'), dict(prompt='a dog', seed=3))
    here.patch.setattr(limits, 'CURRENT', limits.Limits())
    here.infer(config, '--prompts', 'rows.jsonl', '--out', 'P', '--batch-size', batch_size, '--cfg-options',
               'limits.untrusted_pixels=1e16', code=1)
    told = here.told.splitlines()
    for line, sentence in zip(told, ("line 2: prompt='a \\ud800 b': character 3 is a",
                                     'line 3: out of memory', 'line 4: ', 'line 5: negative_prompt'), strict=True):
        assert sentence in line, here.told
    assert 'A smaller --batch-size or size, vae_tiling=True or offload=True' in told[1]
    assert list(pictures('P')) == ['00000-seed0-a-cat.png', '00005-seed3-a-dog.png']
    expected = by_hand(config, dict(prompt='a cat'), dict(prompt='a dog', seed=3))
    if batch_size == 1:
        assert list(pictures('P').values()) == expected


@pytest.mark.parametrize(('error', 'words'), [
    (torch.OutOfMemoryError('CUDA out of memory. Tried it.\nmore'), 'out of memory (CUDA out of memory. Tried it.)'),
    (UserError('a bomb'), 'a bomb'), (MemoryError(), 'out of memory (MemoryError)')])
def test_a_batch_that_fails_is_split(here: Here, error: Exception, words: str) -> None:
    """Of three that fail together, two are made alone; the one that fails alone is reported."""
    def fault(seeds: list[int]) -> None:
        if len(seeds) > 2 or seeds == [1]:
            raise error
    seen = failing(here, fault)
    here.infer(here.config(), '--num-images', 4, '--out', 'P', '--batch-size', 3, code=1)
    assert seen == [[0, 1, 2], [0], [1], [2], [3]]
    assert [name[:11] for name in pictures('P')] == ['00000-seed0', '00002-seed2', '00003-seed3']
    assert here.told.count('\n') == 0 and words in here.told and 'Traceback' not in here.told


def test_a_bug_keeps_its_traceback(here: Here) -> None:
    """The other rows are made and the page is written; the bug is reported with its line, and raised at the end. After
    a second one at the same place the rest is skipped."""
    def fault(seeds: list[int]) -> None:
        if seeds in ([1], [3]):
            raise KeyError('ours')
    seen = failing(here, fault)
    rows(*(dict(seed=seed) for seed in range(6)))
    here.patch.setattr(sys, 'argv', ['infer.py', str(here.config()), '--prompts', 'rows.jsonl', '--out', 'P'])
    here.capsys.readouterr()
    assert here.main() == 1
    assert seen == [[0], [1], [2], [3]] and {p.name for p in Path('P').iterdir()} == {
        '00000-seed0-a-frog.png', '00002-seed2-a-frog.png', *MADE}
    err = here.capsys.readouterr().err
    assert 'Traceback' in err and ', in fault' in err
    assert err.endswith("error: internal error in infer: KeyError: 'ours'\n")
    assert "line 2: KeyError: 'ours' (internal error; please report it)" in err and 'line 4: KeyError' in err
    assert 'The remaining images were skipped.' in err


def test_ctrl_c(here: Here) -> None:
    """Writes the page of the finished images, reports broken rows, and exits with the shell's code."""
    def fault(seeds: list[int]) -> None:
        if seeds == [2]:
            signal.raise_signal(signal.SIGINT)
    failing(here, fault)
    rows(*(dict(seed=seed) for seed in range(4)), dict(seed='x'))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        here.infer(here.config(), '--prompts', 'rows.jsonl', '--out', 'P', code=130)
    finally:
        signal.signal(signal.SIGINT, before)
    assert {p.name for p in Path('P').iterdir()} == {'00000-seed0-a-frog.png', '00001-seed1-a-frog.png', *MADE}
    assert "2 made: see 'P/index.html'." in here.said and 'line 5' in here.told


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Limit the size of files, as a full disk does."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_folder_that_cannot_be_written(here: Here) -> None:
    """Refused before the model loads; no empty folder is left."""
    config = here.config()
    Path('file').write_text('x')
    Path('dangling').symlink_to('nowhere/at/all')
    here.patch.setattr(SDXLInferencer, '__init__', None)
    for out, reason in (('file/below', 'Not a directory'), ('/proc/here/P', 'No such file'),
                        ('dangling', 'File exists'), ('x' * 300, 'File name too long'),
                        ('a/' + 'y' * 300, 'File name too long')):
        here.infer(config, '--out', out, code=1)
        assert f"No images can be written into '{out}' ({reason}" in here.told and '--out' in here.told
    assert {p.name for p in Path().iterdir()} == {'c.py', 'file', 'dangling'}
    if os.getuid() != 0:
        Path('mine').mkdir(mode=0o500)
        here.infer(config, '--out', 'mine', code=1)
        assert 'Permission denied' in here.told


def test_a_disk_that_fills_up(here: Here) -> None:
    """During the run: the rest is skipped, and no temporary file is left."""
    with ExitStack() as disk:
        failing(here, lambda seeds: disk.enter_context(no_file_above(1000)) if seeds == [1] else None)
        here.infer(here.config(), '--num-images', 4, '--out', 'P', code=1)
    assert 'could not be written' in here.told and 'images were skipped' in here.told
    assert [p.name for p in Path('P').iterdir()] == ['00000-seed0-a-frog.png']
    assert read_png('P/00000-seed0-a-frog.png')


def test_no_empty_folder_is_left(here: Here) -> None:
    here.infer(here.config(), '--guidance-scale', 1e308, '--out', 'new/er', code=1)
    assert 'not finite' in here.told and not Path('new').exists()
    Path('old').mkdir()
    here.infer('c.py', '--guidance-scale', 1e308, '--out', 'old/new', code=1)
    assert list(Path('old').iterdir()) == []
    folder = ImageFolder('old')
    folder.check_writable()
    assert Path('old').is_dir() and list(Path('old').iterdir()) == []
