"""A training step of the runner over a bare PyTorch loop on the same model and batches, in pairs in one process.

python benchmarks/train_step.py [--pairs 15] [--block 5]     times, and in two more processes the rise of memory
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch


def build(folder: Path) -> Any:
    """A runner on a tiny SDXL, wide enough for a step of 50 ms or more, with all default hooks."""
    from diffengine_sdxl import config, testing
    from diffengine_sdxl.registry import RUNNERS
    base = testing.write_tiny_sdxl(folder / 'base', channels=(32, 64, 128))
    data = testing.write_circles(folder / 'data', 32, 128)
    cfg = config.load('tiny_t2i_adapter', {
        'model.pretrained': str(base), 'train_dataloader.dataset.source': str(data), 'resolution': 128,
        'train_dataloader.batch_size': 4, 'train_cfg.max_iters': 100000, 'default_hooks.samples': None,
        'default_hooks.checkpoint.interval': 100000, 'optim_wrapper.accumulative_counts': 1})
    cfg.work_dir = str(folder / 'run')
    runner = RUNNERS.build(cfg)
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    runner.param_schedulers = runner.build_param_scheduler(runner.param_schedulers)
    runner.call_hook('before_run')
    runner.optim_wrapper.initialize_count_status(runner.model, 0, runner.max_iters)
    runner.call_hook('before_train')
    runner.call_hook('before_train_epoch')
    runner.model.train()
    return runner


def bare_step(runner: Any, iterator: Any, parameters: list[torch.nn.Parameter], optimizer: Any) -> float:
    """What a short script would write."""
    batch = runner.model.data_preprocessor(next(iterator), True)['inputs']
    loss = runner.model(batch, mode='loss')['loss']
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def prepare(runner: Any) -> tuple[Any, Any, list[torch.nn.Parameter], Any]:
    """Iterators for both loops, and the bare loop's optimizer."""
    parameters = [p for owned in runner.model.trainables().values() for _, p in owned]
    return (iter(runner.train_dataloader), iter(runner.train_dataloader), parameters,
            torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-2))


def measure_time(pairs: int, block: int) -> None:
    """Blocks of both loops in turn; the median of the ratios pair by pair."""
    with tempfile.TemporaryDirectory() as folder:
        runner = build(Path(folder))
        ours, theirs, parameters, optimizer = prepare(runner)
        rows = []
        for index in range(pairs + 1):
            seconds = {}
            for name in ('runner', 'bare') if index % 2 else ('bare', 'runner'):
                begin = time.process_time()
                for _ in range(block):
                    if name == 'runner':
                        runner.train_loop.run_iter(ours)
                    else:
                        bare_step(runner, theirs, parameters, optimizer)
                seconds[name] = (time.process_time() - begin) / block
            if index:  # the first pair warms up
                rows.append((seconds['runner'], seconds['bare'], seconds['runner'] / seconds['bare']))
    ours_ms, bare_ms, ratio = (sorted(column)[len(rows) // 2] for column in zip(*rows, strict=True))
    print('| | runner | bare loop | ratio (median of pairs) | min | max |\n|---|---|---|---|---|---|\n'
          f'| step, CPU time | {ours_ms * 1e3:.1f} ms | {bare_ms * 1e3:.1f} ms | {ratio:.3f} | '
          f'{min(r[2] for r in rows):.3f} | {max(r[2] for r in rows):.3f} |')


def status(key: str) -> float:
    """A line of /proc/self/status, in MiB."""
    line = next(x for x in Path('/proc/self/status').read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) / 1024


def memory_of(which: str, steps: int) -> None:
    """In a process of its own: print the rise of the peak after construction, in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        runner = build(Path(folder))
        ours, theirs, parameters, optimizer = prepare(runner)
        # The peak so far is that of the construction: forget it (Linux).
        Path('/proc/self/clear_refs').write_text('5')
        before = status('VmRSS')
        for _ in range(steps):
            if which == 'runner':
                runner.train_loop.run_iter(ours)
            else:
                bare_step(runner, theirs, parameters, optimizer)
        print(json.dumps(status('VmHWM') - before))


def measure_memory(steps: int, repeats: int) -> None:
    """Both loops in processes of their own, in turn."""
    rises: dict[str, list[float]] = {'runner': [], 'bare': []}
    for _ in range(repeats):
        for which in rises:
            out = subprocess.run([sys.executable, __file__, '--memory-of', which, '--steps', str(steps)],
                                 capture_output=True, text=True, check=True)
            rises[which].append(float(out.stdout.strip().splitlines()[-1]))
    ours, bare = (sorted(values)[len(values) // 2] for values in rises.values())
    print(f'\n| | runner | bare loop | ratio |\n|---|---|---|---|\n'
          f'| rise of peak memory after construction, {steps} steps | {ours:.1f} MiB | {bare:.1f} MiB | '
          f'{ours / bare:.3f} |')


def main() -> None:
    """Parse and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--pairs', type=int, default=15)
    parser.add_argument('--block', type=int, default=5)
    parser.add_argument('--steps', type=int, default=30)
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--memory-of', choices=('runner', 'bare'), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory_of:
        memory_of(args.memory_of, args.steps)
        return
    measure_time(args.pairs, args.block)
    measure_memory(args.steps, args.repeats)


if __name__ == '__main__':
    main()
