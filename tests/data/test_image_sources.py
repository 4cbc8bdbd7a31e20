"""Every layout that images come in, and every way each of them can be wrong."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data_files import image_table, png, stops, write_images, write_table
from PIL import Image

from bimamba.data import VisionDataModule
from bimamba.data.images import CachedImages, Geometry, LazyImages, random_box
from bimamba.data.sources import Digits, ImageFolder, ImageTable, MedMNIST


def setup(source, path=None, stage="fit", **options):
    data = VisionDataModule(source, path=None if path is None else str(path), batch_size=8, **options)
    data.setup(stage)
    return data


def rows_of(loader):
    """`{id: (pixels, label)}` of all batches, before normalisation."""
    return {
        name: (batch["inputs"][i], batch["label"][i].tolist()) for batch in loader for i, name in enumerate(batch["id"])
    }


def npz(path, sizes=(30, 10, 8), shape=(8, 8), labels=1, classes=2, **changed):
    rng = np.random.default_rng(0)
    arrays = {}
    for split, n in zip(("train", "val", "test"), sizes, strict=True):
        arrays[f"{split}_images"] = rng.integers(0, 256, (n, *shape), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(n)[:, None] + np.arange(labels)) % classes
    arrays = {k: v for k, v in {**arrays, **changed}.items() if v is not None}
    np.savez(path, **arrays)
    return path


# The embedded default


def test_digits():
    data = setup(Digits(), seed=0)
    assert data.sizes == {"train": 1294, "val": 144, "test": 359}
    assert data.spec.class_names == tuple("0123456789") and data.spec.problem == "multiclass"
    assert (data.spec.channels, data.spec.height, data.spec.width) == (1, 8, 8)
    batch = next(iter(data.train_dataloader()))
    assert batch["inputs"].dtype == torch.uint8 and batch["inputs"].shape == (8, 1, 8, 8) and "mask" not in batch
    train = torch.cat([b["inputs"] for b in data.train_dataloader()]).float() / 255
    assert train.max() == 1 and abs(train.mean() - data.spec.mean[0]) < 1e-5
    assert abs(train.std() - data.spec.std[0]) < 1e-4
    with stops("the digits come with scikit-learn", "expected null"):
        setup(Digits(), "somewhere")


# Folders


def test_image_folder(tmp_path):
    write_images(tmp_path, {"dog": 20, "cat": 30})
    data = setup(ImageFolder(), tmp_path)
    assert data.spec.class_names == ("cat", "dog") and data.sizes == {"train": 36, "val": 4, "test": 10}
    assert (data.spec.channels, data.spec.height) == (3, 8)
    found = rows_of(data.train_dataloader())
    name, (pixels, label) = next(iter(found.items()))
    assert label == ("dog" in name)
    assert np.array_equal(np.asarray(Image.open(tmp_path / name)).transpose(2, 0, 1), pixels.numpy())


def test_image_folder_with_splits_and_sub_folders(tmp_path):
    for split, n in (("train", 20), ("valid", 4), ("test", 6)):
        write_images(tmp_path / split, {"a/deep": n, "b": n}, seed=n)
    assert setup(ImageFolder(), tmp_path).sizes == {"train": 40, "val": 8, "test": 12}


def test_bad_image_folders(tmp_path):
    with stops("data.path is not set", "one sub-folder of images a class"):
        setup(ImageFolder())
    with stops("expected at least two class folders", "found none"):
        setup(ImageFolder(), tmp_path)
    write_images(tmp_path, {"a": 5})
    with stops("expected at least two class folders", "found a"):
        setup(ImageFolder(), tmp_path)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("x")
    with stops("/b: expected images", ".png", "of the class, found none"):
        setup(ImageFolder(), tmp_path)
    (tmp_path / "b" / "x.png").write_bytes(b"no image")
    with stops("b/x.png", "cannot be decoded as an image"):
        setup(ImageFolder(), tmp_path)
    (tmp_path / "b" / "x.png").write_bytes(png(np.random.default_rng(0))[:-30])
    with stops("b/x.png", "cannot be decoded as an image"):
        setup(ImageFolder(), tmp_path)
    with stops("expected a folder", "got the file"):
        setup(ImageFolder(), tmp_path / "b" / "x.png")


def test_hidden_files_are_no_images_and_other_kinds_are_told(tmp_path):
    write_images(tmp_path, {"a": 5, "b": 5, "b/.ipynb_checkpoints": 2, ".trash": 3})
    (tmp_path / "a" / "000.png").rename(tmp_path / "a" / "000.JFIF")
    for name in ("b/x.heic", "b/y.heic", "b/labels.csv", "README", "b/Thumbs.db", "b/.x.bz2"):
        (tmp_path / name).write_bytes(b"")
    write_images(tmp_path, {".": 1})
    data = setup(ImageFolder(), tmp_path, val_fraction=0, test_fraction=0)
    assert data.sizes["train"] == 10 and "a/000.JFIF" in rows_of(data.train_dataloader())
    (note,) = [n for n in data.notes if "left out" in n]
    assert "left out: 2 .heic, 1 .png: expected .png" in note and note.endswith("in class folders")


def test_sizes_that_differ(tmp_path):
    write_images(tmp_path, {"a": 5, "b": 5})
    write_images(tmp_path / "b" / "large", {"x": 2}, size=12)
    with stops("images of different sizes", "8×8", "12×12", "set data.image_size"):
        setup(ImageFolder(), tmp_path)
    data = setup(ImageFolder(), tmp_path, image_size=[6, 10])
    assert (data.spec.height, data.spec.width) == (6, 10)


def test_a_size_that_the_sample_missed_is_an_error_with_its_file(tmp_path, monkeypatch):
    from bimamba.data import vision

    write_images(tmp_path, {"a": 5, "b": 5})
    write_images(tmp_path / "b", {"odd": 1}, size=12)
    monkeypatch.setattr(vision, "look", lambda images: (3, {(8, 8)}))
    with stops("odd/000.png", "expected 8×8 pixels", "got 12×12", "data.image_size"):
        setup(ImageFolder(), tmp_path)


def test_grey_colour_palette_alpha_and_16_bit(tmp_path):
    write_images(tmp_path, {"a": 1})
    (tmp_path / "b").mkdir()
    ramp = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    Image.fromarray(ramp).save(tmp_path / "b" / "grey.png")
    Image.fromarray(ramp).convert("P").save(tmp_path / "b" / "palette.png")
    Image.fromarray(np.dstack([0 * ramp] * 3 + [255 - ramp])).save(tmp_path / "b" / "alpha.png")
    Image.fromarray(np.dstack([0 * ramp, 255 - ramp])).save(tmp_path / "b" / "grey_alpha.png")
    Image.fromarray((ramp / 255).astype(np.float32)).save(tmp_path / "b" / "unit.tif")
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "b" / "float.tif")
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "b" / "deep.png")
    data = setup(ImageFolder(), tmp_path, val_fraction=0, test_fraction=0)
    found = rows_of(data.train_dataloader())
    for name in ("grey.png", "palette.png", "alpha.png", "grey_alpha.png", "deep.png", "unit.tif", "float.tif"):
        assert np.array_equal(found[f"b/{name}"][0].numpy(), np.stack([ramp] * 3)), name
    assert data.examples.inputs.losses.sentences() == []
    assert setup(ImageFolder(), tmp_path, channels=1, test_fraction=0).spec.channels == 1


def test_a_transparent_palette_lies_on_white(tmp_path):
    image = Image.new("P", (8, 8), 3)
    image.putpalette([0, 0, 0] * 256)
    image.putpixel((0, 0), 5)
    image.save(tmp_path / "x.png", transparency=3)
    pixels = Geometry(1, 8, 8)(Image.open(tmp_path / "x.png"))[0]
    assert pixels[0, 0] == 0 and (pixels.reshape(-1)[1:] == 255).all()


@pytest.mark.parametrize("cache", [True, False])
def test_what_is_lost_of_the_pixels_is_told(tmp_path, monkeypatch, cache):
    write_images(tmp_path, {"a": 3, "b": 3})
    ramp = np.arange(64).reshape(8, 8)
    Image.fromarray((ramp * 60).astype(np.uint16)).save(tmp_path / "a" / "deep.png")
    Image.fromarray((ramp * 50.0).astype(np.float32)).save(tmp_path / "a" / "float.tif")
    page = Image.fromarray(ramp.astype(np.uint8))
    page.save(tmp_path / "b" / "pages.tif", save_all=True, append_images=[page])
    monkeypatch.setattr("bimamba.data.vision.look", lambda images: (1, {(8, 8)}))
    options = dict(val_fraction=0, test_fraction=0, cache=cache, num_workers=0)
    said = "\n".join(setup(ImageFolder(), tmp_path, **options).preflight()["warnings"])
    for part in (
        *("6 images with colours, such as", "data.channels=3", "pages.tif, only the first page is read"),
        *("the largest value of 1 16-bit images is 3780, in", "deep.png", "0 to 14 of 255", "12-bit values", "by 16"),
        *("beyond 0 to 255, up to 3150 in", "float.tif"),
    ):
        assert part in said, part
    said = setup(ImageFolder(), tmp_path, channels=1, **options).preflight()["warnings"]
    assert not any("colours" in warning for warning in said)  # asked for


def test_colours_met_in_a_worker_are_told(tmp_path, monkeypatch):
    from bimamba.data import images

    write_images(tmp_path, {"a": 2, "b": 2})
    told = []
    monkeypatch.setattr(images, "rank_zero_warn", told.append)
    monkeypatch.setattr(images, "get_worker_info", lambda: type("Worker", (), {"id": 0}))
    store = LazyImages(images.EncodedImages(images.find_images(tmp_path), str), Geometry(1, 8, 8))
    store.batch(torch.arange(4))
    assert len(told) == 1 and "with colours, such as 0, are read as grey" in told[0]


def test_turned_by_exif(tmp_path):
    write_images(tmp_path, {"a": 2, "b": 2})
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    exif = Image.Exif()
    exif[0x0112] = 3
    image.save(tmp_path / "b" / "turned.png", exif=exif)
    found = rows_of(setup(ImageFolder(), tmp_path, val_fraction=0, test_fraction=0, channels=1).train_dataloader())
    assert np.array_equal(found["b/turned.png"][0][0].numpy(), np.asarray(image)[::-1, ::-1])


# Tables


@pytest.mark.parametrize("form", ["struct", "binary", "path"])
def test_images_in_parquet(tmp_path, form):
    table = image_table(40, "img", classes=4)
    if form == "binary":
        table = table.set_column(0, "img", pa.array([v["bytes"] for v in table["img"].to_pylist()]))
    if form == "path":
        for i, value in enumerate(table["img"].to_pylist()):
            (tmp_path / f"{i}.png").write_bytes(value["bytes"])
        table = table.set_column(0, "img", pa.array([f"{i}.png" for i in range(40)]))
    pq.write_table(table, tmp_path / "train.parquet")
    data = setup(ImageTable(image_column="img"), tmp_path)
    assert data.sizes == {"train": 29, "val": 3, "test": 8} and data.spec.class_names == tuple("0123")
    name, (pixels, label) = next(iter(rows_of(data.test_dataloader()).items()))
    row = int(name.split(":")[1]) - 1
    expected = Image.open(io.BytesIO(image_table(40, "img", 4)["img"][row].as_py()["bytes"]))
    assert label == row % 4 and np.array_equal(np.asarray(expected).transpose(2, 0, 1), pixels.numpy())


def test_bad_images_in_tables(tmp_path):
    path = tmp_path / "x.parquet"
    rows = image_table(4, "image", 2).to_pydict()
    rows["image"][2] = {"bytes": b"nothing", "path": None}
    pq.write_table(pa.table(rows), path)
    with stops("x.parquet: row 3", "cannot be decoded as an image"):
        setup(ImageTable(), path)
    rows["image"][2] = {"bytes": None, "path": None}
    pq.write_table(pa.table(rows), path)
    with stops("x.parquet: row 3", "expected an image, got a missing value"):
        setup(ImageTable(), path)
    rows["image"][2] = {"bytes": None, "path": "gone.png"}
    pq.write_table(pa.table(rows), path)
    with stops("x.parquet: row 3", "expected an image, nothing is at", "gone.png"):
        setup(ImageTable(), path)
    with stops("expected the column 'picture'", "found 'image', 'label'"):
        setup(ImageTable(image_column="picture"), path)
    with stops("column 'label'", "expected images", "got int64"):
        setup(ImageTable(image_column="label"), path)


def test_unlabelled_test_set_is_left_out(tmp_path):
    """ImageNet's way: test labels are -1, the validation set is the test set."""
    for name, n in (("train", 40), ("validation", 10), ("test", 6)):
        table = image_table(n, "image", 2, seed=n)
        if name == "test":
            table = table.set_column(1, "label", pa.array([-1] * n))
        pq.write_table(table, tmp_path / f"{name}-00000-of-00001.parquet")
    data = setup(ImageTable(split_names={"train": "train", "test": "validation"}), tmp_path)
    assert data.sizes == {"train": 36, "val": 4, "test": 10}
    with stops("test-00000-of-00001.parquet: row 1", "expected class numbers from 0, got -1"):
        setup(ImageTable(), tmp_path)


