"""model.rc_equivariant: nothing changes by reverse complement but the order of tokens and the strands' places."""

import pyarrow.parquet as pq
import pytest
import torch
from runs import TINY, load, run
from test_packed import DNA, IMAGE, MIXERS, POOLINGS, build, packed, sequences

from bimamba.data.sequences import reverse_complement
from bimamba.models import Classifier
from bimamba.nn import TokenPooling
from bimamba.packing import Packing, pick
from bimamba.program import export_program
from bimamba.spec import DataSpec
from bimamba.strands import both_strands, complement_tokens, other_strand, turned

LETTERS = DataSpec("sequence", "multiclass", tuple("TACG"), alphabet="ACGTN", max_length=40)
COMPLEMENT = complement_tokens("ACGTN").long()
CLOSE = dict(atol=1e-12, rtol=1e-10)  # float64


def equivariant(**options):
    torch.manual_seed(0)
    return build(rc_equivariant=True, **options).eval()


def turned_row(tokens):
    return COMPLEMENT[tokens.flip(0)]


@pytest.mark.parametrize("spec,pooling", [(DNA, "mean"), (LETTERS, "token")])
def test_made_on_meta_it_takes_the_weights_of_another(spec, pooling):
    options = dict(d_model=16, depth=1, mixer=MIXERS["bimamba2"], pooling=POOLINGS.get(pooling, TokenPooling))
    model = Classifier(spec, rc_equivariant=True, **options).eval()
    with torch.device("meta"):
        again = Classifier(spec, rc_equivariant=True, **options).eval()
    again.load_state_dict(model.state_dict(), assign=True)
    tokens = sequences()[0][None]
    assert torch.equal(again(tokens), model(tokens))
    assert all(b.is_meta for b in again.to("meta").buffers())


def test_the_other_strand_of_packed_rows():
    tokens, mask, *rest = packed(sequences())
    packing = Packing(*rest)
    both, both_mask, both_packing = both_strands(tokens, COMPLEMENT, mask, packing)
    place = pick(both_packing.bounds[:, :-1].unflatten(0, (-1,)), both_packing)
    row = both_packing.order // (packing.bounds.shape[1] - 1)
    expected = [*sequences(), *map(turned_row, sequences())]
    for r, first, sequence in zip(row, place, expected, strict=True):
        assert torch.equal(both[r, first : first + len(sequence)], sequence)
    assert torch.equal(both_mask, both > 0)
    again = other_strand(other_strand(tokens, COMPLEMENT, mask, packing), COMPLEMENT, mask, packing)
    assert torch.equal(again, tokens)


@pytest.mark.parametrize(
    "mixer,pooling",
    [*((m, "mean") for m in MIXERS), *(("bimamba2", p) for p in POOLINGS if p != "mean")],
)
def test_logits_are_those_of_the_reverse_complement(mixer, pooling):
    model = equivariant(mixer=mixer, pooling=pooling, positions="learned", mlp="swiglu")
    plain = build(mixer=mixer, pooling=pooling, positions="learned", mlp="swiglu").eval()
    plain.load_state_dict(model.state_dict())  # the same parameters, by name and number
    rows = sequences()
    other = [turned_row(tokens) for tokens in rows]
    alone = torch.cat([model(tokens[None]) for tokens in rows])
    padded, padded_other = (torch.nn.utils.rnn.pad_sequence(r, batch_first=True) for r in (rows, other))
    torch.testing.assert_close(torch.cat([model(tokens[None]) for tokens in other]), alone, **CLOSE)
    torch.testing.assert_close(model(padded_other, padded > 0), alone, **CLOSE)
    torch.testing.assert_close(model(padded, padded > 0), alone, **CLOSE)
    tokens, mask, *rest = packed(rows)
    torch.testing.assert_close(model(tokens, mask, *rest), alone, **CLOSE)
    turned_tokens = other_strand(tokens, COMPLEMENT, mask, Packing(*rest))
    torch.testing.assert_close(model(turned_tokens, mask, *rest), alone, **CLOSE)
    noise = torch.where(mask, tokens, 2)
    torch.testing.assert_close(model(noise, mask, *rest), alone, **CLOSE)
    # a network that reads one strand tells them apart: what is tested above is not a property of every network
    mean = (plain(padded, padded > 0) + plain(padded_other, padded > 0)) / 2
    torch.testing.assert_close(mean, alone, **CLOSE)
    assert (plain(padded, padded > 0) - plain(padded_other, padded > 0)).abs().max() > 1e-4


@pytest.mark.parametrize("how", ["padded", "packed"])
def test_tokens_turn_with_the_sequence(how):
    torch.manual_seed(0)
    model = Classifier(LETTERS, 16, 2, mixer=MIXERS["bimamba2"], pooling=TokenPooling, rc_equivariant=True).double()
    if how == "packed":
        tokens, mask, *rest = packed(sequences())
        packing = Packing(*rest)
    else:
        tokens = torch.nn.utils.rnn.pad_sequence(sequences(), batch_first=True)
        mask, rest, packing = tokens > 0, (), None
    other = other_strand(tokens, COMPLEMENT, mask, packing)
    features, features_other = model.features(tokens, mask, *rest), model.features(other, mask, *rest)
    assert features.shape == (*tokens.shape, 32)
    exchanged = turned(features, mask, packing).roll(16, dims=-1)
    torch.testing.assert_close(features_other[mask], exchanged[mask], **CLOSE)
    logits, logits_other = model(tokens, mask, *rest), model(other, mask, *rest)
    letters = ["TACG".index(dict(A="T", C="G", G="C", T="A")[c]) for c in "TACG"]
    torch.testing.assert_close(logits_other[mask], turned(logits, mask, packing)[mask][:, letters], **CLOSE)


