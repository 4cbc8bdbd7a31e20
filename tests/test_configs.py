"""Every experiment and every option of every group composes and is instantiated; experiments run one step."""

import gzip
import re
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from runs import ROOT, TINY, composed, load, run, train
from torch.distributed import TCPStore

from bimamba import config
from bimamba.overrides import soften
from bimamba.spec import DataSpec
from bimamba.tasks.base import Task
from bimamba.tasks.metrics import make_metrics, mode_of

GROUPS = {p.name: sorted(f.stem for f in p.glob("*.yaml")) for p in (ROOT / "configs").iterdir() if p.is_dir()}
EXPERIMENTS = GROUPS["experiment"]


def images(folder: Path) -> Path:
    """A small CIFAR-10 in the Hub's columns."""
    rng = np.random.default_rng(0)
    for split, n in (("train", 60), ("test", 20)):
        rows = []
        for i in range(n):
            path = folder / f"{split}{i}.png"
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
            rows.append({"bytes": path.read_bytes(), "path": path.name})
            path.unlink()
        label = pa.array([i % 10 for i in range(n)], pa.int64())
        pq.write_table(pa.table({"img": rows, "label": label}), folder / f"{split}.parquet")
    return folder


def sequences(n: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list("ACGT"), rng.integers(30, 50))) for _ in range(n)]


def table(folder: Path, columns: tuple[str, str], **more) -> Path:
    for split, n in (("train", 40), ("test", 12)):
        data = {columns[0]: sequences(n, n), columns[1]: pa.array([i % 2 for i in range(n)], pa.int64())}
        pq.write_table(
            pa.table(data | {k: [f(i) for i in range(n)] for k, f in more.items()}), folder / f"{split}.parquet"
        )
    return folder


def fasta(folder: Path) -> Path:
    for name, seed in (("decoy", 1), ("promoter", 2)):
        text = "".join(f">{name}_{i}\n{s}\n" for i, s in enumerate(sequences(25, seed)))
        with gzip.open(folder / f"{name}.fa.gz", "wt") as file:
            file.write(text)
    return folder