# MedMNIST


def test_npz_binary_multiclass_and_multilabel(tmp_path):
    data = setup(MedMNIST(), npz(tmp_path / "a.npz"))
    assert data.sizes == {"train": 30, "val": 10, "test": 8}
    assert data.spec.problem == "binary" and data.spec.channels == 1
    data = setup(MedMNIST(), npz(tmp_path / "b.npz", shape=(8, 8, 3), classes=5))
    assert data.spec.problem == "multiclass" and data.spec.channels == 3 and len(data.spec.class_names) == 5
    pixels = np.load(tmp_path / "b.npz")["test_images"]
    assert np.array_equal(rows_of(data.test_dataloader())["test:3"][0].numpy(), pixels[2].transpose(2, 0, 1))
    data = setup(MedMNIST(), npz(tmp_path / "c.npz", labels=3))
    assert data.spec.problem == "multilabel" and data.spec.num_outputs == 3
    assert next(iter(data.train_dataloader()))["label"].shape == (8, 3)


def test_npz_by_task_and_download(tmp_path):
    npz(tmp_path / "one.npz")
    npz(tmp_path / "two.npz", classes=3)
    assert len(setup(MedMNIST(), tmp_path, task="two").spec.class_names) == 3
    with stops("expected three.npz", "found one.npz, two.npz"):
        setup(MedMNIST(), tmp_path, task="three")
    source = MedMNIST(f"file://{tmp_path}/{{task}}.npz", str(tmp_path / "cache"))
    data = VisionDataModule(source, task="one")
    data.prepare_data()
    data.setup("fit")
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["one.npz"]
    with stops("cannot download", "gone.npz", "data.path= a local copy"):
        VisionDataModule(source, task="gone").prepare_data()
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["one.npz"]
    with stops("expected data.path= an npz file, or data.task="):
        VisionDataModule(MedMNIST()).prepare_data()


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        (dict(val_labels=None), ["expected an array named val_labels", "train_images"]),
        (dict(val_labels=np.zeros((3, 1))), ["10 val_images, but 3 val_labels"]),
        (dict(val_images=np.zeros((10, 8, 8))), ["val_images", "expected uint8", "got float64 of shape (10, 8, 8)"]),
        (dict(val_images=np.zeros((10, 9, 9), np.uint8)), ["expected images of one size", "(8, 8)", "(9, 9)"]),
        (dict(test_labels=np.full((8, 1), 7)), ["expected training rows of every class", "'7'"]),
        (dict(train_labels=np.full((30, 1), np.nan)), ["train_images: image 1", "got the number nan"]),
    ],
)
def test_bad_npz(tmp_path, changed, parts):
    with stops(*parts):
        setup(MedMNIST(), npz(tmp_path / "x.npz", **changed))


