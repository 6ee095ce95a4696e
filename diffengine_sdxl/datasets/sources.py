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

from diffengine_sdxl.datasets import archives
from diffengine_sdxl.datasets.files import list_folder
from diffengine_sdxl.datasets.image_files import remote_errors
from diffengine_sdxl.datasets.image_rows import json_object
from diffengine_sdxl.datasets.local import BUILDERS, open_folder, open_tables
from diffengine_sdxl.errors import UserError, first_line, is_out_of_memory
from diffengine_sdxl.loading.hub import hub_errors

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
    path = Path(os.path.expanduser(source)).absolute()
    with reading(source, path):
        if path.is_file():
            suffix = next((suffix for suffix in reversed(path.suffixes) if suffix.lower() in BUILDERS), '').lower()
            if not suffix or suffix == '.tar':
                raise UserError(f"'{source}' is a file of an unknown type; use {', '.join(BUILDERS)}.")
            # The key makes the file the split that the config requests, whatever it is.
            return open_tables(suffix, {split.partition('[')[0]: [path]}, split, cache_dir, streaming)
        if path.is_dir():
            if any((path / file).is_file() for file in ('state.json', 'dataset_dict.json')):
                return _load_saved(source, path, split, streaming)
            return open_folder(source, path, split, name, data_files, cache_dir, streaming)
        if os.path.lexists(path):
            raise UserError(f"source='{source}' is neither a folder nor a regular file.")
    options = dict(name=name, data_files=data_files, split=split, cache_dir=cache_dir, streaming=streaming)
    if source in ('imagefolder', 'webdataset', *(builder for builder, _ in BUILDERS.values())):
        return _load_builder(source, **options)
    if not HUB_ID.fullmatch(source) or source.startswith('.'):
        raise UserError(f"source='{source}' is neither a local folder or file nor an id of the Hugging Face Hub "
                        "('user/name').")
    return _load_from_hub(source, revision=revision, **options)


def _load_builder(source: str, split: str, streaming: bool, **options: Any) -> Any:
    """Load files that the config names, by a builder of `datasets`."""
    import datasets
    with reading(source):
        builder = datasets.load_dataset_builder(source, **options)
        for files in (builder.config.data_files or {}).values():
            for file in files:
                if os.path.isfile(file):
                    archives.check_unpacked(file)
        if streaming:
            return builder.as_streaming_dataset(split=split)
        builder.download_and_prepare()
        return builder.as_dataset(split=split)


@contextmanager
def reading(source: str, path: Path | None = None) -> Iterator[None]:
    """Re-raise what `datasets` raises for unreadable data as UserError; `path` is a local source's."""
    import datasets
    import pyarrow
    try:
        yield
    except UserError:
        raise
    except (datasets.data_files.EmptyDatasetError, StopIteration) as error:  # StopIteration: an empty jsonl
        raise UserError(f"The data set '{source}' is empty.") from error
    except (datasets.exceptions.DatasetsError, pyarrow.ArrowException, *remote_errors(), TypeError, AttributeError,
            ArithmeticError) as error:
        if is_out_of_memory(error):
            raise
        path = Path(os.path.expanduser(source)).absolute() if path is None else path
        reason = _find_fault(path) or _root_cause(error)
        raise UserError(f"The data set '{source}' cannot be read: {reason}") from error


def _find_fault(path: Path) -> str:
    """Return which table of a local source is at fault, and where; '' if that is not seen."""
    tables = [path] if os.path.isfile(path) else [
        p for p in list_folder(path).files if p.suffix.lower() in BUILDERS] if os.path.isdir(path) else []
    first: tuple[Path, list[str]] | None = None
    for table in tables:
        try:
            columns = _columns(table)
        except UserError as error:
            return str(error)
        if columns and first and {*columns} != {*first[1]}:
            return (f"'{table}' has the columns {', '.join(map(repr, columns))}, and '{first[0]}' "
                    f"{', '.join(map(repr, first[1]))}. All files must have the same, of the same types.")
        first = first or (columns and (table, columns)) or None
    return ''


def _columns(table: Path) -> list[str]:
    """Return the columns of a table; of JSON lines after reading all of them.

    Raises:
        UserError: it is damaged.
    """
    import pyarrow
    import pyarrow.parquet
    try:
        if table.suffix.lower() == '.parquet':
            return list(pyarrow.parquet.read_schema(table).names)
        if table.suffix.lower() != '.jsonl':
            return []
        columns: dict[str, None] = {}
        with table.open('rb') as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    text = line.decode('utf-8-sig' if number == 1 else 'utf-8')
                    columns.update(dict.fromkeys(json_object(text, f"'{table}', line {number}")))
        return list(columns)
    except UnicodeDecodeError as error:
        raise UserError(f"'{table}', line {number} is no UTF-8: {error}.") from error
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"'{table}' is damaged or cut off: {first_line(error)[:300]}") from error


def _load_saved(source: str, path: Path, split: str, streaming: bool) -> Any:
    """Load what `save_to_disk` wrote."""
    import datasets
    state = path / 'state.json'
    with reading(source):
        # `load_from_disk` fails on a table without rows.
        if state.is_file() and json.loads(state.read_text(encoding='utf-8')).get('_data_files') == []:
            raise UserError(f"The data set '{source}' is empty.")
        _check_saved(path)
        data = datasets.load_from_disk(str(path))
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise UserError(f"The data set '{source}' has no split '{split}'; it has {', '.join(data)}.")
        data = data[split]
    return data.to_iterable_dataset() if streaming else data


def _check_saved(path: Path) -> None:
    """Check that a saved data set names no file or folder outside of itself.

    Raises:
        UserError: it does.
    """
    splits = path / 'dataset_dict.json'
    names = json.loads(splits.read_text(encoding='utf-8')).get('splits', []) if splits.is_file() else []
    for folder in [path, *(path / str(name) for name in names)]:
        state = folder / 'state.json'
        content = json.loads(state.read_text(encoding='utf-8')) if state.is_file() else {}
        names = [*names, *(entry['filename'] for key in ('_data_files', '_indices_data_files')
                           for entry in content.get(key) or ())]
    for name in names:
        if str(name) in ('..', '.', '') or '/' in str(name):
            raise UserError(f"The data set '{path}' names '{name}', which is not a file in it.")


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