def image_folder(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir()
        for i in range(20):
            Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


def csv_file(folder: Path) -> Path:
    rows = "".join(f"{s},{'yes' if i % 2 else 'no'}\n" for i, s in enumerate(sequences(40)))
    (folder / "mine.csv").write_text("sequence,label\n" + rows)
    return folder / "mine.csv"


def genome(folder: Path) -> Path:
    (folder / "genome.fa").write_text("".join(f">chr{i}\n{s}\n" for i, s in enumerate(sequences(20))))
    return folder / "genome.fa"


# What each experiment needs besides a small network.
LOCAL = {
    "digits": lambda f: [],
    "motifs": lambda f: ["data.source.num_train=40", "data.source.num_val=20", "data.source.num_test=20"],
    "cifar10_pixels": lambda f: [f"data.path={images(f)}"],
    "cifar10_pixels_fast": lambda f: [f"data.path={images(f)}"],
    "cifar10_patches": lambda f: [f"data.path={images(f)}"],
    "cifar10_patches_stem": lambda f: [f"data.path={images(f)}"],
    "cifar10_patches_local": lambda f: [f"data.path={images(f)}"],
    "promoters": lambda f: [f"data.path={fasta(f)}"],
    "arabidopsis": lambda f: [f"data.path={table(f, ('seq', 'label'))}"],
    "ecoli_sigma70": lambda f: [f"data.path={fasta(f)}"],
    "genomic_benchmark": lambda f: [f"data.path={table(f, ('seq', 'label'))}", "data.task=demo_human_or_worm"],
    "nucleotide_transformer": lambda f: [
        f"data.path={table(f, ('sequence', 'label'), name=str, task=lambda i: 'H3K4me3')}",
        "data.task=H3K4me3",
    ],
    "images_folder": lambda f: [f"data.path={image_folder(f)}"],
    "dna_pretrain": lambda f: [f"data.path={genome(f)}", "data.min_length=10"],
    "sequences_csv": lambda f: [f"data.path={csv_file(f)}"],
}


def test_every_experiment_has_a_test():
    assert set(LOCAL) == set(EXPERIMENTS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_run_one_step(name, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    options = [f"experiment={name}", *TINY, *LOCAL[name](data), "data.batch_size=8"]
    metrics = run(tmp_path / "run", *options, "trainer.fast_dev_run=true")
    assert np.isfinite(metrics["train/loss"]) and np.isfinite(metrics["test/loss"])


def test_options_of_another_choice_are_left_out(tmp_path, caplog):
    """An experiment sets options of its mixer; another one, typed on top, may not have them. What no choice of the
    group has is an error."""
    cfg = composed(tmp_path, "experiment=ecoli_sigma70", "ablation=attention", "data.path=nowhere")
    with caplog.at_level("INFO"):
        config.fit_options(cfg)
    assert [m.split()[1] for m in caplog.messages] == ["model.mixer.d_state", "model.mixer.d_conv"]
    assert instantiate(cfg.model)(spec=DNA).backbone.blocks[0].mixer.headdim == cfg.model.mixer.headdim
    cfg = composed(tmp_path, "model/embedding=pixels")
    config.fit_options(cfg)
    assert "patch_size" not in cfg.model.embedding
    with pytest.raises(ValueError, match=r"model.embedding.patchsize: expected an option that bimamba.nn.PixelEmb"):
        config.fit_options(composed(tmp_path, "model/embedding=pixels", "+model.embedding.patchsize=2"))
    with pytest.raises(ValueError, match=r"task\.optimizer\.beta: expected an option that torch\.optim\.AdamW takes"):
        config.fit_options(composed(tmp_path, "+task.optimizer.beta=1"))


SWITCHES = [
    *("test=no", "extras.print_config=off", "task.test_time_flip=maybe", "data.drop_last=n", "data.pin_memory=off"),
    *("model.mixer.tied=yes", "trainer.enable_progress_bar=no", "callbacks.average.warmup=on"),
    # beside other choices, among options that are handed on, in a table of settings, of a logger and of a stage
    *("callbacks.model_checkpoint.save_last=no", "trainer.deterministic=off", "logger=wandb logger.wandb.log_code=no"),
    *("logger=wandb logger.wandb.log_model=off", "trainer=ddp trainer.strategy.static_graph=yes"),
    "stage=explain explain.saliency.enabled=no",
]


@pytest.mark.parametrize("switch", SWITCHES)
def test_words_are_no_switches(tmp_path, switch):
    """To Hydra, `no` is a text, and to Python any text is true."""
    *others, switch = switch.split()
    key, _, word = switch.partition("=")
    with pytest.raises(ValueError, match=rf"^{re.escape(key)}: expected true or false, got '{word}'"):
        config.check_switches(composed(tmp_path, *others, switch))
    config.check_switches(composed(tmp_path, *others, f"{key}=false"))


@pytest.mark.parametrize(
    "text", ["callbacks.model_checkpoint.save_last=link", "trainer.deterministic=warn", "data.source.label_column=no"]
)
def test_words_are_words_where_words_are_meant(tmp_path, text):
    config.check_switches(composed(tmp_path, "experiment=sequences_csv", "data.path=x.csv", text))


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("task.optimizer.lr=abc", "a number, got 'abc'"),
        ("trainer.max_epochs=ten", "a number, got 'ten'"),
        ("data.batch_size=2.5", "a whole number, got 2.5"),
    ],
)
def test_numbers_are_numbers(tmp_path, option, expected):
    key, _, _ = option.partition("=")
    with pytest.raises(ValueError, match=rf"^{re.escape(key)}: expected {expected}"):
        config.check_switches(composed(tmp_path, option))
    config.check_switches(composed(tmp_path, f"{key}=1"))


@pytest.mark.parametrize("part", ["callbacks.model_checkpoint", "data", "model.mixer"])
def test_a_class_that_is_not_there_is_named(tmp_path, part):
    cfg = composed(tmp_path, f"{part}._target_=bimamba.Nope")
    with pytest.raises(ValueError, match=rf"^{re.escape(part)}\._target_: .*bimamba\.Nope"):
        config.check_switches(cfg)


def test_options_of_another_optimizer_are_left_out(tmp_path):
    cfg = composed(tmp_path, "task.optimizer._target_=torch.optim.SGD")
    config.fit_options(cfg)
    assert set(cfg.task.optimizer) == {"_target_", "_partial_", "lr", "weight_decay"}
    assert composed(tmp_path, "task/optimizer=muon").task.optimizer.momentum == 0.95
    cfg = composed(tmp_path, "task/optimizer=adamw", "+task.optimizer.momentum=0.9")  # as an experiment by Muon sets it
    config.fit_options(cfg)
    assert "momentum" not in cfg.task.optimizer


CIFAR = DataSpec("image", "multiclass", tuple("abcdefghij"), channels=3, height=32, width=32)
DNA = DataSpec("sequence", "binary", ("no", "yes"), alphabet="ACGTN", max_length=251)
SMALL = ["experiment=arabidopsis", "model.d_model=256", "model.depth=2", "model.mixer.headdim=64"]


@pytest.mark.parametrize(("spec", "options"), [(CIFAR, ["experiment=cifar10_patches"]), (DNA, SMALL)])
def test_arms_of_the_ablation_have_equal_parameters(spec, options, tmp_path):
    sizes, mixers = {}, set()
    for arm in GROUPS["ablation"]:
        with torch.device("meta"):
            net = instantiate(composed(tmp_path, *options, f"ablation={arm}").model)(spec=spec)
        block = net.backbone.blocks[0]
        assert block.mlp is not None and net.embedding.positions.kind == "learned"
        sizes[arm] = sum(p.numel() for p in net.parameters())
        mixers.add((type(block.mixer), getattr(block.mixer, "tied", None), getattr(block.mixer, "shift", None)))
    assert len(mixers) == len(sizes) == 5
    assert all(size == pytest.approx(sizes["tied"], rel=0.01) for size in sizes.values()), sizes


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_are_pure_overrides_of_their_own_size(name, tmp_path):
    assert (ROOT / "configs" / "experiment" / f"{name}.yaml").read_text().startswith("# @package _global_\n")
    cfg = composed(tmp_path, f"experiment={name}")
    assert cfg.task_name == name and cfg.monitor.startswith("val/")


@pytest.mark.parametrize(
    ("group", "name"),
    [(g, n) for g in ("task", "trainer", "callbacks", "logger", "debug", "hparams_search") for n in GROUPS[g]],
)
def test_every_option_composes(group, name, tmp_path):
    if (group, name) == ("hparams_search", "optuna"):
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    cfg = composed(tmp_path, f"{group}={name}")
    plain = train.config.resolved(cfg)
    if group == "trainer":
        assert plain["trainer"].keys() == train.config.resolved(composed(tmp_path))["trainer"].keys()
    if group == "task":
        assert issubclass(instantiate(cfg.task).func, Task)


def test_every_common_key_of_the_trainer_is_there(tmp_path):
    import inspect

    from lightning.pytorch import Trainer

    given = set(composed(tmp_path).trainer) - {"_target_", "_convert_"}
    accepted = set(inspect.signature(Trainer.__init__).parameters)
    assert given <= accepted
    # train.py supplies these; the rest is for Lightning's own platform
    assert accepted - given <= {"self", "logger", "callbacks", "enable_autolog_hparams", "model_registry"}


def test_trainer_fsdp_and_loggers_are_made(tmp_path):
    cfg = composed(tmp_path, "trainer=fsdp", "logger=many_loggers")
    assert instantiate(cfg.trainer.strategy)._state_dict_type == "full"
    assert [type(logger).__name__ for logger in train.make_loggers(cfg)] == ["CSVLogger", "WandbLogger"]
    assert train.make_loggers(composed(tmp_path, "logger=none")) is False
    assert train.make_callbacks(composed(tmp_path, "callbacks=none")) == []


def test_tensorboard_says_what_to_install(tmp_path):
    import importlib.util

    if importlib.util.find_spec("tensorboard") or importlib.util.find_spec("tensorboardX"):
        pytest.skip("TensorBoard is installed")
    with pytest.raises(Exception, match="pip install tensorboard"):
        train.make_loggers(composed(tmp_path, "logger=tensorboard"))


def test_optuna_says_what_to_install(monkeypatch):
    monkeypatch.setattr(train.config.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install hydra-optuna-sweeper"):
        train.config.check_plugins(["-m", "hparams_search=optuna"])
    with pytest.raises(SystemExit, match="pip install hydra-submitit-launcher"):
        train.config.check_plugins(["hydra=submitit", "-m", "seed=1,2"])
    train.config.check_plugins(["hparams_search=grid"])


@pytest.mark.parametrize(
    ("trainer", "nodes", "tasks", "gpus"),
    [
        ("trainer=gpu", 1, 1, 1),
        ("trainer=ddp trainer.devices=4 trainer.num_nodes=2", 2, 4, 4),
        ("trainer=ddp trainer.devices=[0,2]", 1, 2, 2),
        ("trainer=ddp_sim", 1, 2, None),
        ("trainer=ddp", 1, "trainer.devices=auto does not say it", None),
    ],
)
def test_slurm_gets_a_process_a_device(tmp_path, trainer, nodes, tasks, gpus):
    file = OmegaConf.load(ROOT / "configs" / "hydra" / "submitit.yaml")
    cfg = OmegaConf.merge({"trainer": composed(tmp_path, *trainer.split()).trainer}, {"launcher": file.launcher})
    assert cfg.launcher.nodes == nodes
    if isinstance(tasks, str):
        with pytest.raises(Exception, match=tasks):
            _ = cfg.launcher.tasks_per_node
    else:
        assert (cfg.launcher.tasks_per_node, cfg.launcher.gpus_per_node) == (tasks, gpus)


def test_submitit_can_send_the_program_to_its_jobs():
    """By cloudpickle: it takes a main program apart, and sends whatever of a package a function's names could mean."""
    cloudpickle = pytest.importorskip("cloudpickle")
    cloudpickle.register_pickle_by_value(train)
    try:
        cloudpickle.dumps(train.main)
    finally:
        cloudpickle.unregister_pickle_by_value(train)


def test_processes_of_torchrun_that_begin_late_find_the_first_ones_folder(monkeypatch):
    def folders():
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            hydra = compose("train", return_hydra_config=True).hydra
        return hydra.run.dir, hydra.sweep.dir

    store = TCPStore("127.0.0.1", 0, is_master=True)  # as torchrun's own process keeps it
    torchrun = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_RESTART_COUNT": 0}
    for name, value in (torchrun | {"TORCHELASTIC_USE_AGENT_STORE": True}).items():
        monkeypatch.setenv(name, str(value))
    first = folders()
    time.sleep(1.1)
    assert folders() == first
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # the first attempt's folder is taken
    assert folders() != first


@pytest.mark.parametrize(
    ("monitor", "mode", "other", "direction"),
    [
        ("val/x", "min", None, "minimize"),
        ("val/x", "max", None, "maximize"),
        ("val/loss", None, None, "minimize"),
        ("val/mcc", None, None, "maximize"),
        ("val/loss", "min", "val/mcc", "maximize"),  # what a trial returns decides
    ],
)
def test_a_search_goes_the_way_of_its_metric(monitor, mode, other, direction):
    """Digits monitor a loss: a search that maximised it would return the worst trial as the best."""
    search = OmegaConf.load(ROOT / "configs" / "hparams_search" / "optuna.yaml")
    cfg = OmegaConf.merge(search, {"monitor_mode": mode, "monitor": monitor}, {"optimized_metric": other or monitor})
    assert cfg.hydra.sweeper.direction == direction
    assert OmegaConf.merge(search, {"monitor": "val/y"}).optimized_metric == "val/y"
    assert cfg.hydra.sweeper.max_failure_rate == 1.0  # a trial that diverges does not end the search


def test_the_mode_of_a_monitored_metric_follows_from_its_name(tmp_path):
    def settled(*overrides):
        cfg = composed(tmp_path, *overrides)
        config.settle_modes(cfg)
        return cfg

    cfg = settled("experiment=digits", "monitor=val/accuracy", "callbacks=early_stopping", "task=plateau")
    modes = {cfg.monitor_mode, cfg.callbacks.model_checkpoint.mode, cfg.callbacks.early_stopping.mode}
    assert modes | {cfg.task.scheduler.mode} == {"max"}
    assert settled("experiment=promoters", "monitor=val/loss").monitor_mode == "min"
    assert settled("experiment=promoters", "monitor=val/mine", "monitor_mode=max").monitor_mode == "max"
    cfg = settled("experiment=promoters", "callbacks=early_stopping", "callbacks.early_stopping.monitor=val/loss")
    assert (cfg.monitor_mode, cfg.callbacks.early_stopping.mode) == ("max", "min")
    for wrong, said in (
        (["monitor=val/mcc", "monitor_mode=min"], "monitor_mode=min: monitor is val/mcc, .* largest; expected max"),
        (["monitor=val/mine"], "monitor: expected a metric that a task makes .* monitor_mode=min .* got val/mine"),
        (["monitor_mode=least"], "monitor_mode: expected min, max or null .* got 'least'"),
        (["callbacks=early_stopping", "callbacks.early_stopping.mode=max"], r"early_stopping\.mode=max: .* smallest"),
    ):
        with pytest.raises(ValueError, match=said):
            settled("experiment=digits", *wrong)


def test_every_metric_of_the_tasks_has_a_mode():
    for problem in ("binary", "multiclass", "multilabel", "regression"):
        spec = DataSpec("sequence", problem, ("a", "b"), alphabet="ACGTN", max_length=9)
        assert all(mode_of(name) for name in make_metrics(spec, "val/"))
    assert mode_of("val/perplexity") == mode_of("train/loss_step") == "min" and mode_of("train/grad_norm") is None


def test_debug_overfit_learns_its_batches(tmp_path):
    options = [*TINY, "model/embedding=patches", "model.embedding.patch_size=4", "data.batch_size=16", "seed=0"]
    metrics = run(tmp_path, "debug=overfit", *options, "trainer.max_epochs=60", "task.optimizer.lr=0.02")
    assert metrics["train/accuracy"] > 0.8
    assert "test/accuracy" not in metrics


def test_early_stopping_stops(tmp_path):
    options = ["callbacks=early_stopping", "callbacks.early_stopping.patience=1", "trainer.max_epochs=20"]
    options += ["task.optimizer.lr=0.0", "test=false", "model/embedding=patches", "data.batch_size=512"]
    options += ["callbacks.learning_curves=null", "callbacks.examples=null", "trainer.limit_train_batches=1"]
    run(tmp_path, *TINY, *options)
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert load(last)["epoch"] == 1
    run(tmp_path, f"ckpt_path={last}", "callbacks.early_stopping.patience=3")  # two validations more
    assert load(last)["epoch"] == 3


def test_softened_arguments():
    assert soften(["data.batch_size=3"]) == ["data.batch_size=3"]
    assert soften(["ckpt_path=null", "data.x=3"]) == ["ckpt_path=null", "data.x=3"]
    assert soften(["hydra=submitit", "-m", "seed=1,2"]) == ["-m", "hydra=submitit", "seed=1,2"]
    given = [
        "-m",
        "ckpt_path=a.ckpt",
        "data.x=3",
        "seed=1",
        "trainer=cpu",
        "+a.b=1",
        "hydra.run.dir=x",
        "model/mixer=a",
    ]
    assert soften(given)[2:] == ["++data.x=3", "seed=1", "trainer=cpu", "+a.b=1", "hydra.run.dir=x", "model/mixer=a"]


def test_no_configuration_evaluates_code_or_runs_commands():
    text = "".join(p.read_text() for p in (ROOT / "configs").rglob("*.yaml"))
    for banned in ("${eval", "oc.create", "subprocess", "os.system", "builtins."):
        assert banned not in text
    OmegaConf.clear_resolver("run_dir")
    train.config.register_resolvers()
    assert OmegaConf.has_resolver("run_dir")
