"""The public functions: results, every bad argument by name, and the choice of a backend."""

import re

import pytest
import torch
from problems import assert_close, oracle, problem

from bimamba.ops.ssd import bimamba_chunk_scan_combined, choose_backend, mamba_chunk_scan_combined

B, L, H, P, G, N = 2, 13, 4, 3, 2, 5


def arguments(**change):
    made = problem(D="h", dtype=torch.float32)
    d = made["forward"]
    return (
        dict(x=made["x"], dt=d.dt, A=d.A, B=d.B, C=d.C, chunk_size=8, D=made["D"], dt_bias=d.dt_bias, dt_softplus=True)
        | change
    )


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_bidirectional_results(backend):
    made = problem(D="h", z=True, states=True, seq=True, dtype=torch.float32)
    f = made["forward"]
    y, (forward, backward) = bimamba_chunk_scan_combined(
        made["x"], f.dt, f.A, f.B, f.C, 8, made["D"], made["z"], f.dt_bias, True, seq_idx=made["seq_idx"],
        initial_states=made["initial_states"], return_final_states=True, backend=backend,
    )  # fmt: skip
    expected = oracle(made)
    assert_close(
        {"y": y, "forward": forward, "backward": backward},
        {"y": expected["y"], "forward": expected["final.forward"], "backward": expected["final.backward"]},
        2e-6,
    )


def test_pairs_give_each_direction_its_own_parameters():
    made = problem(untied=True, dtype=torch.float32)
    f, b = made["forward"], made["backward"]
    y = bimamba_chunk_scan_combined(
        made["x"], (f.dt, b.dt), (f.A, b.A), (f.B, b.B), (f.C, b.C), dt_bias=(f.dt_bias, b.dt_bias), dt_softplus=True
    )
    assert_close({"y": y}, {"y": oracle(made)["y"]}, 2e-6)


def test_causal_results():
    made = problem(causal=True, D="h", states=True, dtype=torch.float32)
    f = made["forward"]
    y, final = mamba_chunk_scan_combined(
        made["x"], f.dt, f.A, f.B, f.C, 8, made["D"], dt_bias=f.dt_bias, dt_softplus=True,
        initial_states=made["initial_states"][0], return_final_states=True,
    )  # fmt: skip
    expected = oracle(made)
    assert_close({"y": y, "f": final}, {"y": expected["y"], "f": expected["final.forward"]}, 2e-6)


def test_inputs_in_any_layout():
    made = arguments()
    expected = bimamba_chunk_scan_combined(**made)
    made["x"] = made["x"].transpose(1, 2).contiguous().transpose(1, 2)
    made["B"] = torch.cat([made["B"], made["B"]], dim=-1)[..., :N]
    assert torch.equal(bimamba_chunk_scan_combined(**made), expected)


def test_bi_mamba2_import_paths():
    from ssd.bi.ssd_combined import bimamba_chunk_scan_combined as bi
    from ssd.modules import BiMamba2, Mamba2
    from ssd.uni.ssd_combined import mamba_chunk_scan_combined as uni

    assert bi is bimamba_chunk_scan_combined and uni is mamba_chunk_scan_combined
    x = torch.randn(2, 64, 32)
    for module in (BiMamba2(d_model=32, d_state=64, d_conv=7, expand=2, use_mem_eff_path=False), Mamba2(d_model=32)):
        y = module(x)
        assert y.shape == x.shape
        y.backward(torch.randn_like(y))


def test_nan_in_gives_nan_out():
    made = arguments()
    made["x"] = made["x"].clone()
    made["x"][0, 5] = torch.nan
    y = bimamba_chunk_scan_combined(**made)
    assert y[0, 5].isnan().all() and not y[1].isnan().any()


def test_compiles_without_graph_breaks():
    made = {k: v.requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in arguments().items()}
    compiled = torch.compile(bimamba_chunk_scan_combined, fullgraph=True, backend="aot_eager")
    expected = bimamba_chunk_scan_combined(**made)
    got = compiled(**made)
    assert_close({"y": got}, {"y": expected}, 1e-6)
    got.sum().backward()


def test_autocast_takes_mixed_dtypes():
    made = arguments()
    made["x"] = made["x"].bfloat16()
    with pytest.raises(ValueError, match="B: expected dtype bfloat16, got float32"):
        bimamba_chunk_scan_combined(**made)
    with torch.autocast("cpu", torch.bfloat16):
        assert bimamba_chunk_scan_combined(**made).dtype == torch.bfloat16


