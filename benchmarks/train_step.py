"""A training step of the runner over a plain loop, in pairs in one process, on a tiny SDXL.

python benchmarks/train_step.py [--pairs 15] [--block 5]     over a bare loop on the same model and batches: times, and
                                                             in two more processes the rise of memory
python benchmarks/train_step.py recipe [--kinds t2i lora]    over what diffusers' example scripts do in a step, from the
                                                             same latents and embeddings
"""

import argparse
import json
import statistics
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
    return begin(RUNNERS.build(cfg))


def begin(runner: Any) -> Any:
    """Do what `runner.train()` does before its first step."""
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


def measure_recipe(kind: str, pairs: int, block: int, size: int = 4, warm_up: int = 6) -> dict[str, Any]:
    """Time blocks of the runner and of diffusers' recipe in turn, after checking that both have the same loss.

    Returns:
        kind, ours and theirs (seconds of a step), ratio (median of pairs), low, high (its quartiles), losses.
    """
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from gpu_steps import build_recipe, loader
    from workbench import Workbench
    rows: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        # Wide enough for a step of 50 ms or more.
        base = Workbench(folder, 'cpu', tiny=True, precision='no', resolution=128, channels=(32, 64, 128))
        recipe = build_recipe(base, kind)  # first: a copy of the UNet before our layers are in it
        with base.runner(base.config(kind, size, 10**6)) as built:
            runner = begin(built)
            losses = compare(runner, recipe)
            ours, theirs = iter(runner.train_dataloader), loader(base, kind, size)
            for _ in range(warm_up):  # the guard of the first steps
                runner.train_loop.run_iter(ours)
            for index in range(pairs + 1):
                seconds = {}
                for name in ('ours', 'theirs') if index % 2 else ('theirs', 'ours'):
                    begun = time.process_time()
                    for _ in range(block):
                        if name == 'ours':
                            runner.train_loop.run_iter(ours)
                        else:
                            recipe.step(next(theirs))
                    seconds[name] = (time.process_time() - begun) / block
                if index:  # the first pair warms up
                    rows.append((seconds['ours'], seconds['theirs']))
    low, middle, high = statistics.quantiles([a / b for a, b in rows], n=4)
    return {'kind': kind, 'ours': statistics.median(a for a, _ in rows), 'losses': losses, 'ratio': middle, 'low': low,
            'theirs': statistics.median(b for _, b in rows), 'high': high}


def compare(runner: Any, recipe: Any) -> tuple[float, float]:
    """Give the recipe our weights and one batch with our noise and timesteps; return both losses."""
    model = runner.bare_model
    if recipe.network is not None:
        recipe.network.load_state_dict(next(iter(model.adapters.values())).net.state_dict())
    else:
        with torch.no_grad():
            for parameter in (p for owned in model.trainables().values() for _, p in owned):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)  # or a fresh LoRA would change nothing
            own = dict(model.unet.named_parameters())
            for name, parameter in recipe.unet.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(own[name.replace('.default.', '.style.')])
    collated = next(iter(runner.train_dataloader))
    batch = model.data_preprocessor(collated, True)['inputs']
    with torch.no_grad():
        ours = float(model(batch, mode='loss')['loss'])
        inputs = {'latents': batch.latents, 'text_embeds': batch.text_embeds, 'pooled': batch.pooled,
                  'time_ids': batch.time_ids, **batch.conditions}
        theirs = float(recipe.loss(inputs, collated['drawn']['noise'], collated['drawn']['timestep']))
    assert abs(ours - theirs) < 1e-5 * abs(theirs), f'the losses differ: {ours}, {theirs}'
    return ours, theirs


def print_recipe(kinds: list[str], pairs: int, block: int) -> None:
    """Print a row for each kind."""
    print("| | runner | diffusers' recipe | ratio (median of pairs) | quartiles |\n|---|---|---|---|---|")
    for kind in kinds:
        row = measure_recipe(kind, pairs, block)
        print(f'| {kind}, step, CPU time | {row["ours"] * 1e3:.1f} ms | {row["theirs"] * 1e3:.1f} ms | '
              f'{row["ratio"]:.3f} | {row["low"]:.3f} to {row["high"]:.3f} |', flush=True)


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('mode', nargs='?', default='bare', choices=('bare', 'recipe'))
    parser.add_argument('--kinds', nargs='+', default=['t2i', 'lora'], choices=('t2i', 'lora'))
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
    if args.mode == 'recipe':
        print_recipe(args.kinds, args.pairs, args.block)
        return
    measure_time(args.pairs, args.block)
    measure_memory(args.steps, args.repeats)


if __name__ == '__main__':
    main()
