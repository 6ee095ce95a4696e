"""Detect NaN and Inf in the sampling loop with one device sync per run."""

from __future__ import annotations

import torch
from torch import Tensor

from diffengine_sdxl.errors import UserError


class NonFiniteDetector:
    """Record on the device whether each tensor of each step is finite; read the records once, at the end."""

    def __init__(self) -> None:
        self.records: list[tuple[int, Tensor, object, Tensor]] = []

    def record(self, index: int, t: Tensor, source: object, tensor: Tensor) -> None:
        """Record what `source` computed in step `index` (from 0) at timestep `t`."""
        # A sum is finite if all its terms are and it does not overflow; an overflow is worth reporting, too.
        self.records.append((index, t, source, tensor.sum()))

    def check(self, num_steps: int) -> None:
        """Raise if a recorded tensor was not finite.

        Raises:
            UserError: names the first one's step, timestep and source.
        """
        if not self.records or bool(torch.isfinite(torch.stack([total.float() for *_, total in self.records])).all()):
            return
        index, t, source, _ = next(record for record in self.records if not bool(torch.isfinite(record[-1])))
        raise UserError(f'The latents are not finite from step {index + 1} of {num_steps} on (timestep {float(t):g}); '
                        f'the first such value is the output of {source}. Lower the guidance scale, avoid fp16, or '
                        'change the scheduler settings.')
