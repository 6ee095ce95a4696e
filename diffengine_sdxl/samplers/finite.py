"""Who made latents not finite, and when: told without waiting for the device in every step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Watch:
    """Notes for each step whether its parts are finite, on their device; reads the notes once, at the end."""

    def __init__(self) -> None:
        self.notes: list[tuple[int, Any, Any, Tensor]] = []
        self.step: tuple[int, Any] = (0, None)

    def begin(self, index: int, t: Any) -> None:
        """What comes now belongs to step `index` (from 0) at timestep `t`."""
        self.step = index, t

    def __call__(self, who: Any, part: Tensor) -> None:
        """Note a part of the step."""
        # A sum is finite if all its terms are and don't overflow; what does overflow is worth a look, too.
        self.notes.append((*self.step, who, part.sum()))

    def check(self, num_steps: int) -> None:
        """Call at the end.

        Raises:
            ValueError: the first part that was not finite: the step, the timestep, and whose it was.
        """
        if not self.notes or bool(torch.isfinite(torch.stack([total.float() for *_, total in self.notes])).all()):
            return
        index, t, who, _ = next(note for note in self.notes if not bool(torch.isfinite(note[-1])))
        raise ValueError(f'The latents are not finite from step {index + 1} of {num_steps} on (timestep {float(t):g}); '
                         f'the first that was not is what {who} gave. A guidance scale that is too large, weights that '
                         'overflow in fp16, or a solver that does not go with its settings do this.')
