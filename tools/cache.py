"""Encode a config's training images once: python tools/cache.py CONFIG FOLDER; then train with type CachedLatents."""

import argparse
import sys
from pathlib import Path


def main() -> int:
    """Parse the options and encode."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='path of a config, or base name of an installed one')
    parser.add_argument('folder', type=Path, help='folder to write; an existing cache is replaced')
    parser.add_argument('--num-samples', type=int, help='number of samples; beyond the number of rows they repeat')
    parser.add_argument('--cfg-options', nargs='+', metavar='KEY=VALUE', help='override keys of the config')
    args = parser.parse_args()
    from diffengine_sdxl.errors import run_command
    return run_command('cache', args)


if __name__ == '__main__':
    sys.exit(main())