BAD = {
    "x rank": (dict(x=torch.randn(2, 13, 12)), "x: expected a tensor (b, l, h, p)"),
    "x empty": (dict(x=torch.randn(2, 0, 4, 3)), "x: expected a tensor (b, l, h, p) with no empty dimension"),
    "x dtype": (dict(x=torch.ones(B, L, H, P, dtype=torch.int64)), "x: expected a float dtype, got torch.int64"),
    "dt shape": (dict(dt=torch.randn(B, L, 3)), "dt: expected shape (b, l, h) = (2, 13, 4), got (2, 13, 3)"),
    "dt none": (dict(dt=None), "dt: expected a tensor"),
    "dt triple": (dict(dt=(torch.ones(1),) * 3), "dt: expected a tensor or a pair (forward, backward), got 3 values"),
    "A shape": (dict(A=-torch.ones(H, N)), "A: expected shape (h) = (4,), got (4, 5)"),
    "A dtype": (dict(A=-torch.ones(H, dtype=torch.int32)), "A: expected dtype"),
    "B groups": (dict(B=torch.randn(B, L, 3, N)), "B: expected (b, l, g, n) = (2, 13, g, n) with g dividing h = 4"),
    "B rank": (dict(B=torch.randn(B, L, N)), "B: expected (b, l, g, n)"),
    "B dtype": (dict(B=torch.randn(B, L, G, N).half()), "B: expected dtype float32, got float16"),
    "C shape": (dict(C=torch.randn(B, L, G, 4)), "C: expected shape (b, l, g, n) = (2, 13, 2, 5), got (2, 13, 2, 4)"),
    "D shape": (dict(D=torch.ones(P)), "D: expected shape (h) or (h, p) = (4,), got (3,)"),
    "D matrix": (dict(D=torch.ones(P, H)), "D: expected shape (h, p) = (4, 3), got (3, 4)"),
    "z shape": (dict(z=torch.ones(B, L, H)), "z: expected shape (b, l, h, p) = (2, 13, 4, 3), got (2, 13, 4)"),
    "dt_bias shape": (dict(dt_bias=torch.ones(3)), "dt_bias: expected shape (h) = (4,), got (3,)"),
    "seq_idx shape": (dict(seq_idx=torch.ones(B, dtype=torch.int32)), "seq_idx: expected shape (b, l) = (2, 13)"),
    "seq_idx dtype": (dict(seq_idx=torch.ones(B, L)), "seq_idx: expected dtype int32 or int64, got float32"),
    "states alone": (dict(initial_states=torch.ones(B, H, P, N)), "initial_states: expected a pair"),
    "states shape": (
        dict(initial_states=(None, torch.ones(B, H, N, P))),
        "initial_states (backward): expected shape (b, h, p, n) = (2, 4, 3, 5), got (2, 4, 5, 3)",
    ),
    "chunk_size": (dict(chunk_size=0), "chunk_size: expected a positive int or None, got 0"),
    "dt_softplus": (dict(dt_softplus=torch.zeros(2)), "dt_softplus: expected True or False, got"),
    "dt_limit": (dict(dt_limit=(0.2, 0.1)), "dt_limit: expected (least, largest)"),
    "backend": (dict(backend="cuda"), "backend: expected one of"),
    "device": (dict(D=torch.ones(H, device="meta")), "D: expected the device of x, cpu, got meta"),
    "one dt_bias": (
        dict(dt=(torch.ones(B, L, H),) * 2, dt_bias=(torch.ones(H), None)),
        "dt_bias: expected one for both directions or for neither",
    ),
    "backward B": (
        dict(B=(torch.randn(B, L, G, N), torch.randn(B, L, 1, N))),
        "backward B: expected shape (b, l, g, n) = (2, 13, 2, 5), got (2, 13, 1, 5)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    change, message = BAD[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        bimamba_chunk_scan_combined(**arguments(**change))


def test_values_are_checked_by_the_debug_switch_alone(monkeypatch):
    decreasing = torch.tensor([[0] * L, [1] * 6 + [0] * 7], dtype=torch.int32)
    for change, message in ((dict(A=torch.ones(H)), "A: expected negative"), (dict(seq_idx=decreasing), "row 1")):
        monkeypatch.delenv("BIMAMBA_DEBUG", raising=False)
        bimamba_chunk_scan_combined(**arguments(**change))
        monkeypatch.setenv("BIMAMBA_DEBUG", "1")
        with pytest.raises(ValueError, match=message):
            bimamba_chunk_scan_combined(**arguments(**change))


def test_backend_choice(monkeypatch):
    x = torch.randn(1, 2, 1, 2)
    assert choose_backend(x, 4) == "torch"
    monkeypatch.setenv("BIMAMBA_BACKEND", "reference")
    assert choose_backend(x, 4) == "reference"
    assert choose_backend(x, 4, "torch") == "torch"  # an argument is stronger than the environment
    monkeypatch.setenv("BIMAMBA_BACKEND", "fast")
    with pytest.raises(ValueError, match="BIMAMBA_BACKEND: expected one of"):
        choose_backend(x, 4)
    with pytest.raises(ValueError, match="demanded, but the kernels compute in float32"):
        choose_backend(x.double(), 4, "triton")
    with pytest.raises(ValueError, match="p and n up to 256, got p=2, n=300"):
        choose_backend(x, 300, "triton")
