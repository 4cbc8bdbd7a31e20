"""Every layout that sequences come in, and every way each of them can be wrong."""

import gzip

import numpy as np
import pyarrow as pa
import pytest
from data_files import dna, sequence_rows, stops, write_fasta, write_table

from bimamba.data import SequenceDataModule
from bimamba.data.sequences import reverse_complement
from bimamba.data.sources import FastaBed, FastaClasses, SequenceTable


def setup(source, path, stage="fit", **options):
    data = SequenceDataModule(source, path=str(path), batch_size=8, **options)
    data.setup(stage)
    return data


def rows_of(loader):
    """`{id: (sequence, label)}` of all batches."""
    found = {}
    for batch in loader:
        for i, name in enumerate(batch["id"]):
            text = "".join("ACGTN"[t - 1] for t in batch["inputs"][i][batch["mask"][i]].tolist())
            found[name] = (text, batch["label"][i].tolist() if "label" in batch else None)
    return found


# Tables


@pytest.mark.parametrize("name", ["x.parquet", "x.csv", "x.tsv", "x.jsonl", "x.csv.gz", "x.tsv.gz", "x.jsonl.gz"])
def test_one_table(tmp_path, name):
    columns = sequence_rows(40)
    data = setup(SequenceTable(), write_table(tmp_path / name, columns))
    assert data.sizes == {"train": 29, "val": 3, "test": 8}
    assert data.spec.problem == "binary" and data.spec.class_names == ("0", "1") and data.spec.max_length <= 40
    found = rows_of(data.train_dataloader()) | rows_of(data.val_dataloader()) | rows_of(data.test_dataloader())
    expected = {f"x:{i}": row for i, row in enumerate(zip(*columns.values(), strict=True), 1)}
    assert found == expected


@pytest.mark.parametrize(
    "names", [("train.csv", "valid.csv", "test.csv"), ("train/0.parquet", "dev/0.parquet", "test/0.parquet")]
)
def test_folder_of_splits(tmp_path, names):
    for i, name in enumerate(names):
        write_table(tmp_path / name, sequence_rows(10 * (i + 1), seed=i))
    assert setup(SequenceTable(), tmp_path).sizes == {"train": 10, "val": 20, "test": 30}


def test_shards_of_a_split_go_together(tmp_path):
    for i in range(2):
        write_table(tmp_path / f"train-0000{i}-of-00002.parquet", sequence_rows(20, seed=i))
    write_table(tmp_path / "test-00000-of-00001.parquet", sequence_rows(6, seed=9))
    data = setup(SequenceTable(), tmp_path)
    assert data.sizes == {"train": 36, "val": 4, "test": 6}


def test_named_columns_and_split_column(tmp_path):
    columns = sequence_rows(30)
    path = write_table(
        tmp_path / "x.csv",
        {
            "dna": columns["sequence"],
            "kind": ["b", "a"] * 15,
            "who": [f"r{i}" for i in range(30)],
            "part": ["Train"] * 20 + ["validation"] * 4 + ["test"] * 6,
        },
    )
    source = SequenceTable(sequence_column="dna", label_column="kind", id_column="who", split_column="part")
    data = setup(source, path)
    assert data.sizes == {"train": 20, "val": 4, "test": 6} and data.spec.class_names == ("a", "b")
    found = rows_of(data.test_dataloader())
    assert found == {f"r{i}": (columns["sequence"][i], 1 - i % 2) for i in range(24, 30)}


def test_groups_of_a_column_stay_in_one_split(tmp_path):
    columns = sequence_rows(120)
    family = [f"f{i % 30}" for i in range(120)]
    path = write_table(tmp_path / "x.csv", {**columns, "family": family})
    data = setup(SequenceTable(group_column="family"), path)
    found = {split: {family[row] for row in rows} for split, rows in data.splits.items()}
    assert all(found.values()) and sum(map(len, found.values())) == 30
    assert any("by whole groups" in note for note in data.notes)
    path = write_table(tmp_path / "y.csv", {**columns, "family": [*family[:-1], ""]})
    with stops("row 120", "expected a value in column 'family'", "group_column"):
        setup(SequenceTable(group_column="family"), path)
    with stops("expected the column", "kin"):
        setup(SequenceTable(group_column="kin"), path)


