"""Kill runs with SIGKILL at random moments and in the middle of a save, then resume them to their end.

python benchmarks/kill.py [--kills 20] [--seed 0]     a row a kill; exit code 1 if one of them is not bitwise
"""

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

STEPS = 8
#: Imported once in the server that all runs are forked from.
PRELOAD = ['diffengine_sdxl.engine', 'diffengine_sdxl.commands.launch', 'diffengine_sdxl.datasets', 'datasets',
           'diffengine_sdxl.models.sdxl', 'diffengine_sdxl.adapters.t2i_adapter', 'diffusers.models.adapter',
           'diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl', 'torch.utils.tensorboard',
           'transformers.models.clip.modeling_clip', 'matplotlib.figure', 'matplotlib.backends.backend_agg']


def options(folder: Path) -> list[str]:
    """Return options of a run of `STEPS` steps that saves after each: about half its time is saving."""
    return [f'model.pretrained={folder / "base"}', f'train_dataloader.dataset.source={folder / "data"}',
            'resolution=32', f'train_cfg.max_iters={STEPS}', 'default_hooks.samples=None',
            'default_hooks.checkpoint.interval=1', 'default_hooks.checkpoint.max_keep_ckpts=2',
            'optim_wrapper.accumulative_counts=2', 'train_dataloader.num_workers=1', 'proportion_empty_prompts=0.5',
            'param_scheduler.name=cosine', 'default_hooks.ema.type=EMAHook']


def run(folder: Path, work_dir: Path, log: Path) -> None:
    """Train or resume `work_dir` in a child process, which exits with the command's exit code."""
    with open(log, 'ab') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from diffengine_sdxl.errors import run_command
    os._exit(run_command('train', argparse.Namespace(config='tiny_t2i_adapter', work_dir=str(work_dir), resume='auto',
                                                     launcher='none', cfg_options=options(folder))))


def start(folder: Path, work_dir: Path) -> Any:
    """Start a child process that trains."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=run, args=(folder, work_dir, work_dir.with_suffix('.log')))
    process.start()
    return process


def finish(folder: Path, work_dir: Path) -> float:
    """Train to the end; return the seconds."""
    begin = time.monotonic()
    process = start(folder, work_dir)
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f'exit code {process.exitcode}\n{work_dir.with_suffix(".log").read_text()[-3000:]}')
    return time.monotonic() - begin


def kill(folder: Path, work_dir: Path, due: Callable[[float], bool]) -> tuple[bool, float]:
    """Start, and kill as soon as `due(seconds)`; return whether that was before the end, and when."""
    begin = time.monotonic()
    process = start(folder, work_dir)
    while process.is_alive() and not due(time.monotonic() - begin):
        time.sleep(0.0005)
    seconds, alive = time.monotonic() - begin, process.is_alive()
    process.kill()
    process.join()
    return alive and process.exitcode == -signal.SIGKILL, seconds


def saving(work_dir: Path, name: str = '.step*.pth.*.part', after: int = 1) -> Callable[[float], bool]:
    """Return a `due` for `kill`: a file is half-written, and a checkpoint of step `after` or later is whole."""
    def due(_: float) -> bool:
        steps = [int(p.stem[4:]) for p in work_dir.glob('step*.pth')]
        return any(p.stat().st_size > 0 for p in work_dir.glob(name)) and max(steps, default=0) >= after

    def patient(seconds: float) -> bool:
        try:
            return due(seconds)
        except FileNotFoundError:  # it was renamed in between
            return False
    return patient


def differences(one: Any, other: Any, path: str = '') -> Iterator[str]:
    """Yield places where two checkpoints are not bitwise equal, except values of the clock and the machine."""
    import torch
    if isinstance(one, dict) and isinstance(other, dict):
        for key in {**one, **other}:
            if key not in ('train/time', 'train/data_time', 'train/memory'):
                yield from differences(one.get(key), other.get(key), f'{path}.{key}')
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from differences(a, b, f'{path}.{i}')
    elif isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.dtype != other.dtype or not torch.equal(one, other):
            yield path
    elif one != other:
        yield f'{path}: {one!r} {other!r}'


def check_left(work_dir: Path) -> str:
    """Check that a killed run's checkpoints load; return the name of the last one, or '-'."""
    from diffengine_sdxl.loading import checkpoint
    last = checkpoint.latest(work_dir)
    for path in checkpoint.list_checkpoints(work_dir):
        checkpoint.load(path)
    return last.stem if last else '-'


def compare(whole: Path, work_dir: Path) -> list[str]:
    """Return where two runs differ: the last checkpoint, the curves, the export, half-written files."""
    import torch
    from safetensors.torch import load_file
    last = [torch.load(f / f'step{STEPS}.pth', weights_only=True) for f in (whole, work_dir)]
    # Without the header of an export, which has the date.
    exports = [load_file(f / f'step{STEPS}/adapter/diffusion_pytorch_model.safetensors') for f in (whole, work_dir)]
    found = [*differences(*last), *differences(*exports)]
    if (whole / 'curves.jsonl').read_bytes() != (work_dir / 'curves.jsonl').read_bytes():
        found.append('curves.jsonl')
    return found + [str(p) for p in work_dir.glob('.*')]


def prepare(folder: Path) -> tuple[Path, float]:
    """Write base and data, and train a run without kills; return its folder and its seconds."""
    from diffengine_sdxl import testing
    testing.write_tiny_sdxl(folder / 'base')
    testing.write_circles(folder / 'data')
    finish(folder, folder / 'first')  # imports the packages and fills the cache of the data
    return folder / 'whole', finish(folder, folder / 'whole')


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=20)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    draws, good = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole, seconds = prepare(folder)
        print(f'unkilled: {seconds:.2f} s\n\n| kill | moment | at | last checkpoint | loads | end |\n'
              '|---|---|---|---|---|---|')
        index = attempt = 0
        while index < args.kills:
            work_dir = folder / f'run{attempt}'
            attempt += 1
            in_save = index % 2 == 1
            moment = draws.uniform(0.3, 0.97) * seconds
            after = draws.randrange(1, STEPS)
            killed, at = kill(folder, work_dir, saving(work_dir, after=after) if in_save else lambda s: s > moment)  # noqa: B023
            if not killed:
                continue
            index += 1
            left = check_left(work_dir)
            rests = len(list(work_dir.glob('.*.part')))
            finish(folder, work_dir)
            found = compare(whole, work_dir)
            good += not found
            what = f'while saving ({rests} half-written)' if rests else 'random'
            print(f'| {index} | {what} | {at:.2f} s | {left} | yes | '
                  f'{"bitwise" if not found else "; ".join(found[:3])} |', flush=True)
    print(f'\n{good} of {args.kills} bitwise')
    return 0 if good == args.kills else 1


if __name__ == '__main__':
    sys.exit(main())
