"""mlp=channel_mixer: a scan along the channels, each token by itself, in every direction selective; and its errors."""

import logging
from functools import partial

import pytest
import torch
from runs import DIGITS, load, run

from bimamba.nn import BiMamba2, Block, ChannelMixer


def mixer(**options):
    torch.manual_seed(0)
    return ChannelMixer(**{"d_model": 16, "group": 4, "headdim": 4, "d_state": 4, **options}).double()


def test_channels_inform_each_other_in_both_directions_and_tokens_do_not():
    layer, x = mixer(d_conv=1), torch.randn(2, 5, 16, dtype=torch.float64)
    y = layer(x)
    assert y.shape == x.shape
    for channel in (0, 15):
        other = x.clone()
        other[1, 3, channel] += 1.0
        change = (layer(other) - y).abs()
        assert (change[1, 3] > 1e-9).all()  # every channel, from the first step as from the last
        change[1, 3] = 0.0
        assert change.max() == 0.0


def test_it_is_the_scan_of_one_tokens_steps():
    layer, x = mixer(), torch.randn(1, 3, 16, dtype=torch.float64)
    for t in range(3):
        steps = torch.stack([x[0, t, 4 * i : 4 * i + 4] + layer.offset[i] for i in range(4)])
        expected = layer.mixer(steps[None])[0].reshape(16)
        torch.testing.assert_close(layer(x)[0, t], expected, atol=1e-12, rtol=1e-10)


def test_gradients():
    # float64, but A_log and D pass through float32: the bounds are theirs
    layer, x = mixer(), torch.randn(2, 3, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    loss = (layer(x) * weight).sum()
    got = torch.autograd.grad(loss, [x, *layer.parameters()])
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in got)
    direction = torch.randn_like(x)
    with torch.no_grad():
        rise = ((layer(x + 1e-5 * direction) - layer(x - 1e-5 * direction)) * weight).sum() / 2e-5
    torch.testing.assert_close((got[0] * direction).sum(), rise, atol=1e-6, rtol=1e-5)


def test_a_mask_and_bf16_pass_through_the_block():
    block = Block(16, partial(BiMamba2, headdim=8, d_state=4), mlp="channel_mixer", layer_scale=0.5, drop_path=0.1)
    x, mask = torch.randn(2, 7, 16), torch.arange(7) < torch.tensor([[7], [4]])
    block.eval()
    alone = block(x[1:, :4])
    torch.testing.assert_close(block(x, mask)[1:, :4], alone, atol=1e-5, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        low = block(x, mask)
    torch.testing.assert_close(low[mask], block(x, mask)[mask], atol=5e-2, rtol=5e-2)


def test_clear_errors():
    with pytest.raises(ValueError, match=r"channel_mixer\.group: expected a divisor of d_model = 16 .*got 5"):
        mixer(group=5)
    with pytest.raises(ValueError, match=r"channel_mixer\.group: expected .* smaller, got 16"):
        mixer(group=16)
    with pytest.raises(ValueError, match=r"channel_mixer\.headdim: expected a divisor of expand \* group = 8, got 3"):
        mixer(headdim=3)
    with pytest.raises(ValueError, match=r"x: expected \(b, l, d_model\) with d_model = 16, got \(2, 3, 8\)"):
        mixer()(torch.zeros(2, 3, 8))
    with pytest.raises(ValueError, match="mlp: expected 'gelu', 'swiglu' or 'channel_mixer', got 'channels'"):
        Block(16, partial(BiMamba2, headdim=8), mlp="channels")


def test_a_run_trains_and_is_explained(tmp_path, caplog):
    quiet = ["callbacks.learning_curves=null", "callbacks.examples=null", "logger=none"]
    options = [*DIGITS, *quiet, "model.mlp=channel_mixer", "model.channel_mixer.d_state=4", "trainer.max_epochs=1"]
    run(tmp_path / "run", *options, "test=false", "trainer.limit_train_batches=2")
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    names = [name for name in load(checkpoint)["state_dict"] if "mlp.mixer.A_log" in name]
    assert names == ["net.backbone.blocks.0.mlp.mixer.A_log"]
    explain = ["stage=explain", f"ckpt_path={checkpoint}", "extras.print_config=false", "explain.samples=1", *quiet]
    with caplog.at_level(logging.INFO, "bimamba.explain.stage"):
        metrics = run(tmp_path / "seen", *explain, "explain.statistics.samples=2")
    assert "channel mixers scan a token's channels" in caplog.text
    assert metrics["explain/mixing_matrix_error"] < 1e-3  # of the scan over tokens, as without
    assert {name.rpartition("/")[2] for name in metrics if "step_size" in name} == {
        "layer_0_forward",
        "layer_0_backward",
    }
