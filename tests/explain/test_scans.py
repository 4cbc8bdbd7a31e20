"""Recorded scans: mixing matrices are the operator, statistics are what they say."""

import numpy as np
import pytest
import torch
from problems import relative_error

from bimamba.explain.matrix import mixing_matrix
from bimamba.explain.record import mixers, recording
from bimamba.explain.statistics import ScanStatistics, memory_length
from bimamba.nn import Attention, BiMamba2, Mamba2
from bimamba.ops.ssd import bimamba_chunk_scan_combined, mamba_chunk_scan_combined

SMALL = dict(headdim=4, d_state=3)
MIXERS = {
    "tied": lambda: BiMamba2(8, **SMALL),
    "groups": lambda: BiMamba2(8, **SMALL, ngroups=2),
    "untied": lambda: BiMamba2(8, **SMALL, tied=False, A_init_range=(1.0, 4.0)),
    "hydra": lambda: BiMamba2(8, **SMALL, shift=True),
    "untied hydra": lambda: BiMamba2(8, **SMALL, shift=True, tied=False),
    "states": lambda: BiMamba2(8, **SMALL, learnable_init_states=True),
    "limit": lambda: BiMamba2(8, **SMALL, dt_limit=(0.01, 0.05)),
    "causal": lambda: Mamba2(8, **SMALL),
    "causal states": lambda: Mamba2(8, **SMALL, learnable_init_states=True),
}


def recorded(name, packed=False, lengths=(11, 7), seed=0):
    torch.manual_seed(seed)
    mixer = MIXERS[name]()
    with torch.no_grad():
        for parameter in mixer.parameters():  # everything that could be forgotten differs from zero and from the other
            parameter.add_(0.3 * torch.randn_like(parameter))
    u = torch.randn(2, 11, 8)
    mask = torch.arange(11) < torch.tensor(lengths)[:, None]
    options = {"seq_idx": torch.tensor([[0] * 4 + [1] * 7, [0] * 1 + [2] * 10])} if packed else {"mask": mask}
    with torch.no_grad(), recording(mixer) as calls:
        mixer(u, **options)
    return mixer, calls[""], mask