def test_order_of_rows_of_names_does_not_matter(tmp_path):
    write_table(tmp_path / "x.csv", {"sequence": ["ACGT"] * 40, "label": ["b"] * 20 + ["a"] * 20})
    assert setup(SequenceTable(), tmp_path).spec.class_names == ("a", "b")


def test_ten_integer_classes_are_sorted_as_numbers(tmp_path):
    path = write_table(tmp_path / "x.parquet", sequence_rows(110, classes=11))
    data = setup(SequenceTable(), path)
    assert data.spec.class_names == tuple(map(str, range(11))) and data.spec.problem == "multiclass"


def test_regression(tmp_path):
    columns = sequence_rows(50)
    columns["label"] = [round(i / 7, 3) for i in range(50)]
    data = setup(SequenceTable(), write_table(tmp_path / "x.csv", columns), problem="regression")
    assert data.spec.num_outputs == 1
    batch = next(iter(data.train_dataloader()))
    assert batch["label"].shape == (8, 1) and str(batch["label"].dtype) == "torch.float32"


def test_several_label_columns(tmp_path):
    columns = {"sequence": sequence_rows(50)["sequence"], "x": [0, 1] * 25, "y": [1, 1, 0, 0, 1] * 10}
    data = setup(SequenceTable(label_column=["x", "y"]), write_table(tmp_path / "x.csv", columns))
    assert data.spec.problem == "multilabel" and data.spec.class_names == ("x", "y")
    assert next(iter(data.train_dataloader()))["label"].shape == (8, 2)
    columns["y"] = [0.5 * i for i in range(50)]
    path = write_table(tmp_path / "y.csv", columns)
    assert setup(SequenceTable(label_column=["x", "y"]), path, problem="regression").spec.num_outputs == 2
    with stops("2 label columns with values other than 0 and 1", "data.problem=regression"):
        setup(SequenceTable(label_column=["x", "y"]), path)


def test_one_label_column_may_be_multilabel(tmp_path):
    path = write_table(tmp_path / "x.csv", sequence_rows(50))
    data = setup(SequenceTable(), path, problem="multilabel", class_names=["active"])
    assert data.spec.class_names == ("active",) and next(iter(data.val_dataloader()))["label"].shape[1] == 1


def test_class_names_for_numbers(tmp_path):
    path = write_table(tmp_path / "x.csv", sequence_rows(50))
    data = setup(SequenceTable(), path, class_names=["off", "on"])
    assert data.spec.class_names == ("off", "on")
    with stops("row 2", "expected a label of 'off', 'on' (numbers 0 to 1)", "got 7"):
        setup(
            SequenceTable(),
            write_table(tmp_path / "y.csv", {"sequence": ["A", "C"], "label": [0, 7]}),
            class_names=["off", "on"],
        )


def test_both_layouts_of_task_collections(tmp_path):
    a, b = sequence_rows(20, seed=1), sequence_rows(30, seed=2, classes=3)
    merged = {"sequence": a["sequence"] + b["sequence"], "label": a["label"] + b["label"]}
    for split in ("train", "test"):
        write_table(tmp_path / "one" / f"{split}.parquet", {**merged, "task": ["a"] * 20 + ["b"] * 30})
        write_table(tmp_path / "many" / "a" / f"{split}.parquet", a)
        write_table(tmp_path / "many" / "b" / f"{split}.parquet", b)
    for layout in ("one", "many"):
        first, second = (setup(SequenceTable(), tmp_path / layout, task=t) for t in ("a", "b"))
        assert first.sizes == {"train": 18, "val": 2, "test": 20} and len(second.spec.class_names) == 3
        assert {v[0] for v in rows_of(first.test_dataloader()).values()} == set(a["sequence"])
    with stops("data.task", "expected one of a, b", "got 'c'"):
        setup(SequenceTable(), tmp_path / "one", task="c")


