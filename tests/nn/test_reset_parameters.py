"""Parameters at the start: the draws that a seed has always given, and those of a model that was made on meta."""

from functools import partial

import pytest
import torch

from bimamba.models import Classifier
from bimamba.nn import (
    AttentionPooling,
    BiMamba2,
    ClassTokenPooling,
    Mamba2,
    NucleotideEmbedding,
    PatchEmbedding,
    TokenPooling,
)
from bimamba.spec import DataSpec

DNA = DataSpec("sequence", "multiclass", tuple("ACGT"), alphabet="ACGTN", max_length=20)
IMAGE = DataSpec("image", "multiclass", ("a", "b", "c"), channels=3, height=8, width=8)
OPTIONS = dict(conv_init=0.1, A_init_range=(1.0, 16.0), learnable_init_states=True, tied=False)
MIXER = partial(BiMamba2, headdim=8, d_state=4, **OPTIONS)
LEARNED = partial(NucleotideEmbedding, positions="learned")
MODELS = {
    "dna": partial(Classifier, DNA, 64, 2, LEARNED, MIXER, ClassTokenPooling, mlp="channel_mixer", layer_scale=0.1),
    "image": partial(Classifier, IMAGE, 64, 2, PatchEmbedding, MIXER, AttentionPooling, mlp="swiglu", mlp_reach=2),
    "strands": partial(Classifier, DNA, 64, 1, LEARNED, MIXER, TokenPooling, rc_equivariant=True),
}


def seeded(make):
    torch.manual_seed(0)
    return make()


@pytest.mark.parametrize(
    ("make", "total"),
    [
        (partial(MIXER, 16, dtype=torch.float64), 333.520517516),
        (partial(Mamba2, 16, headdim=8, dtype=torch.bfloat16), 1108.737944126),
        (MODELS["dna"], 4392.836936405),
        (MODELS["image"], 7465.367893547),
    ],
)
def test_a_seed_gives_the_weights_that_it_always_gave(make, total):
    """Sums of absolute values, as of the first version that wrote them down."""
    found = sum(value.double().abs().sum().item() for value in seeded(make).state_dict().values())
    assert found == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_from_meta_begins_as_one_that_was_made_at_once(name):
    expected = seeded(MODELS[name])
    with torch.device("meta"):
        model = MODELS[name]()
    model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.detach().fill_(torch.nan if tensor.is_floating_point() else -1)
    for module in reversed(list(model.modules())):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for name, value in model.named_parameters():
        other = expected.get_parameter(name)
        assert value.isfinite().all(), name
        if (n := value.numel()) >= 32:
            sure = 6 / n**0.5  # a little over four standard errors of a difference
            torch.testing.assert_close(value.mean(), other.mean(), atol=sure * other.std().item() + 1e-6, rtol=0)
            torch.testing.assert_close(value.std(), other.std(), atol=1e-6, rtol=sure)
    for name, value in model.named_buffers():
        assert torch.equal(value, expected.get_buffer(name)), name


def test_wholes_before_parts_give_a_model_that_works_too():
    """The order of `modules()`, and of FSDP: the last layers of the branches begin larger."""
    with torch.device("meta"):
        model = MODELS["dna"]()
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    dt = torch.nn.functional.softplus(model.backbone.blocks[0].mixer.dt_bias)
    assert dt.min() >= 0.00099 and dt.max() <= 0.101
    assert model(torch.randint(1, 5, (2, 20))).isfinite().all()
