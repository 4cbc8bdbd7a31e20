"""Decay-free groups, and the values of the schedules."""

import itertools
import math

import pytest
import torch
from torch import nn

from bimamba import optim
from bimamba.models import Classifier
from bimamba.spec import DataSpec

SPEC = DataSpec("sequence", "binary", ("no", "yes"), alphabet="ACGTN", max_length=20)


def rates(schedule, steps, **options):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = schedule(optimizer, total_steps=steps, **options)
    values = []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


def test_decay_spares_dynamics_norms_and_biases():
    net = Classifier(SPEC, d_model=32, depth=1)
    names = {id(p): n for n, p in net.named_parameters()}
    decay, free = optim.parameter_groups(net, 0.3)
    assert (decay["weight_decay"], free["weight_decay"]) == (0.3, 0.0)
    freed = {names[id(p)] for p in free["params"]}
    for ending in ("A_log", "D", "dt_bias", "norm.weight", "conv1d.bias", "proj.bias"):
        assert any(n.endswith(ending) for n in freed), ending
    assert {n.split(".")[-2] for n in map(names.get, map(id, decay["params"])) if n} >= {"in_proj", "out_proj", "embed"}
    assert all(p.ndim > 1 for p in decay["params"])
    assert len(freed) + len(decay["params"]) == len(names)


def test_marked_parameters_of_any_shape_are_spared_and_frozen_ones_left_out():
    module = nn.Linear(3, 2)
    module.weight._no_weight_decay = True
    (free,) = optim.parameter_groups(module, 0.1)
    assert free["name"] == "no_decay" and len(free["params"]) == 2
    module.bias.requires_grad_(False)
    assert [p is module.weight for p in optim.parameter_groups(module, 0.1)[0]["params"]] == [True]


def test_flat_parameters_are_grouped_by_the_names_they_had_before_sharding():
    module = nn.Linear(3, 2)
    names = optim.undecayed_names(module)
    module.weight = nn.Parameter(module.weight.detach().flatten())  # as FSDP shows it
    decay, free = optim.parameter_groups(module, 0.1, names)
    assert decay["params"][0] is module.weight and free["params"][0] is module.bias


def test_cosine_values():
    values = rates(optim.cosine, 11, warmup=2, final_ratio=0.1)
    assert values[:3] == pytest.approx([2 / 3, 4 / 3, 2.0])
    assert values[6] == pytest.approx(2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 4 / 8))))
    assert values[-1] == pytest.approx(0.2)
    assert all(a > b for a, b in itertools.pairwise(values[2:]))


def test_linear_and_constant_values():
    assert rates(optim.linear, 5) == pytest.approx([2.0, 1.5, 1.0, 0.5, 0.0])
    assert rates(optim.constant, 5, warmup=0.4) == pytest.approx([2 / 3, 4 / 3, 2, 2, 2])


def test_training_beyond_the_plan_stays_at_the_final_rate():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = optim.cosine(optimizer, total_steps=4, final_ratio=0.25)
    for _ in range(9):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("warmup", "total", "message"),
    [
        (-1, 10, "warmup"),
        (1.0, 10, "fraction in"),
        (10, 10, "leave nothing"),
        (0.1, math.inf, "endless"),
    ],
)
def test_bad_warmups(warmup, total, message):
    with pytest.raises(ValueError, match=message):
        optim.warmup_steps(warmup, total)


def test_endless_training_needs_a_constant_rate():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    for schedule in (optim.cosine, optim.linear):
        with pytest.raises(ValueError, match=r"trainer\.max_steps"):
            schedule(optimizer, total_steps=math.inf)
    optim.constant(optimizer, total_steps=math.inf, warmup=3)
    with pytest.raises(ValueError, match="final_ratio"):
        optim.linear(optimizer, total_steps=9, final_ratio=2)


