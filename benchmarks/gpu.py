"""Full-size SDXL with random weights on one GPU, at 1024 px: training steps and images, beside diffusers'.

    python benchmarks/gpu.py rates parity t2i --out FOLDER
    python benchmarks/gpu.py all --tiny                       every section on a tiny SDXL, also without a GPU

Sections: rates (of the card), parity, t2i, lora, ip, controlnet (training steps), generate, generate-lora,
generate-three (a LoRA, an IP-Adapter and a T2I-Adapter), exact (deterministic training of a T2I-Adapter and an
IP-Adapter), exact-lora, exact-controlnet. Each stays within --budget seconds: rows that don't fit are left out, and one
that runs out of memory is a row that says so. Every row is a line of FOLDER/results.jsonl as soon as it is measured; a
table is printed at the end and after Ctrl-C (`timeout -s INT 300 python benchmarks/gpu.py ...`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

# torch reads it once, at the first matrix product: for the section 'exact'. On Hopper it is the default's size.
os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
sys.path.insert(0, str(Path(__file__).resolve().parent))
import gpu_exact
import gpu_images
import gpu_parity
import gpu_steps
from workbench import Workbench

SECTIONS: dict[str, Callable[[Any], None]] = {
    'rates': gpu_steps.rates, 'parity': gpu_parity.parity,
    **{kind: lambda bench, kind=kind: gpu_steps.training(bench, kind) for kind in ('t2i', 'lora', 'ip', 'controlnet')},
    **{name: lambda bench, kinds=kinds: gpu_images.generate(bench, kinds) for name, kinds in {
        'generate': (), 'generate-lora': ('lora',), 'generate-three': ('lora', 'ip', 't2i')}.items()},
    **{name: lambda bench, kinds=kinds: gpu_exact.exact(bench, kinds) for name, kinds in {
        'exact': ('t2i', 'ip'), 'exact-lora': ('lora',), 'exact-controlnet': ('controlnet',)}.items()}}
#: Seconds that must be left to begin a row.
LEAST = 10


@dataclass
class Bench:
    """One run of the script: the base, the rows so far, and what was asked for.

    Attributes:
        out: folder of results.jsonl and of profiles.
        compile: values of `speed.compile` to measure.
        batch_sizes: of training steps, the most important first.
        steps: timed training steps of a row, and solver steps of an image.
        matmul: TFLOP/s of the card in bf16, once it is measured.
        images: adapters -> the image that the first mode made.
    """

    base: Workbench
    out: Path
    budget: float = 170.0
    compile: Sequence[str] = ('off', 'blocks')
    batch_sizes: Sequence[int] = (4, 8, 1)
    steps: int = 6
    solver_steps: int = 30
    section: str = ''
    started: float = 0.0
    matmul: float | None = None
    images: dict[Any, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def left(self) -> float:
        """Return the seconds that the section may still take."""
        return self.budget - (time.monotonic() - self.started)

    def add(self, name: str, values: Mapping[str, Any]) -> None:
        """Write one row at once: a killed run keeps it."""
        row = {'section': self.section, 'row': name, **values}
        self.rows.append(row)
        line = json.dumps(row)
        print(line, flush=True)
        with open(self.out / 'results.jsonl', 'a') as file:
            file.write(line + '\n')

    def measure(self, name: str, work: Callable[[], Mapping[str, Any]], **labels: Any) -> None:
        """Add the row that `work` returns; or that it ran out of memory, failed, or does not fit in the budget."""
        if self.left() < LEAST:
            self.add(name, {**labels, 'skipped': 'no time left'})
            return
        begun, failure = time.monotonic(), None
        try:
            self.add(name, {**labels, **work(), 'took_s': round(time.monotonic() - begun, 1)})
        except torch.OutOfMemoryError:
            failure = {'out_of_memory': True}
        except Exception as error:
            traceback.print_exc()
            failure = {'error': f'{type(error).__name__}: {error}'[:300]}
        # Outside of the handler, which keeps the tensors of the frames that failed. A runner lies in cycles, and the
        # optimizer's states with it.
        self.base.free()
        if failure:
            self.add(name, {**labels, **failure})

    def run(self, sections: Sequence[str]) -> None:
        """Run sections one after the other."""
        for section in sections:
            self.section, self.started = section, time.monotonic()
            SECTIONS[section](self)
            self.add('(section)', {'took_s': round(time.monotonic() - self.started, 1)})


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as Markdown, a table for each section."""
    lines: list[str] = []
    for section in dict.fromkeys(row['section'] for row in rows):
        own = [row for row in rows if row['section'] == section and row['row'] != '(section)']
        keys = list(dict.fromkeys(key for row in own for key in row if key not in ('section', 'took_s')))
        lines += ['', f'| {section}: {" | ".join(keys)} |', '|' + '---|' * len(keys)]
        lines += ['| ' + ' | '.join(_cell(row.get(key)) for key in keys) + ' |' for row in own]
    return '\n'.join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return ''
    if isinstance(value, float):
        return f'{value:,.1f}' if abs(value) >= 100 else f'{value:.3g}'
    return json.dumps(value) if isinstance(value, dict) else str(value).replace('|', '/')


def versions(device: torch.device) -> dict[str, Any]:
    """Return what the figures belong to."""
    from diffengine_sdxl.versions import git_commit
    from diffengine_sdxl.versions import versions as of_packages
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else platform.processor() or platform.machine()
    return {'device': name, **of_packages(), 'python': platform.python_version(), 'commit': git_commit(),
            'date': time.strftime('%Y-%m-%d')}


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure what the arguments ask for; return the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('sections', nargs='+', choices=(*SECTIONS, 'all'), metavar='SECTION')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/gpu'), help='default: %(default)s')
    parser.add_argument('--budget', type=float, default=170, help='seconds of a section (default: %(default)s)')
    parser.add_argument('--compile', nargs='+', default=['off', 'blocks', 'graph'], choices=('off', 'blocks', 'graph'),
                        help="values of speed.compile to measure; 'graph' is for images only (default: all)")
    parser.add_argument('--batch-sizes', nargs='+', type=int, default=[4, 8, 1], help='default: 4 8 1')
    parser.add_argument('--tiny', action='store_true', help='a tiny SDXL, one step, no compilation, on any device')
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    if device.type == 'cpu' and not args.tiny:
        parser.error('no GPU found; --tiny runs on a CPU.')
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Workbench(folder, device, args.tiny), args.out, args.budget)
        if args.tiny:
            bench.compile, bench.batch_sizes, bench.steps, bench.solver_steps = ('off',), (1,), 1, 2
        else:
            bench.compile, bench.batch_sizes = args.compile, args.batch_sizes
        try:
            bench.add('versions', versions(device))
            bench.run(list(SECTIONS) if 'all' in args.sections else args.sections)
        except KeyboardInterrupt:
            print('stopped', file=sys.stderr)
        finally:
            print(table(bench.rows))
    return bench.rows


if __name__ == '__main__':
    main()