# What can be wrong with a table


def test_table_without_a_path():
    with stops("data.path is not set", "expected a file or folder of tables"):
        SequenceDataModule(SequenceTable()).setup("fit")


def test_no_such_file(tmp_path):
    with stops("data.path", "expected a file or folder", "nothing is at", "nowhere.csv"):
        setup(SequenceTable(), tmp_path / "nowhere.csv")


def test_folder_without_tables(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with stops("expected a folder with tables", ".parquet", "found none"):
        setup(SequenceTable(), tmp_path)


def test_file_that_is_no_table(tmp_path):
    (tmp_path / "x.docx").write_text("nothing")
    with stops("x.docx", "expected a table", ".csv"):
        setup(SequenceTable(), tmp_path / "x.docx")


def test_split_and_other_files_together(tmp_path):
    write_table(tmp_path / "train.csv", sequence_rows(10))
    write_table(tmp_path / "extra.csv", sequence_rows(10))
    with stops("some files name a split", "extra.csv"):
        setup(SequenceTable(), tmp_path)


@pytest.mark.parametrize("name", ["x.csv", "x.parquet", "x.jsonl"])
def test_wrong_column_names_those_that_exist(tmp_path, name):
    path = write_table(tmp_path / name, sequence_rows(10))
    with stops(name, "expected the column 'dna'", "found 'sequence', 'label'"):
        setup(SequenceTable(sequence_column="dna"), path)
    with stops(name, "expected the column 'y'", "found 'sequence', 'label'"):
        setup(SequenceTable(label_column="y"), path)


def test_unreadable_rows(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("sequence,label\nACGT,0\nACGT,1,2\n")
    with stops("x.csv", "cannot be read as CSV", "Row #3", "Expected 2 columns, got 3"):
        setup(SequenceTable(), path)
    path = tmp_path / "x.jsonl"
    path.write_text('{"sequence": "ACGT", "label": 0}\n{"sequence": \n')
    with stops("x.jsonl", "cannot be read as JSONL", "row 1"):
        setup(SequenceTable(), path)
    path = tmp_path / "x.parquet"
    path.write_bytes(b"no parquet")
    with stops("x.parquet", "cannot be read as PARQUET"):
        setup(SequenceTable(), path)
    path = tmp_path / "x.csv.gz"
    path.write_bytes(b"sequence,label\n")
    with stops("x.csv.gz", "cannot be read as CSV"):
        setup(SequenceTable(), path)
    path.write_bytes(b"")
    with stops("x.csv.gz", "cannot be read as CSV"):
        setup(SequenceTable(), path)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"sequence,label\n", ["expected rows below the header line, found none"]),
        (b"sequence,label\nACGT,\xe9\nAC,b\n", ["column 'label'", "expected UTF-8 text"]),
        (b"sequence,label\nAC\xe9T,a\nAC,b\n", ["expected UTF-8 text"]),
        (b"sequence,label\xe9\nACT,a\nAC,b\n", ["expected UTF-8 text"]),
        ("sequence,label\nACT,a\nAC,b\n".encode("utf-16"), ["expected UTF-8 text, got UTF-16"]),
    ],
)
def test_tables_without_rows_or_in_another_encoding(tmp_path, content, parts):
    path = tmp_path / "x.csv"
    path.write_bytes(content)
    with stops("x.csv: ", *parts):
        setup(SequenceTable(), path)


