"""Mixers: every parameter gets a gradient, padding and packing change nothing, options do what they say."""

from functools import partial

import pytest
import torch

from bimamba.nn import Attention, BiMamba2, Mamba2
from bimamba.ops.conv1d import depthwise_conv1d
from bimamba.ops.gated_norm import rms_norm_gated

SMALL = dict(headdim=8, d_state=4)
MIXERS = {
    "bimamba2": partial(BiMamba2, **SMALL),
    "groups": partial(BiMamba2, **SMALL, ngroups=2),
    "untied": partial(BiMamba2, **SMALL, tied=False),
    "hydra": partial(BiMamba2, **SMALL, shift=True),
    "states": partial(BiMamba2, **SMALL, learnable_init_states=True),
    "limit": partial(BiMamba2, **SMALL, learnable_init_states=True, dt_limit=(0.01, 0.2)),
    "untied limit": partial(BiMamba2, **SMALL, tied=False, dt_limit=(0.01, 0.2)),
    "bias": partial(BiMamba2, **SMALL, bias=True, conv_bias=False),
    "mem": partial(BiMamba2, **SMALL, use_mem_eff_path=True),
    "causal": partial(Mamba2, **SMALL),
    "causal states": partial(Mamba2, **SMALL, learnable_init_states=True),
    "attention": partial(Attention, headdim=8),
    "causal attention": partial(Attention, headdim=8, causal=True),
}


def make(name, d_model=16, seed=0):
    torch.manual_seed(seed)
    return MIXERS[name](d_model)


@pytest.mark.parametrize("name", MIXERS)
def test_every_parameter_gets_a_gradient(name):
    mixer = make(name)
    u = torch.randn(2, 11, 16)
    y = mixer(u)
    assert y.shape == u.shape
    y.backward(torch.randn_like(y))
    for parameter, value in mixer.named_parameters():
        assert value.grad is not None and value.grad.abs().sum() > 0, parameter


@pytest.mark.parametrize("name", MIXERS)
def test_padding_changes_nothing(name):
    """Padded = unpadded, in outputs and in the gradients of the parameters; what stands at the padding is noise."""
    mixer = make(name)
    lengths = [11, 1, 7]
    u = torch.randn(3, 11, 16)
    mask = torch.arange(11)[None] < torch.tensor(lengths)[:, None]
    dy = torch.randn(3, 11, 16) * mask[..., None]
    padded = mixer(u, mask)
    got = torch.autograd.grad(padded, list(mixer.parameters()), dy)
    alone = [mixer(u[i : i + 1, :n]) for i, n in enumerate(lengths)]
    expected = torch.autograd.grad(alone, list(mixer.parameters()), [dy[i : i + 1, :n] for i, n in enumerate(lengths)])
    for i, n in enumerate(lengths):
        torch.testing.assert_close(padded[i : i + 1, :n], alone[i], atol=1e-5, rtol=1e-4)
    for (parameter, _), a, b in zip(mixer.named_parameters(), got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3, msg=lambda m, p=parameter: f"{p}: {m}")


@pytest.mark.parametrize("name", [n for n in MIXERS if "states" not in n and n != "limit"])
def test_packed_sequences_equal_each_alone(name):
    """Learned initial states are left out: a packed row has one first and one last token."""
    mixer = make(name)
    u = torch.randn(1, 11, 16)
    index = torch.tensor([[0] * 4 + [1] + [2] * 6])
    packed = mixer(u, seq_idx=index)
    for value in range(3):
        keep = index[0] == value
        torch.testing.assert_close(packed[:, keep], mixer(u[:, keep]), atol=1e-5, rtol=1e-4)


def test_causal_mixers_do_not_look_ahead_and_bidirectional_ones_do():
    for name, ahead in (("causal", False), ("causal attention", False), ("bimamba2", True), ("hydra", True)):
        u = torch.randn(1, 9, 16, requires_grad=True)
        gradient = torch.autograd.grad(make(name)(u)[:, 4].sum(), u)[0]
        assert (gradient[:, 8].abs().sum() > 0) == ahead, name


