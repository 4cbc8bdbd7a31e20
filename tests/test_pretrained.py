"""Models as folders: they come back as they were, run no code, and start trainings; bad folders are named as such."""

import json
import pickle
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from runs import composed
from safetensors.torch import load_file, save_file
from torch import nn

from bimamba.finetune import load_pretrained, resample
from bimamba.models import Classifier
from bimamba.nn import (
    Attention,
    AttentionPooling,
    BiMamba2,
    ClassTokenPooling,
    MaxPooling,
    NucleotideEmbedding,
    PatchEmbedding,
)
from bimamba.pretrained import CONFIG, WEIGHTS, describe, parts
from bimamba.spec import DataSpec

DNA = DataSpec("sequence", "binary", ("no", "yes"), alphabet="ACGTN", max_length=20)
IMAGE = DataSpec("image", "multiclass", ("a", "b", "c"), channels=3, height=8, width=8, mean=(0.5,) * 3, std=(0.2,) * 3)
MIXER = partial(BiMamba2, headdim=8, d_state=8)


def make(spec=DNA, seed=0, **options):
    torch.manual_seed(seed)
    return Classifier(spec, **{"d_model": 16, "depth": 2, "mixer": MIXER, **options}).eval()


def outputs(model):
    generator = torch.Generator().manual_seed(1)
    if model.spec.kind == "image":
        return model(torch.randn(2, 3, 8, 8, generator=generator))
    return model(torch.randint(1, 5, (2, 20), generator=generator))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model; read only."""
    path = tmp_path_factory.mktemp("saved") / "model"
    make().save_pretrained(path)
    return path


@pytest.fixture
def copy(folder, tmp_path):
    """One to be damaged."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def change(folder, **values):
    config = json.loads((folder / CONFIG).read_text())
    config["model"] |= values
    (folder / CONFIG).write_text(json.dumps(config))


# ------------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        (DNA, {}),
        (DNA, {"mixer": partial(MIXER, tied=False, shift=True, dt_limit=(1e-3, float("inf"))), "mlp": "swiglu"}),
        (DNA, {"mixer": partial(Attention, headdim=8), "pooling": ClassTokenPooling}),
        (IMAGE, {"embedding": partial(PatchEmbedding, patch_size=2), "pooling": AttentionPooling, "layer_scale": 1e-2}),
    ],
)
def test_models_come_back_as_they_were(spec, options, tmp_path):
    model = make(spec, **options)
    model.save_pretrained(tmp_path)
    again = Classifier.from_pretrained(tmp_path)
    assert again.spec == spec and not again.training
    assert describe(again.arguments) == describe(model.arguments)
    assert torch.equal(outputs(again), outputs(model))


def test_dtype_is_that_of_to(folder):
    model = Classifier.from_pretrained(folder, dtype=torch.bfloat16)
    expected = make().to(torch.bfloat16).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    tokens = torch.randint(1, 5, (2, 20))
    # 0.004 was measured, of values up to 1.4
    torch.testing.assert_close(model.features(tokens).float(), make().features(tokens), atol=0.03, rtol=0)
    for wrong in (torch.int8, torch.float8_e4m3fn, "bfloat16"):
        with pytest.raises(ValueError, match=r"dtype: expected None or one of torch\.float32, torch\.bfloat16"):
            Classifier.from_pretrained(folder, dtype=wrong)


def test_the_files_are_plain(folder):
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", CONFIG, WEIGHTS]
    config = json.loads((folder / CONFIG).read_text(), parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))
    assert config["model"]["mixer"]["_target_"] == "bimamba.nn.BiMamba2"
    assert config["model"]["mixer"]["dt_limit"] == [0.0, "inf"]  # defaults stand there, too
    assert parts(config["model"])["mixer"].keywords["dt_limit"] == [0.0, float("inf")]
    assert load_file(folder / WEIGHTS).keys() == make().state_dict().keys()


def test_what_json_cannot_hold_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"model\.mixer: expected plain values, a class, or functools\.partial"):
        make(mixer=lambda d: MIXER(d)).save_pretrained(tmp_path)