@pytest.mark.parametrize(
    ("sequences", "labels", "parts"),
    [
        (["ACGT", ""], [0, 1], ["x.jsonl: row 2", "expected a sequence, got an empty one"]),
        (["ACGT", None], [0, 1], ["x.jsonl: row 2", "column 'sequence'", "got a missing value"]),
        (["ACGT", "AC7T"], [0, 1], ["x.jsonl: row 2", "expected letters, got '7' at position 3"]),
        (["ACGT", "AC"], [0, None], ["x.jsonl: row 2", "label column 'label'", "got a missing value"]),
        (["ACGT", "AC"], [0.5, 1.0], ["x.jsonl: row 1", "expected a class, got the number 0.5", "regression"]),
        (["ACGT", "AC"], [0, -1], ["x.jsonl: row 2", "expected class numbers from 0, got -1"]),
        (["ACGT", "AC"], ["a", ""], ["x.jsonl: row 2", "expected a label, got ''"]),
        (["ACGT", "AC"], [0, 0], ["expected at least two classes, got one: '0'"]),
        (["ACGT", "AC"], [[0], [1]], ["label column 'label'", "expected numbers or text, got type list"]),
    ],
)
def test_bad_values(tmp_path, sequences, labels, parts):
    path = write_table(tmp_path / "x.jsonl", {"sequence": sequences, "label": labels})
    with stops(*parts):
        setup(SequenceTable(), path)


def test_nan_and_text_for_numbers(tmp_path):
    columns = {"sequence": ["AC", "GT", "AA"], "label": [1.0, 2.5, float("nan")]}
    with stops("x.parquet: row 3", "label column 'label'", "expected a number, got nan"):
        setup(SequenceTable(), write_table(tmp_path / "x.parquet", columns), problem="regression")
    columns["label"] = ["a", "b", "c"]
    with stops("data.problem=regression", "expected labels as numbers", "'a'"):
        setup(SequenceTable(), write_table(tmp_path / "y.parquet", columns), problem="regression")


def test_problem_that_does_not_fit(tmp_path):
    path = write_table(tmp_path / "x.csv", sequence_rows(30, classes=3))
    with stops("data.problem=binary", "expected two classes, got 3"):
        setup(SequenceTable(), path, problem="binary")
    with stops("data.problem", "expected one of multiclass, binary", "got 'classes'"):
        setup(SequenceTable(), path, problem="classes")
    with stops("data.problem=multilabel", "expected labels 0 and 1, got 2"):
        setup(SequenceTable(), path, problem="multilabel")


def test_class_without_training_rows(tmp_path):
    write_table(tmp_path / "train.csv", sequence_rows(20))
    write_table(tmp_path / "test.csv", sequence_rows(21, seed=1, classes=3))
    with stops(
        "expected training rows of every class", "got none of '2'", "'2' is met in test alone:", "test.csv: row 3"
    ):
        setup(SequenceTable(), tmp_path)


def test_split_column_with_other_values(tmp_path):
    path = write_table(tmp_path / "x.csv", {**sequence_rows(2), "part": ["train", "mine"]})
    with stops("x.csv: row 2", "column 'part'", "expected one of train", "got 'mine'"):
        setup(SequenceTable(split_column="part"), path)


def test_only_a_test_set_cannot_train(tmp_path):
    write_table(tmp_path / "test.csv", sequence_rows(20))
    with stops("no training rows", "test 20"):
        setup(SequenceTable(), tmp_path)


def test_too_long_without_truncation(tmp_path):
    path = write_table(tmp_path / "x.csv", {"sequence": ["ACGTACGT", "AC"] * 10, "label": [0, 1] * 10})
    with stops(
        "x.csv: row 1", "expected at most max_length=4 characters, got 8", "10 rows are longer", "data.truncate"
    ):
        setup(SequenceTable(), path, max_length=4)
    data = setup(SequenceTable(), path, max_length=4, truncate="right")
    assert data.spec.max_length == 4 and set(v[0] for v in rows_of(data.test_dataloader()).values()) == {"ACGT", "AC"}
    assert any("cut to 4" in note for note in data.preflight()["notes"])


# FASTA, one file a class


