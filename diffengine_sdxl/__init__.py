"""diffengine_sdxl: an experiment engine for SDXL adapters.

A config names a base and a set of adapters. Training, evaluation and inference call the same denoiser.
"""

__version__ = '0.1.0'


def __getattr__(name: str) -> object:
    """Import `SDXLInferencer` on first use: it imports the whole engine."""
    if name == 'SDXLInferencer':
        from diffengine_sdxl.inference.inferencer import SDXLInferencer
        return SDXLInferencer
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
