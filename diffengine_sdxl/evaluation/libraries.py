"""Libraries of metrics whose import needs a check first."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from diffengine_sdxl.errors import UserError, first_line


def torchmetrics(module: str) -> Any:
    """Import `torchmetrics.<module>`, such as 'functional.image.ssim'; the first time takes seconds.

    Raises:
        UserError: torch-fidelity is installed and torchvision is not: `import torchmetrics` fails there.
    """
    if find_spec('torch_fidelity') and not find_spec('torchvision'):
        raise UserError('torch-fidelity is installed without torchvision, and torchmetrics cannot be imported there. '
                        'Nothing here needs torch-fidelity: pip uninstall torch-fidelity.')
    return import_module(f'torchmetrics.{module}')


def torchvision(owner: str) -> Any:
    """Import torchvision, which `owner` needs.

    Raises:
        UserError: it is not installed, or is not of this torch's build.
    """
    if not find_spec('torchvision'):
        raise UserError(f"{owner} needs torchvision, of the same build as this torch: pip install "
                        "'diffengine_sdxl[metrics]'. Metrics over networks of transformers need none: DINO, CLIPImage, "
                        'KID, CMMD.')
    try:
        return import_module('torchvision')
    except (ImportError, RuntimeError, OSError) as error:
        import torch
        raise UserError(f'{owner} needs torchvision, and the installed one cannot be imported beside torch '
                        f'{torch.__version__} ({first_line(error)[:150]}). Install the torchvision that was built for '
                        'this torch, or uninstall it and leave the metric out.') from error
