"""A checkpoint of unknown origin runs no code, and every damaged or foreign file is named as such."""

import pickle

import pytest
import torch
from omegaconf import OmegaConf
from runs import DIGITS, ROOT, load, run
from torch import nn

from bimamba.checkpoint import check_paths, check_targets, has_resolver, load_weights, read_checkpoint
from bimamba.config import recipe


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


def test_missing_files_name_their_neighbours(tmp_path):
    (tmp_path / "best.ckpt").touch()
    with pytest.raises(FileNotFoundError, match=r"there is .*best\.ckpt"):
        read_checkpoint(tmp_path / "bset.ckpt")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(FileNotFoundError, match=r"a folder.*there is .*run/checkpoints/last\.ckpt"):
        read_checkpoint(tmp_path / "run")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half a zip", b"export A=1\n. ./env\n"])
def test_damaged_files(tmp_path, content):
    path = tmp_path / "x.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.ckpt is (damaged|no checkpoint)"):
        read_checkpoint(path)


def test_truncated_checkpoint(tmp_path):
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": {"w": torch.zeros(1000)}, "spec": {}, "recipe": {}}, path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match="damaged"):
        read_checkpoint(path)


def test_malicious_pickles_are_refused(tmp_path):
    for name, save in (("zip", torch.save), ("raw", lambda o, p: p.write_bytes(pickle.dumps(o)))):
        path = tmp_path / f"{name}.ckpt"
        save({"state_dict": {}, "spec": {}, "recipe": Evil()}, path)
        with pytest.raises(ValueError, match=r"safely|damaged"):
            read_checkpoint(path)


def test_checkpoints_of_other_programs(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="lacks spec, recipe"):
        read_checkpoint(tmp_path / "x.ckpt")
    torch.save([1, 2], tmp_path / "y.ckpt")
    with pytest.raises(ValueError, match="not written by this project"):
        read_checkpoint(tmp_path / "y.ckpt")


def test_weights_of_another_model():
    state = nn.Linear(3, 2).state_dict()
    with pytest.raises(ValueError, match=r"1 shapes differ \(weight: \(2, 3\) there, \(2, 4\) here\)"):
        load_weights(nn.Linear(4, 2), {"state_dict": state})
    with pytest.raises(ValueError, match="missing there"):
        load_weights(nn.Sequential(nn.Linear(3, 2)), {"state_dict": state})


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "bimamba.checkpoint.pickle.loads",  # begins well
        "bimamba.config.os.system",
        "bimamba.checkpoint.torch.hub.load",
        "bimamba.config.hydra.utils.get_method",
        "torch.optim.os.system",
        "torch.load",
        "lightning.fabric.utilities.cloud_io._load",
        "bimamba.no.such.thing",
        "bimamba.config.save",  # ours, but it writes files
        "bimamba.predictions.write_predictions",
        "bimamba.export.upload",
        "bimamba.data.fasta_index.write_index",
        "lightning.pytorch.Trainer.save_checkpoint",
        "bimamba",
        7,
    ],
)
def test_untrusted_targets_are_refused(target):
    with pytest.raises(ValueError, match=r"data\.list\[1\]\._target_.*outside the trusted modules"):
        check_targets({"data": {"list": [1, {"_target_": target}]}})


@pytest.mark.parametrize(
    "target",
    [
        "bimamba.models.Classifier",
        "bimamba.data.VisionDataModule",
        "bimamba.optim.cosine",
        "torch.optim.AdamW",
        "lightning.pytorch.Trainer",
        "lightning.pytorch.callbacks.ModelCheckpoint",
        "lightning.pytorch.strategies.FSDPStrategy",
    ],
)
def test_trusted_targets_pass(target):
    check_targets({"x": {"_target_": target}})


def test_every_target_of_the_configurations_is_trusted():
    """What train.py saves must load again; sweepers and stage=explain take nothing from checkpoints."""
    tried = 0
    for path in (ROOT / "configs").rglob("*.yaml"):
        if path.parent.name not in ("hparams_search", "hydra", "explain"):
            plain = _without_interpolations(OmegaConf.to_container(OmegaConf.load(path), resolve=False))
            check_targets(plain)
            tried += "_target_" in path.read_text()
    assert tried > 30


def _without_interpolations(config):
    if isinstance(config, dict):
        return {k: _without_interpolations(v) for k, v in config.items()}
    if isinstance(config, list):
        return [_without_interpolations(v) for v in config]
    return None if isinstance(config, str) and has_resolver(config) else config


def test_own_modules_can_be_trusted_by_name():
    with pytest.raises(ValueError, match=r"extras\.trusted_modules"):
        check_targets({"_target_": "fractions.Fraction"})
    check_targets({"_target_": "fractions.Fraction"}, extra=["fractions"])


def test_resolvers_do_not_come_in_from_checkpoints():
    assert not has_resolver("${paths.output_dir}/x:y") and not has_resolver("plain: text")
    assert has_resolver("${oc.env:HOME}") and has_resolver("${${a}:HOME}") and has_resolver("${a.${oc.env:X}}")
    with pytest.raises(ValueError, match="resolver"):
        check_targets({"data": {"path": "${oc.env:HOME}"}})


