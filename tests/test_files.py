"""Data in files: every format, written here by other means, read back exactly; and every kind of damage."""

from __future__ import annotations

import gzip
import json
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scorelab.data import Arrays, Files, Images, load, read_idx
from scorelab.training import Trainer, build, default_config

RNG = np.random.default_rng(0)
GRAY = RNG.integers(0, 256, (12, 7, 5), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (12, 6, 9, 3), dtype=np.uint8)
LABELS = (np.arange(12) % 3).astype(np.uint8)


def idx(x: np.ndarray) -> bytes:
    """The format by its description: two zero bytes, 8 for uint8, the rank, sizes as big-endian 32-bit numbers."""
    return struct.pack(">BBBB", 0, 0, 8, x.ndim) + struct.pack(f">{x.ndim}I", *x.shape) + x.tobytes()


def pictures(folder: Path, suffix: str = ".png", images: np.ndarray = COLOUR) -> Path:
    """Images in two subfolders, a and b."""
    for i, x in enumerate(images):
        place = folder / "ab"[i % 2] / f"{i:02d}{suffix}"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x).save(place)
    return folder


def in_range(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x.astype(np.float32) / 127.5 - 1)


@pytest.mark.parametrize("packed", [False, True])
def test_idx(tmp_path, packed):
    for stem, x in (("train-images-idx3-ubyte", GRAY), ("train-labels-idx1-ubyte", LABELS)):
        path = tmp_path / (stem + (".gz" if packed else ""))
        path.write_bytes(gzip.compress(idx(x)) if packed else idx(x))
        np.testing.assert_array_equal(read_idx(path), x)
    data = load("mnist", Files(str(tmp_path)))
    assert isinstance(data, Images)
    assert data.data_shape == (1, 7, 5)
    torch.testing.assert_close(data.reference(), in_range(GRAY)[:, None])
    assert data.labels.tolist() == LABELS.tolist()
    alone = load("idx", Files(str(next(tmp_path.glob("train-images*")))))
    torch.testing.assert_close(alone.reference(), data.reference())


def test_cifar10(tmp_path):
    x = RNG.integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
    rows = np.concatenate([LABELS[:4, None], x.reshape(4, -1)], 1)
    (tmp_path / "data_batch_1.bin").write_bytes(rows[:3].tobytes())
    (tmp_path / "data_batch_2.bin").write_bytes(rows[3:].tobytes())
    data = load("cifar10", Files(str(tmp_path)))
    torch.testing.assert_close(data.reference(), in_range(x))
    assert data.labels.tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tiff", ".webp", ".ppm"])
def test_folder_with_labels(tmp_path, suffix):
    # lossy as Pillow writes webp: one colour a picture survives
    images = np.repeat(np.repeat(COLOUR[:, :1, :1], 6, 1), 9, 2) if suffix == ".webp" else COLOUR
    data = load("folder", Files(str(pictures(tmp_path, suffix, images))))
    order = [0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11]
    expected = in_range(images[order].transpose(0, 3, 1, 2))
    torch.testing.assert_close(data.reference(), expected, rtol=0, atol=0.03 if suffix == ".webp" else 1e-6)
    assert data.labels.tolist() == [0] * 6 + [1] * 6
    assert data.data_shape == (3, 6, 9)


def test_zip_with_labels(tmp_path):
    folder, place = pictures(tmp_path / "images"), tmp_path / "images.zip"
    with zipfile.ZipFile(place, "w") as archive:
        names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*.png"))
        for name in names:
            archive.write(folder / name, name)
        archive.writestr("dataset.json", json.dumps({"labels": [[n, 5 + i] for i, n in enumerate(names)]}))
    data = load("zip", Files(str(place)))
    torch.testing.assert_close(data.reference(), load("folder", Files(str(folder))).reference())
    assert data.labels.tolist() == list(range(5, 17))


@pytest.mark.parametrize(
    ("x", "shape", "kind"),
    [
        (GRAY, (1, 7, 5), Images),
        (COLOUR, (3, 6, 9), Images),
        (COLOUR.transpose(0, 3, 1, 2), (3, 6, 9), Images),
        (RNG.normal(size=(9, 2, 16)), (2, 16), Arrays),
        (RNG.normal(size=(9, 1, 4, 5, 3)).astype(np.float32), (1, 4, 5, 3), Arrays),
        (RNG.normal(size=(9, 3)), (3,), Arrays),
    ],
)
def test_arrays(tmp_path, x, shape, kind):
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "x.npz", images=x, labels=np.arange(len(x)))
    data = load("arrays", Files(str(tmp_path / "x.npy")))
    assert isinstance(data, kind)
    assert data.data_shape == shape
    both = load("arrays", Files(str(tmp_path / "x.npz")))
    torch.testing.assert_close(both.reference(), data.reference())
    assert both.labels.tolist() == list(range(len(x)))
    if kind is Arrays:
        torch.testing.assert_close(data.reference(), torch.from_numpy(x).float())


