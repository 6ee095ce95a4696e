"""Open what a config calls `source` with Hugging Face `datasets`, and say in one sentence why it can't be opened."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BUILDERS = {'.parquet': 'parquet', '.jsonl': 'json', '.json': 'json', '.csv': 'csv', '.arrow': 'arrow'}
HUB_ID = re.compile(r'[\w.-]+(/[\w.-]+)?')
PROBE_SECONDS = 10


def open_source(source: str, split: str = 'train', name: str | None = None, data_files: Any = None,
                cache_dir: str | None = None, revision: str | None = None, streaming: bool = False) -> Any:
    """The rows of `source`: a `datasets.Dataset`, or an `IterableDataset` when streaming.

    Args:
        source: a folder that `save_to_disk` wrote; a folder of images with `metadata.jsonl`, of parquet or jsonl;
            one such file; or a dataset id of the Hugging Face Hub. What exists here goes before the hub.
        split, name, data_files, cache_dir, revision: as `datasets.load_dataset` has them.

    Raises:
        ValueError: there is no such thing, it cannot be read or reached, or is empty.
    """
    path = Path(source).expanduser()
    options = dict(name=name, split=split, cache_dir=cache_dir, streaming=streaming)
    if path.is_file():
        if path.suffix.lower() not in BUILDERS:
            raise ValueError(f"'{source}' is a file of a kind that is not known ({', '.join(BUILDERS)} are).")
        # The key names the split that the file is: whatever the config asks for.
        files = {split.split('[')[0]: str(path.absolute())}
        return _load(source, BUILDERS[path.suffix.lower()], data_files=files, **options)
    if path.is_dir():
        if any((path / mark).is_file() for mark in ('state.json', 'dataset_dict.json')):
            return _saved(source, path, split, streaming)
        # The full path: a folder named 'json' would otherwise be taken for the builder of that name.
        return _load(source, str(path.absolute()), data_files=data_files, **options)
    if source in BUILDERS.values() or source in ('imagefolder', 'webdataset'):
        return _load(source, source, data_files=data_files, **options)
    if not HUB_ID.fullmatch(source) or source.startswith('.'):
        raise ValueError(f"source='{source}' is neither a folder or file here nor an id of the Hugging Face Hub "
                         "('user/name').")
    return _hub(source, data_files=data_files, revision=revision, **options)


def _load(source: str, builder: str, **options: Any) -> Any:
    import datasets
    try:
        return datasets.load_dataset(builder, **options)
    except datasets.data_files.EmptyDatasetError as error:
        raise ValueError(f"The data set '{source}' is empty: the folder holds no data files.") from error
    except StopIteration as error:  # what an empty jsonl ends in
        raise ValueError(f"The data set '{source}' is empty.") from error
    except Exception as error:  # builders raise their parsers' own
        raise ValueError(f"The data set '{source}' cannot be read: {_reason(error)}") from error


def _saved(source: str, path: Path, split: str, streaming: bool) -> Any:
    import datasets
    state = path / 'state.json'
    try:
        # `load_from_disk` fails on a table that was saved without rows.
        if state.is_file() and json.loads(state.read_text()).get('_data_files') == []:
            raise ValueError('it is empty')
        data = datasets.load_from_disk(str(path))
    except Exception as error:  # as in `_load`
        raise ValueError(f"The saved data set '{source}' cannot be read: {_reason(error)}") from error
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise ValueError(f"The data set '{source}' has no split '{split}'; it has {', '.join(data)}.")
        data = data[split]
    if streaming and len(data) == 0:
        raise ValueError(f"The data set '{source}' is empty.")
    return data.to_iterable_dataset() if streaming else data


def _hub(source: str, **options: Any) -> Any:
    import datasets
    import huggingface_hub as hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
    reason = 'offline mode is set (HF_HUB_OFFLINE)'
    offline = bool(hub.constants.HF_HUB_OFFLINE)
    if not offline:
        # One request with a time-out: load_dataset would try for half a minute before it gives up.
        try:
            hub.HfApi().dataset_info(source, revision=options['revision'], timeout=PROBE_SECONDS)
        except GatedRepoError as error:
            raise ValueError(f"The data set '{source}' asks for a consent on its page at the Hugging Face Hub, "
                             'and for `hf auth login` here.') from error
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise ValueError(
                f"source='{source}' is neither a folder here nor a data set of the Hugging Face Hub at revision "
                f"'{options['revision'] or 'main'}' (or a private one: `hf auth login`).") from error
        except Exception as error:  # whatever http client the hub's version uses
            offline, reason = True, _reason(error)
    try:
        with _offline(offline):
            return datasets.load_dataset(source, **options)
    except Exception as error:
        if offline:
            raise ValueError(
                f"source='{source}' is neither a folder here nor in the cache of `datasets`, and the Hugging Face Hub "
                f'cannot be reached: {reason}. Set source to a local copy.') from error
        raise ValueError(f"The data set '{source}' cannot be read: {_reason(error)}") from error


@contextmanager
def _offline(on: bool) -> Iterator[None]:
    """Inside, `datasets` looks into its cache only: it would retry every request otherwise."""
    import datasets
    from huggingface_hub import constants
    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    if on:
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return first[:300]