@pytest.mark.parametrize("suffix", [".fa", ".fasta.gz"])
def test_fasta_classes(tmp_path, suffix):
    rng = np.random.default_rng(0)
    written = {}
    for name in ("yes", "no"):
        sequences = {f"{name}{i}": dna(rng, 40 + i) for i in range(20)}
        write_fasta(tmp_path / f"{name}{suffix}", sequences)
        written |= {k: (s, int(name == "yes")) for k, s in sequences.items()}
    data = setup(FastaClasses(), tmp_path)
    assert data.spec.class_names == ("no", "yes") and data.sizes == {"train": 29, "val": 3, "test": 8}
    assert (
        rows_of(data.train_dataloader()) | rows_of(data.val_dataloader()) | rows_of(data.test_dataloader()) == written
    )


def test_fasta_classes_with_splits(tmp_path):
    rng = np.random.default_rng(0)
    for split, n in (("train", 12), ("val", 4), ("test", 5)):
        for name in ("a", "b"):
            write_fasta(tmp_path / split / f"{name}.fa", {f"{i}": dna(rng, 30) for i in range(n)})
    assert setup(FastaClasses(), tmp_path).sizes == {"train": 24, "val": 8, "test": 10}


def test_files_that_are_no_fasta_are_told_and_hidden_ones_ignored(tmp_path):
    for name in ("a.fa", "b.fa", ".c.fa", "._b.fa", "deep/d.fa"):
        write_fasta(tmp_path / name, {"x": "ACGT", "y": "GGTT"})
    for name in ("e.fa.bz2", "f.txt", "README.md", "a.fa.fai"):
        (tmp_path / name).write_bytes(b"")
    data = setup(FastaClasses(), tmp_path, val_fraction=0, test_fraction=0)
    assert data.spec.class_names == ("a", "b")
    (note,) = [n for n in data.notes if "left out" in n]
    for part in ("1 .bz2", "1 .txt", "1 .fa", "expected .fa, ", "in the folder itself"):
        assert part in note, part
    data.predict = str(tmp_path)
    with pytest.warns(UserWarning, match="left out: 1 .bz2, 1 .txt"):
        data.setup("predict")
    assert len(data._predicted) == 6


def test_fasta_line_ends_and_bare_headers(tmp_path):
    (tmp_path / "a.fa").write_bytes(b"\r\n>\r\nAC\r\nGT\r\n> 12 x\r\nacgt\r\n" * 1)
    (tmp_path / "b.fa").write_bytes(b">x>y\rAA\r>z\rCC")
    data = setup(FastaClasses(), tmp_path, val_fraction=0, test_fraction=0)
    assert rows_of(data.train_dataloader()) == {
        "record_1": ("ACGT", 0),
        "12": ("ACGT", 0),
        "x>y": ("AA", 1),
        "z": ("CC", 1),
    }


def test_bad_fasta(tmp_path):
    with stops("data.path is not set", "one FASTA file a class"):
        SequenceDataModule(FastaClasses()).setup("fit")
    with stops("expected FASTA files", ".fa", "found none"):
        setup(FastaClasses(), tmp_path)
    good = write_fasta(tmp_path / "a.fa", {"x": "ACGT"})
    with stops("expected at least two classes (FASTA files), got one: 'a'"):
        setup(FastaClasses(), tmp_path)
    with stops("expected a folder", "got the file"):
        setup(FastaClasses(), good)
    bad = tmp_path / "b.fa"
    for content, parts in (
        (b"", ["b.fa", "expected FASTA records", "found none"]),
        (b"ACGT\n", ["b.fa", "expected FASTA records", "found none"]),
        (b"ACGT\n>x\nAC\n", ["b.fa", "expected '>' at the start", "ACGT"]),
        (b">x\nAC\n>y\n>z\nAC\n", ["b.fa", "record 2 (y)", "expected a sequence, got none"]),
        (b">x\nAC\n>y\nAC4\n", ["b.fa: record 2", "expected letters, got '4' at position 3"]),
    ):
        bad.write_bytes(content)
        with stops(*parts):
            setup(FastaClasses(), tmp_path)
    bad.unlink()
    (tmp_path / "b.fa.gz").write_bytes(gzip.compress(b">x\nACGT\n")[:-9])
    with stops("b.fa.gz", "cannot be read"):
        setup(FastaClasses(), tmp_path)


