"""Bytes to tokens, padding, and the other strand."""

from functools import partial

import numpy as np
import pyarrow as pa
import pytest
import torch

from bimamba.data.augment import RandomSubstitution, ReverseComplement
from bimamba.data.collate import pack_rows, pad_rows
from bimamba.data.sequences import ByteRows, check_alphabet, reverse_complement, tokenise
from bimamba.strands import complement_tokens


def where(row):
    return f"x.csv: row {row + 1}"


def tokens(*rows, **options):
    return tokenise(ByteRows.from_list([r.encode() for r in rows]), where, **options)


def row(store, i):
    return store.tokens[store.offsets[i] : store.offsets[i + 1]].tolist()


def test_tokens_of_dna():
    store = tokens("ACGTN", "acgtu", "RYX-")
    assert row(store, 0) == [1, 2, 3, 4, 5]
    assert row(store, 1) == [1, 2, 3, 4, 4]
    assert row(store, 2) == [5, 5, 5, 5]
    assert store.unknown == {"-": 1, "N": 1, "R": 1, "X": 1, "Y": 1}
    assert store.lengths.tolist() == [5, 5, 4]


def test_tokens_of_another_alphabet():
    store = tokens("MKU", "W", alphabet="KMWX")
    assert row(store, 0) == [2, 1, 4] and row(store, 1) == [3] and store.unknown == {"U": 1}


@pytest.mark.parametrize(("truncate", "kept"), [("left", "GTA"), ("right", "ACG"), ("center", "CGT")])
def test_truncation(truncate, kept):
    store = tokens("AC", "ACGTA", max_length=3, truncate=truncate)
    assert row(store, 0) == [1, 2]
    assert row(store, 1) == ["ACGT".index(c) + 1 for c in kept]
    assert store.truncated == 1


def test_bad_rows():
    with pytest.raises(ValueError, match=r"x.csv: row 2: expected at most max_length=3 characters, got 5 \(1 rows"):
        tokens("AC", "ACGTA", max_length=3)
    with pytest.raises(ValueError, match=r"x.csv: row 2: expected a sequence, got an empty one"):
        tokens("AC", "", "A")
    with pytest.raises(ValueError, match=r"x.csv: row 2: expected letters, got '1' at position 3"):
        tokens("AC", "AC1T")


@pytest.mark.parametrize("alphabet", ["", "A", "acgt", "AAC", "AC GT", "ÄC"])
def test_bad_alphabet(alphabet):
    with pytest.raises(ValueError, match="expected different capital letters"):
        check_alphabet(alphabet)


def test_dna_needs_a_letter_for_unknown_bases():
    with pytest.raises(ValueError, match="expected a last letter for unknown bases"):
        check_alphabet("ACGT")


def test_rows_from_arrow_chunks_and_slices():
    rows = ["AC", "GTGT", "", "T", "ACGTACGT"]
    column = pa.chunked_array([pa.array(rows[:2]), pa.array(rows[1:]).slice(1)])
    found = ByteRows.from_arrow(column, "s", where)
    assert [found[i].decode() for i in range(len(found))] == ["AC", "GTGT", "", "T", "ACGTACGT"]
    encoded = ByteRows.from_arrow(pa.chunked_array([pa.array(["AC", "GT", "AC"]).dictionary_encode()]), "s", where)
    assert [encoded[i] for i in range(3)] == [b"AC", b"GT", b"AC"]


def test_rows_from_arrow_reject_numbers_and_nulls():
    with pytest.raises(ValueError, match="column 's': expected sequences as text, got type int64"):
        ByteRows.from_arrow(pa.chunked_array([pa.array([1])]), "s", where)
    with pytest.raises(ValueError, match=r"x.csv: row 2: column 's': expected a sequence, got a missing value"):
        ByteRows.from_arrow(pa.chunked_array([pa.array(["A", None])]), "s", where)


def test_strip():
    stripped = ByteRows.from_list([b" AC\n", b"GT"]).strip()
    assert [stripped[i] for i in range(2)] == [b"AC", b"GT"]