def test_npz_that_is_none(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"nothing")
    with stops("x.npz", "cannot be read as npz"):
        setup(MedMNIST(), tmp_path / "x.npz")
    np.savez(tmp_path / "y.npz", a=np.zeros(3))
    with stops("expected arrays named train_images", "found a"):
        setup(MedMNIST(), tmp_path / "y.npz")


# Sizes, statistics, memory


def test_resizing():
    image = Image.fromarray(np.arange(288, dtype=np.int64).astype(np.uint8).reshape(12, 24))
    pixels = np.asarray(image)
    assert np.array_equal(Geometry(1, 12, 24)(image)[0], pixels)
    assert np.array_equal(Geometry(1, 12, 12)(image)[0], pixels[:, 6:18])
    assert np.array_equal(Geometry(1, 6, 12, crop_fraction=0.5)(image)[0], pixels[3:9, 6:18])
    squashed = Geometry(3, 12, 12, resize="squash")(image)
    assert squashed.shape == (3, 12, 12) and np.abs(squashed[0, :, 0].astype(int) - pixels[:, 0]).max() < 8


def test_random_boxes_lie_within_the_image():
    rng = np.random.default_rng(0)
    for width, height in ((40, 30), (300, 4), (5, 5)):
        for _ in range(50):
            left, top, right, bottom = random_box(width, height, (0.08, 1.0), rng)
            assert 0 <= left < right <= width and 0 <= top < bottom <= height


