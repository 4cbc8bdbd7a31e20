"""Classifiers from parts: shapes, padding through pooling, sizes of the presets, bad combinations."""

from functools import partial
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import nn
from torch.utils.checkpoint import checkpoint

from bimamba.models import Backbone, Classifier
from bimamba.nn import (
    Attention,
    AttentionPooling,
    BiMamba2,
    Block,
    ClassTokenPooling,
    DropPath,
    MaxPooling,
    MeanPooling,
    PatchEmbedding,
    PixelEmbedding,
)
from bimamba.spec import DataSpec

CONFIGS = str(Path(__file__).parents[2] / "configs")
DNA = DataSpec("sequence", "multiclass", ("a", "b", "c"), alphabet="ACGTN", max_length=30)
IMAGE = DataSpec("image", "binary", ("no", "yes"), channels=3, height=8, width=12)
MIXER = partial(BiMamba2, headdim=8, d_state=4)
POOLINGS = [MeanPooling, MaxPooling, AttentionPooling, ClassTokenPooling]


class Deaf(nn.Linear):
    """A mixer that asks nothing of its mask."""

    def __init__(self, d_model):
        super().__init__(d_model, d_model)

    def forward(self, u, mask=None, seq_idx=None):
        return super().forward(u)


def composed(*overrides):
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        return instantiate(compose(overrides=list(overrides)).model)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_changes_nothing(pooling):
    torch.manual_seed(0)
    model = Classifier(DNA, 16, 2, mixer=MIXER, pooling=pooling, mlp="swiglu", layer_scale=0.5)
    lengths = [20, 1, 13]
    mask = torch.arange(20)[None] < torch.tensor(lengths)[:, None]
    tokens = torch.randint(1, 6, (3, 20))
    logits = model(tokens * mask, mask)
    alone = torch.cat([model(tokens[i : i + 1, :n]) for i, n in enumerate(lengths)])
    torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-4)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_class_token_stands_in_the_middle_of_the_real_tokens():
    pooling = ClassTokenPooling(2)
    x = torch.arange(10.0).view(1, 5, 2).repeat(2, 1, 1)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    longer, longer_mask, _ = pooling.insert(x, mask)
    assert longer_mask.sum(1).tolist() == [6, 4]
    for row, middle in ((0, 2), (1, 1)):
        torch.testing.assert_close(longer[row, middle], pooling.token.detach())
        rest = torch.cat([longer[row, :middle], longer[row, middle + 1 :]])
        torch.testing.assert_close(rest, x[row])
    torch.testing.assert_close(pooling(longer, longer_mask), pooling.token.expand(2, -1))


@pytest.mark.parametrize("embedding,l", [(PixelEmbedding, 96), (partial(PatchEmbedding, patch_size=4), 6)])
@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "none"])
def test_images(embedding, l, positions):
    model = Classifier(IMAGE, 16, 1, mixer=MIXER, embedding=partial(embedding, positions=positions))
    images = torch.randn(2, 3, 8, 12)
    assert model(images).shape == (2, 1)
    assert model.embedding(images).shape == (2, l, 16)


def test_pixels_keep_their_order():
    embedding = PixelEmbedding(IMAGE, 4, positions="none")
    images = torch.zeros(1, 3, 8, 12)
    images[0, :, 2, 5] = 1.0
    tokens = embedding(images) - embedding(torch.zeros_like(images))
    assert tokens.abs().sum(-1).argmax().item() == 2 * 12 + 5


@pytest.mark.parametrize("size,millions", [("nano", 0.15), ("tiny", 0.73), ("small", 3.5), ("base", 19.9)])
def test_presets(size, millions):
    spec = DataSpec("image", "multiclass", tuple("abcdefghij"), channels=3, height=32, width=32)
    with torch.device("meta"):
        model = composed(f"+model={size}")(spec=spec)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.03)


@pytest.mark.parametrize("mixer", ["bimamba2", "bimamba2_untied", "hydra", "mamba2", "attention"])
def test_mixers_by_config(mixer):
    model = composed("+model=nano", f"model/mixer={mixer}", "model/embedding=nucleotides", "model.depth=1")(spec=DNA)
    assert model(torch.randint(1, 6, (2, 9))).shape == (2, 3)


