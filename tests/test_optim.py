"""Decay-free groups, and the values of the schedules."""

import copy
import io
import itertools
import math
from functools import partial

import pytest
import torch
from torch import nn

from bimamba import optim
from bimamba.models import Classifier
from bimamba.nn import BiMamba2, NucleotideEmbedding
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


def test_copies_are_spared_too():
    mixer = partial(BiMamba2, headdim=8, learnable_init_states=True)
    embedding = partial(NucleotideEmbedding, positions="learned")
    options = dict(d_model=16, depth=1, embedding=embedding, mixer=mixer, mlp="channel_mixer")
    net = Classifier(SPEC, **options)
    with torch.device("meta"):
        empty = Classifier(SPEC, **options)
    given = copy.deepcopy(empty)
    given.load_state_dict(net.state_dict(), assign=True)
    names = optim.undecayed_names(net)
    matrices = {n.rpartition(".")[2] for n, p in net.named_parameters() if n in names and p.ndim > 1}
    assert matrices == {"table", "offset", "init_states"}
    for other in (copy.deepcopy(net), empty.to_empty(device="cpu"), given):
        assert optim.undecayed_names(other) == names


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


# ---------------------------------------------------------------------------------------------------------------- Muon


def muon_groups(net, **options):
    return optim.parameter_groups(net, 0.1, hidden=optim.hidden_names(net), **options)


def test_hidden_are_the_matrices_of_blocks_and_the_convolutions_of_the_embedding():
    net = Classifier(SPEC, d_model=32, depth=1, mlp="swiglu")
    names = {id(p): n for n, p in net.named_parameters()}
    groups = muon_groups(net)
    assert [(g["name"], g["hidden"], g["weight_decay"]) for g in groups] == [
        ("decay", False, 0.1),
        ("hidden", True, 0.1),
        ("no_decay", False, 0.0),
    ]
    hidden = [names[id(p)] for p in groups[1]["params"]]
    assert {n.split(".", 1)[1] for n in hidden if "blocks.0." in n} == {
        f"blocks.0.{layer}.weight" for layer in ("mixer.in_proj", "mixer.out_proj", "mlp.in_proj", "mlp.out_proj")
    }
    assert "backbone.blocks.0.mixer.conv1d.weight" in [names[id(p)] for p in groups[0]["params"]]  # depthwise
    layers = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3), nn.Linear(8, 8)
    stem = nn.ModuleDict({"embedding": nn.Sequential(*layers), "head": nn.Linear(8, 2)})
    assert optim.hidden_names(stem) == {"embedding.2.weight", "embedding.3.weight"}  # the first reads pixels


@pytest.mark.parametrize("shape", [(3, 20, 60), (2, 60, 20), (1, 16, 16)])
def test_orthogonal_keeps_the_directions_and_evens_the_lengths(shape):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    y = optim.orthogonal(x)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    values = u.mT @ y @ v.mT
    along = values.diagonal(dim1=1, dim2=2)
    assert (values - torch.diag_embed(along)).abs().max() < 1e-10
    assert along.max() < 1.3 and along.median() > 0.6 and along.min() > 0  # the smallest of a square matrix rise slowly


def test_muon_is_torchs_on_matrices_and_adamw_elsewhere():
    torch.manual_seed(0)
    start = [torch.randn(12, 30), torch.randn(12, 30), torch.randn(30, 8), torch.randn(7), torch.randn(5, 3)]
    ours, theirs = ([nn.Parameter(t.clone()) for t in start] for _ in range(2))
    options = {"lr": 0.02, "weight_decay": 0.1}
    groups = [{"params": ours[:3], "hidden": True}, {"params": ours[3:]}]
    one = optim.Muon(groups, betas=(0.9, 0.98), **options)
    muon = torch.optim.Muon(theirs[:3], adjust_lr_fn="match_rms_adamw", **options)
    adam = torch.optim.AdamW(theirs[3:], betas=(0.9, 0.98), **options)
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in (one, muon, adam):
            optimizer.step()
    for p, q, s in zip(ours, theirs, start, strict=True):
        if "momentum_buffer" in one.state[p]:  # torch's iterates in bfloat16 everywhere
            assert (p - q).norm() < 0.02 * (p - s).norm()
        else:
            assert torch.equal(p, q)


