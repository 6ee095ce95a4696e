"""Train what a config describes: mim train diffengine_sdxl CONFIG, or python tools/train.py CONFIG."""

import argparse
import os
import sys


def main() -> int:
    """Parse the options and train. Import heavy modules afterwards, so that -h answers at once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='path of a config, or base name of an installed one')
    parser.add_argument('--work-dir', help='folder for checkpoints, logs and images (default: work_dirs/<config>)')
    parser.add_argument('--resume', nargs='?', const='auto',
                        help='continue from the last checkpoint in the work dir, or from the given one')
    parser.add_argument('--cfg-options', nargs='+', metavar='KEY=VALUE',
                        help='override keys of the config, e.g. model.adapters.adapter.scale=0.5')
    parser.add_argument('--launcher', choices=('none', 'pytorch', 'slurm', 'mpi'), default='none',
                        help='what starts the processes')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    from diffengine_sdxl.errors import run_command
    return run_command('train', args)


if __name__ == '__main__':
    sys.exit(main())