def test_layers_learn_slower_the_lower_they_are():
    net = Classifier(SPEC, d_model=32, depth=3)
    groups = optim.parameter_groups(net, 0.3, layer_decay=0.5, lr=8.0)
    names = {id(p): n for n, p in net.named_parameters()}
    rate = {names[id(p)]: g["lr"] for g in groups for p in g["params"]}
    assert len(rate) == len(names)
    assert rate["head.proj.weight"] == rate["backbone.norm.weight"] == 8.0
    assert {rate[n] for n in rate if n.startswith("backbone.blocks.0.")} == {1.0}
    assert {rate[n] for n in rate if n.startswith("backbone.blocks.2.")} == {4.0}
    assert {rate[n] for n in rate if n.startswith("embedding.")} == {0.5}
    assert groups[0]["name"].startswith("layer_0/") and all("A_log" not in n for n in [g["name"] for g in groups])
    free = {names[id(p)] for g in groups if g["weight_decay"] == 0 for p in g["params"]}
    assert free == optim.undecayed_names(net)
    with pytest.raises(ValueError, match=r"layer_decay: expected a number in \(0, 1\]"):
        optim.parameter_groups(net, 0.3, layer_decay=1.5, lr=1.0)
    with pytest.raises(ValueError, match="optimizer with lr"):
        optim.parameter_groups(net, 0.3, layer_decay=0.5)


def test_parts_have_rates_of_their_own():
    net = nn.ModuleDict({"net": Classifier(SPEC, d_model=32, depth=2)})  # as a task holds it
    scale = {"backbone": 0.5, "backbone.blocks.1": 0.25, "head": 10}
    names = {id(p): n.removeprefix("net.") for n, p in net.named_parameters()}
    groups = optim.parameter_groups(net, 0.3, lr=8.0, lr_scale=scale)
    rate = {names[id(p)]: g.get("lr", 8.0) for g in groups for p in g["params"]}
    assert sorted(rate) == sorted(names.values())
    for name, found in rate.items():
        expected = {"head": 80.0, "backbone": 4.0}.get(name.split(".")[0], 8.0)
        assert found == (2.0 if name.startswith("backbone.blocks.1.") else expected), name
    assert {g["name"] for g in groups} >= {"head/decay", "backbone/no_decay", "backbone.blocks.1/decay", "decay"}
    free = {f"net.{names[id(p)]}" for g in groups if g["weight_decay"] == 0 for p in g["params"]}
    assert free == optim.undecayed_names(net)
    both = optim.parameter_groups(net, 0.3, layer_decay=0.5, lr=8.0, lr_scale={"embedding": 0.1})
    assert {g["name"]: g["lr"] for g in both}["embedding/layer_0/decay"] == pytest.approx(8.0 * 0.5**3 * 0.1)


@pytest.mark.parametrize(
    ("scale", "lr", "message"),
    [
        ({"haed": 2.0}, 1.0, "lr_scale: no parameters in 'haed'; expected one of embedding, backbone, head"),
        ({"head": 0.0}, 1.0, r"lr_scale\.head: expected a factor above 0, got 0"),
        ({"head": 2.0}, None, "lr_scale: expected an optimizer with lr"),
    ],
)
def test_wrong_scales_are_refused(scale, lr, message):
    with pytest.raises(ValueError, match=message):
        optim.parameter_groups(Classifier(SPEC, d_model=32, depth=1), 0.3, lr=lr, lr_scale=scale)


def test_plateau_warms_up_and_falls_when_the_metric_stands_still():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    options = {"warmup": 2, "final_ratio": 0.2, "monitor": "val/mcc", "mode": "max", "patience": 0}
    warm, falling = optim.plateau(optimizer, total_steps=100, **options)
    assert warm["interval"] == "step" and falling["interval"] == "epoch" and falling["monitor"] == "val/mcc"
    seen = []
    for _ in range(4):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        warm["scheduler"].step()
    assert seen == pytest.approx([2 / 3, 4 / 3, 2, 2])
    for value, rate in ((0.1, 2.0), (0.2, 2.0), (0.2, 1.0), (0.1, 0.5), (0.3, 0.5), (0.0, 0.4), (0.0, 0.4)):
        falling["scheduler"].step(value)
        optimizer.step()
        warm["scheduler"].step()  # leaves it alone
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)
    with pytest.raises(ValueError, match="mode min or max"):
        optim.plateau(optimizer, 10, mode="up")


def test_constant_ends_as_high_as_it_was():
    with pytest.raises(ValueError, match="final_ratio"):
        optim.constant(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), 9, final_ratio=0.5)
