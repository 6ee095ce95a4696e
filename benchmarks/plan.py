"""Compare what `diffengine-sdxl plan` predicts with what a GPU does: peak of memory and seconds of full-size steps.

    python benchmarks/plan.py [--kinds t2i lora ip controlnet] [--batch-sizes 1 4] [--checkpointing off full]

Full-size SDXL with random weights at 1024 px, trained by the shipped configs from a cache on disk. `--tiny` runs on any
device: a CPU reports no peak.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from gpu_steps import Meter
from workbench import CONFIGS, Workbench

from diffengine_sdxl.commands.plan.command import make_plan


def compare(base: Workbench, kind: str, batch_size: int, checkpointing: str, steps: int) -> dict[str, Any]:
    """Return a row: predicted and measured peak in GiB, and seconds of a step, with their ratios."""
    meter = Meter(base.device, steps, warm_up=1 if base.tiny else 5)
    cfg = base.config(kind, batch_size, meter.max_iters, speed__checkpointing=checkpointing)
    own = make_plan(cfg).own
    base.free()
    with base.runner(cfg, [meter]) as runner:
        runner.train()
    peak, seconds = meter.values['peak_gib'], meter.values['ms'] / 1e3
    return {'kind': kind, 'batch': batch_size, 'checkpointing': checkpointing, 'predicted GiB': own.peak / 2**30,
            'measured GiB': peak, 'ratio': None if peak is None else own.peak / 2**30 / peak,
            'predicted s': own.seconds, 'measured s': seconds, 'ratio of s': own.seconds / seconds}


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Print a table; return its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kinds', nargs='+', default=list(CONFIGS), choices=list(CONFIGS))
    parser.add_argument('--batch-sizes', nargs='+', type=int, default=[1, 4])
    parser.add_argument('--checkpointing', nargs='+', default=['off'], choices=('off', 'blocks', 'full'))
    parser.add_argument('--tiny', action='store_true', help='a tiny SDXL on any device')
    args = parser.parse_args(arguments)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    if device.type == 'cpu' and not args.tiny:
        parser.error('no GPU found; --tiny runs on a CPU.')
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        base = Workbench(folder, device, args.tiny, precision='no' if args.tiny else 'bf16')
        for kind in args.kinds:
            for size in args.batch_sizes:
                for mode in args.checkpointing:
                    rows.append(row := compare(base, kind, size, mode, 1 if args.tiny else 4))
                    if len(rows) == 1:
                        print(f'| {" | ".join(row)} |\n' + '|---' * len(row) + '|')
                    print('| ' + ' | '.join('' if v is None else f'{v:.3g}' if isinstance(v, float) else str(v)
                                           for v in row.values()) + ' |', flush=True)
    return rows


if __name__ == '__main__':
    main()