def test_a_repository_is_read_from_the_cache_of_the_hub(folder, tmp_path):
    """The cache's layout, files as links into `blobs`; no network."""
    repo = tmp_path / "models--me--mine"
    snapshot, blobs = repo / "snapshots" / ("0" * 40), repo / "blobs"
    for made in (snapshot, blobs, repo / "refs"):
        made.mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    for name in (CONFIG, WEIGHTS):
        (blobs / name).write_bytes((folder / name).read_bytes())
        (snapshot / name).symlink_to(blobs / name)
    model = Classifier.from_pretrained("me/mine", cache_dir=tmp_path, local_files_only=True)
    assert torch.equal(outputs(model), outputs(make()))


def test_push_to_hub_sends_the_folder(monkeypatch):
    sent = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **options):
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, folder_path, **options):
            sent.update(options, files=sorted(p.name for p in folder_path.iterdir()))
            sent["card"] = (folder_path / "README.md").read_text()
            return "address"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    assert make().push_to_hub("me/mine") == "address"
    assert sent["repo_id"] == "me/mine" and sent["files"] == ["README.md", CONFIG, WEIGHTS]
    assert "# mine\n" in sent["card"] and 'from_pretrained("me/mine")' in sent["card"]
    make().push_to_hub("me/mine", model_card_kwargs={"name": "you/yours"}, commit_message="second")
    assert "# yours\n" in sent["card"] and sent["commit_message"] == "second"


# ------------------------------------------------------------------------------------------------- of unknown origin


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.exec",
        "bimamba.pretrained.os.system",
        "bimamba.nn.mamba2.torch.hub.load",
        "bimamba.config.save",  # ours, but it writes files
        "bimamba.nn.mamba2.checkpoint",
        "torch.nn.Linear",
    ],
)
def test_a_malicious_configuration_is_refused(copy, target):
    change(copy, mixer={"_target_": target, "_partial_": True, "command": "touch pwned"})
    with pytest.raises(ValueError, match=r"model\.mixer\._target_.*outside the trusted modules"):
        Classifier.from_pretrained(copy)
    with pytest.raises(ValueError, match="outside the trusted modules"):
        make(pretrained=copy)


def test_functions_and_resolvers_of_a_configuration_are_refused(copy):
    change(copy, mixer={"_target_": "bimamba.nn.embedding.sinusoids", "l": 3})
    with pytest.raises(ValueError, match=r"mixer"):
        Classifier.from_pretrained(copy)
    change(copy, mixer={"_target_": "bimamba.nn.BiMamba2", "activation": "${oc.env:HOME}"})
    with pytest.raises(ValueError, match="resolver"):
        Classifier.from_pretrained(copy)


def test_own_parts_can_be_trusted_by_name(tmp_path):
    model = make(mixer=OwnMixer)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="outside the trusted modules"):
        Classifier.from_pretrained(tmp_path)
    again = Classifier.from_pretrained(tmp_path, trusted_modules=[OwnMixer.__module__])
    assert torch.equal(outputs(again), outputs(model))


class OwnMixer(nn.Linear):
    def __init__(self, d_model):
        super().__init__(d_model, d_model)

    def forward(self, u, mask=None, seq_idx=None):
        return super().forward(u)


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


def test_pickles_in_a_folder_are_not_read(copy):
    """Neither under a pickle's usual name nor in the place of the safetensors."""
    for name in ("pytorch_model.bin", "model.pt2", "modeling_bimamba.py"):
        (copy / name).write_bytes(pickle.dumps(Evil()))
    assert torch.equal(outputs(Classifier.from_pretrained(copy)), outputs(make()))
    (copy / WEIGHTS).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="damaged or no safetensors"):
        Classifier.from_pretrained(copy)
    (copy / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=WEIGHTS):
        Classifier.from_pretrained(copy)


def test_a_configuration_cannot_lead_to_other_files(copy, tmp_path_factory):
    """`..` in any value is no path to us, and unknown keys are refused."""
    other = tmp_path_factory.mktemp("other")
    make(seed=5).save_pretrained(other)
    change(copy, weights=f"../{other.name}/{WEIGHTS}")
    with pytest.raises(ValueError, match="weights"):
        Classifier.from_pretrained(copy)
    (copy / CONFIG).write_bytes((other / CONFIG).read_bytes())
    change(copy, pretrained=f"../{other.name}")
    with pytest.raises(ValueError, match="pretrained and freeze are no part"):
        Classifier.from_pretrained(copy)


