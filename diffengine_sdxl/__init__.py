"""diffengine_sdxl: an experiment engine for SDXL adapters.

A config names a base and a set of adapters; one runner trains it, evaluates it and makes images with it,
and all three call the same denoiser.
"""

__version__ = '0.1.0'
