"""Learning from trained networks: the loss by direct formulas, who learns and who does not, and each bad input."""

import copy
import math
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from runs import DIGITS, QUIET, load, run
from torch.utils.data import DataLoader

from bimamba.data.collate import pack_rows
from bimamba.export import gather
from bimamba.models import Classifier
from bimamba.nn import Attention, BiMamba2, ClassTokenPooling
from bimamba.packing import Packing
from bimamba.replay import replay
from bimamba.spec import DataSpec
from bimamba.tasks import Distillation, SupervisedTask, distillation

OUTPUTS = {"multiclass": 3, "binary": 1, "multilabel": 3, "regression": 2}
IMAGE = {"channels": 1, "height": 4, "width": 4}


def dna(problem="multiclass", **options):
    classes = tuple("abc"[: 2 if problem == "binary" else OUTPUTS[problem]])
    return DataSpec("sequence", problem, classes, **{"alphabet": "ACGTN", "max_length": 20, **options})


def network(spec, seed=0, **options):
    torch.manual_seed(seed)
    options = {"mixer": partial(BiMamba2, headdim=8, d_state=4), **options}
    return Classifier(spec, 8, 1, **options).eval()


def batch_of(spec, n=6, seed=0):
    """Padded sequences of 5 to 20 letters and their labels."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(20) < torch.randint(5, 21, (n, 1), generator=generator)
    label = {
        "multiclass": torch.arange(n) % 3,
        "binary": torch.arange(n) % 2,
        "multilabel": torch.rand(n, 3, generator=generator).round(),
        "regression": torch.randn(n, 2, generator=generator),
    }[spec.problem]
    inputs = torch.randint(1, 5, (n, 20), generator=generator) * mask
    return {"inputs": inputs, "mask": mask, "label": label, "id": [str(i) for i in range(n)]}


def task(spec, distill=None, seed=9, **options):
    optimizer = partial(torch.optim.SGD, lr=0.1)
    return SupervisedTask(network(spec, seed, dropout=0.5).train(), spec, optimizer, distill=distill, **options)


def taught(spec, teachers, **options):
    """A distillation by networks that are there already."""
    found = Distillation(spec, ["there"], **options)
    found.networks = list(teachers)
    return found


# ----------------------------------------------------------------------------------------------------------- the loss


def direct(problem, student, teachers, t):
    """By definition, in float64: KL divergences at temperature t, times its square."""
    student, teachers = student.double(), [z.double() for z in teachers]
    if problem == "regression":
        return ((student - sum(teachers) / len(teachers)) ** 2).mean(-1)
    if problem == "multiclass":
        p = sum((z / t).exp() / (z / t).exp().sum(-1, keepdim=True) for z in teachers) / len(teachers)
        q = (student / t).exp() / (student / t).exp().sum(-1, keepdim=True)
        return t**2 * (p * (p / q).log()).sum(-1)
    p, q = sum(1 / (1 + (-z / t).exp()) for z in teachers) / len(teachers), 1 / (1 + (-student / t).exp())
    return t**2 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean(-1)


@pytest.mark.parametrize(
    ("problem", "temperature"), [*((problem, 1.0) for problem in OUTPUTS), *((p, 3.0) for p in list(OUTPUTS)[:3])]
)
def test_the_loss_is_the_formula(problem, temperature):
    generator = torch.Generator().manual_seed(0)
    student, *teachers = (3 * torch.randn(5, OUTPUTS[problem], generator=generator) for _ in range(3))
    found = taught(dna(problem), [lambda *_, z=z: z for z in teachers], temperature=temperature)
    target = found.target({"inputs": None})
    loss = found.loss(student, target)
    assert loss.shape == (5,) and loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), direct(problem, student, teachers, temperature), atol=1e-5, rtol=1e-5)
    assert found.loss(student.bfloat16(), target).dtype == torch.float32
    sure = taught(dna(problem), [lambda *_: teachers[0] * 1e4])  # probabilities of 0 and 1
    assert torch.isfinite(sure.loss(student, sure.target({"inputs": None}))).all()
    torch.testing.assert_close(sure.loss(teachers[0] * 1e4, sure.target({"inputs": None})), torch.zeros(5))


def step(spec, teachers, labels=None, **options):
    """A training step's loss, the student's gradients and both losses apart."""
    student = task(spec, (lambda spec, **_: taught(spec, teachers, **options)) if teachers else None).train()
    batch = batch_of(spec) | ({} if labels is None else {"label": labels})
    torch.manual_seed(5)  # of dropout
    loss = student.shared_step(batch, "train")["loss"]
    loss.backward()
    return student, loss.detach()


@pytest.mark.parametrize("problem", OUTPUTS)
def test_the_weight_goes_from_labels_to_teachers(problem):
    spec = dna(problem)
    teacher = network(spec)
    _, plain = step(spec, [])
    student, none = step(spec, [teacher], weight=0.0)
    assert none == plain and student.distill_loss.compute() > 0
    _, alone = step(spec, [teacher], weight=1.0)
    _, other = step(spec, [teacher], labels=1 - batch_of(spec)["label"].clamp(max=1), weight=1.0)
    assert alone == other != plain
    mixed, total = step(spec, [teacher], weight=0.25)
    torch.testing.assert_close(total, 0.75 * plain + 0.25 * alone)
    torch.testing.assert_close(mixed.train_loss.compute(), total)
    torch.testing.assert_close(mixed.distill_loss.compute(), alone)


def test_evaluation_is_that_of_the_labels():
    spec = dna()
    plain, student = task(spec), task(spec, lambda spec, **_: taught(spec, []))
    for stage in ("val", "test", "predict"):  # and asks no teacher: there is none here
        out = [one.eval().shared_step(batch_of(spec), stage)["sample_loss"] for one in (plain, student)]
        assert torch.equal(*out)


def test_teachers_read_what_the_student_reads_padded_or_packed():
    spec, teacher = dna(), network(dna())
    batch, found = batch_of(spec), taught(spec, [teacher])
    alone = [teacher(row[None, :n]) for row, n in zip(batch["inputs"], batch["mask"].sum(1), strict=True)]
    expected = torch.cat(alone).softmax(-1)
    torch.testing.assert_close(found.target(batch)[:, 0], expected, atol=1e-5, rtol=1e-4)
    lengths = batch["mask"].sum(1)
    flat = batch["inputs"][batch["mask"]]
    inputs, mask, packing = pack_rows(flat, lengths.cumsum(0) - lengths, lengths, 60)
    packed = {"inputs": inputs, "mask": mask, **dict(zip(Packing._fields, packing, strict=True))}
    assert len(inputs) < len(lengths)
    torch.testing.assert_close(found.target(packed)[:, 0], expected, atol=1e-5, rtol=1e-4)


# -------------------------------------------------------------------------------------------- who learns, who does not


def saved(tmp_path, spec, **options):
    folder = tmp_path / "teacher"
    network(spec, **options).save_pretrained(folder)
    return folder


def test_the_student_alone_learns(tmp_path):
    """Through the trainer, which puts everything that it knows into training mode."""
    spec = dna()
    folder = saved(tmp_path, spec, pooling=ClassTokenPooling, mixer=partial(Attention, headdim=4), dropout=0.5)
    student = task(spec, partial(Distillation, teachers=[folder]))
    rows, seen = [batch_of(spec, seed=s) for s in range(3)], []

    def look(*_):
        (teacher,) = student.distillation.networks
        seen.append((student.net.training, teacher.training, torch.is_grad_enabled()))
        assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())

    student.on_train_batch_end = look
    state = torch.get_rng_state()
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, **QUIET, default_root_dir=tmp_path)
    trainer.fit(student, DataLoader(rows, batch_size=None))
    assert seen == [(True, False, True)] * 3
    (teacher,) = student.distillation.networks
    again = Classifier.from_pretrained(folder)
    for (name, p), q in zip(teacher.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert {"train/loss", "train/loss_distill"} <= trainer.callback_metrics.keys()
    plain = task(spec)
    assert student.state_dict().keys() == plain.state_dict().keys()
    assert len(list(student.parameters())) == len(list(plain.parameters()))
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in student.net.parameters()}
    assert copy.deepcopy(student).distillation is student.distillation
    torch.set_rng_state(state)
    student.distillation.read()
    assert torch.equal(torch.get_rng_state(), state)  # dropout draws what it draws without teachers


def test_images_of_other_statistics_are_seen_as_the_teacher_saw_them(tmp_path):
    here, there = ({"mean": (m,), "std": (s,)} for m, s in ((0.5, 0.2), (0.3, 0.4)))
    specs = [DataSpec("image", "binary", ("a", "b"), **IMAGE, **own) for own in (here, there)]
    folder = saved(tmp_path, specs[1], embedding=None)
    pixels = torch.rand(2, 1, 4, 4)
    found = Distillation(specs[0], [folder])
    found.read()
    expected = Classifier.from_pretrained(folder)((pixels - 0.3) / 0.4).sigmoid()
    torch.testing.assert_close(found.target({"inputs": (pixels - 0.5) / 0.2})[..., 1], expected)


@pytest.mark.parametrize(("mode", "own"), [("reduce-overhead", None), ("max-autotune-no-cudagraphs",) * 2])
def test_teachers_are_compiled_with_the_student_and_without_cuda_graphs(tmp_path, monkeypatch, mode, own):
    compiled = []
    monkeypatch.setattr(distillation, "compile_network", lambda net, **options: compiled.append(options))
    distill, options = partial(Distillation, teachers=[saved(tmp_path, dna())]), {"mode": mode, "dynamic": True}
    task(dna(), distill, compile_options=options).distillation.read()
    assert compiled == []
    task(dna(), distill, compile=True, compile_options=options).distillation.read()
    assert compiled == [{"mode": own, "dynamic": True}]


# ----------------------------------------------------------------------------------------------------------- bad inputs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": 1.5}, r"task\.distill\.weight: expected a number in \[0, 1\], got 1\.5"),
        ({"weight": math.nan}, r"task\.distill\.weight: expected a number in \[0, 1\], got nan"),
        ({"weight": None}, r"task\.distill\.weight: expected a number in \[0, 1\], got None"),
        ({"temperature": None}, r"task\.distill\.temperature: expected a number above 0, got None"),
        ({"temperature": 0}, r"task\.distill\.temperature: expected a number above 0, got 0"),
        ({"temperature": math.inf}, r"task\.distill\.temperature: expected a number above 0, got inf"),
        ({"teachers": "logs/x.ckpt"}, r"task\.distill\.teachers: expected a list of paths, got 'logs/x\.ckpt'"),
        ({"teachers": [3]}, r"task\.distill\.teachers: expected a list of paths, got \[3\]"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Distillation(dna(), **options)


def test_a_run_without_a_best_checkpoint_is_no_teacher(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(FileNotFoundError, match=r"task\.distill\.teachers: .*best\.ckpt .*there is .*last\.ckpt"):
        Distillation(dna(), [tmp_path]).read()
    assert not Distillation(dna(), None).teachers


def test_a_regression_has_no_temperature():
    with pytest.raises(ValueError, match=r"task\.distill\.temperature: expected 1 for regression, got 2"):
        Distillation(dna("regression"), temperature=2)


@pytest.mark.parametrize(
    ("here", "message"),
    [
        (DataSpec("image", "multiclass", tuple("abc"), **IMAGE), "another kind: 'sequence' there, 'image' here"),
        (dna("multilabel"), "another problem: 'multiclass' there"),
        (DataSpec("sequence", "multiclass", tuple("acb"), alphabet="ACGTN", max_length=20), "another class_names"),
        (dna(alphabet="ACGUN"), "another alphabet: 'ACGTN' there, 'ACGUN' here; to fit it set data.alphabet=ACGTN"),
        (dna(max_length=30), "sequences of up to 20 letters, and those of the student may have 30"),
    ],
)
def test_teachers_of_other_data(tmp_path, here, message):
    with pytest.raises(ValueError, match=rf"task\.distill\.teachers: .*teacher .*{message}"):
        Distillation(here, [saved(tmp_path, dna())]).read()


# ---------------------------------------------------------------------------------------------------------- end to end

FAST = [*DIGITS, *(f"callbacks.{name}=null" for name in ("learning_curves", "examples", "predictions", "health"))]
FAST += ["logger=none", "trainer.num_sanity_val_steps=0", "trainer.max_epochs=1", "data.check_duplicates=false"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A teacher with averaged weights, stored in float16; the student of two; both with their folders."""
    folder = tmp_path_factory.mktemp("distilled")
    run(folder / "teacher", *FAST, "test=false", "callbacks.average.decay=0.9", "task.optimizer.lr=0.01")
    best = folder / "teacher" / "checkpoints" / "best.ckpt"
    half = load(best)
    half["state_dict"] = {k: v.half() if v.is_floating_point() else v for k, v in half["state_dict"].items()}
    torch.save(half, folder / "half.ckpt")
    teachers = f"task.distill.teachers=[{folder / 'teacher'},{folder / 'half.ckpt'}]"
    options = ["model/mixer=hydra", "model.d_model=8", "task.distill.temperature=2"]
    options += ["callbacks.average.decay=0.9", "data.mix.mixup=0.5"]
    metrics = run(folder / "student", *FAST, *options, teachers)
    return folder, metrics, [*options, teachers]