def test_lazy_and_cached_images_are_the_same(tmp_path):
    write_images(tmp_path, {"a": 12, "b": 12})
    cached, lazy = (setup(ImageFolder(), tmp_path, cache=c) for c in (True, False))
    assert isinstance(cached.examples.inputs, CachedImages) and isinstance(lazy.examples.inputs, LazyImages)
    assert cached.spec == lazy.spec
    for a, b in zip(cached.train_dataloader(), lazy.train_dataloader(), strict=True):
        assert torch.equal(a["inputs"], b["inputs"]) and a["id"] == b["id"]


def test_large_sets_stay_on_disk(tmp_path, monkeypatch):
    from bimamba.data import vision

    write_images(tmp_path, {"a": 12, "b": 12})
    monkeypatch.setattr(vision, "CACHE_LIMIT", 24 * 3 * 64 - 1)
    assert isinstance(setup(ImageFolder(), tmp_path).examples.inputs, LazyImages)
    monkeypatch.setattr(vision, "CACHE_LIMIT", 24 * 3 * 64)
    assert isinstance(setup(ImageFolder(), tmp_path).examples.inputs, CachedImages)


def test_lazy_crops_depend_on_seed_epoch_and_row_not_on_the_worker(tmp_path):
    write_images(tmp_path, {"a": 12, "b": 12}, size=16)

    def first_epoch(workers, epoch=0):
        options = dict(cache=False, image_size=8, augment={"resized_crop": [0.2, 0.9]}, num_workers=workers)
        loader = setup(ImageFolder(), tmp_path, **options).train_dataloader()
        loader.sampler.set_epoch(epoch)
        found = rows_of(loader)
        return {name: found[name][0] for name in sorted(found)}

    plain, workers, later = first_epoch(0), first_epoch(2), first_epoch(0, epoch=1)
    assert all(torch.equal(plain[k], workers[k]) for k in plain)
    assert not any(torch.equal(plain[k], later[k]) for k in plain)