def test_saving_does_not_write_through_links(tmp_path):
    """A folder of somebody else may have links in the places of our files."""
    target = tmp_path / "precious"
    target.write_text("precious")
    folder = tmp_path / "model"
    folder.mkdir()
    for name in (CONFIG, WEIGHTS):
        (folder / name).symlink_to(target)
    make().save_pretrained(folder)
    assert target.read_text() == "precious"
    assert torch.equal(outputs(Classifier.from_pretrained(folder)), outputs(make()))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model": 1, "spec": 2}', b'{"spec": {}}', b"\xff\xfe"])
def test_damaged_configurations(copy, content):
    (copy / CONFIG).write_bytes(content)
    with pytest.raises(ValueError, match="expected what save_pretrained writes"):
        Classifier.from_pretrained(copy)


def test_damaged_weights(copy):
    whole = (copy / WEIGHTS).read_bytes()
    for content in (b"", whole[:-100], whole[:20], b"\xff" * 50):
        (copy / WEIGHTS).write_bytes(content)
        with pytest.raises(ValueError, match="damaged or no safetensors"):
            Classifier.from_pretrained(copy)


def test_weights_that_do_not_fit_the_configuration(copy):
    change(copy, d_model=8)
    with pytest.raises(ValueError, match="shapes differ"):
        Classifier.from_pretrained(copy)
    change(copy, d_model="8")
    with pytest.raises(ValueError, match="describes no model"):
        Classifier.from_pretrained(copy)


def test_missing_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{CONFIG} is missing"):
        Classifier.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder or file at"):
        Classifier.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="cannot be had from the Hub"):
        Classifier.from_pretrained("me/nothing", cache_dir=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="got the file"):
        Classifier.from_pretrained(tmp_path / "file")


# ------------------------------------------------------------------------------------------------------- fine-tuning


def test_a_new_head_where_the_classes_differ(folder):
    same = make(seed=1, pretrained=folder)
    assert torch.equal(outputs(same), outputs(make()))
    other = DataSpec("sequence", "multiclass", ("x", "y", "z"), alphabet="ACGTN", max_length=9)
    model, fresh = make(other, seed=1, pretrained=folder), make(other, seed=1)
    source = load_file(folder / WEIGHTS)
    for name, value in model.state_dict().items():
        wanted = fresh.state_dict()[name] if name.startswith("head.") else source[name]
        assert torch.equal(value, wanted), name
    renamed = DataSpec("sequence", "binary", ("a", "b"), alphabet="ACGTN", max_length=20)
    assert load_pretrained(make(renamed), folder) == ["head.proj.bias", "head.proj.weight"]


def test_another_pooling_and_positions_start_anew(folder):
    options = {"pooling": AttentionPooling, "embedding": partial(NucleotideEmbedding, positions="learned")}
    new = load_pretrained(make(**options), folder)
    assert "embedding.positions.table" in new and sum(name.startswith("pooling.") for name in new) == 4
    assert load_pretrained(make(pooling=MaxPooling), folder) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 32}, r"d_model: 16 there, 32 here. To fit it: model\.d_model=16"),
        ({"depth": 1}, "depth: 2 there, 1 here"),
        ({"mixer": partial(MIXER, shift=True)}, r"mixer\.shift: False there, True here"),  # weights look the same
        ({"mixer": partial(Attention, headdim=8)}, r"mixer\._target_: 'BiMamba2' there, 'Attention' here"),
        ({"layer_scale": 0.1}, "weights differ"),
        ({"spec": DataSpec("sequence", "binary", ("no", "yes"), alphabet="ACGUN", max_length=20)}, "alphabet: 'ACGTN'"),
        ({"spec": IMAGE}, "kind: 'sequence' there, 'image' here"),
    ],
)
def test_another_model_is_named(folder, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options, pretrained=folder)


def test_other_channels(tmp_path):
    make(IMAGE).save_pretrained(tmp_path)
    grey = DataSpec("image", "multiclass", ("a", "b", "c"), channels=1, height=8, width=8)
    with pytest.raises(ValueError, match=r"channels: 3 there, 1 here; to fit it set data\.channels=3"):
        make(grey, pretrained=tmp_path)