def test_a_student_is_trained_tested_and_exported_and_resumed_only_with_its_teachers(runs, tmp_path):
    folder, metrics, _ = runs
    assert metrics["train/loss_distill"] > 0
    last = folder / "student" / "checkpoints" / "last.ckpt"
    saved = load(last)
    own = [v for group in saved["optimizer_states"][0]["param_groups"] for v in group["params"]]
    networks = [k for k in saved["state_dict"] if k.startswith("net.")]
    assert not set(saved["state_dict"]) - set(networks) - {"loss.weight"} and len(own) == len(networks)
    assert saved["state_dict"]["net.head.proj.weight"].shape == (10, 8)

    (folder / "teacher").rename(tmp_path / "away")
    try:
        quiet = ["extras.print_config=false", "callbacks=none", "logger=none"]
        tested = run(tmp_path / "test", "stage=test", f"ckpt_path={last}", *quiet)
        assert tested["test/loss"] == pytest.approx(metrics["test/loss"], abs=1e-6)
        run(tmp_path / "out", "stage=export", f"ckpt_path={last}", "extras.print_config=false", "export.program=false")
        card = (tmp_path / "out" / "model" / "README.md").read_text()
        assert "| task.distill.teachers | ['teacher', 'half.ckpt'] |" in card
        half = folder / "half.ckpt"  # had no teacher
        assert "distill" not in gather(half, load(half))["protocol"]["task"]
        with pytest.raises(FileNotFoundError, match=r"task\.distill\.teachers: no folder or file at .*teacher"):
            run(folder / "student", f"ckpt_path={last}", "trainer.max_epochs=2")
    finally:
        (tmp_path / "away").rename(folder / "teacher")