# FASTA and BED


def bed_files(tmp_path, lines, gz=False):
    rng = np.random.default_rng(0)
    genome = {"chr1": dna(rng, 500), "chr2": dna(rng, 300), "chr3": dna(rng, 100)}
    fasta = write_fasta(tmp_path / ("genome.fa.gz" if gz else "genome.fa"), genome)
    text = "\n".join("\t".join(map(str, line)) for line in lines) + "\n"
    bed = tmp_path / ("x.bed.gz" if gz else "x.bed")
    bed.write_bytes(gzip.compress(text.encode()) if gz else text.encode())
    return fasta, bed, genome


def bed_lines(n=30):
    rng = np.random.default_rng(1)
    chosen = [(f"chr{1 + i % 2}", int(rng.integers(0, 250)), "ab"[i // 2 % 2], "+-"[i // 4 % 2]) for i in range(n)]
    return [(c, start, start + 20 + i, name, 0, strand) for i, (c, start, name, strand) in enumerate(chosen)]


@pytest.mark.parametrize("gz", [False, True])
def test_bed_cuts_intervals_on_their_strand(tmp_path, gz):
    lines = bed_lines()
    fasta, bed, genome = bed_files(tmp_path, [("track name=x",), ("# a comment",), *lines], gz)
    data = setup(FastaBed(str(fasta)), bed, val_fraction=0, test_fraction=0)
    expected = {}
    for c, start, end, name, _, strand in lines:
        text = genome[c][start:end]
        if strand == "-":
            text = reverse_complement(text.encode()).decode()
        expected[f"{c}:{start}-{end}({strand})"] = (text, "ab".index(name))
    assert rows_of(data.train_dataloader()) == expected and data.spec.class_names == ("a", "b")


def test_names_of_intervals_are_no_classes(tmp_path):
    lines = [(c, start, end, f"peak{i}", *rest) for i, (c, start, end, _, *rest) in enumerate(bed_lines())]
    fasta, bed, _ = bed_files(tmp_path, lines)
    with stops("got 30 values of which 30 have one row ('peak0', 'peak1'", "label_column", "problem=regression"):
        setup(FastaBed(str(fasta)), bed)
    with stops("data.test_fraction: expected at least one row in a part of 0.2, got none", "or set it to 0"):
        setup(FastaBed(str(fasta)), bed, problem="multiclass", val_fraction=0)
    data = setup(FastaBed(str(fasta)), bed, problem="multiclass", val_fraction=0, test_fraction=0)
    assert len(data.spec.class_names) == 30


def test_numbers_that_hardly_repeat_are_no_classes(tmp_path):
    columns = {"sequence": ["ACGT"] * 50, "label": [*range(100, 120), *[1, 2, 3, 4, 5] * 6]}
    with stops("got 25 values of which 20 have one row (100, 101, 102, 103, 104, …)", "problem=regression"):
        setup(SequenceTable(), write_table(tmp_path / "x.csv", columns))


def test_bed_columns_by_name_and_number(tmp_path):
    lines = [(*line, 0.5 * i, ["train", "test"][i % 2]) for i, line in enumerate(bed_lines())]
    header = ("#chrom", "start", "end", "name", "score", "strand", "signal", "part")
    fasta, bed, _ = bed_files(tmp_path, [header, *lines])
    data = setup(FastaBed(str(fasta), label_column="signal", split_column="part"), bed, problem="regression")
    assert data.sizes == {"train": 13, "val": 2, "test": 15}
    assert setup(FastaBed(str(fasta), label_column=7, split_column=8), bed, problem="regression").sizes == data.sizes
    with stops("data.source.label_column", "expected the column 'y'", "chrom, start, end"):
        setup(FastaBed(str(fasta), label_column="y"), bed)
    with stops("x.bed: line 2", "expected a column 9", "found 8 columns"):
        setup(FastaBed(str(fasta), label_column=9), bed)


def test_bed_groups_by_column(tmp_path):
    lines = [*bed_lines(), *(("chr3", i, i + 30, "ab"[i % 2], 0, "+") for i in range(6))]
    fasta, bed, _ = bed_files(tmp_path, lines)
    data = setup(FastaBed(str(fasta), group_column=1), bed, test_fraction=0.4, val_fraction=0.3)
    found = [{data.examples.ids[int(row)].as_py().split(":")[0] for row in rows} for rows in data.splits.values()]
    assert all(found) and sum(map(len, found)) == 3  # chromosomes
    fasta, bed, _ = bed_files(tmp_path, [*lines[:5], (*lines[5][:3], "", *lines[5][4:])])
    with stops("x.bed: line 6", "expected a value in column 4 (data.source.group_column)"):
        setup(FastaBed(str(fasta), label_column=5, group_column=4), bed)


def test_bed_splits_by_chromosome(tmp_path):
    lines = [*bed_lines(), *(("chr3", i, i + 30, "ab"[i % 2], 0, "+") for i in range(6))]
    fasta, bed, _ = bed_files(tmp_path, lines)
    data = setup(FastaBed(str(fasta), val_chromosomes=["chr3"], test_chromosomes=["chr2"]), bed)
    assert data.sizes == {"train": 15, "val": 6, "test": 15}
    assert all(name.startswith("chr2") for name in rows_of(data.test_dataloader()))
    with stops("test_chromosomes", "no interval on chrX", "found chr1, chr2, chr3"):
        setup(FastaBed(str(fasta), test_chromosomes=["chrX"]), bed)
    with stops("chromosomes in common"):
        setup(FastaBed(str(fasta), val_chromosomes=["chr2"], test_chromosomes=["chr2"]), bed)
    with stops("either split_column or val_/test_chromosomes"):
        FastaBed(str(fasta), split_column=7, test_chromosomes=["chr2"])


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (("chr1", 1), ["x.bed: line 2", "expected chromosome, start and end"]),
        (("chr1", "a", 9, "a"), ["x.bed: line 2", "expected chromosome, start and end"]),
        (("chr1", 9, 9, "a"), ["x.bed: line 2", "expected start < end, got 9 and 9"]),
        (("chr1", 490, 501, "a"), ["x.bed: line 2", "at most 500 (length of chr1), got 501"]),
        (("chr9", 1, 9, "a"), ["x.bed: line 2", "has no record 'chr9'", "it has chr1, chr2, chr3"]),
        (("chr1", 1, 9, "a", 0, "x"), ["x.bed: line 2", "expected a strand", "got 'x'"]),
        (("chr1", 1, 9), ["x.bed: line 2", "expected a column 4", "found 3 columns"]),
    ],
)
def test_bad_bed(tmp_path, line, parts):
    fasta, bed, _ = bed_files(tmp_path, [("chr1", 1, 9, "a"), line])
    with stops(*parts):
        setup(FastaBed(str(fasta)), bed)


def test_bed_without_its_files(tmp_path):
    fasta, bed, _ = bed_files(tmp_path, bed_lines())
    with stops("data.path is not set", "a BED file"):
        SequenceDataModule(FastaBed(str(fasta))).setup("fit")
    with stops("data.source.fasta is not set"):
        setup(FastaBed(), bed)
    with stops("data.source.fasta", "nothing is at"):
        setup(FastaBed(str(tmp_path / "no.fa")), bed)
    with stops("data.source.fasta", "expected a FASTA file", "x.bed"):
        setup(FastaBed(str(bed)), bed)
    bed.write_text("# nothing\n")
    with stops("x.bed", "expected BED lines, found none"):
        setup(FastaBed(str(fasta)), bed)


# The Hub, without a connection


def test_hub_data_go_the_same_way(monkeypatch):
    import datasets

    features = datasets.Features({"seq": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "aye"])})
    made = {
        split: datasets.Dataset.from_dict(
            {"seq": sequence_rows(n, seed=n)["sequence"], "label": [i % 2 for i in range(n)]}, features
        )
        for split, n in (("train", 30), ("test", 11))
    }
    asked = []

    def load_dataset(name, config=None, cache_dir=None):
        asked.append((name, config))
        return datasets.DatasetDict(made)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = SequenceDataModule(SequenceTable("me/set_{task}", sequence_column="seq"), task="cats")
    data.prepare_data()
    data.setup("fit")
    assert asked[0] == ("me/set_cats", None) and data.spec.class_names == ("no", "aye")
    assert data.sizes == {"train": 27, "val": 3, "test": 11}

    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: ["cats", "dogs"])
    data = SequenceDataModule(SequenceTable("me/set", sequence_column="seq"), task="dogs")
    data.setup("fit")
    assert asked[-1] == ("me/set", "dogs")
    with stops("me/set, split train", "expected the column 'dna'", "found 'seq', 'label'"):
        SequenceDataModule(SequenceTable("me/set", sequence_column="dna")).setup("fit")