def test_muon_takes_kernels_as_matrices_and_its_updates_are_as_large_as_adamws():
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.zeros(16, 4, 3, 3))
    one = optim.Muon([{"params": [kernel], "hidden": True}], lr=1.0, weight_decay=0.0)
    kernel.grad = torch.randn_like(kernel)
    one.step()
    assert kernel.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.25)
    flat = nn.Parameter(torch.zeros(16, 36))
    other = optim.Muon([{"params": [flat], "hidden": True}], lr=1.0, weight_decay=0.0)
    flat.grad = kernel.grad.flatten(1)
    other.step()
    assert torch.equal(flat, kernel.flatten(1))


def test_muon_goes_on_from_its_state():
    def steps(net, optimizer, count, seed):
        torch.manual_seed(seed)
        for _ in range(count):
            optimizer.zero_grad()
            net(torch.randn(4, 8)).square().sum().backward()
            optimizer.step()
        return net

    def fresh():
        torch.manual_seed(7)
        net = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(8, 8)]), "head": nn.Linear(8, 2)})
        net.forward = lambda x: net["head"](net["blocks"][0](x))
        return net, optim.Muon(muon_groups(net), lr=0.1)

    net, optimizer = fresh()
    steps(net, optimizer, 3, 0)
    weights, state = {k: v.clone() for k, v in net.state_dict().items()}, optimizer.state_dict()
    state = torch.load(_saved(state), weights_only=True)
    again, restored = fresh()
    again.load_state_dict(weights)
    restored.load_state_dict(state)
    one, two = steps(net, optimizer, 3, 1), steps(again, restored, 3, 1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def _saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def test_hooks_are_called_once_and_copies_and_new_groups_step():
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])  # from now on torch's own step calls hooks, too
    matrix, bias = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))
    one, calls = optim.Muon([{"params": [matrix], "hidden": True}], lr=0.1), []
    one.add_param_group({"params": [bias]})  # as Lightning's BackboneFinetuning does
    one.register_step_pre_hook(lambda *_: calls.append("before"))
    one.register_step_post_hook(lambda *_: calls.append("after"))
    matrix.grad, bias.grad = torch.eye(4), torch.ones(4)
    one.step()
    assert calls == ["before", "after"] and (bias < 1).all() and (matrix.diagonal() < 1).all()
    other = copy.deepcopy(one)
    (theirs,) = other.param_groups[0]["params"]
    theirs.grad = torch.eye(4)
    other.step()
    one.step()
    assert torch.equal(theirs, matrix)


def test_every_group_has_its_own_rate_and_matrices_of_one_shape_are_taken_together(monkeypatch):
    torch.manual_seed(0)
    start, gradient, shapes = torch.randn(8, 20), torch.randn(8, 20), []
    whole, orthogonal = [nn.Parameter(start.clone()) for _ in range(2)], optim.orthogonal
    monkeypatch.setattr(optim, "orthogonal", lambda x, steps: (shapes.append(tuple(x.shape)), orthogonal(x, steps))[1])
    groups = [{"params": [p], "hidden": True, "lr": lr} for p, lr in zip(whole, (0.1, 0.2), strict=True)]
    one = optim.Muon(groups, weight_decay=0.0)
    for p in whole:
        p.grad = gradient.clone()
    one.step()
    assert shapes == [(2, 8, 20)]
    torch.testing.assert_close(2 * (whole[0] - start), whole[1] - start)


def test_what_decay_must_leave_alone_is_not_hidden():
    net = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])})
    net["blocks"][0].weight._no_weight_decay = True
    groups = muon_groups(net)
    assert [(g["name"], g["weight_decay"], len(g["params"])) for g in groups] == [
        ("hidden", 0.1, 1),
        ("no_decay", 0.0, 1),
    ]


def test_muon_refuses():
    matrix = nn.Parameter(torch.zeros(4, 4))
    for options in ({"momentum": 1.0}, {"momentum": -0.1}, {"ns_steps": 0}, {"ns_steps": 2.5}):
        with pytest.raises(ValueError, match="Muon: expected momentum"):
            optim.Muon([matrix], **options)
    with pytest.raises(ValueError, match=r"matrices in a hidden group, got the shape \(16,\)"):
        optim.Muon([{"params": [nn.Parameter(torch.zeros(16))], "hidden": True}])
    with pytest.raises(ValueError, match=r"groups that are hidden=\[True\], got one of \[None\]"):
        another = torch.optim.AdamW([matrix])
        optim.Muon([{"params": [matrix], "hidden": True}]).load_state_dict(another.state_dict())
    one = optim.Muon([{"params": [matrix], "hidden": True}])
    matrix.grad, one.grad_scale = torch.ones(4, 4), torch.ones(1)
    with pytest.raises(ValueError, match="unscaled gradients"):
        one.step()
