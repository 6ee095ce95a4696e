"""Test a checkpoint: mim test diffengine_sdxl CONFIG --checkpoint X, or python tools/test.py CONFIG X."""

import argparse
import os
import sys


def main() -> int:
    """Parse the options and test. Import heavy modules afterwards, so that -h answers at once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='path of a config, or base name of an installed one')
    parser.add_argument('checkpoint', help='a step<N>.pth; a work dir (its latest); an exported step<N>/ or '
                                           "adapter's folder; 'weights' for those that the config names; or 'none' for "
                                           'the base without adapters')
    parser.add_argument('--work-dir', help='folder for metrics.json, images and logs (default: work_dirs/<config>)')
    parser.add_argument('--cfg-options', nargs='+', metavar='KEY=VALUE',
                        help='override keys of the config, e.g. test_cfg.seeds=4')
    parser.add_argument('--launcher', choices=('none', 'pytorch', 'slurm', 'mpi'), default='none',
                        help='what starts the processes')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    from diffengine_sdxl.errors import run_command
    return run_command('test', args)


if __name__ == '__main__':
    sys.exit(main())
