"""`diffengine-sdxl infer`: make images of prompts and settings, each of which can be made again."""

from .command import run
from .run import OUT_OF_MEMORY

STOPPED = 'Stopped. Repeat the command to make the remaining images.'

__all__ = ['OUT_OF_MEMORY', 'STOPPED', 'run']
