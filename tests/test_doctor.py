"""`python -m bimamba.doctor` on a machine without a GPU."""

from __future__ import annotations

import pytest
import torch

from bimamba import doctor


@pytest.fixture(autouse=True)
def cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "standard_time", lambda device: (1.0, 2.0, 0.0))


def test_says_what_runs_here_and_that_it_is_right(capsys, monkeypatch):
    monkeypatch.delenv("BIMAMBA_BACKEND", raising=False)
    assert doctor.main() == 0
    said = capsys.readouterr().out
    assert f"torch {torch.__version__}" in said and "backend: torch" in said
    assert "parity float32: ok, worst" in said and "ddt_bias" in said


@pytest.mark.parametrize("wrong", [1.001, float("nan")])
def test_one_wrong_gradient_is_an_error(wrong, capsys, monkeypatch):
    right = doctor.outputs

    def outputs(t, backend, **options):
        got = right(t, "torch", **options)
        return got | {"dB": got["dB"] * wrong} if backend == "auto" else got

    monkeypatch.setattr(doctor, "outputs", outputs)
    assert doctor.main() == 1
    assert "parity float32: BEYOND 1e-05, worst dB" in capsys.readouterr().out


def test_parity_is_that_of_the_sizes_and_options_asked_for(monkeypatch):
    asked, right = [], doctor.outputs

    def outputs(t, backend, **options):
        asked.append((backend, tuple(t["x"].shape), t["B"].shape[-1], t["x"].dtype, options))
        return right(t, "torch", **options)

    monkeypatch.setattr(doctor, "outputs", outputs)
    errors = doctor.parity(torch.bfloat16, "cpu", (1, 40, 4, 16, 2, 8), save_states=True)
    assert asked == [
        ("auto", (1, 40, 4, 16), 8, torch.bfloat16, {"save_states": True}),
        ("torch", (1, 40, 4, 16), 8, torch.float64, {}),
    ]
    assert list(errors) == ["y", "dx", "ddt", "dA", "dB", "dC", "dD", "ddt_bias"] and 1e-4 < errors["dx"] < 1e-2


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(doctor, "choose_backend", lambda *_: "triton")
    monkeypatch.setattr(doctor, "triton_unavailable", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *sizes, device: zeros(*sizes))


def test_sixteen_bits_are_checked_with_states_saved_and_recomputed(gpu, monkeypatch, capsys):
    asked = []

    def parity(dtype, device, sizes, **options):
        asked.append((dtype, sizes, options.get("save_states")))
        return {"y": 1.0 if asked[-1] == (torch.bfloat16, doctor.LARGE, True) else 0.0}

    monkeypatch.setattr(doctor, "parity", parity)
    assert doctor.main() == 1
    cases = [(doctor.SMALL, None), (doctor.LARGE, True), (doctor.LARGE, False)]
    for dtype, expected in ((torch.bfloat16, cases), (torch.float16, cases), (torch.float32, cases[:1])):
        assert [a[1:] for a in asked if a[0] == dtype] == expected
    said = capsys.readouterr().out
    assert "parity bfloat16, states saved: BEYOND 0.004" in said and "parity bfloat16, states recomputed: ok" in said
    assert "expected about 0.45 ms (measured on H100)" in said


def test_the_large_problem_is_one_for_descriptors():
    pytest.importorskip("triton")
    from bimamba.ops.ssd.kernels.choose import LITTLE

    b, l, h, p, *_ = doctor.LARGE
    assert b * l * h * p > LITTLE
    b, l, h, p, *_ = doctor.SMALL
    assert b * l * h * p <= LITTLE
