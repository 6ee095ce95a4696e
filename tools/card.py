"""Write an export's model card again, with a test's results: python tools/card.py W/step<N>."""

import sys

from diffengine_sdxl.commands.cli import main

if __name__ == '__main__':
    sys.exit(main('card'))