def test_memory_efficient_path_gives_the_same_gradients():
    results = []
    for name in ("bimamba2", "mem"):
        mixer = make(name)
        u = torch.randn(2, 11, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = mixer(u)
        results.append([y, *torch.autograd.grad(y.square().sum(), [u, *mixer.parameters()])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_memory_efficient_path_keeps_less():
    def kept(mixer):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            mixer(torch.randn(2, 200, 16, requires_grad=True))
        return sum(saved)

    assert kept(make("mem")) < kept(make("bimamba2")) / 4


def test_state_dict_names_are_bi_mamba2s():
    names = {n.split(".")[0] for n in make("bimamba2").state_dict()}
    assert names == {"in_proj", "conv1d", "dt_bias", "A_log", "D", "norm", "out_proj"}
    state = make("bimamba2").state_dict() | {"fc_D.weight": torch.zeros(4, 32)}  # allocated there and never used
    make("bimamba2", seed=1).load_state_dict(state)


@pytest.mark.parametrize("name", ["states", "causal states"])
def test_states_without_a_direction_are_loaded_for_each(name):
    mixer = make(name)
    given = torch.randn(mixer.init_states.shape[1:])  # as Bi-Mamba2 and Mamba-2 save them
    mixer.load_state_dict(mixer.state_dict() | {"init_states": given})
    assert all(torch.equal(states, given) for states in mixer.init_states)
    with pytest.raises(RuntimeError, match="size mismatch for init_states"):
        mixer.load_state_dict(mixer.state_dict() | {"init_states": given[:1]})


@pytest.mark.filterwarnings("ignore:bimamba runs its PyTorch path on meta")
@pytest.mark.parametrize("name", MIXERS)
def test_shapes_come_out_on_the_meta_device(name):
    mixer = make(name).to("meta")
    mask = torch.ones(1, 5, dtype=torch.bool, device="meta")
    for given in (None, mask):
        assert mixer(torch.randn(1, 5, 16, device="meta"), given).shape == (1, 5, 16)


def test_decay_free_parameters_are_marked():
    mixer = make("states")
    marked = {n for n, p in mixer.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked == {"A_log", "D", "dt_bias", "init_states"}


def test_step_sizes_start_in_range():
    bias = BiMamba2(512, dt_min=0.01, dt_max=0.1).dt_bias
    dt = torch.nn.functional.softplus(bias)
    assert dt.min() >= 0.0099 and dt.max() <= 0.101


@pytest.mark.parametrize(
    "make_bad,message",
    [
        (lambda: BiMamba2(24, headdim=64), "headdim: expected a divisor of expand \\* d_model = 48, got 64"),
        (lambda: BiMamba2(32, headdim=16, ngroups=3), "ngroups: expected a divisor of the 4 heads, got 3"),
        (lambda: BiMamba2(64, activation="relu"), "activation: expected one of"),
        (lambda: BiMamba2(64, dt_min=0.2), "dt_min, dt_max"),
        (lambda: BiMamba2(0), "d_model: expected at least 1, got 0"),
        (lambda: BiMamba2(64, d_state=0), "d_state: expected at least 1, got 0"),
        (lambda: BiMamba2(64, d_conv=0), "d_conv: expected at least 1, got 0"),
        (lambda: BiMamba2(64, expand=0), "expand: expected at least 1, got 0"),
        (lambda: Mamba2(64, headdim=0), "headdim: expected at least 1, got 0"),
        (lambda: Mamba2(64, headdim=-64), "headdim: expected at least 1, got -64"),
        (lambda: BiMamba2(64, ngroups=0), "ngroups: expected at least 1, got 0"),
        (lambda: BiMamba2(64, A_init_range=(0.0, 1.0)), r"A_init_range: expected .* got \(0.0, 1.0\)"),
        (lambda: Mamba2(64, A_init_range=[16.0, 1.0]), r"A_init_range: expected .* got \(16.0, 1.0\)"),
        (lambda: Attention(32, headdim=0), "headdim: expected a divisor of d_model = 32, got 0"),
        (lambda: Attention(30, headdim=8), "headdim: expected a divisor of d_model = 30, got 8"),
        (lambda: make("bimamba2")(torch.randn(2, 5, 8)), "u: expected \\(b, l, d_model\\) with d_model = 16"),
        (lambda: make("bimamba2")(torch.randn(0, 5, 16)), r"u: expected .* no empty dimension, got \(0, 5, 16\)"),
        (lambda: make("causal")(torch.randn(2, 0, 16)), r"u: expected .* no empty dimension, got \(2, 0, 16\)"),
        (lambda: make("bimamba2")(torch.randn(2, 5, 16), torch.ones(2, 4).bool()), "mask: expected shape"),
        (
            lambda: make("bimamba2")(torch.randn(2, 5, 16), torch.ones(2, 5, device="meta").bool()),
            "mask: expected the device of u, cpu, got meta",
        ),
        *(
            (
                lambda n=n, d=d: make(n)(torch.randn(2, 5, 16), torch.ones(2, 5, dtype=d)),
                f"mask: expected .* bool, got {d}",
            )
            for n in ("bimamba2", "attention")
            for d in (torch.int64, torch.float32)
        ),
        (lambda: make("bimamba2")(torch.randn(2, 5, 16), None, torch.ones(2, 4).int()), "seq_idx: expected shape"),
        (lambda: depthwise_conv1d(torch.randn(2, 5, 3), torch.randn(4, 3)), "x: expected \\(b, l, d\\) with d = 4"),
        (lambda: rms_norm_gated(torch.randn(2, 6), None, torch.ones(6), group_size=4), "group_size"),
    ],
)
def test_bad_input(make_bad, message):
    with pytest.raises(ValueError, match=message):
        make_bad()


@pytest.mark.parametrize("width", [1, 2, 4, 7])
@pytest.mark.parametrize("causal", [False, True])
def test_convolution_by_taps_equals_the_library(width, causal):
    x, weight, bias = torch.randn(2, 9, 3), torch.randn(3, width), torch.randn(3)
    one_sequence = torch.zeros(2, 9, dtype=torch.int32)
    torch.testing.assert_close(
        depthwise_conv1d(x, weight, bias, causal=causal, seq_idx=one_sequence),
        depthwise_conv1d(x, weight, bias, causal=causal),
    )
    if not causal:
        expected = torch.nn.functional.conv1d(x.mT, weight[:, None], bias, groups=3, padding="same").mT
        torch.testing.assert_close(depthwise_conv1d(x, weight, bias, "none"), expected)


@pytest.mark.parametrize("before", [False, True])
def test_gated_norm_is_its_formula(before):
    y, z, weight = torch.randn(4, 6), torch.randn(4, 6), torch.randn(6)
    gate = z * torch.sigmoid(z)

    def norm(v):  # of two groups
        v = v.view(4, 2, 3)
        return (v / (v.square().mean(-1, keepdim=True) + 1e-5).sqrt()).view(4, 6) * weight

    expected = norm(y) * gate if before else norm(y * gate)
    torch.testing.assert_close(rms_norm_gated(y, z, weight, norm_before_gate=before, group_size=3), expected)


def test_float64_is_float64_throughout():
    """A, too, which is at least float32: its gradient by finite differences."""
    mixer = BiMamba2(8, d_state=4, headdim=8, A_init_range=(1, 16)).double()
    u = torch.randn(1, 6, 8, dtype=torch.float64)

    def f(A_log):
        return torch.func.functional_call(mixer, {"A_log": A_log}, u)

    torch.autograd.gradcheck(f, mixer.A_log.detach().clone().requires_grad_())
