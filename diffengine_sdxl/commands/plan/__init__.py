"""`diffengine-sdxl plan`: memory and time of a training, counted before anything is loaded.

    counter.py      kernels, FLOP, bytes and memory of what runs on torch's meta device
    devices.py      GPUs by their sheets; this machine's device measured
    meta_model.py   the config's model without weights, and a batch for it
    step_counts.py  passes of a step by checkpointing, for any batch size
    estimate.py     memory and seconds of a setting; the fastest one that fits
    table.py        the page
"""

from .command import run

STOPPED = 'Stopped.'

__all__ = ['STOPPED', 'run']
