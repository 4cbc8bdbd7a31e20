"""Convolutions with taps at powers of two: against dense ones, with padding and packed rows, and as part of a block."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from bimamba.nn import BiMamba2, Block
from bimamba.nn.powers import DepthwisePowersConv1d, PowersConv1d


@pytest.mark.parametrize(("l", "reach", "stride"), [(96, 4, 2), (97, 3, 4), (98, 1, 5), (5, 8, 3), (7, 0, 2)])
def test_powers_are_a_sparse_convolution(l, reach, stride):
    sparse = PowersConv1d(6, 4, reach, stride)
    far = sparse.taps[-1]
    assert far <= reach and sparse.taps[0] == -far and len(sparse.taps) == 2 * reach.bit_length() + 1
    weight = torch.zeros(4, 6, 2 * far + 1)
    weight[:, :, [far + tap for tap in sparse.taps]] = sparse.proj.weight.unflatten(1, (-1, 6)).mT
    x = torch.randn(2, l, 6)
    expected = F.conv1d(x.mT, weight, sparse.proj.bias, stride, padding=far).mT
    torch.testing.assert_close(sparse(x), expected, atol=1e-5, rtol=1e-5)


def depthwise(channels, reach):
    conv = DepthwisePowersConv1d(channels, reach).double()
    torch.nn.init.normal_(conv.weight)
    return conv


@pytest.mark.parametrize(("l", "reach"), [(33, 8), (5, 8), (1, 2), (9, 6)])
def test_each_channel_by_itself(l, reach):
    conv = depthwise(6, reach)
    far = conv.taps[-1]
    weight = torch.zeros(6, 1, 2 * far + 1).double()
    weight[:, 0, [far + tap for tap in conv.taps]] = conv.weight.mT
    x = torch.randn(2, l, 6).double()
    torch.testing.assert_close(conv(x), F.conv1d(x.mT, weight, padding=far, groups=6).mT)
    assert torch.autograd.gradcheck(conv, (x.requires_grad_(),))


def test_padding_and_neighbours_in_a_row_are_not_seen():
    conv, lengths = depthwise(4, 4), [7, 3, 5]
    alone = [torch.randn(1, l, 4).double() for l in lengths]
    expected = torch.cat([conv(x) for x in alone], 1)
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    torch.testing.assert_close(conv(torch.cat(alone, 1), seq_idx=ids), expected)
    padded = torch.cat([alone[1], torch.full((1, 6, 4), torch.inf).double()], 1)
    torch.testing.assert_close(conv(padded, mask=torch.arange(9)[None] < 3)[:, :3], conv(alone[1]))


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_a_block_that_looks_around_starts_as_one_that_does_not(mlp):
    make = partial(Block, 16, partial(BiMamba2, headdim=8, d_state=4), mlp)
    plain, looking = make(), make(mlp_reach=4)
    assert looking.load_state_dict(plain.state_dict(), strict=False).missing_keys == ["mlp.conv.weight"]
    x = torch.randn(2, 11, 16)
    torch.testing.assert_close(looking(x), plain(x))
    looking(x).square().sum().backward()
    assert (looking.mlp.conv.weight.grad.abs().sum(-1) > 0).all()


@pytest.mark.parametrize(("mlp", "reach"), [(None, 2), ("channel_mixer", 2), ("gelu", -1)])
def test_bad_reach(mlp, reach):
    with pytest.raises(ValueError, match=f"mlp_reach: expected 0.*got {reach}"):
        Block(16, partial(BiMamba2, headdim=8, d_state=4), mlp, mlp_reach=reach)
