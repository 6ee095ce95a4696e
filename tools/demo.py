"""Train a T2I-Adapter on a tiny SDXL with drawn data, into work_dirs/demo. What `make demo` runs."""

import argparse
import shutil
import sys
from pathlib import Path


def main() -> int:
    """Write base and data, train, name the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--work-dir', default='work_dirs/demo', help='folder, made anew (default: %(default)s)')
    parser.add_argument('--cfg-options', nargs='+', metavar='KEY=VALUE', help='override keys of the config')
    args = parser.parse_args()
    from diffengine_sdxl import testing
    from diffengine_sdxl.engine import launch
    work_dir = Path(args.work_dir)
    if work_dir.exists() and not (work_dir / 'run.json').is_file():
        print(f"error: '{work_dir}' exists and is not a demo's folder; choose another --work-dir.", file=sys.stderr)
        return 1
    shutil.rmtree(work_dir, ignore_errors=True)
    base, data = work_dir / 'inputs' / 'base', work_dir / 'inputs' / 'data'
    testing.write_tiny_sdxl(base)
    testing.write_circles(data, 64)
    options = [f'model.pretrained={base}', f'train_dataloader.dataset.source={data}', *(args.cfg_options or ())]
    code = launch.train(argparse.Namespace(config='tiny_t2i_adapter', work_dir=str(work_dir), resume=None,
                                           launcher='none', cfg_options=options))
    pictures = sorted((work_dir / 'samples').glob('*.png'), key=lambda p: p.stat().st_mtime)
    if code == 0 and pictures:
        print(f'The adapter: {work_dir}/step*/adapter (loads in diffusers). Curves: {work_dir}/curves.png\n'
              f'The picture: {pictures[-1]}')
    return code


if __name__ == '__main__':
    sys.exit(main())
