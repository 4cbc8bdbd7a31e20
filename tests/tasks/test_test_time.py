"""task.test_time_rc, task.test_time_flip: test and prediction see both views of a row; training and validation one."""

from functools import partial

import pyarrow.parquet as pq
import pytest
import torch
from runs import TINY, load, run
from test_supervised import task

from bimamba.data.collate import pack_rows
from bimamba.data.sequences import reverse_complement
from bimamba.models import Classifier
from bimamba.nn import BiMamba2, PatchEmbedding
from bimamba.spec import DataSpec
from bimamba.tasks import SupervisedTask
from bimamba.tasks.compilation import compile_network

CLASSES = DataSpec("sequence", "multiclass", ("a", "b", "c"), alphabet="ACGTN", max_length=12)
IMAGE = DataSpec("image", "binary", ("no", "yes"), channels=1, height=4, width=6)


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
        torch.testing.assert_close(one.logits_of_both_views(batch), expected, atol=1e-12, rtol=1e-10)
        for stage in ("test", "predict"):
            found = one.shared_step(batch, stage)["probabilities"]
            torch.testing.assert_close(found, expected.float().softmax(-1))
        plain = one.shared_step(batch, "val")["probabilities"]
        torch.testing.assert_close(plain, one(batch).float().softmax(-1))
        assert (plain - found).abs().max() > 1e-5  # else nothing was averaged


def test_mirror_images_give_the_same_in_test_and_prediction():
    torch.manual_seed(0)
    net = Classifier(IMAGE, 8, 1, embedding=partial(PatchEmbedding, patch_size=2), mixer=small).double().eval()
    both = SupervisedTask(net, IMAGE, torch.optim.AdamW, test_time_flip=True)
    images = torch.randn(3, 1, 4, 6, dtype=torch.float64)
    here, there = {"inputs": images, "id": [0, 1, 2]}, {"inputs": images.flip(-1), "id": [0, 1, 2]}
    expected = (net(images) + net(images.flip(-1))) / 2
    torch.testing.assert_close(both.logits_of_both_views(here), expected)
    for stage in ("test", "predict"):
        found = [both.shared_step(batch, stage)["probabilities"] for batch in (here, there)]
        torch.testing.assert_close(*found)
        torch.testing.assert_close(found[0], expected.float()[:, 0].sigmoid())
    plain = [both.shared_step(batch, "val")["probabilities"] for batch in (here, there)]
    assert (plain[0] - plain[1]).abs().max() > 1e-5  # else there was nothing to average
    place = torch.empty_like(expected)
    both.net.register_forward_hook(lambda net, inputs, output: place.copy_(output))  # as a CUDA graph has one
    torch.testing.assert_close(both.logits_of_both_views(here), expected)


@pytest.mark.gpu
def test_mirror_images_as_cuda_graphs():
    torch.manual_seed(0)
    net = Classifier(IMAGE, 8, 1, embedding=partial(PatchEmbedding, patch_size=2), mixer=small).cuda().eval()
    both = SupervisedTask(net, IMAGE, torch.optim.AdamW, test_time_flip=True)
    batch = {"inputs": torch.randn(3, 1, 4, 6, device="cuda")}
    with torch.no_grad():
        expected = both.logits_of_both_views(batch)
        compile_network(net, mode="reduce-overhead")
        for _ in range(4):  # warm-up, recording, replays
            torch.testing.assert_close(both.logits_of_both_views(batch), expected, atol=1e-4, rtol=1e-3)


def test_clear_errors():
    with pytest.raises(ValueError, match=r"task\.test_time_flip: expected images, got data of kind 'sequence'"):
        task(CLASSES, test_time_flip=True)
    with pytest.raises(ValueError, match=r"task\.test_time_rc: expected DNA sequences, got data of kind 'image'"):
        task(IMAGE, test_time_rc=True)
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
