"""Write the report of a training or a test: python tools/report.py WORK_DIR."""

import sys

from diffengine_sdxl.commands.cli import main

if __name__ == '__main__':
    sys.exit(main('report'))