def test_an_unreadable_image_met_in_training_is_named(tmp_path):
    write_images(tmp_path, {"a": 4, "b": 4})
    (tmp_path / "a" / "001.png").write_bytes(b"broken")
    stated = dict(image_size=8, channels=3, mean=[0.5] * 3, std=[0.5] * 3)
    data = setup(ImageFolder(), tmp_path, cache=False, val_fraction=0, test_fraction=0, num_workers=0, **stated)
    with stops("a/001.png", "cannot be decoded"):
        list(data.train_dataloader())


def test_many_images_are_decoded_by_processes(tmp_path, monkeypatch):
    from bimamba.data import images

    write_images(tmp_path, {"a": 12, "b": 12})
    plain = setup(ImageFolder(), tmp_path).examples.inputs.pixels
    monkeypatch.setattr(images, "MANY_IMAGES", 1)
    monkeypatch.setattr(images, "cores", lambda: 2)
    assert torch.equal(setup(ImageFolder(), tmp_path).examples.inputs.pixels, plain)
    (tmp_path / "a" / "005.png").write_bytes(b"broken")
    monkeypatch.setattr("bimamba.data.vision.look", lambda images: (3, {(8, 8)}))
    with stops("a/005.png: cannot be decoded"):
        setup(ImageFolder(), tmp_path)


