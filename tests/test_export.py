"""stage=export: checkpoint to folder, card and program; and trainings that start from either."""

import re
import shutil
from functools import partial

import pytest
import torch
from huggingface_hub import ModelCard
from runs import DIGITS, load, run

from bimamba import export, program
from bimamba.checkpoint import read_checkpoint
from bimamba.models import Classifier
from bimamba.nn import BiMamba2
from bimamba.spec import DataSpec

QUIET = "extras.print_config=false"
# Pictures take longer than the training.
PLAIN = [*DIGITS, *(f"callbacks.{name}=null" for name in ("learning_curves", "examples", "predictions"))]
SMALL = DataSpec("sequence", "binary", ("no", "yes"), alphabet="ACGTN", max_length=12)
PROTEIN = DataSpec("sequence", "binary", ("no", "yes"), alphabet="ACDEFGHIKLMNPQRSTVWYX", max_length=20)
UNSCALED = DataSpec("image", "binary", ("no", "yes"), channels=3, height=8, width=8)


def small():
    return Classifier(SMALL, d_model=8, depth=1, mixer=partial(BiMamba2, headdim=8, d_state=4))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A short training; read only."""
    folder = tmp_path_factory.mktemp("fitted")
    options = ["trainer.max_epochs=1", "trainer.limit_train_batches=2"]
    metrics = run(folder, *PLAIN, *options, choices={"experiment": "digits"})
    return folder, metrics


@pytest.fixture(scope="module")
def exported(fitted, tmp_path_factory):
    """Its best checkpoint as a folder; read only."""
    out = tmp_path_factory.mktemp("exported")
    best = fitted[0] / "checkpoints" / "best.ckpt"
    run(out, "stage=export", f"ckpt_path={best}", QUIET, "export.license=mit")
    return out / "model"


def test_the_folder_is_the_checkpoint(fitted, exported):
    assert sorted(p.name for p in exported.iterdir()) == ["README.md", "config.json", "model.pt2", "model.safetensors"]
    model = Classifier.from_pretrained(exported)
    saved = load(fitted[0] / "checkpoints" / "best.ckpt")["state_dict"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved[f"net.{name}"]), name


def test_the_card_states_data_protocol_and_metrics(fitted, exported):
    card = ModelCard.load(exported / "README.md")
    assert card.data.license == "mit" and card.data.library_name == "bimamba"
    results = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert results["accuracy"] == pytest.approx(fitted[1]["test/accuracy"], abs=1e-6)
    assert card.data.eval_results[0].dataset_name == "Digits"
    for row in (
        "| source | Digits |",
        "| test_fraction | 0.2 |",
        "| rows (test) | 359 |",
        "| experiment | digits |",
        "| epochs | 1 of 1 |",
        "| chosen by | val/loss (min) |",
        "| task.optimizer | AdamW |",
        f"| test/mcc | {fitted[1]['test/mcc']:.4f} |",
    ):
        assert row in card.content, row


def test_the_code_of_the_card_runs(exported, monkeypatch):
    monkeypatch.chdir(exported.parent)
    code = re.search(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.DOTALL).group(1)
    scope = {}
    exec(code, scope)
    assert scope["logits"].shape == (2, 10)


def test_the_code_of_a_sequence_models_card_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small().save_pretrained("model", model_card_kwargs={"name": "model"})
    text = (tmp_path / "model" / "README.md").read_text()
    assert "Not recorded." in text and "None recorded: evaluate before you trust it." in text
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    scope, lower_rna = {}, {}
    exec(code, scope)
    assert scope["logits"].shape == (2, 1)
    assert scope["tokens"][1].tolist() == [4, 4, 3, 1, 2, 1, 5]
    exec(code.replace('"TTGACAN"', '"uugacan"'), lower_rna)  # read as the data module reads it
    assert torch.equal(scope["logits"], lower_rna["logits"])


@pytest.mark.parametrize("spec,tag", [(PROTEIN, "sequence"), (UNSCALED, "image")])
def test_the_card_tells_of_no_dna_and_no_normalisation_where_there_is_none(spec, tag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = Classifier(spec, d_model=16, depth=1, mixer=partial(BiMamba2, headdim=8))
    model.save_pretrained("model", model_card_kwargs={"name": "model"})
    text = (tmp_path / "model" / "README.md").read_text()
    assert ModelCard.load(tmp_path / "model" / "README.md").data.tags[-1] == tag
    assert "U is T" not in text and "mean, std" not in text
    scope = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1), scope)
    assert scope["logits"].shape == (2, 1)
    if tag == "sequence":
        assert scope["tokens"][1].tolist() == list(range(15, 22))  # all of them letters that it knows


def test_figures_are_those_of_the_same_weights_and_rows(fitted, tmp_path):
    """last.ckpt was not tested after fit: its card is silent until stage=test was run on the same rows."""
    shutil.copytree(fitted[0], tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    checkpoint = load(last)
    config = checkpoint["config"]
    assert export.find_metrics(last, checkpoint) == ({}, "")
    task = {**config["task"], "test_time_flip": True}
    few = {**config["trainer"], "limit_test_batches": 2}
    changes = {"data": {**config["data"], "seed": 1}}, {}, {"task": task}, {"trainer": few}
    for number, change in enumerate(changes, 1):
        out = tmp_path / "run" / "test" / str(number)
        out.mkdir(parents=True)
        export.record_evaluation(out, checkpoint, config | change, {"test/accuracy": number / 10})
    earlier = {**checkpoint, "state_dict": {k: v + 2 for k, v in checkpoint["state_dict"].items()}}
    (out.parent / "5").mkdir()
    export.record_evaluation(out.parent / "5", earlier, config, {"test/accuracy": 0.5})
    assert export.find_metrics(last, checkpoint) == ({"test/accuracy": 0.2}, "the test rows, by stage=test (2)")
    looking = {**checkpoint, "config": {**config, "task": task}}
    trained_on = {**checkpoint, "state_dict": {k: v + 1 for k, v in checkpoint["state_dict"].items()}}
    assert export.find_metrics(last, trained_on) == ({}, "")
    figures, of = export.find_metrics(last, looking)  # trained by a configuration that looks twice
    assert figures == {"test/accuracy": 0.3} and "by task.test_time_flip" in of
    alone = shutil.copy(last, tmp_path / "alone.ckpt")
    assert export.find_metrics(alone, checkpoint) == ({}, "")


def test_the_program_takes_any_batch(exported):
    runs, model = torch.export.load(exported / "model.pt2").module(), Classifier.from_pretrained(exported)
    for size in (1, 2, 17):
        inputs = program.example(model.spec, size)
        torch.testing.assert_close(runs(*inputs), model(*inputs), rtol=1e-5, atol=1e-6)


def test_the_program_of_a_sequence_model_respects_padding(tmp_path):
    model = small()
    program.export_program(model, tmp_path / "m.pt2")
    assert model.training  # as it was
    runs, mask = torch.export.load(tmp_path / "m.pt2").module(), torch.arange(12) < 7
    tokens = torch.randint(1, 5, (4, 12)) * mask
    short = model.eval()(tokens[:, :7])
    torch.testing.assert_close(runs(tokens, mask.expand(4, 12)), short, rtol=1e-5, atol=1e-6)


def test_a_program_that_differs_is_not_written(tmp_path, monkeypatch):
    model = small()
    whole = torch.export.export

    def wrong(net, *args, **options):
        return whole(small().eval(), *args, **options)  # other weights

    monkeypatch.setattr(program, "export", wrong)
    with pytest.raises(ValueError, match=r"outputs differ .* at batch size 1"):
        program.export_program(model, tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())


def test_bad_exports(fitted, exported, tmp_path, monkeypatch):
    best = f"ckpt_path={fitted[0] / 'checkpoints' / 'best.ckpt'}"
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        run(tmp_path, "stage=export", best, QUIET, f"export.folder={exported}")
    with pytest.raises(ValueError, match="stage=export needs a checkpoint"):
        run(tmp_path, "stage=export")
    with pytest.raises(ValueError, match=r"export\.repo: not/a/repo could not be uploaded"):
        export.upload(exported, "not/a/repo", private=True)
    with pytest.raises(ValueError, match=r"export\.repo: me/mine could not be uploaded .*; the model is in"):
        export.upload(exported, "me/mine", private=True)  # HF_HUB_OFFLINE


# ------------------------------------------------------------------------------------------------------ fine-tuning


def test_fine_tuning_from_a_checkpoint(fitted, tmp_path):
    source = tmp_path / "source.ckpt"
    shutil.copy(fitted[0] / "checkpoints" / "best.ckpt", source)
    options = ["trainer.max_epochs=1", "trainer.limit_train_batches=1", "test=false", "trainer.num_sanity_val_steps=0"]
    run(tmp_path / "fit", *PLAIN, *options, f"model.pretrained={source}", "model.freeze=backbone", "seed=1")
    tuned, given = tmp_path / "fit" / "checkpoints" / "best.ckpt", _net(source)
    for name, value in _net(tuned).items():
        assert torch.equal(value, given[name]) != name.startswith("head."), name  # the head alone has learned
    source.unlink()  # a checkpoint brings its weights: what it started from may be gone
    options = ["logger=none", "callbacks=none", "trainer.enable_progress_bar=false", QUIET]
    metrics = run(tmp_path / "test", "stage=test", f"ckpt_path={tuned}", *options)
    assert metrics["test/loss"] > 0
    assert load(tuned)["recipe"]["model"]["pretrained"] == str(source)


def _net(path):
    state = read_checkpoint(path)["state_dict"]
    return {k.removeprefix("net."): v for k, v in state.items() if k.startswith("net.")}


def test_bad_pretrained_models(fitted, tmp_path):
    best = fitted[0] / "checkpoints" / "best.ckpt"
    for options, message in (
        ([f"model.pretrained={best}", "model.d_model=32"], "d_model: 16 there, 32 here"),
        ([f"model.pretrained={fitted[0]}/checkpoints/bset.ckpt"], r"model\.pretrained: .*there is .*best\.ckpt"),
        ([f"model.pretrained={fitted[0]}/checkpoints"], r"config\.json is missing"),
        (["model.freeze=everything"], r"model\.freeze: expected"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run(tmp_path, *DIGITS, *options)
