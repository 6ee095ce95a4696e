"""What measures on the shapes world are worth: p-values, the best checkpoint, stopping in time.

    python benchmarks/stopping.py calibration               100 comparisons of equal settings: p-values, intervals
    python benchmarks/stopping.py best --folder F            an over-trained run: the best step against the last
    python benchmarks/stopping.py stop --folder F --runs 20  stopped runs against their full length

Trainings are in F, and go on there when started again.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

#: Trainings of `shapes_t2i_adapter`: half its batch, a constant rate, averaged weights, validated every 50 steps.
COMMON = ['train_dataloader.batch_size=8', 'param_scheduler.name=constant_with_warmup',
          'param_scheduler.num_warmup_steps=50', 'default_hooks.samples=None', 'default_hooks.checkpoint.interval=50',
          'train_cfg.val_interval=50', 'val_dataloader=dict(batch_size=40,dataset=dict(type=Shapes,split=val,length=48,'
          'conditioning=outline,truth=True,transforms=[dict(type=ComputeTimeIds),dict(type=PackInputs)]))',
          'val_evaluator=[dict(type=MaskIoU)]', 'val_cfg.num_pictures=0']
AVERAGED = 'custom_hooks=[dict(type=EMAHook,decay=0.98)]'


def run(command: str, config: str, work_dir: Path, options: Sequence[str], **arguments: Any) -> None:
    """Run a command of the project in this process."""
    from diffengine_sdxl.errors import run_command
    args = SimpleNamespace(config=config, work_dir=str(work_dir), launcher='none', cfg_options=list(options),
                           **arguments)
    if run_command(command, args):
        raise SystemExit(f'{command} {config} failed in {work_dir}.')


def train(work_dir: Path, options: Sequence[str], max_iters: int) -> None:
    """Train to `max_iters`, going on where an earlier call stopped."""
    if not (work_dir / f'step{max_iters}.pth').is_file():
        run('train', 'shapes_t2i_adapter', work_dir, [*COMMON, *options, f'train_cfg.max_iters={max_iters}'],
            resume='auto')


def compare(work_dir: Path, step: int, other: int, folder: Path, num_samples: int, seeds: int) -> dict[str, Any]:
    """Test two steps on the same captions and noise, which no validation had; return metrics.json."""
    import json
    options = [f'test_dataloader.dataset.length={num_samples}', f'test_cfg.seeds={seeds}',
               "test_cfg.image_sets=['adapted']", 'test_cfg.num_pictures=0', 'test_evaluator=[dict(type=MaskIoU)]']
    run('test', 'shapes_t2i_adapter', folder, options, checkpoint=str(work_dir / f'step{step}.pth'),
        compare=str(work_dir / f'step{other}.pth'))
    found: dict[str, Any] = json.loads((folder / 'metrics.json').read_text())
    return found


def shown(result: dict[str, Any]) -> str:
    """Format a value with its interval."""
    return f'{result["value"]:.3f} ({result["low"]:.3f} to {result["high"]:.3f})'


def calibration(args: argparse.Namespace) -> None:
    """Compare seeds 2i and 2i + 1 of the base alone, which differ in their noise only."""
    from scipy.stats import kstest

    from diffengine_sdxl.engine.report import read_samples
    from diffengine_sdxl.evaluation import interval
    with tempfile.TemporaryDirectory() as folder:
        run('test', 'shapes_base', Path(folder), [
            f'test_cfg.seeds={2 * args.comparisons}', f'test_dataloader.dataset.length={args.samples}',
            'test_cfg.num_pictures=0', 'test_evaluator=[dict(type=MaskIoU),dict(type=ShapeAccuracy)]'],
            checkpoint='none', compare=None)
        rows = read_samples(Path(folder) / 'test' / 'samples.csv')
    for name, difference in (('iou', interval.difference), ('shape_accuracy', interval.share_difference)):
        scores = {(row['key'], int(row['seed'])): float(row[name]) for row in rows}
        keys = sorted({key for key, _ in scores})
        found = [difference([scores[key, 2 * i] for key in keys], [scores[key, 2 * i + 1] for key in keys], keys)
                 for i in range(args.comparisons)]
        p = np.array([estimate.p for estimate in found], dtype=float)
        holds = np.mean([estimate.low <= 0 <= estimate.high for estimate in found])
        print(f'{name}: {args.comparisons} comparisons of {len(keys)} images: {np.mean(p < 0.05):.0%} below p = 0.05, '
              f'{np.mean(p < 0.5):.0%} below 0.5; Kolmogorov-Smirnov p = {kstest(p, "uniform").pvalue:.2f}; '
              f'{holds:.0%} of the intervals hold 0')


def best(args: argparse.Namespace) -> None:
    """Train on eight images for far too long, and compare the best validated step with the last on new noise."""
    import json
    folder = args.folder / 'best'
    train(folder, ['train_dataloader.dataset.length=8', 'default_hooks.checkpoint.keep_best=iou'], args.steps)
    step = json.loads((folder / 'best.json').read_text())['step']
    found = compare(folder, step, args.steps, args.folder / 'best_test', 200, 3)
    difference = found['adapted - compared']['iou']
    print(f'best step {step}: IoU {shown(found["adapted"]["iou"])}; step {args.steps}: '
          f'{shown(found["compared"]["iou"])}; difference {shown(difference)}, p = {difference["p"]:.2g}')


def stop(args: argparse.Namespace) -> None:
    """Ask where EarlyStop would have stopped full runs, and compare that step with the last on new captions."""
    from diffengine_sdxl.engine.hooks.early_stop import EarlyStop
    saved, inside = [], []
    for seed in range(args.runs):
        folder = args.folder / f'seed{seed}'
        train(folder, [AVERAGED, f'randomness.seed={seed}'], args.steps)
        step = EarlyStop(metric='iou').first_stop(folder) or args.steps
        found = compare(folder, step, args.steps, args.folder / f'test{seed}', 100, 1)
        stopped, full = found['adapted']['iou'], found['compared']['iou']
        saved.append(1 - step / args.steps)
        inside.append(full['low'] <= stopped['value'] <= full['high'])
        print(f'seed {seed}: stopped at {step} of {args.steps}; IoU {stopped["value"]:.3f}, in full {shown(full)}',
              flush=True)
    print(f'{args.runs} runs: {np.mean(saved):.0%} of the steps saved, at least {min(saved):.0%}; the final IoU '
          f"is inside the full run's interval in {sum(inside)} of {len(inside)}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=('calibration', 'best', 'stop'))
    parser.add_argument('--folder', type=Path, default=Path('work_dirs/stopping'), help='for trainings and tests')
    parser.add_argument('--comparisons', type=int, default=100)
    parser.add_argument('--samples', type=int, default=40, help='captions of a comparison (default: %(default)s)')
    parser.add_argument('--runs', type=int, default=20)
    parser.add_argument('--steps', type=int, default=500, help='length of a full run (default: %(default)s)')
    args = parser.parse_args()
    {'calibration': calibration, 'best': best, 'stop': stop}[args.what](args)


if __name__ == '__main__':
    sys.exit(main())
