"""Train a T2I-Adapter on the shapes base, measure it and show it, in work_dirs/demo. What `make demo` runs."""

import argparse
import shutil
import sys
from pathlib import Path

CONFIG = 'shapes_t2i_adapter'
SCALES = (0.25, 0.5, 1.0, 1.5)


def main() -> int:
    """Train, test, draw the contact sheet, name the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--work-dir', default='work_dirs/demo', help='folder, made anew (default: %(default)s)')
    parser.add_argument('--cfg-options', nargs='+', metavar='KEY=VALUE', help='override keys of the config')
    args = parser.parse_args()
    from diffengine_sdxl.engine import launch
    work_dir = Path(args.work_dir)
    if work_dir.exists() and not (work_dir / 'run.json').is_file():
        print(f"error: '{work_dir}' exists and is not a demo's folder; choose another --work-dir.", file=sys.stderr)
        return 1
    shutil.rmtree(work_dir, ignore_errors=True)
    options = ['test_cfg.seeds=1', *(args.cfg_options or ())]
    shared = {'config': CONFIG, 'work_dir': str(work_dir), 'launcher': 'none', 'cfg_options': options}
    code = launch.train(argparse.Namespace(**shared, resume=None))
    if code == 0:
        code = launch.test(argparse.Namespace(**shared, checkpoint=str(work_dir)))
    if code == 0:
        draw(work_dir, options)
    return code


def draw(work_dir: Path, options: list[str]) -> None:
    """The contact sheet of the last export, and where everything is."""
    import torch

    from diffengine_sdxl.datasets import Shapes, collate
    from diffengine_sdxl.engine import config
    from diffengine_sdxl.engine.scales import scale_sheet
    from diffengine_sdxl.registry import MODELS
    exported = max(work_dir.glob('step*/adapter'), key=lambda path: int(path.parent.name[4:]))
    cfg = config.resolve(config.load(CONFIG, [*options, f'model.adapters.adapter.weights={exported}']))
    model = MODELS.build({**cfg.model, 'objective': None}).eval()
    data = Shapes(length=6, split='test', seed=1, truth=False,
                  transforms=[{'type': 'ComputeTimeIds'}, {'type': 'PackInputs'}])
    batch = model.data_preprocessor(collate([data[i] for i in range(len(data))]))['inputs']
    batch.seed = torch.arange(len(batch))
    path = work_dir / 'contact_sheet.png'
    scale_sheet(model, batch, 'adapter', SCALES, 'A T2I-Adapter of outlines on the shapes base').save(path)
    print(f'The adapter: {exported} (loads in diffusers). Figures: {work_dir}/metrics.json\n'
          f'Pictures: {path}, {work_dir}/test/pictures.png, {work_dir}/curves.png')


if __name__ == '__main__':
    sys.exit(main())
