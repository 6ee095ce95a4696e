"""Train, test and show a T2I-Adapter on the shapes base, in work_dirs/demo (`make demo`)."""

import argparse
import shutil
import sys
from pathlib import Path

CONFIG = 'shapes_t2i_adapter'
SCALES = (0.25, 0.5, 1.0, 1.5)
MARK = '.demo'


def main() -> int:
    """Train, test, draw the contact sheet and print where the images are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--work-dir', default='work_dirs/demo',
                        help='folder; an earlier demo in it is removed (default: %(default)s)')
    parser.add_argument('--cfg-options', nargs='+', metavar='KEY=VALUE', help='override keys of the config')
    args = parser.parse_args()
    from diffengine_sdxl import config
    from diffengine_sdxl.errors import UserError, run_command
    work_dir, options = Path(args.work_dir), ['test_cfg.seeds=1', *(args.cfg_options or ())]
    shared = {'config': CONFIG, 'work_dir': str(work_dir), 'launcher': 'none', 'cfg_options': options}
    try:
        config.load(CONFIG, options)  # before an earlier demo is removed
        if work_dir.exists() and not (work_dir / MARK).is_file():
            raise UserError(f"'{work_dir}' exists and is not a demo's folder; choose another --work-dir.")
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    shutil.rmtree(work_dir, ignore_errors=True)
    work_dir.mkdir(parents=True)
    (work_dir / MARK).write_text('tools/demo.py may remove this folder.\n')
    code = (run_command('train', argparse.Namespace(**shared, resume=None))
            or run_command('test', argparse.Namespace(**shared, checkpoint=str(work_dir), compare=None))
            or run_command('scales', argparse.Namespace(**shared, adapter='adapter', scales=SCALES)))
    if code == 0:
        print(f'The adapter: {work_dir}/step*/adapter (loads in diffusers). Figures: {work_dir}/report.html\n'
              f'Images: {work_dir}/contact_sheet.png, {work_dir}/test/pictures.png, {work_dir}/curves.png')
    return code


if __name__ == '__main__':
    sys.exit(main())