def test_hub_table_of_all_tasks(monkeypatch):
    import datasets

    columns = sequence_rows(40)
    table = datasets.Dataset.from_dict({**columns, "task": ["a", "a", "b", "b"] * 10})
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: ["default"])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"train": table, "test": table})
    data = SequenceDataModule(SequenceTable("me/set"), task="b")
    data.setup("fit")
    assert data.sizes == {"train": 18, "val": 2, "test": 20}


def test_hub_without_a_connection():
    data = SequenceDataModule(SequenceTable("me/nothing_here", sequence_column="seq"))
    with stops("cannot load 'me/nothing_here' from the Hub", "data.path= a local copy"):
        data.prepare_data()
    with stops("data.task is not set", "me/{task}"):
        SequenceDataModule(SequenceTable("me/{task}")).prepare_data()


def test_saved_to_disk_by_datasets(tmp_path):
    import datasets

    made = datasets.Dataset.from_dict(sequence_rows(40)).filter(lambda row: len(row["sequence"]) > 0)
    datasets.DatasetDict({"train": made.select(range(30)), "test": made.select(range(30, 40))}).save_to_disk(
        str(tmp_path / "x")
    )
    assert setup(SequenceTable(), tmp_path / "x").sizes == {"train": 27, "val": 3, "test": 10}


