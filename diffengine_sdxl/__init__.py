"""diffengine_sdxl: an experiment engine for SDXL adapters.

A config names a base and a set of adapters; one runner trains it, evaluates it and makes images with it,
and all three call the same denoiser.
"""

__version__ = '0.1.0'


def __getattr__(name: str) -> object:
    """`SDXLInferencer`, imported when it is first asked for: it brings all of the engine."""
    if name == 'SDXLInferencer':
        from diffengine_sdxl.engine.inference.inferencer import SDXLInferencer
        return SDXLInferencer
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
