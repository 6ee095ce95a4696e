"""Where the rows of a data set come from: open `source` with Hugging Face `datasets`.

`open_source` tells a hub id, a saved folder, a folder of images or tables, and a single file apart. `HFDataset` reads
what it returns by number, `HFStream` as a stream.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffengine_sdxl.datasets.image_files import remote_errors
from diffengine_sdxl.errors import UserError, first_line, is_out_of_memory
from diffengine_sdxl.loading.hub import hub_errors

BUILDERS = {'.parquet': 'parquet', '.jsonl': 'json', '.json': 'json', '.csv': 'csv', '.arrow': 'arrow'}
HUB_ID = re.compile(r'[\w.-]+(/[\w.-]+)?')
PROBE_SECONDS = 10


def open_source(source: str, split: str = 'train', name: str | None = None, data_files: Any = None,
                cache_dir: str | None = None, revision: str | None = None, streaming: bool = False) -> Any:
    """Return the rows of `source`: a `datasets.Dataset`, or an `IterableDataset` if streaming.

    Args:
        source: a folder written by `save_to_disk`; a folder of images with `metadata.jsonl`, of parquet or of jsonl;
            one such file; or a dataset id of the Hugging Face Hub. Local paths take precedence.
        split, name, data_files, cache_dir, revision: as in `datasets.load_dataset`.

    Raises:
        UserError: it does not exist, is empty, or cannot be read or reached.
    """
    import datasets
    path = Path(os.path.expanduser(source))
    options = dict(name=name, split=split, cache_dir=cache_dir, streaming=streaming)
    if path.is_file():
        if path.suffix.lower() not in BUILDERS:
            raise UserError(f"'{source}' is a file of an unknown type; use {', '.join(BUILDERS)}.")
        # The key makes the file the split that the config requests, whatever it is.
        builder, data_files = BUILDERS[path.suffix.lower()], {split.split('[')[0]: str(path.absolute())}
    elif path.is_dir():
        if any((path / file).is_file() for file in ('state.json', 'dataset_dict.json')):
            return _load_saved(source, path, split, streaming)
        # The full path: a folder named 'json' would otherwise be taken for the builder of that name.
        builder = str(path.absolute())
    elif source in BUILDERS.values() or source in ('imagefolder', 'webdataset'):
        builder = source
    elif not HUB_ID.fullmatch(source) or source.startswith('.'):
        raise UserError(f"source='{source}' is neither a local folder or file nor an id of the Hugging Face Hub "
                        "('user/name').")
    else:
        return _load_from_hub(source, data_files=data_files, revision=revision, **options)
    with reading(source):
        return datasets.load_dataset(builder, data_files=data_files, **options)


@contextmanager
def reading(source: str) -> Iterator[None]:
    """Re-raise what `datasets` raises for unreadable data as UserError."""
    import datasets
    import pyarrow
    try:
        yield
    except UserError:
        raise
    except (datasets.data_files.EmptyDatasetError, StopIteration) as error:  # StopIteration: an empty jsonl
        raise UserError(f"The data set '{source}' is empty.") from error
    except (datasets.exceptions.DatasetsError, pyarrow.ArrowException, *remote_errors(), TypeError,
            AttributeError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"The data set '{source}' cannot be read: {_root_cause(error)}") from error


def _load_saved(source: str, path: Path, split: str, streaming: bool) -> Any:
    """Load what `save_to_disk` wrote."""
    import datasets
    state = path / 'state.json'
    with reading(source):
        # `load_from_disk` fails on a table without rows.
        if state.is_file() and json.loads(state.read_text(encoding='utf-8')).get('_data_files') == []:
            raise UserError(f"The data set '{source}' is empty.")
        data = datasets.load_from_disk(str(path))
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise UserError(f"The data set '{source}' has no split '{split}'; it has {', '.join(data)}.")
        data = data[split]
    return data.to_iterable_dataset() if streaming else data


def _load_from_hub(source: str, **options: Any) -> Any:
    import datasets
    import huggingface_hub as hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
    offline, reason = bool(hub.constants.HF_HUB_OFFLINE), 'offline mode is set (HF_HUB_OFFLINE)'
    if not offline:
        # One request with a timeout: load_dataset would retry for half a minute.
        try:
            hub.HfApi().dataset_info(source, revision=options['revision'], timeout=PROBE_SECONDS)
        except GatedRepoError as error:
            raise UserError(f"The data set '{source}' is gated: accept its terms on its page at the Hugging Face Hub, "
                            'and log in here with `hf auth login`.') from error
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise UserError(
                f"source='{source}' is neither a local folder nor a data set of the Hugging Face Hub at revision "
                f"'{options['revision'] or 'main'}'; for a private one log in with `hf auth login`.") from error
        except hub_errors() as error:
            offline, reason = True, _root_cause(error)
    try:
        with _offline(offline), reading(source):
            return datasets.load_dataset(source, **options)
    except UserError as error:
        if not offline:
            raise
        raise UserError(
            f"source='{source}' is neither a local folder nor in the cache of `datasets`, and the Hugging Face Hub "
            f'cannot be reached: {reason}. Set source to a local copy.') from error


@contextmanager
def _offline(enabled: bool) -> Iterator[None]:
    """If `enabled`, let `datasets` read its cache only; it would retry every request otherwise."""
    import datasets
    from huggingface_hub import constants
    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    if enabled:
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)[:300]
