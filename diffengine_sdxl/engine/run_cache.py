"""A run's cache: the store that its config names, and what of its model and data the store holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmengine.logging import print_log

from diffengine_sdxl.cache.plan import CachePlan
from diffengine_sdxl.cache.samples import keep_samples
from diffengine_sdxl.cache.store import Store
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.models.cache_plan import cache_plan
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.structures import Lookups


def open_store(config: Mapping[str, Any]) -> Store | None:
    """Open the store that the `cache` of a resolved config names; None if it names none.

    Raises:
        UserError: the setting is wrong, or the folder cannot be a cache.
    """
    setting = config.get('cache')
    if setting is None:
        return None
    settings = {'folder': setting} if isinstance(setting, str) else dict(setting)
    folder = settings.pop('folder', None)
    if not isinstance(folder, str) or not folder:
        raise UserError(f"cache={setting!r} must name a folder: cache='work_dirs/cache', or "
                        "cache=dict(folder='work_dirs/cache', read_only=True).")
    return Store(folder, **settings)


class RunCache:
    """What a training looks up and keeps.

    Args:
        store: its store.
        model: built with `lazy_encoders`, on its device.
    """

    def __init__(self, store: Store, model: SDXL) -> None:
        self.store, self.model = store, model
        self.plan: CachePlan = cache_plan(model, store)
        print_log(store.describe(), logger='current')

    def attach(self, dataset: Any, trains: bool = False) -> None:
        """Let a data set look up its samples, before the workers of its loader start.

        Args:
            trains: it is the one that the run trains on.
        """
        if hasattr(dataset, 'attach_cache'):
            dataset.attach_cache(self.plan)
        elif trains:
            print_log(f'{type(dataset).__name__} has no attach_cache, so of its samples only the captions are '
                      'cached.', logger='current')

    def keep_samples(self, collated: Any) -> None:
        """Keep what the workers found to be new in a collated batch, before it goes to the device."""
        if not isinstance(collated, dict):
            return
        if 'lookups' not in collated and 'text_embeds' not in collated:  # of a data set that cannot look up anything
            collated['lookups'] = self._look_up_text(collated)
        keep_samples(collated, self.store)

    def _look_up_text(self, collated: Mapping[str, Any]) -> dict[str, Lookups]:
        if self.plan.text is None or 'text' not in collated:
            return {}
        first, second = list(collated['text']), list(collated.get('text_2') or collated['text'])
        dropped = (collated.get('drop') or {}).get('text')
        if dropped is not None and self.plan.empty_when_dropped:
            first, second = (['' if drop else text for drop, text in zip(dropped.tolist(), texts, strict=True)]
                             for texts in (first, second))
        keys = [self.plan.text_key(*pair) for pair in zip(first, second, strict=True)]
        return {'text': Lookups(keys, [self.store.get(key) for key in keys])}

    def close(self) -> None:
        """Write what is pending, and say how much was found."""
        self.model.store = None
        rates = self.store.hit_rates()
        self.store.close()
        if rates:
            print_log(f'Found in the cache: {rates}.', logger='current')