@pytest.mark.parametrize("pooling", ["mean", "max", "attention", "cls"])
@pytest.mark.parametrize("embedding", ["pixels", "patches", "pixels_conv", "conv_stem"])
def test_parts_by_config(pooling, embedding):
    model = composed(
        "+model=nano", f"model/pooling={pooling}", f"model/embedding={embedding}", "model.depth=1", "model.mlp=gelu"
    )(spec=IMAGE)
    assert model(torch.randn(2, 3, 8, 12)).shape == (2, 1)


def test_columns_are_the_rows_of_the_image_turned_around_its_diagonal():
    embedding = partial(PatchEmbedding, patch_size=2, positions="none")
    torch.manual_seed(0)
    columns = Classifier(IMAGE, 16, 3, mixer=MIXER, embedding=embedding, scan_order=["columns"])
    turned = DataSpec(**(vars(IMAGE) | {"height": IMAGE.width, "width": IMAGE.height}))
    rows = Classifier(turned, 16, 3, mixer=MIXER, embedding=embedding)
    state = dict(columns.state_dict())
    state["embedding.proj.weight"] = state["embedding.proj.weight"].transpose(-1, -2)
    rows.load_state_dict(state)
    images = torch.randn(2, 3, 8, 12)
    torch.testing.assert_close(columns(images), rows(images.transpose(-1, -2)))
    both = Classifier(IMAGE, 16, 3, mixer=MIXER, embedding=embedding, scan_order=["rows", "columns"])
    both.load_state_dict(columns.state_dict())
    x, block = torch.randn(2, 24, 16), both.backbone.blocks
    middle = block[1](block[0](x).view(2, 4, 6, 16).transpose(1, 2).flatten(1, 2)).view(2, 6, 4, 16)
    torch.testing.assert_close(both.backbone(x), both.backbone.norm(block[2](middle.transpose(1, 2).flatten(1, 2))))


@pytest.mark.parametrize(
    ("spec", "options", "words"),
    [
        (IMAGE, {"scan_order": []}, "expected a list of rows and columns, got \\[\\]"),
        (IMAGE, {"scan_order": ["spiral"]}, "spiral"),
        (IMAGE, {"scan_order": "rows"}, "expected a list"),
        (DNA, {"scan_order": ["columns"]}, "those of an image"),
        (IMAGE, {"scan_order": ["columns"], "pooling": ClassTokenPooling}, "adds no token"),
    ],
)
def test_scan_orders_that_cannot_be(spec, options, words):
    with pytest.raises(ValueError, match=words):
        Classifier(spec, 16, 2, mixer=MIXER, **options)


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    drop = DropPath(0.25)
    y = drop(torch.ones(4000, 3))
    assert y.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert (y[:, :1] == y).all()
    assert y.mean().item() == pytest.approx(1.0, abs=0.03)
    assert torch.equal(drop.eval()(y), y)


def test_stochastic_depth_rises_linearly():
    backbone = Backbone(16, 3, MIXER, drop_path=0.2)
    assert [b.drop_path.rate for b in backbone.blocks] == [0.0, 0.1, 0.2]


class Noise(nn.Module):
    """A mixer of a user's, which draws random numbers."""

    def __init__(self, d_model):
        super().__init__()
        self.proj = nn.Linear(d_model, d_model)

    def forward(self, x, mask=None, seq_idx=None):
        return self.proj(x) * torch.rand_like(x)


@pytest.mark.parametrize(
    ("options", "draws"),
    [
        ({}, False),
        ({"mlp": "gelu"}, False),
        ({"dropout": 0.5}, True),
        ({"mlp": "swiglu", "drop_path": 0.5}, True),
        ({"mixer": partial(Attention, headdim=8)}, False),
        ({"mixer": partial(Attention, headdim=8, dropout=0.5)}, True),
        ({"mixer": Noise}, True),
    ],
)
def test_block_checkpointing_gives_the_same_gradients(options, draws, monkeypatch):
    kept = []

    def noted(*args, preserve_rng_state, **more):
        kept.append(preserve_rng_state)
        return checkpoint(*args, preserve_rng_state=preserve_rng_state, **more)

    monkeypatch.setattr("bimamba.models.classifier.checkpoint", noted)

    def gradients(checkpoint_blocks):
        torch.manual_seed(0)
        model = Classifier(DNA, 16, 2, **{"mixer": MIXER, **options}, checkpoint_blocks=checkpoint_blocks)
        loss = model(torch.arange(1, 5).repeat(2, 3)).square().sum()
        return torch.autograd.grad(loss, list(model.parameters()))

    for a, b in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(a, b)
    assert any(kept) is draws and len(kept) == 2