@pytest.mark.parametrize(("multiple", "length"), [(1, 5), (4, 8), (5, 5)])
def test_padding_stands_at_the_end(multiple, length):
    store = tokens("ACG", "ACGTA", "T")
    ids, mask = store.batch(torch.tensor([2, 1, 0]), multiple)
    assert ids.shape == mask.shape == (3, length) and ids.dtype == torch.int64 and mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [1, 5, 3]
    assert ids[0].tolist() == [4] + [0] * (length - 1)
    assert ids[1, :5].tolist() == [1, 2, 3, 4, 1]
    assert (ids[~mask] == 0).all() and (ids[mask] > 0).all()
    assert (mask[:, :-1].int() >= mask[:, 1:].int()).all()


def test_batch_takes_its_longest_row_only():
    store = tokens("ACG", "ACGTA" * 10, "T")
    assert store.batch(torch.tensor([0, 2]))[0].shape == (2, 3)
    flat, starts, lengths = torch.arange(1, 7), torch.tensor([3, 0]), torch.tensor([2, 3])
    assert pad_rows(flat, starts, lengths)[0].tolist() == [[4, 5, 0], [1, 2, 3]]


def test_reverse_complement_of_bytes():
    assert reverse_complement(b"AACGTNry") == b"ryNACGTT"
    every = b"ACGTNRYSWKMBDHV"
    assert reverse_complement(reverse_complement(every)) == every


def test_reverse_complement_augmentation_keeps_padding_at_the_end():
    rng = np.random.default_rng(0)
    rows = ["".join(rng.choice(list("ACGTN"), n)) for n in (1, 5, 9, 3)]
    store = tokens(*rows)
    ids, mask = store.batch(torch.arange(4))
    turned = ReverseComplement("ACGTN", 1.0)(ids, mask)
    expected, _ = tokens(*(reverse_complement(r.encode()).decode() for r in rows)).batch(torch.arange(4))
    assert torch.equal(turned, expected)
    assert torch.equal(ReverseComplement("ACGTN", 0.0)(ids, mask), ids)


def test_reverse_complement_augmentation_turns_some_rows_as_the_generator_says():
    ids, mask = tokens(*["AACCG"] * 400).batch(torch.arange(400))
    augment = ReverseComplement("ACGTN", 0.5)
    torch.manual_seed(0)
    once = augment(ids, mask)
    share = (once != ids).any(1).float().mean()
    assert 0.4 < share < 0.6
    torch.manual_seed(0)
    assert torch.equal(augment(ids, mask), once)


def test_substitution_draws_real_characters_anew():
    ids, mask = tokens(*["AACCG" * 20] * 50, "AC").batch(torch.arange(51))
    torch.manual_seed(0)
    drawn = RandomSubstitution("ACGTN", 0.4)(ids, mask)
    assert torch.equal(drawn == 0, ids == 0) and drawn.max() == 4  # padding stays, nothing becomes unknown
    share = (drawn != ids)[mask].float().mean()
    assert 0.27 < share < 0.33  # 0.4, less the quarter that comes out as it was
    with pytest.raises(ValueError, match=r"substitution: expected a probability in \[0, 1\], got -1"):
        RandomSubstitution("ACGTN", -1)


def test_complement_needs_dna():
    assert complement_tokens("ACGTN").tolist() == [0, 4, 3, 2, 1, 5]
    assert complement_tokens("TGCAN").tolist() == [0, 4, 3, 2, 1, 5]
    with pytest.raises(ValueError, match="needs a DNA alphabet"):
        ReverseComplement("ACDEX", 0.5)
    with pytest.raises(ValueError, match=r"probability in \[0, 1\], got 2"):
        ReverseComplement("ACGTN", 2)


def test_rows_beyond_the_array_are_refused():
    """A slice would be shorter without a word, and one of a single token would fill its row."""
    flat, starts, lengths = torch.arange(10, dtype=torch.uint8), torch.tensor([9, 0]), torch.tensor([4, 2])
    for make in (pad_rows, partial(pack_rows, pack_length=8)):
        with pytest.raises(IndexError, match="expected rows within 10 tokens, got one that ends at 13"):
            make(flat, starts, lengths)
