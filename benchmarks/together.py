"""How adapters of the shapes world get along: as trained apart, with partners, and repaired.

    python benchmarks/together.py work_dirs --out work_dirs/together

reads the work dirs that `diffengine-sdxl train` made of the configs in SETS; sets that lack one are left out. 200
prompts that name the shape only, three seeds each, with a noise for each; what is in --out already is not made again.
Prints tables and writes together.png: in each row the same prompt, noise, reference and outline.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from shapes import evaluate

#: Set -> adapter in shapes_composition -> the config that trained it, and its name there.
SETS = {
    'apart': {'style': ('shapes_lora', 'style'), 'ip': ('shapes_ip_adapter', 'ip'),
              'layout': ('shapes_t2i_adapter', 'adapter')},
    'partners': {'style': ('shapes_lora_partners', 'style'), 'ip': ('shapes_ip_adapter_partners', 'ip'),
                 'layout': ('shapes_t2i_adapter_partners', 'layout')},
    'repaired': {name: ('shapes_repair', name) for name in ('style', 'ip', 'layout')},
}
#: Adapter and metric, as the retention of shapes_composition pairs them.
MEASURES = (('style', 'style_score'), ('ip', 'fill_accuracy'), ('ip', 'ground_accuracy'), ('layout', 'iou'))


def weights(work_dirs: Path, trained: Mapping[str, tuple[str, str]]) -> dict[str, Path] | None:
    """Return adapter -> folder of its last step; None if one is missing."""
    found = {}
    for name, (config, subfolder) in trained.items():
        steps = {int(p.parent.name[4:]): p for p in work_dirs.glob(f'{config}/step*/{subfolder}')}
        if not steps:
            print(f"Left out: '{work_dirs / config}' has no step*/{subfolder}.", file=sys.stderr)
            return None
        found[name] = steps[max(steps)]
    return found


def measure(work_dirs: Path, out: Path, options: list[str]) -> dict[str, dict[str, Any]]:
    """Test each set; return set -> its metrics.json."""
    results = {}
    for name, trained in SETS.items():
        folder = out / name
        if not (folder / 'metrics.json').is_file():
            if (paths := weights(work_dirs, trained)) is None:
                continue
            files = [f'model.adapters.{adapter}.weights={path}' for adapter, path in paths.items()]
            evaluate('shapes_composition', 'weights', folder, [*options, *files])
        results[name] = json.loads((folder / 'metrics.json').read_text())
    return results


def shown(result: Mapping[str, Any]) -> str:
    """Format a number and its interval."""
    if result['value'] is None:
        return 'undefined'
    between = '' if result['low'] is None else f' ({result["low"]:.2f} to {result["high"]:.2f})'
    return f'{result["value"]:.2f}{between}'


def retention_rows(results: Mapping[str, Mapping[str, Any]]) -> Iterator[list[str]]:
    """Yield the rows of each set: base, alone and together, and what is retained."""
    for name, metrics in results.items():
        for adapter, metric in MEASURES:
            sets = ('base', f'only_{adapter}', 'adapted')
            yield [name, f'{adapter}: {metric}', *(shown(metrics[image_set][metric]) for image_set in sets),
                   shown(metrics['retention'][f'{adapter}/{metric}'])]
        yield [name, 'harmonic mean', '', '', '', shown(metrics['retention']['harmonic_mean'])]


def change_rows(out: Path, results: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yield how each adapter alone, and all together, differ from those trained apart: paired by prompt and noise."""
    from diffengine_sdxl.engine.report import read_samples
    from diffengine_sdxl.evaluation.interval import difference
    rows = {name: {(row['image_set'], row['key'], row['seed']): row
                   for row in read_samples(out / name / 'test/samples.csv')} for name in results}
    for name in [name for name in results if name != 'apart' and 'apart' in results]:
        for adapter, metric in MEASURES:
            cells = []
            for image_set in (f'only_{adapter}', 'adapted'):
                keys = [key for key in rows[name] if key[0] == image_set and key in rows['apart']]
                now, before = ([float(rows[run][key][metric]) for key in keys] for run in (name, 'apart'))
                cells.append(shown(difference(now, before, [key[1] for key in keys])._asdict()))
            yield [name, f'{adapter}: {metric}', *cells]


def sheet(out: Path, sets: list[str], num_rows: int) -> Image.Image:
    """Draw a row for each of the first prompts: its reference and outline, and what base, adapters and sets make."""
    from diffengine_sdxl.datasets import Shapes
    from diffengine_sdxl.datasets.data_sampler import Draw
    from diffengine_sdxl.images import labelled_grid
    data = Shapes(length=num_rows, split='test', styles=['dotted'], reference=True, mentions=['shape'])
    made = {'base': 'base', 'style alone': 'only_style', 'colours alone': 'only_ip', 'layout alone': 'only_layout'}
    rows = []
    for i in range(num_rows):
        images = data.images(i, Draw(i, 0, 0))
        name = f'{i:06d}_seed0.png'
        cells = [images['reference'], images['conditioning_image']]
        cells += [Image.open(out / sets[0] / 'test/images' / folder / name) for folder in made.values()]
        cells += [Image.open(out / run / 'test/images/adapted' / name) for run in sets]
        rows.append((data.texts(i, Draw(i, 0, 0))['text'], cells))
    return labelled_grid(rows, ['reference', 'outline', *made, *(f'together: {run}' for run in sets)],
                         'Three adapters on one base, prompts that name the shape only')


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('work_dirs', type=Path, help='the folder that holds work dirs, named as their configs are')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/together'), help='default: %(default)s')
    parser.add_argument('--num-samples', type=int, default=200, help='prompts (default: %(default)s)')
    parser.add_argument('--seeds', type=int, default=3, help='images a prompt (default: %(default)s)')
    args = parser.parse_args()
    options = [f'test_dataloader.dataset.length={args.num_samples}', f'test_cfg.seeds={args.seeds}']
    results = measure(args.work_dirs, args.out, options)
    if not results:
        raise SystemExit(f"'{args.work_dirs}' holds no complete set; see --help.")
    for header, rows in ((['set', 'what', 'base', 'alone', 'together', 'retention'], retention_rows(results)),
                         (['set', 'what', 'alone, less apart', 'together, less apart'],
                          change_rows(args.out, results))):
        for cells in (header, ['---'] * len(header), *rows):
            print(f'| {" | ".join(cells)} |')
        print()
    sheet(args.out, [*results], min(8, args.num_samples)).save(args.out / 'together.png')
    print(f"Images: '{args.out / 'together.png'}'")


if __name__ == '__main__':
    sys.exit(main())
