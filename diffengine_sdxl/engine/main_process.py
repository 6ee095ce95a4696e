"""Work of the main process whose result, or error, every process needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from mmengine.dist import broadcast_object_list, is_main_process

from diffengine_sdxl.errors import UserError

T = TypeVar('T')


def on_main_process(function: Callable[[], T]) -> T:
    """Call `function` in the main process only; return its result in every process.

    Raises:
        UserError: raised by `function`; then every process raises it.
    """
    outcome: list[Any] = [None, None]
    if is_main_process():
        try:
            outcome[0] = function()
        except UserError as error:
            outcome[1] = str(error)
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]
