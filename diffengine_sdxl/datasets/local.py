"""A local folder as rows: which of its files are rows, of which split and kind.

`datasets` itself would guess splits from file names, take a folder's name for a pattern, and read what a README.md
names anywhere on the machine. So the files are chosen here: all of the commonest kind, in the split that a folder's
name says, or that README.md says within the folder.
"""

from __future__ import annotations

import fnmatch
import importlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from diffengine_sdxl.datasets import archives, image_rows
from diffengine_sdxl.datasets.files import Listing, image_suffixes, list_folder, read_regular
from diffengine_sdxl.errors import UserError, did_you_mean

#: Suffix of a table -> module and class of `datasets` that read it.
BUILDERS = {'.parquet': ('parquet', 'Parquet'), '.jsonl': ('json', 'Json'), '.json': ('json', 'Json'),
            '.csv': ('csv', 'Csv'), '.arrow': ('arrow', 'Arrow'), '.tar': ('webdataset', 'WebDataset')}
COMPRESSED = ('.gz', '.bz2', '.xz', '.zst', '.lz4')
SPLITS = {'train': 'train', 'training': 'train', 'validation': 'validation', 'valid': 'validation', 'val': 'validation',
          'dev': 'validation', 'test': 'test', 'testing': 'test', 'eval': 'test', 'evaluation': 'test'}
#: Of a table's name: 'test.csv', 'rows_test.csv', 'test-00000-of-00002.parquet'.
SPLIT_NAME = re.compile(rf'(?:.*[-_.])?({"|".join(SPLITS)})(?:[-_.].*)?', re.IGNORECASE)
SHARD_NAME = re.compile(r'(\w+)-\d{5}-of-\d{5}')
#: Lists and objects within one another in a line of JSON; brackets in texts count too.
MAX_NESTING = 5000
Groups = dict[str, list[Path]]


def open_folder(source: str, folder: Path, split: str, name: str | None = None, data_files: Any = None,
                cache_dir: str | None = None, streaming: bool = False) -> Any:
    """Return the rows of a folder of images, tables, zip archives of images, or tars of WebDataset.

    Args:
        source: how errors name it.
        folder: absolute.
        split: of `datasets`, such as 'train', 'train[:100]' or 'train+test'.
        name: one of the configs of the folder's README.md.
        data_files: patterns of files in the folder, or split -> patterns, in place of README.md and folder names.
        cache_dir, streaming: as in `open_source`.

    Raises:
        UserError: it holds no rows, or not that split; a file is damaged, or README.md leads out of the folder.
    """
    listing = list_folder(folder)
    chosen = data_files or _readme_patterns(source, folder, name)
    if chosen is not None:
        groups = _match(source, listing, chosen, 'data_files' if data_files else 'its README.md')
        files = sorted({path for paths in groups.values() for path in paths})
    else:
        groups, files = {}, listing.files
    kind = _kind(files)
    if kind is None:
        listing.pass_over_rest(())
        raise UserError(f"The data set '{source}' is empty: no images, tables or archives that are read"
                        f'{listing.reasons()}.')
    groups = groups or _by_name(listing, files, kind)
    groups = {_requested(split, group): paths for group, paths in groups.items()}
    wanted = {part.partition('[')[0].strip() for part in split.split('+')}
    wanted = {*groups} if wanted == {'all'} else wanted
    if missing := sorted(wanted - groups.keys()):
        raise UserError(f"The data set '{source}' has no split '{missing[0]}'; it has {', '.join(sorted(groups))}."
                        f'{did_you_mean(missing[0], groups)}')
    listing.pass_over('in other splits', (p for key, paths in groups.items() if key not in wanted for p in paths))
    groups = {key: paths for key, paths in groups.items() if key in wanted}
    if kind in ('images', '.zip'):
        data = _image_table(listing, groups, kind, split)
        return data.to_iterable_dataset() if streaming else data
    used = {path for paths in groups.values() for path in paths if _suffix(path) == kind}
    _pass_over(listing, used)
    listing.log(len(used), f'{kind} files of rows')
    return open_tables(kind, {key: [p for p in paths if p in used] for key, paths in groups.items()}, split, cache_dir,
                       streaming)


def open_tables(kind: str, groups: Mapping[str, Sequence[Path]], split: str, cache_dir: str | None,
                streaming: bool) -> Any:
    """Return the rows of local tables, by the builder of `datasets` for their suffix `kind`.

    Raises:
        UserError: a compressed one unpacks to more than the limits allow.
    """
    import datasets
    from datasets.data_files import DataFilesDict, DataFilesList
    for paths in groups.values():
        for path in paths:
            if '::' in str(path):
                raise UserError(f"'{path}': `datasets` takes '::' in a path for an archive. Rename it.")
            archives.check_unpacked(path)
            if path.suffix.lower() in ('.jsonl', '.json'):
                _check_nesting(path)
    name, builder_class = BUILDERS[kind]
    # Not by `load_dataset`, which takes paths for patterns: '[' in a name would be one. The size and the time tell its
    # cache whether a file changed.
    files = DataFilesDict({key: DataFilesList([str(path) for path in paths], [
        (str(path), str(path.stat().st_mtime_ns), str(path.stat().st_size)) for path in paths])
        for key, paths in groups.items()})
    module = importlib.import_module(f'datasets.packaged_modules.{name}.{name}')
    builder = getattr(module, builder_class)(cache_dir=cache_dir, data_files=files, hash=datasets.__version__)
    if streaming:
        return builder.as_streaming_dataset(split=split)
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


