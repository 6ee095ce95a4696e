"""The attention of the UNet: which kernel computes it. The only file that touches attention processors."""

from typing import Any

BACKENDS = ('sdpa', 'xformers')


def set_backend(unet: Any, backend: str) -> None:
    """Let every attention of `unet` run on torch's scaled dot product ('sdpa') or on 'xformers'.

    Raises:
        ValueError: no such backend, or xformers is not installed here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention='{backend}' is not known; choose one of {', '.join(BACKENDS)}.")
    if backend == 'xformers':
        try:
            unet.enable_xformers_memory_efficient_attention()
        except (ImportError, ModuleNotFoundError, ValueError) as error:
            raise ValueError("attention='xformers' needs the package xformers and a GPU that it supports; install "
                             f"it (pip install xformers) or set attention='sdpa'. It said: {error}") from error
