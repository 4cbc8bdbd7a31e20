"""Tables from the Hub or from disk: the two places that one data set of the Hub can lie in."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bimamba.data.records import SPLIT_ALIASES, Origins, existing
from bimamba.data.tables import Rows, check_columns, class_label_names, local_tables, read_rows, split_by_column

TASK_COLUMN = "task"  # Nucleotide Transformer's table of all tasks has it
MAPPED_ABOVE = 4 << 30  # bytes of Parquet beyond which rows stay on disk (through `datasets`' memory-mapped cache)


def load_rows(
    *,
    hub: str | None,
    path: str | None,
    task: str | None,
    columns: Sequence[str],
    text: Sequence[str] = (),
    optional: Sequence[str] = (),
    split_column: str | None = None,
    split_names: Mapping[str, str] | None = None,
    cache_dir: str | None = None,
) -> tuple[Rows, Any]:
    """Rows of a data set in the Hub's schema.

    Args:
        hub: name on the Hub, read where `path` is None.
        path: a local copy: a file or folder of tables, or what `datasets.save_to_disk` wrote.
        task: one of a collection's tasks: a configuration or a sub-folder of that name, or the rows whose column
            `task` says so.
        columns: needed columns; `text`: those of them to read as text; `optional`: taken along where they exist.
        split_column: column that says the split.
        split_names: `{split: name in the data set}`; None: by the usual names.
        cache_dir: where downloads go; None: where `datasets` puts them.

    Returns:
        The rows, and a function `column -> class names or None`.

    Raises:
        ValueError: nothing is there, or a column is missing.
    """
    optional = [*optional, TASK_COLUMN] if task is not None else list(optional)
    wanted = [*columns, *([split_column] if split_column else [])]
    if path is None:
        if hub is None:
            raise ValueError("data.path is not set: expected a file or folder of tables")
        rows, features = _from_hub(hub_splits(hub, task, cache_dir), wanted, optional, split_names, hub)
    elif (root := existing(path, "data.path")).is_dir() and _is_saved(root):
        rows, features = _from_hub(_load_from_disk(root), wanted, optional, split_names, str(root))
    else:
        files = _rename(local_tables(path, task), split_names)
        if _is_large(files):
            rows, features = _from_hub(_mapped(files, cache_dir), wanted, optional, None, path)
        else:
            rows = read_rows(files, wanted, text, optional)
            features = _metadata_names(rows)
    if task is not None and TASK_COLUMN in rows.table.column_names:
        rows = _of_task(rows, task, path or hub)
    if split_column:
        rows = split_by_column(rows, split_column)
    return rows, features


def hub_splits(hub: str, task: str | None, cache_dir: str | None) -> Any:
    """`datasets.load_dataset`, of one configuration a task or of the table that holds all tasks.

    Raises:
        ValueError: the Hub cannot be reached and nothing is cached, or there is no such data set.
    """
    import datasets

    try:
        config = None
        if task is not None and task in datasets.get_dataset_config_names(hub):
            config = task
        return datasets.load_dataset(hub, config, cache_dir=cache_dir)
    # datasets, huggingface_hub, fsspec and requests raise a dozen unrelated classes here; whichever it is, the user can
    # do one thing, so it becomes one error. The cause is kept.
    except Exception as error:
        raise ValueError(
            f"cannot load {hub!r} from the Hub ({type(error).__name__}: {error}); "
            "expected a connection (gated sets: also `hf auth login`), or data.path= a local copy"
        ) from error


def _is_saved(root: Path) -> bool:
    return (root / "dataset_dict.json").is_file() or (root / "state.json").is_file()


def _load_from_disk(root: Path) -> Any:
    import datasets

    loaded = datasets.load_from_disk(str(root))
    return loaded if isinstance(loaded, dict) else {"train": loaded}


def _is_large(files: Mapping[str, Sequence[Path]]) -> bool:
    paths = [p for group in files.values() for p in group]
    return all(p.suffix == ".parquet" for p in paths) and sum(os.path.getsize(p) for p in paths) > MAPPED_ABOVE


def _mapped(files: Mapping[str, Sequence[Path]], cache_dir: str | None) -> Any:
    import datasets

    data_files = {split: [str(p) for p in paths] for split, paths in files.items()}
    return datasets.load_dataset("parquet", data_files=data_files, cache_dir=cache_dir)


def _from_hub(
    splits: Mapping[str, Any],
    columns: Sequence[str],
    optional: Sequence[str],
    split_names: Mapping[str, str] | None,
    name: str,
) -> tuple[Rows, Any]:
    """Rows of a `DatasetDict`, memory-mapped as `datasets` holds them."""
    chosen = _by_split(splits, split_names, name)
    tables, files, numbers, start = [], [], {}, 0
    for split, dataset in chosen.items():
        check_columns(f"{name}, split {split}", dataset.column_names, columns)
        kept = [*columns, *(c for c in optional if c in dataset.column_names and c not in columns)]
        if dataset._indices is not None:  # a filtered or shuffled set that was saved to disk
            dataset = dataset.flatten_indices()
        tables.append(dataset.data.table.select(kept).replace_schema_metadata(None))
        files.append((f"{name}/{split}", dataset.num_rows))
        numbers[split] = np.arange(start, start + dataset.num_rows)
        start += dataset.num_rows
    features = next(iter(chosen.values())).features
    return Rows(pa.concat_tables(tables), Origins(files), numbers), lambda column: _names(features, column)


def _by_split(splits: Mapping[str, Any], split_names: Mapping[str, str] | None, name: str) -> dict[str, Any]:
    if split_names is None:
        return {SPLIT_ALIASES.get(s.lower(), s): d for s, d in splits.items() if s.lower() in (*SPLIT_ALIASES, "all")}
    missing = sorted(set(split_names.values()) - set(splits))
    if missing:
        raise ValueError(f"{name}: expected the splits {', '.join(missing)}, found {', '.join(splits)}")
    return {split: splits[theirs] for split, theirs in split_names.items()}


def _rename(files: dict[str, list[Path]], split_names: Mapping[str, str] | None) -> dict[str, list[Path]]:
    """Applies `split_names` (which speak of the Hub's names) to a local copy; files of other splits are left out."""
    if split_names is None or set(files).isdisjoint(SPLIT_ALIASES.values()):
        return files
    wanted = {split: SPLIT_ALIASES[theirs.lower()] for split, theirs in split_names.items()}
    return {split: files[theirs] for split, theirs in wanted.items() if theirs in files}


def _names(features: Mapping[str, Any], column: str) -> tuple[str, ...] | None:
    names = getattr(features.get(column), "names", None)
    return tuple(names) if names else None


def _metadata_names(rows: Rows) -> Any:
    return lambda column: class_label_names(rows.table, column)


def _of_task(rows: Rows, task: str, where: str | None) -> Rows:
    values = rows.table[TASK_COLUMN]
    keep = np.asarray(pc.fill_null(pc.equal(values, task), False).to_numpy(zero_copy_only=False), bool)
    if not keep.any():
        raise ValueError(
            f"data.task: {where}: expected one of {', '.join(map(str, pc.unique(values).to_pylist()))}, got {task!r}"
        )
    return rows.filter(keep)