class Squares(torch.utils.data.Dataset):
    """Pillow images with labels."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, i: int):
        return Image.fromarray(COLOUR[i]), i


def test_a_torch_dataset_by_its_import_path():
    sys.modules["squares"] = sys.modules[__name__]
    data = load("squares:Squares")
    torch.testing.assert_close(data.reference(), in_range(COLOUR[:5].transpose(0, 3, 1, 2)))
    assert data.labels.tolist() == [0, 1, 2, 3, 4]
    for source, message in (("squares:Nothing", "no attribute"), ("no.such.module:Name", "No module")):
        with pytest.raises(ValueError, match=message):
            load(source)


def test_size_crops_at_the_centre_and_scales_to_cover(tmp_path):
    x = np.zeros((2, 8, 20), np.uint8)
    x[0, :, 4:16] = 255  # wider than the crop by what the filter of the scaling reaches
    x[1] = 9
    np.save(tmp_path / "x.npy", x)
    found = load("arrays", Files(str(tmp_path / "x.npy"), size=(8, 8))).reference()
    assert (found[0] == 1).all()
    assert float(load("arrays", Files(str(tmp_path / "x.npy"))).reference()[0].min()) == -1
    assert load("arrays", Files(str(tmp_path / "x.npy"), size=(4, 4))).reference().shape == (2, 1, 4, 4)
    assert float(load("arrays", Files(str(tmp_path / "x.npy"), size=(4, 4))).reference()[0].min()) > 0.9
    grey = load("folder", Files(str(pictures(tmp_path / "c")), grayscale=True, size=(12, 5)))
    assert grey.data_shape == (1, 12, 5)


def test_sixteen_bits_rotation_and_palettes(tmp_path):
    deep = RNG.integers(0, 65536, (6, 9), dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    found = load("folder", Files(str(tmp_path))).stored[0, 0]
    np.testing.assert_array_equal(found, np.round(deep / 257))
    (tmp_path / "deep.png").unlink()
    upright = Image.fromarray(COLOUR[0])
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    upright.save(tmp_path / "turned.png", exif=exif)
    found = load("folder", Files(str(tmp_path))).stored[0]
    np.testing.assert_array_equal(found, COLOUR[0, ::-1, ::-1].transpose(2, 0, 1))
    Image.fromarray(np.full((6, 9), 0.5, np.float32)).save(tmp_path / "turned.tiff")
    with pytest.raises(ValueError, match="floating-point pixels; save such data as .npy"):
        load("folder", Files(str(tmp_path)))


def test_augmentation_follows_from_seed_and_step():
    data = Images(torch.from_numpy(GRAY)[:, None], flip=True, dequantise=True)
    a, b, c = (data.batch(0, step, 400).x0 for step in (3, 3, 4))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    plain = torch.from_numpy(GRAY)[:, None][data.indices(0, 3, 400)].float()
    levels = ((a + 1) * 128).floor()
    same, mirrored = ((levels == y).flatten(1).all(1) for y in (plain, plain.flip(-1)))
    assert bool((same | mirrored).all())
    assert 150 < int(same.sum()) < 250
    rest = (a + 1) * 128 - levels
    assert float(rest.mean()) == pytest.approx(0.5, abs=0.02)
    # one epoch holds every image once
    assert sorted(data.indices(1, 0, 12).tolist()) == list(range(12))


def test_the_cache_is_mapped_and_read_again(tmp_path):
    folder, cache = pictures(tmp_path / "images"), str(tmp_path / "cache")
    first = load("folder", Files(str(folder), cache=cache))
    torch.testing.assert_close(first.reference(), load("folder", Files(str(folder))).reference())
    stamps = {p: p.stat().st_mtime_ns for p in Path(cache).iterdir()}
    again = load("folder", Files(str(folder), cache=cache))
    assert {p: p.stat().st_mtime_ns for p in Path(cache).iterdir()} == stamps
    assert again.labels.tolist() == first.labels.tolist()
    # a changed folder is decoded anew
    Image.fromarray(COLOUR[0]).save(folder / "a" / "99.png")
    assert len(load("folder", Files(str(folder), cache=cache))) == 13


def test_bad_files_are_named_or_skipped(tmp_path):
    folder = pictures(tmp_path / "images")
    whole = (folder / "a" / "04.png").read_bytes()
    (folder / "a" / "04.png").write_bytes(whole[: len(whole) // 2])
    (folder / "b" / "zz.jpg").write_text("no image")
    Image.fromarray(COLOUR[0, :3]).save(folder / "b" / "small.png")
    with pytest.raises(ValueError, match=r"a/04.png can't be used .*; remove or repair it, or set data.skip_bad=True"):
        load("folder", Files(str(folder)))
    said = r"3 of 14 files skipped: a/04.png \(.*\), b/small.png \(it is .*, b/zz.jpg \(it is no image"
    with pytest.warns(RuntimeWarning, match=said):
        data = load("folder", Files(str(folder), skip_bad=True))
    assert len(data) == 11
    assert data.labels.tolist() == [0] * 5 + [1] * 6


def damaged(tmp_path: Path, name: str, data: bytes) -> Files:
    (tmp_path / name).write_bytes(data)
    return Files(str(tmp_path / name))


@pytest.mark.filterwarnings("ignore:Duplicate name")  # zipfile's own, when such an archive is made
def test_damage_ends_in_a_message_with_the_file(tmp_path):
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "nan.npy", np.full((3, 2), np.nan))
    np.save(tmp_path / "flat.npy", np.full((3, 7, 5), 7, np.uint8))
    np.save(tmp_path / "words.npy", np.array(["a", "b"]))
    np.savez(tmp_path / "odd.npz", pictures=GRAY)
    np.savez(tmp_path / "labels.npz", images=GRAY, labels=LABELS[:5])
    with zipfile.ZipFile(tmp_path / "half.zip", "w") as archive:
        archive.write(next(pictures(tmp_path / "i").rglob("*.png")), "1.png")
        archive.writestr("dataset.json", json.dumps({"labels": [["2.png", 0]]}))
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as archive:
        for _ in range(2):
            archive.write(next((tmp_path / "i").rglob("*.png")), "1.png")
    np.save(tmp_path / "hollow.npy", np.zeros((5, 0, 3)))
    cases = [
        ("folder", Files(), "data.path is empty"),
        ("folder", Files(str(tmp_path / "none")), "there is no .*none"),
        ("folder", Files(str(tmp_path / "empty")), "empty holds no images"),
        ("folder", Files(str(tmp_path / "nan.npy")), "a file; expected a folder"),
        ("idx", damaged(tmp_path, "a", idx(GRAY)[:-3]), "a holds 433 bytes, its header says 436; it is truncated"),
        ("idx", damaged(tmp_path, "b", gzip.compress(idx(GRAY))[:-30]), "b can't be read"),
        ("idx", damaged(tmp_path, "c", b"hello world"), "c is no IDX file"),
        ("mnist", Files(str(tmp_path / "empty")), "holds no train-images-idx3-ubyte"),
        ("cifar10", damaged(tmp_path, "d.bin", b"1" * 3000), "d.bin holds 3000 bytes; expected a multiple of 3073"),
        ("cifar10", Files(str(tmp_path / "empty")), "holds no data_batch"),
        ("arrays", damaged(tmp_path, "e.npy", b"123"), "e.npy can't be read"),
        (
            "arrays",
            Files(str(next((tmp_path / "i").rglob("*.png")))),
            "can't be read .*begins with 89504e470d0a, as neither",
        ),
        ("zip", Files(str(tmp_path / "twice.zip")), "twice.zip can't be read .*it holds 1.png twice"),
        ("arrays", Files(str(tmp_path / "hollow.npy")), "hollow.npy: it holds float64 .5, 0, 3.; expected"),
        ("arrays", Files(str(tmp_path / "nan.npy")), "nan.npy: data is not finite at 3 of 3"),
        ("arrays", Files(str(tmp_path / "flat.npy")), "flat.npy: the data set is constant"),
        ("arrays", Files(str(tmp_path / "words.npy")), "words.npy: it holds <U1"),
        ("arrays", Files(str(tmp_path / "odd.npz")), "odd.npz .*holds pictures; expected"),
        ("arrays", Files(str(tmp_path / "labels.npz")), "labels.npz: labels of shape .5,. for 12 samples"),
        ("arrays", Files(str(tmp_path / "nan.npy"), flip=True), "are for uint8 images"),
        ("zip", damaged(tmp_path, "f.zip", b"PK"), "f.zip can't be read"),
        ("zip", Files(str(tmp_path / "half.zip")), "no label for 1 images .first: 1.png"),
        ("foldr", Files(), "did you mean 'folder'"),
    ]
    for source, files, message in cases:
        with pytest.raises(ValueError, match=message):
            load(source, files)
    with pytest.raises(ValueError, match="data.size is"):
        Files(size=(3,))


@pytest.mark.parametrize("shape", [(9, 2, 16), (9, 1, 4, 6, 3), (9, 3, 7, 5)])
def test_any_shape_trains_a_step(tmp_path, shape):
    np.save(tmp_path / "x.npy", RNG.normal(size=shape))
    config = default_config()
    config.data.source, config.data.path = "arrays", str(tmp_path / "x.npy")
    config.model.net.width, config.training.batch_size = 8, 4
    metrics = Trainer(build(config), config).advance()
    assert np.isfinite(metrics.loss)
