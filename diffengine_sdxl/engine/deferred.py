"""Numbers of a training step that the host reads later, so that it need not wait for the device in every step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import islice

import torch
from torch import Tensor


class DeferredValues:
    """Scalars on their way from the device, one record for each step, in the order of the steps."""

    def __init__(self) -> None:
        self._records: deque[tuple[int, list[list[str]], Callable[[], list[float]]]] = deque()

    def push(self, step: int, *groups: Mapping[str, Tensor]) -> None:
        """Begin to copy the scalars of `step`, together: nothing waits for them.

        Args:
            groups: names -> tensors of one number each, all on one device; at least one in all.
        """
        values = torch.stack([value.detach().double().reshape(()) for group in groups for value in group.values()])
        self._records.append((step, [list(group) for group in groups], _reader(values)))

    def pop(self, keep: int = 0) -> Iterator[tuple[int, list[dict[str, float]]]]:
        """Remove and yield the records but for the newest `keep`, oldest first, each when its values are here.

        Yields:
            The step, and its groups.
        """
        while len(self._records) > keep:
            step, names, read = self._records.popleft()
            values = iter(read())
            yield step, [dict(zip(group, islice(values, len(group)), strict=True)) for group in names]


def _reader(values: Tensor) -> Callable[[], list[float]]:
    """Begin to copy `values`; return the function that waits for the copy alone, not for what follows it."""
    if values.device.type != 'cuda':
        return values.tolist
    # Into pinned memory, as `non_blocking` makes it.
    on_host, copied = values.to('cpu', non_blocking=True), torch.cuda.Event()
    copied.record()

    def read() -> list[float]:
        copied.synchronize()
        return on_host.tolist()
    return read