def test_float32_gradients_and_number_of_parameters():
    torch.manual_seed(0)
    model = Classifier(DNA, 16, 2, mixer=MIXERS["untied"], pooling=POOLINGS["attention"], rc_equivariant=True)
    padded = torch.nn.utils.rnn.pad_sequence(sequences(), batch_first=True)
    logits = model(padded, padded > 0)
    other = model(other_strand(padded, COMPLEMENT, padded > 0), padded > 0)
    assert (logits - other).abs().max() <= 1e-6 * max(1.0, logits.abs().max().item())
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    plain = Classifier(DNA, 16, 2, mixer=MIXERS["untied"], pooling=POOLINGS["attention"])
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_it_is_exported_for_any_batch(tmp_path):
    model = Classifier(DNA, 16, 1, mixer=MIXERS["bimamba2"], rc_equivariant=True)
    export_program(model, tmp_path / "model.pt2")  # compares at two batch sizes


def test_clear_errors():
    with pytest.raises(ValueError, match=r"model\.rc_equivariant: expected DNA sequences, got data of kind 'image'"):
        Classifier(IMAGE, 16, 1, mixer=MIXERS["bimamba2"], rc_equivariant=True)
    protein = DataSpec("sequence", "binary", ("no", "yes"), alphabet="ACDEFGX", max_length=9)
    with pytest.raises(ValueError, match=r"model\.rc_equivariant: a reverse complement needs a DNA alphabet"):
        Classifier(protein, 16, 1, mixer=MIXERS["bimamba2"], rc_equivariant=True)
    with pytest.raises(ValueError, match=r"classes that are letters with their complements.*got \['a', 'b', 'c'\]"):
        Classifier(DNA, 16, 1, mixer=MIXERS["bimamba2"], pooling=TokenPooling, rc_equivariant=True)


QUIET = ["callbacks.learning_curves=null", "callbacks.examples=null", "logger=none", "trainer.num_sanity_val_steps=0"]


def test_a_run_pretrains_fine_tunes_and_explains(tmp_path):
    """Two commands in equivariant form, then a checkpoint whose logits a reverse complement leaves as they are."""
    generator = torch.Generator().manual_seed(0)

    def fasta(name, rows, length):
        letters = torch.randint(4, (rows, length), generator=generator).tolist()
        path = tmp_path / name
        path.write_text("".join(f">{i}\n{''.join('ACGT'[c] for c in row)}\n" for i, row in enumerate(letters)))

    fasta("genome.fa", 2, 600)
    (tmp_path / "classes").mkdir()
    for name, rows in (("yes", 40), ("no", 30)):
        fasta(f"classes/{name}.fa", rows, 21 + rows)
    options = [*TINY, *QUIET, "model.rc_equivariant=true", "trainer.max_epochs=1"]
    genome = ["experiment=dna_pretrain", f"data.path={tmp_path / 'genome.fa'}", "data.window=64", "data.batch_size=16"]
    run(tmp_path / "pretrained", *genome, *options)
    start = f"model.pretrained={tmp_path / 'pretrained' / 'checkpoints' / 'last.ckpt'}"
    classes = ["experiment=promoters", f"data.path={tmp_path / 'classes'}", "data.packing=true"]
    run(tmp_path / "tuned", *classes, *options, start)
    checkpoint = tmp_path / "tuned" / "checkpoints" / "last.ckpt"
    saved = load(checkpoint)
    assert not any("complement" in k for k in saved["state_dict"]) and saved["config"]["model"]["rc_equivariant"]
    found = []
    for strand in ("own", "other"):
        rows = [row if strand == "own" else reverse_complement(row) for row in (b"ACGTTGCAN", b"GGGATCCAACGTTTTTT")]
        (tmp_path / "new.fa").write_bytes(b"".join(b">%d\n%s\n" % (i, row) for i, row in enumerate(rows)))
        predict = ["stage=predict", f"ckpt_path={checkpoint}", f"data.predict={tmp_path / 'new.fa'}", "logger=none"]
        run(tmp_path / strand, *predict, *QUIET[:2], "extras.print_config=false")
        table = pq.read_table(tmp_path / strand / "predictions.parquet")
        found.append(torch.tensor(table["probability_yes"].to_pylist()))
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=0)
    explained = [
        "extras.print_config=false",
        "explain.samples=1",
        "explain.statistics.samples=4",
        "explain.mutagenesis.samples=1",
    ]
    metrics = run(tmp_path / "seen", "stage=explain", f"ckpt_path={checkpoint}", *explained, "logger=none", *QUIET[:2])
    assert metrics["explain/mixing_matrix_error"] < 1e-3
