"""From files to records: what several sources, and `data.predict` for all of them, have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from bimamba.data.fasta import BESIDE_FASTA, FASTA_SUFFIXES, class_of, is_fasta, read_fasta
from bimamba.data.files import files_below, left_out
from bimamba.data.images import BESIDE_IMAGES, IMAGE_SUFFIXES, EncodedImages, find_images
from bimamba.data.labels import read_labels
from bimamba.data.records import UNSPLIT, Names, Origins, Records, existing
from bimamba.data.sequences import ByteRows
from bimamba.data.tables import Rows, column_names, find_tables, is_table, read_rows

LabelNames = Callable[[str], "tuple[str, ...] | None"]


def fasta_records(paths: Sequence[Path]) -> tuple[Records, list[int]]:
    """Records of FASTA files, unlabelled, and their number in each file."""
    ids, sequences, counts = [], [], []
    for path in paths:
        before = len(ids)
        for name, sequence in read_fasta(path):
            ids.append(name)
            sequences.append(sequence)
        counts.append(len(ids) - before)
    describe = Origins([(str(p), n) for p, n in zip(paths, counts, strict=True)], "record")
    rows = {UNSPLIT: np.arange(len(ids))}
    return Records(ByteRows.from_list(sequences), ids, rows, describe), counts


def read_sequences(
    path: str,
    sequence_column: str = "sequence",
    label_columns: Sequence[str] = ("label",),
    id_column: str | None = None,
) -> Records:
    """Sequences to predict, from FASTA files or tables, one file or a folder; labels where a table has them.

    Raises:
        ValueError: nothing is there that can be read as sequences.
    """
    root = existing(path, "data.predict")
    fasta = [root] if root.is_file() and is_fasta(root) else []
    if root.is_dir():
        fasta = [p for p in files_below(root) if is_fasta(p)]
    if fasta:
        records, counts = fasta_records(fasta)
        if root.is_dir():  # perhaps one file a class
            records.labels = np.repeat(np.array([class_of(p) for p in fasta], dtype=object), counts)
            records.notes += left_out(root, fasta, f"{', '.join(FASTA_SUFFIXES)} (also .gz)", BESIDE_FASTA)
        return records
    files = find_tables(root)
    everything = [p for paths in files.values() for p in paths]
    present = set.intersection(*(set(column_names(p)) for p in everything))
    if sequence_column not in present and sequence_column in ("sequence", "seq"):
        # A model trained on FASTA files, or on `seq`, meets a table: both usual names will do.
        sequence_column = next((c for c in ("sequence", "seq") if c in present), sequence_column)
    labels = list(label_columns) if set(label_columns) <= present else []
    id_column = id_column if id_column in present else None
    columns = [sequence_column, *labels, *([id_column] if id_column else [])]
    rows = read_rows({"all": everything}, columns, text=[sequence_column, *([id_column] if id_column else [])])
    return table_records(rows, sequence_column, labels, id_column, lambda column: None, lenient=True)


def table_records(
    rows: Rows,
    sequence_column: str,
    label_columns: Sequence[str],
    id_column: str | None,
    names: LabelNames,
    lenient: bool = False,
) -> Records:
    """Rows of a table with sequences as records. `lenient`: see `table_labels`."""
    labels, label_names, notes = table_labels(rows, label_columns, names, lenient)
    return Records(
        inputs=ByteRows.from_arrow(rows.table[sequence_column], sequence_column, rows.describe).strip(),
        ids=row_ids(rows, id_column),
        splits=rows.splits,
        describe=rows.describe,
        labels=labels,
        label_names=label_names,
        notes=notes,
    )


def table_labels(
    rows: Rows, columns: Sequence[str], names: LabelNames, lenient: bool
) -> tuple[np.ndarray | None, tuple[str, ...] | None, list[str]]:
    """Labels, their names, and what was left out.

    Args:
        rows: the table.
        columns: label columns; none: no labels.
        names: class names that the table knows for a column.
        lenient: for rows to predict: labels that cannot be read are left out, with a note, instead of raising.
    """
    if not columns:
        return None, None, []
    label_names = tuple(columns) if len(columns) > 1 else names(columns[0])
    try:
        return read_labels(rows, columns), label_names, []
    except ValueError as error:
        if not lenient:
            raise
        return None, None, [f"labels left out: {error}"]


def row_ids(rows: Rows, id_column: str | None) -> list[str]:
    """Names of the rows: of a column, or file name and number."""
    if id_column is None:
        return rows.describe.ids()
    values = rows.table[id_column].cast(pa.string()).to_pylist()
    return [v if v is not None else d for v, d in zip(values, rows.describe.ids(), strict=True)]


def image_rows(rows: Rows, image_column: str, root: Path | None) -> EncodedImages:
    """Images of a table's column.

    Raises:
        ValueError: the column holds neither bytes, nor file names, nor a struct of them.
    """
    column = rows.table[image_column]
    kind = column.type
    fields = {field.name for field in kind} if pa.types.is_struct(kind) else set()
    encoded = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or bool(fields & {"bytes", "path"})
    if not encoded and not pa.types.is_string(kind) and not pa.types.is_large_string(kind):
        raise ValueError(
            f"column {image_column!r}: expected images (binary, file names, or a struct of bytes and path), got {kind}"
        )
    return EncodedImages(column, rows.describe, root)


def read_images(
    path: str, image_column: str = "image", label_columns: Sequence[str] = ("label",), id_column: str | None = None
) -> Records:
    """Images to predict: image files, an npz array, or a table; one file or a folder. Labels where a table has them.

    Raises:
        ValueError: nothing is there that can be read as images.
    """
    root = existing(path, "data.predict")
    if root.is_file() and root.suffix == ".npz":
        from bimamba.data.sources.medmnist import npz_to_predict

        return npz_to_predict(root)
    if root.is_file() and not is_table(root):
        return image_file_records([root], root.parent)
    files = find_images(root) if root.is_dir() else []
    if files:
        records = image_file_records(files, root)
        records.notes += left_out(root, files, ", ".join(IMAGE_SUFFIXES), BESIDE_IMAGES)
        if all(p.parent != root for p in files):  # perhaps one folder a class
            records.labels = np.array([p.relative_to(root).parts[0] for p in files], dtype=object)
        return records
    tables = [p for paths in find_tables(root).values() for p in paths]
    present = set.intersection(*(set(column_names(p)) for p in tables))
    if image_column not in present:
        image_column = next((c for c in ("image", "img") if c in present), image_column)
    labels = list(label_columns) if set(label_columns) <= present else []
    columns = [image_column, *labels, *([id_column] if id_column in present else [])]
    rows = read_rows({UNSPLIT: tables}, columns)
    return image_table_records(
        rows, image_column, labels, id_column if id_column in present else None, lambda column: None, root, lenient=True
    )


def image_file_records(files: Sequence[Path], root: Path) -> Records:
    """Image files, unlabelled; ids are paths below `root`."""
    ids = [p.relative_to(root).as_posix() for p in files]
    describe = Names([str(p) for p in files])
    return Records(EncodedImages(files, describe), ids, {UNSPLIT: np.arange(len(files))}, describe)


def image_table_records(
    rows: Rows,
    image_column: str,
    label_columns: Sequence[str],
    id_column: str | None,
    names: LabelNames,
    path: Path | None,
    lenient: bool = False,
) -> Records:
    """Rows of a table with images as records; file names in it are relative to the table's folder."""
    labels, label_names, notes = table_labels(rows, label_columns, names, lenient)
    root = None if path is None else (path if path.is_dir() else path.parent)
    return Records(
        inputs=image_rows(rows, image_column, root),
        ids=row_ids(rows, id_column),
        splits=rows.splits,
        describe=rows.describe,
        labels=labels,
        label_names=label_names,
        notes=notes,
    )
