"""Say what a training will need: python tools/plan.py CONFIG [--device NAME]."""

import sys

from diffengine_sdxl.commands.cli import main

if __name__ == '__main__':
    sys.exit(main('plan'))