def apply_scan(scan, x):
    """The operator itself on other inputs, in float64, with the recorded parameters."""
    directions = list(scan.directions().values())
    pairs = [tuple(d[i].double() for d in directions) for i in range(5) if directions[0][i] is not None]
    options = {k: v for k, v in scan.options.items() if k not in ("initial_states", "shift")}
    states = tuple(None if s is None else s.double() for s in scan.options["initial_states"])
    D = scan.D.double()
    dt, A, B, C = pairs[:4]
    bias = pairs[4] if len(pairs) > 4 else None
    if scan.backward is None:
        return mamba_chunk_scan_combined(
            x, dt[0], A[0], B[0], C[0], D=D, dt_bias=None if bias is None else bias[0], initial_states=states[0],
            **options,
        )  # fmt: skip
    return bimamba_chunk_scan_combined(
        x, dt, A, B, C, D=D, dt_bias=bias, initial_states=states, shift=scan.options["shift"], **options
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", MIXERS)
def test_the_matrix_is_the_scan(name, packed):
    """On inputs that the matrix has never seen, so that no factor of the recorded ones can hide in it."""
    if packed and ("states" in name or name == "limit"):
        pytest.skip("a packed row has one first token")
    _, scan, _ = recorded(name, packed)
    x = torch.randn(scan.x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    expected = apply_scan(scan, x)
    for row in range(2):
        mixing = mixing_matrix(scan, row)
        assert mixing.error < 1e-5
        got = torch.einsum("hij,jhp->ihp", mixing.matrix, x[row]) + mixing.constant
        assert relative_error(got, expected[row]) < 1e-12
    upper = mixing.matrix.triu(1).abs().sum()
    assert (upper == 0) == name.startswith("causal")
    assert (mixing.constant.abs().sum() > 0) == ("states" in name)


def test_a_matrix_too_long_is_refused():
    _, scan, _ = recorded("tied")
    with pytest.raises(ValueError, match=r"11 x 11 tokens .* at most 10 tokens; raise it"):
        mixing_matrix(scan, max_length=10)
    with pytest.raises(ValueError, match="row: expected 0 to 1, got 2"):
        mixing_matrix(scan, 2)


@pytest.mark.parametrize("name", ["tied", "causal"])
def test_scans_are_seen_where_a_block_is_one_operator(name, monkeypatch):
    """As on a GPU: here by Triton's interpreter."""
    _, expected, _ = recorded(name)
    monkeypatch.setenv("BIMAMBA_BACKEND", "triton")
    _, scan, mask = recorded(name)
    assert relative_error(scan.y * mask[..., None, None], expected.y * mask[..., None, None]) < 1e-5


def test_recording_leaves_no_trace_and_wants_a_scan():
    from bimamba.nn import mamba2

    before = mamba2.bimamba_chunk_scan_combined
    mixer, _, _ = recorded("tied")
    assert mamba2.bimamba_chunk_scan_combined is before and not mixer._forward_hooks and not mixer._forward_pre_hooks
    net = torch.nn.Sequential(Attention(8, headdim=4))
    assert mixers(net) == {}
    with pytest.raises(ValueError, match="without any scan"), recording(net):
        pass


def test_memory_length_by_hand():
    rate = torch.tensor([[0.5], [0.5], [0.25], [0.25], [0.5], [2.0]])
    length, censored = memory_length(rate)
    # after token 0: .5 + .25 + .25; 1: .25 + .25 + .5; 2: .25 + .5 + 2; 3: .5 + 2; 4: 2; 5: 1 / (4 / 6)
    assert length[:, 0].tolist() == [3, 3, 3, 2, 1, 2]
    assert censored[:, 0].tolist() == [False] * 5 + [True]
    constant, _ = memory_length(torch.full((50, 1), 0.1))
    assert set(constant[:, 0].tolist()) == {10}  # 1 / rate, also where the sequence has ended


@pytest.mark.parametrize("name", ["tied", "untied", "limit", "causal"])
def test_statistics_are_those_of_the_real_tokens(name):
    mixer, scan, _ = recorded(name)
    statistics = ScanStatistics()
    statistics.update("0", scan)
    values = statistics.values()["0"]
    assert list(values) == (["forward"] if name == "causal" else ["forward", "backward"])
    heads = mixer.nheads
    low, high = mixer.dt_limit
    for i, (direction, parts) in enumerate(values.items()):
        A = torch.exp(mixer.A_log.detach())
        A = A[i * heads :] if name == "untied" and i else A[:heads]
        assert parts["step_size"].shape == (18, heads) and statistics.longest == 11  # 11 + 7 of 22: no padding
        assert (parts["step_size"] > max(low - 1e-6, 0)).all() and (parts["step_size"] <= high + 1e-6).all()
        np.testing.assert_allclose(parts["decay"], np.exp(-parts["step_size"] * A.numpy()), rtol=1e-5)
        delta = scan.step_sizes(scan.directions()[direction])[0]
        first = delta if direction == "forward" else delta.flip(0)
        np.testing.assert_allclose(parts["step_size"][:11], first.numpy(), rtol=1e-6)
        np.testing.assert_allclose(parts["memory"][:11], memory_length(first * A)[0].numpy())
    if name == "untied":
        assert not np.allclose(values["forward"]["step_size"][:11], values["backward"]["step_size"][:11][::-1])
    rows = statistics.table()
    assert len(rows) == len(values) * 3 * heads
    row = next(r for r in rows if r["statistic"] == "step_size" and r["head"] == 1)
    assert row["q50"] == pytest.approx(np.median(values["forward"]["step_size"][:, 1]))
    assert row["tokens"] == 18 and row["tied"] == (name in ("tied", "limit"))


def test_statistics_keep_a_draw_of_many_values():
    _, scan, _ = recorded("tied")
    few, again = ScanStatistics(max_values=5, seed=1), ScanStatistics(max_values=5, seed=1)
    for statistics in (few, again):
        for _ in range(3):
            statistics.update("0", scan)
    a, b = (s.values()["0"]["forward"] for s in (few, again))
    assert len(a["memory"]) == 5 and np.array_equal(a["memory"], b["memory"])
    assert few.table()[0]["tokens"] == 54
    with pytest.raises(ValueError, match="max_values: expected at least 1"):
        ScanStatistics(max_values=0)
