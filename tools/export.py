"""Export one adapter for other tools, and verify it: python tools/export.py CONFIG OUT --checkpoint X."""

import sys

from diffengine_sdxl.commands.cli import main

if __name__ == '__main__':
    sys.exit(main('export'))
