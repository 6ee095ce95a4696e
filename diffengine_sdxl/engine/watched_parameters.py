"""What is seen of the parameters that train in the first optimizer steps: which have gradients, which change."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffengine_sdxl.errors import listed

#: Entries of a tensor that are compared before and after a step; of a larger one every n-th, and the first of the
#: largest gradient.
NUM_COMPARED = 2**16


@dataclass
class WatchedParameters:
    """The parameters of one adapter, or of one part of the base, and what was seen of them.

    Attributes:
        names: of the parameters, in the same order.
        in_graph: whether each had a gradient, be it zero; reached: one that is not zero; changed: by a step. bool [n].
        rows: of the present micro-batch, those that leave something to learn, bool [B].
        alive: whether the present step counts: there are such rows, in the active range.
        num_steps: that counted. waited: all.
        noted: for each parameter with a gradient, the places and values that were compared last.
    """

    name: str
    names: list[str]
    parameters: list[nn.Parameter]
    rows: Tensor | None = None
    alive: bool = False
    num_steps: int = 0
    waited: int = 0
    noted: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.in_graph, self.reached, self.changed = (torch.zeros(len(self.names), dtype=torch.bool) for _ in range(3))

    @torch.no_grad()
    def before_step(self) -> str | None:
        """Note which have a gradient, after clipping, and the values where it is largest.

        Returns:
            What is wrong if values are not those that the last step left; else None.
        """
        moved = self._differing()
        with_grad = [i for i, p in enumerate(self.parameters) if p.grad is not None]
        self.noted = {}
        if not with_grad:
            return moved
        grads: list[Any] = [self.parameters[i].grad for i in with_grad]
        # One transfer from the device for all.
        reached = torch.stack([norm.double() for norm in torch._foreach_norm(grads, math.inf)]).cpu() > 0
        self.in_graph[with_grad] = True
        self.reached[with_grad] |= reached
        for i, grad, has in zip(with_grad, grads, reached.tolist(), strict=True):
            if has:
                at = torch.arange(0, grad.numel(), math.ceil(grad.numel() / NUM_COMPARED), device=grad.device)
                at[0] = grad.flatten().abs().argmax()
                self.noted[i] = at, self.parameters[i].flatten()[at]
        return moved

    @torch.no_grad()
    def after_step(self) -> None:
        """Note which parameters the step has changed, and the new values."""
        if self.noted:
            changed = torch.stack([(self.parameters[i].flatten()[at] != values).any()
                                   for i, (at, values) in self.noted.items()])
            self.changed[list(self.noted)] |= changed.cpu()
            self.noted = {i: (at, self.parameters[i].flatten()[at]) for i, (at, _) in self.noted.items()}

    def _differing(self) -> str | None:
        if not self.noted:
            return None
        same = torch.stack([(self.parameters[i].flatten()[at] == values).all()
                            for i, (at, values) in self.noted.items()]).tolist()
        moved = [self.names[i] for i, equal in zip(self.noted, same, strict=True) if not equal]
        return (f"{len(moved)} of {len(self.names)} tensors of '{self.name}' ({listed(moved)}) are not what the last "
                'step made of them: something sets them between the steps') if moved else None

    def missing(self) -> list[str]:
        """Return the parameters without any gradient; if at least half had no other than zero, those too.

        A few of zeros may be right: self-attention over one token, or what half precision rounds to zero.
        """
        zero = self.in_graph & ~self.reached
        missing = ~self.reached if 2 * int(zero.sum()) >= len(self.names) else ~self.in_graph
        return self._select(missing)

    def zeros(self) -> list[str]:
        """Return the parameters whose gradients were all zero."""
        return self._select(self.in_graph & ~self.reached)

    def unchanged(self) -> list[str]:
        """Return the parameters that had gradients and did not change."""
        return self._select(self.reached & ~self.changed)

    def _select(self, which: Tensor) -> list[str]:
        return [name for name, selected in zip(self.names, which.tolist(), strict=True) if selected]