def test_in_double_precision(runs, tmp_path):
    options = ["trainer.precision=64-true", "trainer.limit_train_batches=1", "test=false"]
    metrics = run(tmp_path, *FAST, *options, f"task.distill.teachers=[{runs[0] / 'teacher'}]")
    assert metrics["train/loss_distill"] > 0


def test_the_average_is_the_teacher_and_its_batches_are_repeated_by_replay(runs, tmp_path):
    folder, _, _ = runs
    checkpoint = load(folder / "teacher" / "checkpoints" / "best.ckpt")
    found = Distillation(DataSpec.from_dict(checkpoint["spec"]), [folder / "teacher", folder / "half.ckpt"])
    assert found.read()[0].origin.endswith("best.ckpt")
    for net, atol in zip(found.networks, (0, 1e-3), strict=True):
        for name, value in net.state_dict().items():
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, checkpoint["state_dict"][f"net.{name}"], atol=atol, rtol=atol)
    saved = load(folder / "student" / "checkpoints" / "last.ckpt")
    batch = {"inputs": torch.zeros(2, 1, 8, 8), "label": torch.tensor([0, 1]), "id": ["a", "b"]}
    saved["nonfinite"] = {"batch": batch, "random": {"torch": torch.get_rng_state()}, "step": 0, "found": ""}
    torch.save(saved, tmp_path / "step_0.ckpt")
    finding, loss, _ = replay(tmp_path / "step_0.ckpt", "cpu")
    assert finding is None and torch.isfinite(loss)


