"""Encode a config's training images once: python tools/cache.py CONFIG FOLDER; then train with type CachedLatents."""

import sys

from diffengine_sdxl.commands.cli import main

if __name__ == '__main__':
    sys.exit(main('cache'))
