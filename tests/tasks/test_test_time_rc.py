"""task.test_time_rc: test and prediction read both strands, padded and packed; training and validation read one."""

import pyarrow.parquet as pq
import pytest
import torch
from runs import TINY, load, run
from test_supervised import task

from bimamba.data.collate import pack_rows
from bimamba.data.sequences import reverse_complement
from bimamba.models import Classifier
from bimamba.nn import BiMamba2
from bimamba.spec import DataSpec
from bimamba.tasks import SupervisedTask

CLASSES = DataSpec("sequence", "multiclass", ("a", "b", "c"), alphabet="ACGTN", max_length=12)


def small(d_model):
    return BiMamba2(d_model, headdim=8, d_state=4)


def classifier(**options):
    torch.manual_seed(0)
    return Classifier(CLASSES, 8, 1, mixer=small, **options).double().eval()


def test_logits_are_the_mean_and_those_of_the_equivariant_network():
    lengths = torch.tensor([5, 12, 1, 7])
    flat = torch.randint(1, 6, (25,), generator=torch.Generator().manual_seed(0))
    starts = lengths.cumsum(0) - lengths
    tokens, mask, packing = pack_rows(flat, starts, lengths, 13)
    padded = torch.nn.utils.rnn.pad_sequence(flat.split(lengths.tolist()), batch_first=True)
    one = SupervisedTask(classifier(), CLASSES, torch.optim.AdamW, test_time_rc=True)
    batches = [{"inputs": padded, "mask": padded > 0}, {"inputs": tokens, "mask": mask, **packing._asdict()}]
    equivariant = classifier(rc_equivariant=True)
    for batch in batches:
        batch["id"] = list("wxyz")
        expected = equivariant(padded, padded > 0)
        torch.testing.assert_close(one.logits_of_both_strands(batch), expected, atol=1e-12, rtol=1e-10)
        for stage in ("test", "predict"):
            found = one.shared_step(batch, stage)["probabilities"]
            torch.testing.assert_close(found, expected.float().softmax(-1))
        plain = one.shared_step(batch, "val")["probabilities"]
        torch.testing.assert_close(plain, one(batch).float().softmax(-1))
        assert (plain - found).abs().max() > 1e-5  # else nothing was averaged


def test_clear_errors():
    image = DataSpec("image", "binary", ("no", "yes"), channels=1, height=4, width=4)
    with pytest.raises(ValueError, match=r"task\.test_time_rc: expected DNA sequences, got data of kind 'image'"):
        task(image, test_time_rc=True)
    protein = DataSpec("sequence", "binary", ("no", "yes"), alphabet="ACDEFGX", max_length=9)
    with pytest.raises(ValueError, match=r"task\.test_time_rc: a reverse complement needs a DNA alphabet"):
        task(protein, test_time_rc=True)
    with pytest.raises(ValueError, match=r"expected false with model\.rc_equivariant=true"):
        SupervisedTask(classifier(rc_equivariant=True), CLASSES, torch.optim.AdamW, test_time_rc=True)


def test_a_checkpoint_is_tested_on_both_strands(tmp_path):
    """An option of the evaluation alone: typed on top of a checkpoint that was trained before there was one."""
    (tmp_path / "classes").mkdir()
    letters = torch.randint(4, (60, 20), generator=torch.Generator().manual_seed(0)).tolist()
    for i, name in enumerate(("no", "yes")):
        rows = ["".join("ACGT"[c] for c in row) for row in letters[i::2]]
        (tmp_path / "classes" / f"{name}.fa").write_text("".join(f">{n}\n{row}\n" for n, row in enumerate(rows)))
    quiet = ["callbacks.learning_curves=null", "callbacks.examples=null", "logger=none"]
    options = ["experiment=promoters", f"data.path={tmp_path / 'classes'}", *TINY, *quiet, "trainer.max_epochs=1"]
    run(tmp_path / "trained", *options, "test=false", "trainer.num_sanity_val_steps=0")
    path = tmp_path / "trained" / "checkpoints" / "last.ckpt"
    saved = load(path)
    for config in (saved["config"], saved["recipe"]):
        del config["task"]["test_time_rc"]
    torch.save(saved, path)
    found = []
    for strand in ("own", "other"):
        rows = [b"ACGTTGCAN", b"GGGATCCAACGTTTTTT"]
        rows = [row if strand == "own" else reverse_complement(row) for row in rows]
        (tmp_path / "new.fa").write_bytes(b"".join(b">%d\n%s\n" % (i, row) for i, row in enumerate(rows)))
        evaluate = [f"ckpt_path={path}", "extras.print_config=false"]
        evaluate += ["stage=predict", f"data.predict={tmp_path / 'new.fa'}", "task.test_time_rc=true", "logger=none"]
        run(tmp_path / strand, *evaluate, "callbacks.learning_curves=null", "callbacks.examples=null")
        found.append(pq.read_table(tmp_path / strand / "predictions.parquet")["probability_yes"].to_numpy())
    assert found[0] == pytest.approx(found[1], abs=1e-6)