class Began(Exception):
    """The training."""


def test_other_rows_of_the_teacher_and_bad_values_are_told_before_training(runs, tmp_path, monkeypatch):
    folder, _, options = runs

    def begin(*_, **__):
        raise Began

    monkeypatch.setattr(pl.Trainer, "fit", begin)
    told = r"half\.ckpt was trained on other rows .* its student \(data\.seed=5; .* data\.seed=0\)"
    with pytest.warns(UserWarning, match=told), pytest.raises(Began):
        run(tmp_path / "other_rows", *FAST, *options, "data.seed=5")

    evil = load(folder / "half.ckpt")
    evil["config"]["model"]["mixer"]["_target_"] = "os.system"
    torch.save(evil, tmp_path / "evil.ckpt")
    (tmp_path / "damaged.ckpt").write_bytes(b"no checkpoint")
    cases = [
        (f"teachers=[{tmp_path}/damaged.ckpt]", ValueError, "teachers: .*damaged.ckpt is no checkpoint that can be"),
        (f"teachers=[{tmp_path}/missing.ckpt]", FileNotFoundError, "teachers: expected a checkpoint file, got .*miss"),
        (f"teachers=[{tmp_path}]", FileNotFoundError, "teachers: .*config.json is missing"),
        (f"teachers=[{tmp_path}/evil.ckpt]", ValueError, "teachers: .*evil.ckpt: model.mixer._target_: .* outside the"),
        ("weight=much", ValueError, "weight: expected a number, got 'much'"),
    ]
    for number, (bad, kind, message) in enumerate(cases):
        with pytest.raises(kind, match=f"task.distill.{message}"):
            run(tmp_path / f"bad_{number}", *FAST, *options, f"task.distill.{bad}")