def test_paths_stay_in_the_runs_folder():
    inside = {"dirpath": "${paths.output_dir}/checkpoints", "filename": "best", "n": 3, "list": ["a..b", "c/d", ""]}
    check_paths(inside, "callbacks", ())
    for path in (
        "/etc/cron.d",
        "~/.ssh",
        "..",
        "../x",
        "a/../../b",
        "${paths.output_dir}/../../b",
        "C:\\x",
        "\\\\host\\x",
    ):
        with pytest.raises(ValueError, match=r"callbacks\.saver\.to\[0\]: .*leads out of its run's folder"):
            check_paths({"saver": {"to": [path]}}, "callbacks", ())
        check_paths({"saver": {"to": path}}, "callbacks", {"callbacks.saver.to"})


# --------------------------------------------------------------------------------- train.py with a malicious checkpoint


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A good checkpoint to be made bad; read only."""
    folder = tmp_path_factory.mktemp("trained")
    options = ["trainer.max_epochs=1", "trainer.limit_train_batches=1", "test=false", "logger=none"]
    pictures = [f"callbacks.{name}=null" for name in ("learning_curves", "examples", "predictions")]
    run(folder, *DIGITS, *options, *pictures)
    return folder / "checkpoints" / "best.ckpt"


def _changed(trained, path, key, value):
    checkpoint = load(trained)
    for config in (checkpoint["recipe"], checkpoint["config"]):
        *parents, leaf = key.split(".")
        for parent in parents:
            config = config[parent]
        config[leaf] = value
    torch.save(checkpoint, path)
    return f"ckpt_path={path}"


QUIET = ["extras.print_config=false", "logger=none"]


@pytest.mark.parametrize(
    ("stage", "key"),
    [
        ("fit", "callbacks.throughput"),
        ("test", "model.mixer"),
        ("export", "task.optimizer"),
        ("predict", "data.source"),
    ],
)
def test_a_malicious_recipe_runs_no_code(trained, tmp_path, stage, key):
    mark = tmp_path / "code_ran"
    evil = {"_target_": "os.system", "command": f"touch {mark}", "_args_": [f"touch {mark}"]}
    given = [_changed(trained, tmp_path / "x.ckpt", key, evil), f"stage={stage}", *QUIET, "data.predict=x"]
    with pytest.raises(ValueError, match=rf"{key}\._target_: .*outside the trusted modules"):
        run(tmp_path / "run", *given)
    assert not mark.exists()


def test_a_malicious_recipe_writes_nowhere_else(trained, tmp_path):
    target = tmp_path / "elsewhere"
    given = _changed(trained, tmp_path / "x.ckpt", "callbacks.model_checkpoint.dirpath", str(target))
    with pytest.raises(ValueError, match=r"callbacks\.model_checkpoint\.dirpath: .*leads out of its run's folder"):
        run(tmp_path / "run", given, *QUIET)
    assert not target.exists()
    options = ["trainer.max_epochs=1", f"callbacks.model_checkpoint.dirpath={target}"]
    run(tmp_path / "run", given, *QUIET, *options)  # the user means it


def test_a_malicious_recipe_reads_no_other_model(trained, tmp_path):
    """A checkpoint brings its weights; the file that it says it started from is not opened."""
    (tmp_path / "pickle.ckpt").write_bytes(pickle.dumps(Evil()))
    given = _changed(trained, tmp_path / "x.ckpt", "model.pretrained", str(tmp_path / "pickle.ckpt"))
    metrics = run(tmp_path / "run", given, "stage=test", "callbacks=none", "trainer.enable_progress_bar=false", *QUIET)
    assert metrics["test/loss"] > 0
    with pytest.raises(
        ValueError, match=r"model\.pretrained: .*pickle\.ckpt is no checkpoint that can be loaded safely"
    ):
        run(tmp_path / "fine", *DIGITS, f"model.pretrained={tmp_path / 'pickle.ckpt'}")


def test_a_pickle_under_ckpt_path_runs_no_code(tmp_path):
    (tmp_path / "x.ckpt").write_bytes(pickle.dumps(Evil()))
    for stage in ("fit", "export"):
        with pytest.raises(ValueError, match="loaded safely"):
            run(tmp_path / "run", f"ckpt_path={tmp_path / 'x.ckpt'}", f"stage={stage}", *QUIET)


def test_checkpoints_with_odd_parts(tmp_path):
    for part in ("state_dict", "spec", "recipe"):
        torch.save({"state_dict": {}, "spec": {}, "recipe": {}} | {part: "text"}, tmp_path / "x.ckpt")
        with pytest.raises(ValueError, match=f"{part} is no mapping there"):
            read_checkpoint(tmp_path / "x.ckpt")


def test_recipes_are_saved_without_resolvers(monkeypatch):
    monkeypatch.setenv("WHERE", "here")
    cfg = OmegaConf.create({"a": 1, "b": "${a}", "c": "${oc.env:WHERE}/${a}", "d": ["${b}"]})
    assert recipe(cfg) == {"a": 1, "b": "${a}", "c": "here/1", "d": ["${b}"]}
