"""Packed = padded = one at a time, in outputs and in the gradients of all parameters."""

from functools import partial

import numpy as np
import pytest
import torch

from bimamba.models import Classifier
from bimamba.nn import (
    Attention,
    AttentionPooling,
    BiMamba2,
    ChannelMixer,
    ClassTokenPooling,
    DropPath,
    Mamba2,
    MaxPooling,
    MeanPooling,
    NucleotideEmbedding,
)
from bimamba.packing import describe, plan
from bimamba.spec import DataSpec

DNA = DataSpec("sequence", "multiclass", ("a", "b", "c"), alphabet="ACGTN", max_length=40)
IMAGE = DataSpec("image", "binary", ("no", "yes"), channels=1, height=4, width=4)
SMALL = dict(headdim=8, d_state=4)
MIXERS = {
    "bimamba2": partial(BiMamba2, **SMALL),
    "untied": partial(BiMamba2, **SMALL, tied=False),
    "hydra": partial(BiMamba2, **SMALL, shift=True),
    "limit": partial(BiMamba2, **SMALL, dt_limit=(0.01, 0.2)),
    "causal": partial(Mamba2, **SMALL),
    "attention": partial(Attention, headdim=8),
}
POOLINGS = {"mean": MeanPooling, "max": MaxPooling, "attention": AttentionPooling, "cls": ClassTokenPooling}
LENGTHS = np.array([17, 1, 40, 2, 9, 24, 8])


def sequences(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 6, (n,), generator=generator) for n in LENGTHS.tolist()]


def packed(rows, extra=3):
    """inputs, mask, and what a packing says, in rows of 45 tokens and a little padding."""
    row, start = plan(LENGTHS, 45)
    l = int((start + LENGTHS).max()) + extra
    inputs = torch.zeros(row.max() + 1, l, dtype=torch.int64)
    for tokens, r, s in zip(rows, row, start, strict=True):
        inputs[r, s : s + len(tokens)] = tokens
    return inputs, inputs > 0, *describe(row, start, LENGTHS, l)


def check(model):
    rows = sequences()
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    weight = torch.randn(len(rows), 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = {}
    for how, logits in (
        ("alone", torch.cat([model(tokens[None]) for tokens in rows])),
        ("padded", model(padded, padded > 0)),
        ("packed", model(*packed(rows))),
    ):
        assert logits.shape == weight.shape
        results[how] = [logits, *torch.autograd.grad((logits * weight).sum(), list(model.parameters()))]
    names = ["logits", *(n for n, _ in model.named_parameters())]
    for how in ("padded", "packed"):
        for name, a, b in zip(names, results[how], results["alone"], strict=True):
            # float64, but A_log and D pass through float32, and so do their gradients: 1e-7 was measured there
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-6, msg=lambda m, n=name, h=how: f"{h}: {n}: {m}")


def build(mixer="bimamba2", pooling="mean", positions="none", **options):
    torch.manual_seed(0)
    return Classifier(
        DNA,
        16,
        2,
        embedding=partial(NucleotideEmbedding, positions=positions),
        mixer=MIXERS[mixer],
        pooling=POOLINGS[pooling],
        **options,
    ).double()


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer(mixer):
    check(build(mixer, mlp="swiglu", mlp_reach=2))


def test_channel_mixer():
    check(build(mlp="channel_mixer", channel_mixer=partial(ChannelMixer, group=4, headdim=4, d_state=4)))


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "none"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_pooling_and_position(pooling, positions):
    check(build(pooling=pooling, positions=positions))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_without_the_loaders_help_the_order_is_that_of_the_rows(pooling):
    model, (inputs, mask, seq_idx, bounds, order) = build(pooling=pooling), packed(sequences())
    expected = model(inputs, mask, seq_idx, bounds, order)
    torch.testing.assert_close(model(inputs, mask, seq_idx), expected[order.argsort()])


@pytest.mark.parametrize("pooling", POOLINGS)
def test_noise_at_padding_reaches_nobody(pooling):
    model, (inputs, mask, *rest) = build(pooling=pooling, positions="learned"), packed(sequences())
    noisy = torch.where(mask, inputs, torch.randint(1, 6, inputs.shape))
    torch.testing.assert_close(model(noisy, mask, *rest), model(inputs, mask, *rest))


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("pooling", [p for p in POOLINGS if p != "cls"])
def test_nothing_but_padding_gives_zeros_and_finite_gradients(pooling, layout):
    torch.manual_seed(0)
    pool, x = POOLINGS[pooling](4), torch.randn(2, 5, 4, requires_grad=True)
    if layout == "padded":
        pooled = pool(x, torch.tensor([[True] * 3 + [False] * 2, [False] * 5]))
    else:  # an empty sequence beside another one, and one with a row to itself
        row, start, lengths = np.array([0, 0, 1]), np.array([0, 3, 0]), np.array([3, 0, 0])
        pooled = pool(x, None, describe(row, start, lengths, 5))
    torch.testing.assert_close(pooled[:1], pool(x[:1, :3]))
    assert (pooled[1:] == 0).all()
    pooled.sum().backward()
    assert x.grad[0, :3].abs().sum() > 0 and (x.grad[0, 3:] == 0).all() and (x.grad[1] == 0).all()
    assert all(p.grad.isfinite().all() for p in pool.parameters())


def test_sequences_of_a_row_are_dropped_one_by_one():
    drop = DropPath(0.5)
    seq_idx = torch.arange(400).repeat_interleave(3)[None]
    y = drop(torch.ones(1, 1200, 2), seq_idx)[0].view(400, 3, 2)
    assert (y == y[:, :1, :1]).all() and 0.35 < (y[:, 0, 0] > 0).float().mean() < 0.65


def test_clear_errors():
    inputs, mask, *rest = packed(sequences())
    learned = partial(BiMamba2, **SMALL, learnable_init_states=True)
    with pytest.raises(ValueError, match="expected learnable_init_states=false with packing"):
        Classifier(DNA, 16, 1, mixer=learned)(inputs, mask, *rest)
    with pytest.raises(ValueError, match=r"seq_idx: expected \(\d, \d+\), got"):
        build()(inputs, mask, rest[0][:, 1:])
    with pytest.raises(ValueError, match="seq_idx: expected none with images"):
        Classifier(IMAGE, 16, 1, mixer=MIXERS["bimamba2"])(torch.zeros(1, 1, 4, 4), None, rest[0])