def test_class_names_written_by_datasets_into_parquet(tmp_path):
    import datasets

    features = datasets.Features(
        {"sequence": datasets.Value("string"), "label": datasets.ClassLabel(names=["zero", "one"])}
    )
    datasets.Dataset.from_dict(sequence_rows(40), features).to_parquet(str(tmp_path / "train.parquet"))
    assert setup(SequenceTable(), tmp_path).spec.class_names == ("zero", "one")


def test_memory_mapped_when_large(tmp_path, monkeypatch):
    from bimamba.data.sources import rows

    columns = sequence_rows(40)
    path = write_table(tmp_path / "data" / "train.parquet", columns).parent
    monkeypatch.setattr(rows, "MAPPED_ABOVE", 10)
    mapped = setup(SequenceTable(cache_dir=str(tmp_path / "cache")), path)
    monkeypatch.undo()
    plain = setup(SequenceTable(), path)
    assert (tmp_path / "cache").exists()
    assert list(rows_of(mapped.train_dataloader()).values()) == list(rows_of(plain.train_dataloader()).values())


def test_columns_of_different_types_do_not_go_together(tmp_path):
    write_table(tmp_path / "train.csv", sequence_rows(10))
    write_table(tmp_path / "test.csv", {"sequence": ["AC", "GT"], "label": ["x", "y"]})
    with stops("do not go together", "train.csv", "test.csv"):
        setup(SequenceTable(), tmp_path)


def test_arrow_files(tmp_path):
    table = pa.table(sequence_rows(40))
    with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    assert setup(SequenceTable(), tmp_path / "x.arrow").sizes["train"] == 29