def _check_nesting(path: Path) -> None:
    """Check that a line of JSON is not nested so deep that Arrow's parser would crash the process.

    Raises:
        UserError: it is.
    """
    depth = 0
    with path.open('rb') as file:
        while (block := np.frombuffer(file.read(2**22), np.uint8)).size:
            steps = np.isin(block, (ord('['), ord('{'))).astype(np.int32) - np.isin(block, (ord(']'), ord('}')))
            depths = depth + np.cumsum(steps)
            # Each line is a value of its own.
            ends = np.where(block == ord('\n'), np.arange(1, len(block) + 1), 0)
            starts = np.maximum.accumulate(ends)
            depths -= np.where(starts > 0, depths[starts - 1], 0)
            if depths.max() > MAX_NESTING:
                raise UserError(f"'{path}' has a value that is nested more than {MAX_NESTING} deep, which no data is.")
            depth = int(depths[-1])


def _suffix(path: Path) -> str:
    """Return the suffix in lower case, without that of a compression."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED else suffix


def _is_metadata(path: Path) -> bool:
    return path.name.lower() in image_rows.METADATA


def _kind(files: Sequence[Path]) -> str | None:
    """Return 'images', a suffix of BUILDERS, '.zip', or None: what most of the files are."""
    metadata = any(map(_is_metadata, files))
    suffixes = Counter(_suffix(path) for path in files)
    tables = [(suffixes[suffix], suffix) for suffix in BUILDERS if suffixes[suffix]]
    images = sum(suffixes[suffix] for suffix in image_suffixes())
    if images and (metadata or images >= max(tables, default=(0, ''))[0]):
        return 'images'
    # Images in zip archives, with their metadata; a table beside them may name images in them.
    return max(tables)[1] if tables else '.zip' if suffixes['.zip'] else None


def _by_name(listing: Listing, files: Sequence[Path], kind: str) -> Groups:
    """Group files by the split that a folder of them is named, or a table; all others are 'train'."""
    if kind == 'images' and any(path.parent == listing.folder and _is_metadata(path) for path in files):
        return {'train': list(files)}  # it says which images are rows, wherever they lie
    groups: Groups = {}
    for path in files:
        parts = [part.lower() for part in path.relative_to(listing.folder).parts[:2] if part != path.name]
        split = next((SPLITS[part] for part in parts if part in SPLITS), None)
        if split is None and kind in BUILDERS and _suffix(path) == kind:
            stem = path.name.partition(kind)[0]
            named, shard = SPLIT_NAME.fullmatch(stem), SHARD_NAME.fullmatch(stem)
            split = SPLITS[named[1].lower()] if named else shard[1] if shard else None
        groups.setdefault(split or 'train', []).append(path)
    # Other files, such as a README.md, are no split.
    suffixes = image_suffixes() if kind == 'images' else (kind,)
    return {key: paths for key, paths in groups.items() if any(_suffix(path) in suffixes for path in paths)}


def _requested(split: str, group: str) -> str:
    """Return how `split` names a group: 'val' for 'validation'."""
    words = re.findall(r'\w+', split)
    return group if group in words else next((word for word in words if SPLITS.get(word) == group), group)


def _image_table(listing: Listing, groups: Mapping[str, Sequence[Path]], kind: str, split: str) -> Any:
    """Return the rows of images, or of zip archives of them, of some splits."""
    import datasets
    parts: dict[str, Any] = {}
    used: set[Path] = set()
    for group, paths in groups.items():
        if kind == '.zip':
            zips = [path for path in paths if _suffix(path) == '.zip']
            trees = [image_rows.zip_tree(path) for path in zips]
            used.update(zips)
        else:
            trees = [image_rows.folder_tree(listing.folder, [listing.relative(path) for path in paths])]
        columns = image_rows.rows(trees)
        if kind != '.zip':
            used.update(listing.folder / name for name in trees[0].used)
        parts[group] = datasets.Dataset.from_dict(columns)
    _pass_over(listing, used)
    listing.log(sum(map(len, parts.values())), 'images')
    spec = '+'.join(parts) if split == 'all' else split
    pieces = datasets.ReadInstruction.from_spec(spec).to_absolute({key: len(part) for key, part in parts.items()})
    selected = [parts[piece.splitname].select(range(piece.from_ or 0, len(parts[piece.splitname]) if piece.to is None
                                                    else piece.to)) for piece in pieces]
    return selected[0] if len(selected) == 1 else datasets.concatenate_datasets(selected)


def _pass_over(listing: Listing, used: Iterable[Path]) -> None:
    """Record what is neither used nor in another split."""
    others = {listing.folder / name for name in listing.passed_over.get('in other splits', ())}
    listing.pass_over_rest({*used, *others})


def _match(source: str, listing: Listing, data_files: Any, who: str) -> Groups:
    """Return the files of the folder that patterns name.

    Args:
        data_files: patterns, or split -> patterns.
        who: what names them.
    """
    by_split = data_files if isinstance(data_files, Mapping) else {'train': data_files}
    names = {listing.relative(path): path for path in listing.files}
    groups: Groups = {}
    for split, patterns in by_split.items():
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            parts = PurePosixPath(str(pattern)).parts
            if '://' in str(pattern) or '::' in str(pattern) or '..' in parts or parts[:1] == ('/',):
                raise UserError(f"'{source}': {who} names '{pattern}', which is outside of the folder. Put it there, "
                                "or set source='json' (or another builder) and data_files in your config.")
            found = [path for name, path in names.items() if _matches(name.split('/'), parts)
                     or _matches(name.split('/'), [*parts, '**'])]
            if not found:
                raise UserError(f"'{source}': {who} names '{pattern}', which is no file of the folder.")
            groups[str(split)] = list(dict.fromkeys([*groups.get(str(split), []), *found]))
    return groups


def _matches(name: Sequence[str], pattern: Sequence[str]) -> bool:
    """Return whether the parts of a path match those of a pattern; '**' is any number of folders."""
    # Numbers of parts of the path that the pattern so far can match.
    ends = {0}
    for i, part in enumerate(pattern):
        if part == '**':
            last = i == len(pattern) - 1
            ends = {*range(min(ends, default=len(name) + 1), len(name) + last)}
        else:
            ends = {end + 1 for end in ends if end < len(name) and fnmatch.fnmatchcase(name[end], part)}
    return len(name) in ends


def _readme_patterns(source: str, folder: Path, name: str | None) -> Any:
    """Return the data_files of a config of README.md, as data sets of the hub have them; None if there is none.

    Raises:
        UserError: the config `name` does not exist, or the file is not as the hub writes it.
    """
    import yaml
    path, configs = folder / 'README.md', None
    if path.is_file():
        try:
            text = read_regular(path, 'json_bytes').decode('utf-8-sig')
            head = re.match(r'---[ \t]*\r?\n(.*?)\r?\n---', text, re.DOTALL)
            settings = yaml.safe_load(head[1]) if head else None
            configs = settings.get('configs') if isinstance(settings, dict) else None
        except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
            reason = ' '.join(str(error).split())[:300]
            raise UserError(f"'{path}' cannot be read: {reason}. Correct or remove it.") from error
    if not configs:
        if name is not None:
            raise UserError(f"name='{name}': the folder '{source}' has no README.md with configs.")
        return None
    if not isinstance(configs, list) or not all(isinstance(config, dict) for config in configs):
        raise UserError(f"'{path}': configs must be a list of entries with config_name and data_files.")
    by_name = {_plain(config.get('config_name', 'default'), path): config for config in configs}
    defaults = [key for key, config in by_name.items() if config.get('default') or key == 'default']
    name = name or (defaults[0] if defaults else next(iter(by_name)) if len(by_name) == 1 else None)
    if name not in by_name:
        raise UserError(f"'{source}': README.md has the configs {', '.join(map(repr, by_name))}; set name to one of "
                        'them.')
    config = by_name[name]
    found, base = config.get('data_files'), config.get('data_dir')
    if found is None:
        return None if base is None else _plain(base, path)
    if isinstance(found, list) and any(isinstance(entry, dict) for entry in found):
        found = {_plain(entry.get('split', 'train'), path): entry.get('path', []) for entry in found
                 if isinstance(entry, dict)}
    base = None if base is None else _plain(base, path)
    by_split = {_plain(key, path): value for key, value in found.items()} if isinstance(found, dict) else {
        'train': found}
    patterns = {key: [value] if isinstance(value, str) else value for key, value in by_split.items()}
    if not all(isinstance(value, list) and all(isinstance(p, str) for p in value) for value in patterns.values()):
        raise UserError(f"'{path}': data_files of '{name}' must be paths, or split and path of each.")
    return {key: [f'{base}/{p}' if base else p for p in value] for key, value in patterns.items()}


def _plain(value: Any, path: Path) -> str:
    """Return a name in a README.md as text; not of a list, which may be one of references without end.

    Raises:
        UserError: it is neither text nor a number.
    """
    if not isinstance(value, str | int | float):
        raise UserError(f"'{path}': config_name, split and data_dir must be texts; one is a {type(value).__name__}.")
    return str(value)
