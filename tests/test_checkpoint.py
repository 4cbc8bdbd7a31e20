"""A checkpoint of unknown origin runs no code, and every damaged or foreign file is named as such."""

import pickle

import pytest
import torch
from torch import nn

from bimamba.checkpoint import check_targets, has_resolver, load_weights, read_checkpoint
from bimamba.config import recipe


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


def test_missing_files_name_their_neighbours(tmp_path):
    (tmp_path / "best.ckpt").touch()
    with pytest.raises(FileNotFoundError, match=r"there is .*best\.ckpt"):
        read_checkpoint(tmp_path / "bset.ckpt")
    with pytest.raises(FileNotFoundError, match="a folder"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half a zip"])
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


def test_own_modules_can_be_trusted_by_name():
    with pytest.raises(ValueError, match=r"extras\.trusted_modules"):
        check_targets({"_target_": "fractions.Fraction"})
    check_targets({"_target_": "fractions.Fraction"}, extra=["fractions"])


def test_resolvers_do_not_come_in_from_checkpoints():
    assert not has_resolver("${paths.output_dir}/x:y") and not has_resolver("plain: text")
    assert has_resolver("${oc.env:HOME}") and has_resolver("${${a}:HOME}") and has_resolver("${a.${oc.env:X}}")
    with pytest.raises(ValueError, match="resolver"):
        check_targets({"data": {"path": "${oc.env:HOME}"}})


def test_recipes_are_saved_without_resolvers(monkeypatch):
    from omegaconf import OmegaConf

    monkeypatch.setenv("WHERE", "here")
    cfg = OmegaConf.create({"a": 1, "b": "${a}", "c": "${oc.env:WHERE}/${a}", "d": ["${b}"]})
    assert recipe(cfg) == {"a": 1, "b": "${a}", "c": "here/1", "d": ["${b}"]}
