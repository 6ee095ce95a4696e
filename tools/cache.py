"""Fill the cache of a config ahead of its training: python tools/cache.py CONFIG [--folder F]."""

import sys

from diffengine_sdxl.commands.cli import main

if __name__ == '__main__':
    sys.exit(main('cache'))
