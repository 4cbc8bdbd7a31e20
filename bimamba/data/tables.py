"""Tables of rows: Parquet, CSV, TSV, JSON lines (each also gzipped) and Arrow, whole folders of them, split by name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bimamba.data.files import files_below
from bimamba.data.records import SPLIT_ALIASES, UNSPLIT, Origins, existing

SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".arrow", ".feather")
_SPLIT_NAME = re.compile(rf"^({'|'.join(SPLIT_ALIASES)})(?=$|[-_.])", re.IGNORECASE)


@dataclass
class Rows:
    """A table, with the file and split that each row came from.

    Args:
        table: the columns asked for.
        describe: names file and number of a row; the number is counted from 1, without a header line.
        splits: row numbers of each split (or of `all`).
    """

    table: pa.Table
    describe: Origins
    splits: dict[str, np.ndarray]

    def __len__(self) -> int:
        return self.table.num_rows

    def filter(self, keep: np.ndarray) -> Rows:
        """Rows where `keep` is True."""
        new = np.cumsum(keep) - 1
        splits = {name: new[rows[keep[rows]]] for name, rows in self.splits.items()}
        origins = Origins(self.describe.files, self.describe.unit, np.flatnonzero(keep))
        return Rows(self.table.filter(pa.array(keep)), origins, {s: rows for s, rows in splits.items() if len(rows)})


def is_table(path: Path) -> bool:
    """True for a file name this module reads."""
    name = path.name.lower().removesuffix(".gz")
    return name.endswith(SUFFIXES)


def find_tables(path: Path) -> dict[str, list[Path]]:
    """Table files by split.

    A file is one unsplit table. In a folder, `train`, `val|valid|validation|dev` and `test` at the start of a file's
    name (`train.csv`, `train-00000-of-00002.parquet`), or the name of the sub-folder it lies in, say the split.

    Raises:
        ValueError: no table is there, or some files name a split and others do not.
    """
    if path.is_file():
        if not is_table(path):
            raise ValueError(f"{path}: expected a table ({', '.join(SUFFIXES)}, or one of them with .gz)")
        return {UNSPLIT: [path]}
    files = [p for p in files_below(path) if is_table(p)]
    files = [p for p in files if p.name not in ("dataset_info.json", "dataset_infos.json", "state.json")]
    if not files:
        raise ValueError(f"{path}: expected a folder with tables ({', '.join(SUFFIXES)}, also .gz), found none")
    found: dict[str, list[Path]] = {}
    for file in files:
        found.setdefault(_split_of(file, path), []).append(file)
    if UNSPLIT in found and len(found) > 1:
        names = ", ".join(str(p.relative_to(path)) for p in found[UNSPLIT][:5])
        raise ValueError(
            f"{path}: some files name a split (train, val, test) and others do not ({names}); "
            "give data.path= a folder with one kind only, or one file"
        )
    return found


def read_rows(
    files: Mapping[str, Sequence[Path]], columns: Iterable[str], text: Iterable[str] = (), optional: Iterable[str] = ()
) -> Rows:
    """Reads the named columns of all files.

    Args:
        files: paths by split, as from `find_tables`.
        columns: needed columns.
        text: of these, the ones to read as text whatever they look like.
        optional: columns to take along where every file has them.

    Raises:
        ValueError: a file cannot be parsed (the parser's own message names the row), or lacks a column.
    """
    wanted, optional = list(dict.fromkeys(columns)), list(dict.fromkeys(optional))
    tables, names, splits, start = [], [], {}, 0
    for split, paths in files.items():
        first = start
        for path in paths:
            table = read_table(path, text)
            check_columns(str(path), table.column_names, wanted)
            tables.append(table)
            names.append((str(path), table.num_rows))
            start += table.num_rows
        splits[split] = np.arange(first, start)
    kept = wanted + [c for c in optional if c not in wanted and all(c in t.column_names for t in tables)]
    return Rows(concat([t.select(kept) for t in tables], [n for n, _ in names]), Origins(names), splits)


def concat(tables: Sequence[pa.Table], names: Sequence[str]) -> pa.Table:
    """One table of many.

    Raises:
        ValueError: a column has types that do not go together (a number here, text there).
    """
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(f"the columns of {', '.join(names)} do not go together: {error}") from error


def check_columns(where: str, present: Sequence[str], wanted: Iterable[str]) -> None:
    """Raises ValueError naming the columns that exist if one of `wanted` does not."""
    missing = [c for c in wanted if c not in present]
    if missing:
        raise ValueError(
            f"{where}: expected the column{'s' if len(missing) > 1 else ''} {', '.join(map(repr, missing))}, "
            f"found {', '.join(map(repr, present))}"
        )


def column_names(path: Path) -> list[str]:
    """Columns of one file; of a CSV without reading it all."""
    return read_table(path, ()).column_names


def read_table(path: Path, text: Iterable[str] = ()) -> pa.Table:
    """One file as an Arrow table.

    Raises:
        ValueError: the file cannot be parsed.
    """
    kind = Path(path.name.lower().removesuffix(".gz")).suffix
    try:
        if kind == ".parquet":
            import pyarrow.parquet as pq

            return pq.ParquetFile(_open(path) if path.name.lower().endswith(".gz") else str(path)).read()
        if kind in (".csv", ".tsv"):
            return _read_csv(path, "," if kind == ".csv" else "\t", text)
        if kind in (".jsonl", ".ndjson", ".json"):
            import pyarrow.json as pj

            # The block must hold the longest line; a genomic record of megabases is one line.
            return pj.read_json(_open(path), pj.ReadOptions(block_size=max(1 << 20, _longest_line(path) * 2)))
        return _read_arrow(path)
    except UnicodeDecodeError as error:  # a column's name
        raise ValueError(f"{path}: expected UTF-8 text, got another encoding: {error}") from error
    except (pa.ArrowException, OSError, EOFError) as error:
        if "UTF8" in str(error):
            raise ValueError(f"{path}: expected UTF-8 text, got another encoding (Latin-1?): {error}") from error
        raise ValueError(f"{path}: cannot be read as {kind.removeprefix('.').upper()}: {error}") from error


def _read_csv(path: Path, delimiter: str, text: Iterable[str]) -> pa.Table:
    import pyarrow.csv as pv

    _check_encoding(path)
    table = pv.read_csv(
        _open(path),
        # Single-threaded: only then do errors name the row.
        pv.ReadOptions(use_threads=False, block_size=max(1 << 20, _longest_line(path) * 2)),
        pv.ParseOptions(delimiter=delimiter, newlines_in_values=False),
        # Without this a column of "1", "2" ids becomes numbers, and a sequence "NA" stays text as it should.
        pv.ConvertOptions(column_types={c: pa.string() for c in text}),
    )
    if table.num_rows == 0:
        raise ValueError(f"{path}: expected rows below the header line, found none")
    # Where it infers a type, the reader hands on what is no UTF-8 as bytes.
    for name, kind in zip(table.column_names, table.schema.types, strict=True):
        if pa.types.is_binary(kind):
            raise ValueError(f"{path}: column {name!r}: expected UTF-8 text, got another encoding (Latin-1?)")
    return table.rename_columns([c.strip() for c in table.column_names])


def _check_encoding(path: Path) -> None:
    """Raises ValueError for UTF-16, which spreadsheets write as "Unicode text"."""
    with _open(path) as stream:
        start = stream.read(1000)
    if b"\0" in start:
        raise ValueError(f"{path}: expected UTF-8 text, got UTF-16, or no text at all (there are zero bytes)")


def _read_arrow(path: Path) -> pa.Table:
    import pyarrow.ipc as ipc

    try:
        return ipc.open_file(_open(path)).read_all()
    except pa.ArrowInvalid:  # `datasets` writes the streaming format
        return ipc.open_stream(_open(path)).read_all()


def _open(path: Path) -> pa.NativeFile:
    return pa.input_stream(str(path), compression="gzip" if path.name.lower().endswith(".gz") else None)


def _longest_line(path: Path) -> int:
    longest = rest = 0
    with _open(path) as stream:
        while block := stream.read(1 << 24):
            ends = np.flatnonzero(np.frombuffer(block, np.uint8) == 10)
            if len(ends) == 0:
                rest += len(block)
                continue
            longest = max(longest, rest + int(ends[0]), int(np.diff(ends).max(initial=0)))
            rest = len(block) - int(ends[-1]) - 1
    return max(longest, rest) + 1


def _split_of(file: Path, root: Path) -> str:
    for part in reversed(file.relative_to(root).parts):
        match = _SPLIT_NAME.match(part)
        if match:
            return SPLIT_ALIASES[match.group(1).lower()]
    return UNSPLIT


def split_by_column(rows: Rows, column: str) -> Rows:
    """Splits as a column of the table says.

    Raises:
        ValueError: a value that names no split.
    """
    values = pc.utf8_lower(pc.cast(rows.table[column], pa.string())).to_pylist()
    unknown = sorted({str(v) for v in values} - set(SPLIT_ALIASES))
    if unknown:
        row = next(i for i, v in enumerate(values) if str(v) in unknown)
        raise ValueError(
            f"{rows.describe(row)}: column {column!r}: expected one of {', '.join(SPLIT_ALIASES)}, got {values[row]!r}"
        )
    names = np.array([SPLIT_ALIASES[v] for v in values])
    return Rows(rows.table, rows.describe, {s: np.flatnonzero(names == s) for s in np.unique(names).tolist()})


def class_label_names(table: pa.Table, column: str) -> tuple[str, ...] | None:
    """Class names that `datasets` wrote into a Parquet file's metadata, if it did."""
    metadata = (table.schema.metadata or {}).get(b"huggingface")
    if metadata is None:
        return None
    feature = json.loads(metadata).get("info", {}).get("features", {}).get(column, {})
    return tuple(feature["names"]) if feature.get("_type") == "ClassLabel" and "names" in feature else None


def local_tables(path: str | Path, task: str | None = None) -> dict[str, list[Path]]:
    """Table files below a local path, of one task's sub-folder where there is one.

    Raises:
        ValueError: nothing is there.
    """
    root = existing(path, "data.path")
    if task is not None and (root / task).is_dir():
        root = root / task
    return find_tables(root)