def test_positions_of_pixels_are_resampled_row_by_row():
    """Tokens of a few pixels of a row each: a table of where in the image a token lies stays one at another size."""

    def where(height, columns):
        row, column = torch.meshgrid(torch.arange(height), torch.arange(columns), indexing="ij")
        return torch.stack([(row + 0.5) / height, (column + 0.5) / columns], -1).flatten(0, 1)

    there, here = (DataSpec(**(vars(IMAGE) | {"height": n, "width": n})) for n in (16, 32))
    table = resample(where(16, 4), there, here, 32 * 8, patches=False)
    inner = where(32, 8).unflatten(0, (32, 8))[4:-4, 3:-3]  # edges have fewer neighbours
    torch.testing.assert_close(table.unflatten(0, (32, 8))[4:-4, 3:-3], inner, atol=1e-2, rtol=0.0)
    line = resample(torch.arange(86.0)[:, None], there, here, 342, patches=False)  # strides that do not divide a row
    torch.testing.assert_close(line[8:-8, 0], (torch.arange(342) + 0.5)[8:-8] * 86 / 342 - 0.5, atol=1e-2, rtol=0.0)


def test_positions_of_images_are_resampled(tmp_path):
    patches = partial(PatchEmbedding, patch_size=2)
    model = make(IMAGE, embedding=patches)
    ramp = torch.linspace(0, 1, 4)[:, None, None].expand(4, 4, 16)  # from top to bottom
    model.embedding.positions.table.data.copy_(ramp.flatten(0, 1))
    model.save_pretrained(tmp_path)
    large = DataSpec("image", "multiclass", ("a", "b", "c"), channels=3, height=16, width=8)
    table = make(large, embedding=patches, pretrained=tmp_path).embedding.positions.table.detach().view(8, 4, 16)
    assert (table[1:] >= table[:-1]).all() and (table - table[:, :1]).abs().max() < 1e-5
    same = model.embedding.positions.table.detach()
    assert resample(same, IMAGE, IMAGE, 16) is same


def test_freezing(folder):
    model = make(pretrained=folder, freeze="backbone", dropout=0.5)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"head.proj.weight", "head.proj.bias"}
    model.train()
    assert model.training and model.head.training and not model.backbone.training
    assert torch.equal(outputs(model), outputs(make()))  # no dropout in what is frozen
    first = make(freeze=1)
    learning = {n for n, p in first.named_parameters() if p.requires_grad}
    assert "backbone.blocks.1.norm1.weight" in learning and "backbone.norm.weight" in learning
    assert not any(n.startswith(("embedding.", "backbone.blocks.0.")) for n in learning)
    assert not make(freeze="embedding").embedding.embed.weight.requires_grad
    for bad in ("head", 3, 0, True, -1):
        with pytest.raises(ValueError, match=r"model\.freeze: expected null, embedding, backbone, or a number"):
            make(freeze=bad)


def test_a_frozen_model_saves_whole(tmp_path):
    model = make(freeze="backbone")
    model.save_pretrained(tmp_path)
    again = Classifier.from_pretrained(tmp_path)
    assert all(p.requires_grad for p in again.parameters())
    save_file(load_file(tmp_path / WEIGHTS) | {"more": torch.zeros(1)}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="unknown here"):
        Classifier.from_pretrained(tmp_path)


def test_plain_weights_start_a_model_that_reads_both_strands(folder):
    """No weight is new, and its logits are the mean of the plain model's of both strands."""
    both, plain = make(seed=1, rc_equivariant=True), Classifier.from_pretrained(folder)
    assert load_pretrained(both, folder) == []
    tokens = torch.randint(1, 5, (2, 20), generator=torch.Generator().manual_seed(1))
    expected = (plain(tokens) + plain((5 - tokens).flip(1))) / 2  # the complement of A C G T is T G C A
    torch.testing.assert_close(both(tokens), expected, atol=1e-5, rtol=1e-5)


def test_the_attached_model_of_digits_has_the_accuracy_of_its_card(tmp_path):
    """`benchmark/results/models`: what was saved by an earlier version is read by this one."""
    folder = Path(__file__).parents[1] / "benchmark" / "results" / "models" / "digits"
    (said,) = re.findall(r"type: accuracy\n +value: (\S+)", (folder / "README.md").read_text())
    data = instantiate(composed(tmp_path, "experiment=digits").data)
    data.prepare_data()
    data.setup("test")
    model = Classifier.from_pretrained(folder)
    with torch.no_grad():
        batches = [data.transform(batch, training=False) for batch in data.test_dataloader()]
        right = torch.cat([model(b["inputs"]).argmax(-1) == b["label"] for b in batches])
    assert right.float().mean().item() == pytest.approx(float(said), abs=1e-6)
