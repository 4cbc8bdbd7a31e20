"""The README's commands and code work as printed."""

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from bimamba import config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
CELLS = re.findall(r"^\| `(python train\.py.*?)` \|", README, re.MULTILINE)
LINES = [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()] + CELLS
COMMANDS = sorted(
    {part.strip() for line in LINES for part in line.split("&&") if part.strip().startswith("python train")}
)


def test_the_two_commands_stand_first():
    first, second = [block.strip() for kind, block in BLOCKS if kind == "bash"][:2]
    assert first == "pip install -e . && python train.py"
    assert second == 'pip install -e ".[dev]" && pytest'
    ci = (ROOT / ".ci" / "run").read_text()
    assert 'pip install -q -e ".[dev]"' in ci and re.search(r"^pytest$", ci, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_compose(command):
    """Every override of every printed command is known to the configuration."""
    config.register_resolvers()
    overrides = [a for a in shlex.split(command, comments=True)[2:] if a != "-m"]
    # a sweep's values one by one: the first stands for all
    overrides = [re.sub(r"^((?:seed|data\.fold)=\d+),.*", r"\1", o) for o in overrides]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("train", overrides)
    OmegaConf.to_container(OmegaConf.masked_copy(cfg, ["data", "model", "task"]), throw_on_missing=True)


@pytest.mark.parametrize("code", [block for kind, block in BLOCKS if kind == "python"])
def test_code_runs(code):
    exec(compile(code, "README.md", "exec"), {})


def test_every_experiment_is_in_the_table():
    files = {p.stem for p in (ROOT / "configs" / "experiment").glob("*.yaml")}
    named = set(re.findall(r"experiment=(\w+)", README)) | {"digits"}
    assert files == named