def test_stated_statistics(tmp_path):
    write_images(tmp_path, {"a": 12, "b": 12})
    data = setup(ImageFolder(), tmp_path, mean=[0.1, 0.2, 0.3], std=[1, 2, 4])
    batch = next(iter(data.val_dataloader()))
    expected = (batch["inputs"].float() / 255 - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor(
        [1.0, 2.0, 4.0]
    )[:, None, None]
    assert torch.allclose(data.transform(batch, training=False)["inputs"], expected)
    with stops("expected 3 positive numbers each", "(0.1,)"):
        setup(ImageFolder(), tmp_path, mean=[0.1], std=[1])
    with stops("data.mean and data.std go together"):
        setup(ImageFolder(), tmp_path, mean=[0.1])


def test_images_of_one_colour_cannot_be_normalised(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.new("L", (8, 8), 51).save(tmp_path / name / f"{i}.png")
    with stops("every pixel has the value 0.2"):
        setup(ImageFolder(), tmp_path)
    for name in ("a", "b"):
        for i in range(4):
            Image.fromarray(np.full((8, 8), 50 * i, np.uint16)).save(tmp_path / name / f"{i}.png")
    with stops("every pixel has the value 0;", "8 16-bit images is 150, in", "3.png", "8-bit values", "by 257"):
        setup(ImageFolder(), tmp_path)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (dict(channels=2), ["data.channels", "got 2"]),
        (dict(resize="fit"), ["data.resize", "crop, squash", "'fit'"]),
        (dict(crop_fraction=0), ["data.crop_fraction", "got 0"]),
        (dict(cache="maybe"), ["data.cache", "'maybe'"]),
        (dict(image_size=[1, 2, 3]), ["data.image_size", "[1, 2, 3]"]),
        (dict(batch_size=0), ["data.batch_size", "got 0"]),
        (dict(num_workers="many"), ["data.num_workers", "'many'"]),
        (dict(augment={"horizontal_flip": 2}), ["horizontal_flip", "got 2"]),
    ],
)
def test_options_out_of_range(options, parts):
    with stops(*parts):
        VisionDataModule(Digits(), **options)


def test_a_misspelt_option_is_no_option():
    with pytest.raises(TypeError, match="bach_size"):
        VisionDataModule(Digits(), bach_size=3)


def test_table_of_file_names(tmp_path):
    write_images(tmp_path, {"pictures": 30})
    columns = {"image": [f"pictures/{i:03}.png" for i in range(30)], "label": ["x", "y"] * 15}
    data = setup(ImageTable(), write_table(tmp_path / "list.csv", columns))
    assert data.spec.class_names == ("x", "y") and data.sizes["train"] == 22
