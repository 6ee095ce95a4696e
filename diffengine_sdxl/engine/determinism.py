"""`randomness.deterministic`: kernels that give equal bits every time, or an error that names the one that cannot."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from diffengine_sdxl.errors import UserError

#: In the message of torch's RuntimeError, after the name of the kernel.
MARK = ' does not have a deterministic implementation'


def enable() -> None:
    """Allow deterministic kernels only, for the rest of the process.

    Flash and memory-efficient attention have a deterministic backward pass, which torch takes in this mode, but not
    where it is only to warn; cuDNN's attention has none.
    """
    # Read when cuBLAS starts. Its other workspaces may be shared by streams in an order that changes.
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    torch.use_deterministic_algorithms(True, warn_only=False)
    # On by default in this mode, for programs that read what they never wrote; it costs a write of each new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.backends.cuda.enable_cudnn_sdp(False)


@contextmanager
def named_kernels() -> Iterator[None]:
    """Turn torch's error of a kernel that is not deterministic into a sentence.

    Raises:
        UserError: such a kernel was to run; its name.
    """
    try:
        yield
    except RuntimeError as error:
        kernel, mark, _ = str(error).partition(MARK)
        if not mark:
            raise
        raise UserError(f"randomness.deterministic=True: torch's kernel '{kernel.split()[-1]}' gives other last bits "
                        'every time, and there is no other for it. Leave out the part of the config that needs it (the '
                        'traceback names it), or set randomness.deterministic=False.') from error