def test_a_deep_model_has_finite_gradients():
    torch.manual_seed(0)
    model = Classifier(DNA, 16, 24, mixer=MIXER)
    loss = model(torch.randint(1, 6, (2, 30))).square().mean()
    for gradient in torch.autograd.grad(loss, list(model.parameters())):
        assert gradient.isfinite().all()


def test_compiles_without_graph_breaks():
    torch.manual_seed(0)
    model = Classifier(DNA, 16, 1, mixer=MIXER)
    tokens = torch.randint(1, 6, (2, 30))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens), model(tokens))
    model.backbone.checkpoint_blocks = True
    torch.testing.assert_close(compiled(tokens), model(tokens))


@pytest.mark.parametrize(
    "make_bad,message",
    [
        (lambda: Classifier(IMAGE, embedding=partial(PatchEmbedding, patch_size=5)), "patch_size: expected a divisor"),
        (lambda: composed("+model=nano", "model/embedding=pixels")(spec=DNA), "pixels embeds data of kind 'image'"),
        (lambda: composed("+model=nano", "model/embedding=nucleotides")(spec=IMAGE), "nucleotides embeds data of kind"),
        (lambda: Classifier(IMAGE)(torch.randn(2, 3, 12, 8)), r"inputs: expected \(b, 3, 8, 12\), got \(2, 3, 12, 8\)"),
        (lambda: Classifier(DNA)(torch.ones(2, 3, 4)), r"inputs: expected token ids \(b, l\)"),
        (lambda: Classifier(DNA)(torch.ones(2, 3).long(), torch.ones(2, 4).bool()), "mask: expected"),
        (
            lambda: Classifier(DNA, mixer=Deaf)(torch.ones(2, 3).long(), torch.ones(2, 3).long()),
            "mask: expected .* bool, got .*int64",
        ),
        (
            lambda: Classifier(DNA, mixer=Deaf)(torch.ones(2, 3).long(), torch.ones(2, 3)),
            "mask: expected .* bool, got .*float32",
        ),
        (lambda: Block(16, MIXER, mlp="relu"), "mlp: expected 'gelu', 'swiglu' or 'channel_mixer', got 'relu'"),
        (lambda: DropPath(1.0), "drop_path: expected a rate in"),
        (lambda: Backbone(16, 0, MIXER), "depth: expected at least 1, got 0"),
        (lambda: PixelEmbedding(IMAGE, 8, positions="rotary"), "positions: expected one of"),
        (lambda: DataSpec("audio", "binary", ("a", "b")), "kind: expected one of"),
        (lambda: DataSpec("image", "binary", ("a", "b", "c"), 3, 8, 8), "exactly 2, got"),
        (lambda: DataSpec("sequence", "binary", ("a", "b")), "needs alphabet, max_length"),
        (lambda: DataSpec.from_dict({"kind": "image", "size": 3}), r"unknown keys in a data spec: \['size'\]"),
    ],
)
def test_bad_input(make_bad, message):
    with pytest.raises(ValueError, match=message):
        make_bad()


def test_spec_survives_a_round_trip():
    for spec in (DNA, IMAGE):
        assert DataSpec.from_dict(spec.to_dict()) == spec


def test_mean_of_more_tokens_than_float16_can_count():
    x, mask = torch.full((1, 70_000, 2), 2.0, dtype=torch.half), torch.ones(1, 70_000, dtype=torch.bool)
    assert torch.equal(MeanPooling(2)(x, mask), torch.full((1, 2), 2.0, dtype=torch.half))
