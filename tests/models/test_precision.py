"""Mixed precision on CPUs (trainer.precision=bf16-mixed): what stays float32, and how far gradients go.

Bound: in a network of 24 layers the gradient differs from the float32 run's by at most 2 % of its norm (0.4 % and 0.6 %
were measured), and each parameter's part of it by 5 % of its own norm (2.4 %) plus 1e-4 of the whole.
"""

from functools import partial

import pytest
import torch

from bimamba.models import Classifier
from bimamba.nn import BiMamba2, Mamba2
from bimamba.ops.ssd import chunked
from bimamba.spec import DataSpec

DNA = DataSpec("sequence", "multiclass", ("a", "b", "c"), alphabet="ACGTN", max_length=60)


def gradients(mixer, dtype):
    torch.manual_seed(0)
    model = Classifier(DNA, 32, 24, mixer=mixer)
    tokens = torch.randint(1, 6, (4, 60))
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        logits = model(tokens)
    loss = torch.nn.functional.cross_entropy(logits.float(), torch.tensor([0, 1, 2, 0]))
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True)), model


@pytest.mark.parametrize("mixer", [BiMamba2, Mamba2])
def test_a_deep_networks_gradients_agree_with_float32(mixer):
    mixer = partial(mixer, headdim=16, d_state=8)
    exact, _ = gradients(mixer, None)
    mixed, model = gradients(mixer, torch.bfloat16)
    size = torch.stack([a.square().sum() for a in exact.values()]).sum().sqrt()
    difference = 0.0
    for name, a in exact.items():
        b = mixed[name]
        assert b.dtype == torch.float32 and b.isfinite().all(), name
        assert (a - b).norm() < 0.05 * a.norm() + 1e-4 * size, (name, float((a - b).norm() / a.norm()))
        difference += (a - b).square().sum()
    assert difference.sqrt() < 0.02 * size
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32, name


def test_decays_are_float32_under_autocast(monkeypatch):
    """The scan gets bf16 tokens, and A, D, dt_bias as they are; sums of decays and states are float32."""
    seen = {}
    plain = chunked._Read.__init__

    def spy(self, B, C, s, e, row, xd):
        seen.update(s=s.dtype, e=e.dtype, B=B.dtype, xd=xd.dtype)
        plain(self, B, C, s, e, row, xd)

    monkeypatch.setattr(chunked._Read, "__init__", spy)
    layer = BiMamba2(32, headdim=16, d_state=8)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(2, 50, 32))
    assert y.dtype == torch.bfloat16
    assert seen == dict.fromkeys(("s", "e", "B", "xd"), torch.float32)
    assert {p.dtype for p in (layer.A_log, layer.D, layer.dt_bias)} == {torch.float32}
