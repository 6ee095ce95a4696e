"""How good the shapes world is: base, held-out pairs, T2I-Adapters, VAE; one table, each figure beside its aim.

    python benchmarks/shapes.py                                  the base and its VAE
    python benchmarks/shapes.py --adapter W --long W2            and what was trained there, by a config each

200 captions that no training showed, three seeds each, mean with a 95 % interval.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

Row = tuple[str, float, str, float | None]


def evaluate(config: str, checkpoint: str, folder: Path, options: list[str]) -> dict[str, Any]:
    """Run one test; return its metrics.json."""
    from diffengine_sdxl.errors import run_command
    args = SimpleNamespace(config=config, checkpoint=checkpoint, compare=None, work_dir=str(folder), launcher='none',
                           cfg_options=options)
    if run_command('test', args):
        raise SystemExit(f'{config} with {checkpoint} could not be tested.')
    return json.loads((folder / 'metrics.json').read_text())


def interval(result: dict[str, Any]) -> str:
    """Format the interval and the number of samples."""
    return f'{result["low"]:.3f} to {result["high"]:.3f}, {result["num_samples"]} images'


def base_rows(folder: Path, options: list[str]) -> Iterator[Row]:
    """Measure the base alone, on pairs of fill and shape seen in training and held out."""
    for pairs, aim in (('seen', 0.95), ('held_out', 0.85)):
        changed = [*options, f'test_dataloader.dataset.combinations={pairs}']
        base = evaluate('shapes_base', 'none', folder / pairs, changed)['base']
        for key in ('shape_accuracy', 'fill_accuracy', 'ground_accuracy'):
            yield f'base, {pairs.replace("_", " ")} pairs: {key}', base[key]['value'], interval(base[key]), aim


def adapter_rows(name: str, checkpoint: str, aim: float, folder: Path, options: list[str]) -> Iterator[Row]:
    """Measure an adapter's IoU beside the base's, and its effect on the base's accuracies."""
    metrics = evaluate('shapes_t2i_adapter', checkpoint, folder / name, options)
    base, adapted = metrics['base'], metrics['adapted']
    yield f'{name}: IoU', adapted['iou']['value'], interval(adapted['iou']), aim
    yield f'{name}: IoU of the base alone', base['iou']['value'], interval(base['iou']), None
    for key in ('shape_accuracy', 'fill_accuracy', 'ground_accuracy'):
        of_base = base[key]['value']
        yield (f'{name}: {key} (base: {of_base:.3f})', adapted[key]['value'], interval(adapted[key]),
               round(of_base - 0.03, 3))


def vae_rows(num_images: int) -> Iterator[Row]:
    """Measure the PSNR of images through the VAE and back, of all styles, on a separate split."""
    import torch

    from diffengine_sdxl.datasets import Shapes, collate
    from diffengine_sdxl.registry import MODELS
    from diffengine_sdxl.shapes.scene import STYLES
    model: Any = MODELS.build({'type': 'SDXL', 'pretrained': 'diffengine_sdxl::shapes/base'})
    data = Shapes(length=num_images, split='psnr', styles=STYLES, combinations='all', conditioning=None,
                  transforms=[{'type': 'ComputeTimeIds'}, {'type': 'PackInputs'}])
    values = []
    for start in range(0, num_images, 50):
        rows = [data[i] for i in range(start, min(start + 50, num_images))]
        batch = model.data_preprocessor(collate(rows))['inputs']
        with torch.no_grad():
            decoded = model.decode(model.posterior(batch).mean * model.vae.config.scaling_factor)
        error = (decoded - (batch.img * 0.5 + 0.5)).square().mean(dim=(1, 2, 3))
        values.append(-10 * torch.log10(error))
    psnr = torch.cat(values)
    margin = 1.96 * float(psnr.std(correction=0)) / len(psnr) ** 0.5
    yield ('VAE: PSNR, dB', float(psnr.mean()),
           f'{psnr.mean() - margin:.2f} to {psnr.mean() + margin:.2f}, {len(psnr)} images', 30.0)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--adapter', help="work_dir of the demo's training")
    parser.add_argument('--long', help='work_dir of shapes_t2i_adapter_long')
    parser.add_argument('--num-samples', type=int, default=200, help='captions (default: %(default)s)')
    parser.add_argument('--seeds', type=int, default=3, help='images a caption (default: %(default)s)')
    args = parser.parse_args()
    options = [f'test_dataloader.dataset.length={args.num_samples}', f'test_cfg.seeds={args.seeds}']
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows += vae_rows(args.num_samples)
        rows += base_rows(folder, options)
        for name, checkpoint, aim in (('T2I-Adapter', args.adapter, 0.75), ('T2I-Adapter, long', args.long, 0.90)):
            if checkpoint:
                rows += adapter_rows(name, checkpoint, aim, folder, options)
    print('| what | measured | 95 % interval | aim |\n|---|---|---|---|')
    for what, value, spread, target in rows:
        print(f'| {what} | {value:.3f} | {spread} | {"" if target is None else target} |')


if __name__ == '__main__':
    sys.exit(main())
