"""Encode a config's training images once: python tools/cache.py CONFIG FOLDER; then train with type CachedLatents."""

import argparse
import sys
from pathlib import Path


def main() -> int:
    """Parse, encode, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='path of a config, or base name of an installed one')
    parser.add_argument('folder', type=Path, help='where to; a cache that is there already is replaced')
    parser.add_argument('--num-samples', type=int, help='of the first rows; more than there are passes them again')
    parser.add_argument('--cfg-options', nargs='+', metavar='KEY=VALUE', help='override keys of the config')
    args = parser.parse_args()
    from diffengine_sdxl.engine import launch
    return launch.cache(args)


if __name__ == '__main__':
    sys.exit(main())
