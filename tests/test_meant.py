"""Data: what was read is what was meant, or it is refused: transparency, depth, axes, labels, hidden files, ranges."""

from __future__ import annotations

import gzip
import json
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scorelab.cli import analysis, bound
from scorelab.cli.main import main
from scorelab.cli.sampling import sample_run, write_samples
from scorelab.data import Arrays, Files, Images, Values, load
from scorelab.likelihood import bits_per_dim, variational_bound
from scorelab.losses import Bins
from scorelab.plotting.pictures import tiled
from scorelab.training import build, default_config, train

RNG = np.random.default_rng(1)
GRAY = RNG.integers(0, 256, (12, 7, 5), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (12, 6, 9, 3), dtype=np.uint8)


def read(path: Path, source: str = "folder", **options) -> Images | Arrays:
    return load(source, Files(str(path), **options))


def pixels(path: Path, source: str = "folder", **options) -> np.ndarray:
    stored = read(path, source, **options).stored
    return np.array(stored if isinstance(stored, np.ndarray) else stored.numpy())


# transparency

HALF = np.array([[[200, 100, 0, 0], [200, 100, 0, 255]], [[10, 20, 30, 128], [0, 0, 0, 0]]], np.uint8)


def over(background: tuple[int, int, int]) -> np.ndarray:
    """alpha c + (1 - alpha) b, by its definition, (3, H, W)."""
    alpha = HALF[..., 3:] / 255
    return (alpha * HALF[..., :3] + (1 - alpha) * np.array(background)).transpose(2, 0, 1)


@pytest.mark.parametrize(("name", "colour"), [("white", (255, 255, 255)), ("#102030", (16, 32, 48))])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "palette", "key"])
def test_what_is_transparent_shows_the_background(tmp_path, mode, name, colour):
    image, path = Image.fromarray(HALF), tmp_path / "x.png"
    expected = over(colour)
    if mode == "LA":
        image = image.convert("LA")
        gray, alpha = np.asarray(image).astype(float).transpose(2, 0, 1)
        expected = alpha / 255 * gray + (1 - alpha / 255) * np.array(colour)[:, None, None]
        expected = expected[:1] if name == "white" else expected
        image.save(path)
    elif mode in ("PA", "RGBa"):
        path = tmp_path / "x.tiff" if mode == "RGBa" else tmp_path / "x.png"
        image.convert("RGBa").convert("RGBA").save(path)
    elif mode == "palette":
        flat = Image.new("P", (2, 2))
        flat.putpalette([200, 100, 0, 10, 20, 30])
        flat.putdata([0, 1, 1, 0])
        flat.save(path, transparency=0)
        expected = np.where(np.array([[1, 0], [0, 1]], bool), np.array(colour)[:, None, None], [[[10]], [[20]], [[30]]])
    elif mode == "key":
        Image.fromarray(HALF[..., :3]).save(path, transparency=(200, 100, 0))
        away = (HALF[..., :3] == [200, 100, 0]).all(-1)
        expected = np.where(away, np.array(colour)[:, None, None], HALF[..., :3].transpose(2, 0, 1))
    else:
        image.save(path)
    found = pixels(tmp_path, background=name)[0]
    assert found.shape == expected.shape
    assert float(np.abs(found - expected).max()) <= 2  # premultiplied colours are rounded twice


def test_colours_under_alpha_zero_never_show(tmp_path):
    for i, hidden in enumerate(([255, 0, 0, 0], [0, 255, 0, 0])):
        image = np.full((4, 4, 4), hidden, np.uint8)
        image[0, 0] = 5, 6, 7, 255
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    found = pixels(tmp_path)
    np.testing.assert_array_equal(found[0], found[1])
    with pytest.raises(ValueError, match="data.background is 'transparent-ish'; expected a colour"):
        Files(background="transparent-ish")


# depth, pages


def test_images_of_12_bits_in_16_keep_their_grey_levels(tmp_path):
    deep = [RNG.integers(0, 4096, (6, 9), dtype=np.uint16) for _ in range(3)]
    deep[1][0, 0] = 4095
    for i, x in enumerate(deep):
        Image.fromarray(x).save(tmp_path / f"{i}.png")
    with pytest.warns(RuntimeWarning, match="hold values up to 4095; they are read as 12 bits, 4095 being white"):
        found = pixels(tmp_path)[:, 0]
    np.testing.assert_array_equal(found, np.round(np.stack(deep) * (255 / 4095)))


def test_images_of_8_and_16_bits_are_not_mixed(tmp_path):
    Image.fromarray(GRAY[0]).save(tmp_path / "a.png")
    Image.fromarray(GRAY[1].astype(np.uint16) * 257).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b.png can't be used \(it has 16 bits and those before it 8"):
        pixels(tmp_path)


@pytest.mark.parametrize("suffix", ["tiff", "gif", "png", "webp"])
def test_pages_and_frames_are_refused(tmp_path, suffix):
    first, second = (Image.fromarray(x) for x in COLOUR[:2])
    first.save(tmp_path / f"x.{suffix}", save_all=True, append_images=[second])
    with pytest.raises(ValueError, match=rf"x.{suffix} can't be used \(it holds several pages or frames"):
        pixels(tmp_path)


# folders


def save(folder: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(COLOUR[i % 12]).save(folder / name)
    return folder


def test_class_folders_that_are_links_are_followed_but_not_in_circles(tmp_path):
    store, data = save(tmp_path / "store", "1.png", "2.png"), save(tmp_path / "data", "cat/1.png")
    (data / "dog").symlink_to(store)
    (data / "cat" / "again").symlink_to(data / "cat")
    (store / "up").symlink_to(data)
    found = read(data)
    assert found.labels.tolist() == [0, 1, 1]
    assert len(found) == 3


def test_links_to_nothing_are_named(tmp_path):
    save(tmp_path, "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(ValueError, match=r"b.png can't be read \(No such file"):
        read(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become someone else")
def test_folders_that_may_not_be_read_are_named(tmp_path):
    """As another user, since root may read everything."""
    save(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "b").chmod(0o700)
    for folder in (tmp_path, *tmp_path.parents):
        if folder != Path("/") and folder != Path("/tmp"):
            folder.chmod(folder.stat().st_mode | 0o055)
    before = os.geteuid()
    os.seteuid(65534)
    try:
        with pytest.raises(ValueError, match=r"b can't be read \(Permission denied\)"):
            read(tmp_path)
    finally:
        os.seteuid(before)


def test_hidden_files_are_left_out_and_listed_once(tmp_path):
    names = ("a/1.png", "b/2.png", ".ipynb_checkpoints/1-checkpoint.png", "a/._1.png", "__MACOSX/a/1.png")
    save(tmp_path / "x", *names)
    (tmp_path / "x" / ".DS_Store").write_text("")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in names:
            archive.write(tmp_path / "x" / name, name)
    said = r"3 hidden files are left out: .ipynb_checkpoints/1-checkpoint.png, __MACOSX/a/1.png, a/._1.png$"
    for path, source in ((tmp_path / "x", "folder"), (tmp_path / "x.zip", "zip")):
        with pytest.warns(RuntimeWarning, match=said) as caught:
            found = read(path, source)
        assert len(caught) == 1
        assert len(found) == 2
    with pytest.warns(RuntimeWarning):
        assert read(tmp_path / "x").labels.tolist() == [0, 1]


@pytest.mark.parametrize("suffix", ["pdf", "mpg", "h5", "eps", "hdf", "txt"])
def test_what_is_no_image_is_not_read(tmp_path, suffix):
    save(tmp_path, "a.png", "b.png")
    (tmp_path / f"c.{suffix}").write_bytes(b"something else")
    assert len(read(tmp_path)) == 2


# arrays


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32])
@pytest.mark.parametrize(
    ("shape", "found"),
    [
        ((8, 8, 4), (4, 8, 8)),
        ((8, 8, 3), (3, 8, 8)),
        ((8, 8, 2), (2, 8, 8)),
        ((8, 9, 1), (1, 8, 9)),
        ((3, 8, 9), (3, 8, 9)),
        ((2, 8, 9), (2, 8, 9)),
        ((1, 8, 4), (1, 8, 4)),
        ((16, 2), (2, 16)),
        ((2, 16), (2, 16)),
        ((1, 6, 7, 8), (1, 6, 7, 8)),
        ((6, 7, 8, 2), (2, 6, 7, 8)),
        ((7,), (7,)),
    ],
)
def test_channels_are_recognised(tmp_path, dtype, shape, found):
    x = RNG.integers(0, 256, (6, *shape)).astype(dtype)
    np.save(tmp_path / "x.npy", x)
    data = read(tmp_path / "x.npy", "arrays")
    assert data.data_shape == found
    expected = np.moveaxis(x, -1, 1) if found != shape else x
    seen = data.values.outside(data.reference()).numpy()
    np.testing.assert_allclose(seen, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32])
@pytest.mark.parametrize(
    "shape", [(8, 9), (3, 8, 4), (4, 4, 4), (8, 8, 8), (2, 3), (16, 8, 8), (6, 7, 8, 9), (3, 5, 6, 2)]
)
def test_two_readings_are_refused_until_a_layout_settles_them(tmp_path, dtype, shape):
    x = RNG.integers(0, 256, (6, *shape)).astype(dtype)
    np.save(tmp_path / "x.npy", x)
    if dtype == np.uint8 and shape == (8, 9):
        assert read(tmp_path / "x.npy", "arrays").data_shape == (1, 8, 9)  # as MNIST's
    else:
        with pytest.raises(ValueError, match=r"x.npy: .*read in several ways; set data.layout to channels_first"):
            read(tmp_path / "x.npy", "arrays")
    first, last, none = (
        read(tmp_path / "x.npy", "arrays", layout=k).data_shape
        for k in ("channels_first", "channels_last", "no_channels")
    )
    assert (first, last, none) == (shape, (shape[-1], *shape[:-1]), (1, *shape))


def test_layouts_that_are_none_are_refused(tmp_path):
    with pytest.raises(ValueError, match="data.layout is 'NHWC'; expected '' or one of channels_first"):
        Files(layout="NHWC")
    np.save(tmp_path / "x.npy", GRAY[:, 0])
    with pytest.raises(ValueError, match="holds points"):
        read(tmp_path / "x.npy", "arrays", layout="channels_last")


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_size_keeps_every_channel(tmp_path, channels):
    flat = RNG.integers(0, 256, (6, channels), dtype=np.uint8)
    np.save(tmp_path / "x.npy", np.tile(flat[:, None, None], (1, 9, 8, 1)))
    found = pixels(tmp_path / "x.npy", "arrays", size=(4, 5))
    assert found.shape == (6, channels, 4, 5)
    np.testing.assert_array_equal(found[:, :, 0, 0], flat)


@pytest.mark.parametrize("dtype", [">f4", "<f4", ">f8", ">i2", "<u2", ">i4", "<i8", "f2", "i1"])
def test_any_type_and_byte_order(tmp_path, dtype):
    x = RNG.integers(-100 if dtype[-2] != "u" else 0, 100, (9, 3, 8, 7)).astype(dtype)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "x.npz", data=x)
    for name in ("x.npy", "x.npz"):
        found = read(tmp_path / name, "arrays").reference()
        assert found.dtype == torch.float32
        np.testing.assert_array_equal(found.numpy(), x.astype(np.float32))


@pytest.mark.parametrize(("code", "dtype"), [(8, "u1"), (9, "i1"), (11, ">i2"), (12, ">i4"), (13, ">f4"), (14, ">f8")])
def test_every_type_of_idx(tmp_path, code, dtype):
    x = RNG.integers(0, 100, (9, 6, 7)).astype(dtype)
    head = struct.pack(">BBBB", 0, 0, code, 3) + struct.pack(">3I", *x.shape)
    (tmp_path / "x").write_bytes(gzip.compress(head + x.tobytes()))
    found = read(tmp_path / "x", "idx", layout="no_channels")
    np.testing.assert_allclose(found.values.outside(found.reference())[:, 0], x.astype(np.float32), atol=1e-4)


def test_large_arrays_stay_on_disk(tmp_path):
    """In a process of its own that may take less than the file, of 590 MB, where more than 16 MB are mapped."""
    code = f"""
import resource, numpy as np
x = np.lib.format.open_memmap({str(tmp_path / "x.npy")!r}, "w+", ">f4", (9000, 1, 128, 128))
x[::1000] = np.arange(9)[:, None, None, None]
del x
import torch
from scorelab.data import Files, files, load
files.IN_MEMORY = 2**24
torch.ones(10).sum()
used = int(open("/proc/self/statm").read().split()[5]) * 4096
resource.setrlimit(resource.RLIMIT_DATA, (used + 560 * 10**6,) * 2)
data = load("arrays", Files({str(tmp_path / "x.npy")!r}))
rows = data.take(torch.tensor([3000, 3001, 8000]))[:, 0, 7, 9]
assert rows.tolist() == [3.0, 0.0, 8.0], rows
assert (data.values.least, data.values.most, data.values.step) == (0.0, 8.0, 1.0)
assert data.reference().nbytes <= 2**28
data.fingerprint()
print("held")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "held\n", done.stderr


def test_archives_are_unpacked_once_into_the_cache(tmp_path):
    x, cache = RNG.normal(size=(20, 3, 8, 9)).astype(np.float32), tmp_path / "cache"
    np.savez_compressed(tmp_path / "x.npz", images=x, labels=np.arange(20))
    for _ in range(2):
        data = read(tmp_path / "x.npz", "arrays", cache=str(cache))
        np.testing.assert_array_equal(data.reference(), x)
        assert data.labels.tolist() == list(range(20))
        (copy,) = cache.iterdir()
        stamp = copy.stat().st_mtime_ns
    assert copy.stat().st_mtime_ns == stamp
    copy.write_bytes(copy.read_bytes()[:-100])
    np.testing.assert_array_equal(read(tmp_path / "x.npz", "arrays", cache=str(cache)).reference(), x)


# the cache


def test_a_renamed_class_is_read_anew_and_a_damaged_cache_made_again(tmp_path):
    folder, cache = save(tmp_path / "x", "a/1.png", "b/2.png"), tmp_path / "cache"
    before = pixels(folder, cache=str(cache))
    (folder / "a").rename(folder / "c")
    found = read(folder, cache=str(cache))
    assert found.labels.tolist() == [0, 1]
    np.testing.assert_array_equal(found.stored, before[::-1])
    for place, damage in (("*.u8", b"short"), ("*.json", b"{"), ("*.json", b'{"shape": [2], "names": 3}')):
        for path in cache.glob(place):
            path.write_bytes(damage)
        np.testing.assert_array_equal(pixels(folder, cache=str(cache)), before[::-1])


# labels


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.full(12, 1.5), "label of sample 0 is .*1.5"),
        (np.full((12, 2), 1), r"labels of shape \(12, 2\) for 12 samples"),
        (np.array([np.nan] * 12), "label of sample 0 is .*nan"),
        (np.array(["cat"] * 12), "label of sample 0 is .*cat"),
        (np.arange(11), r"labels of shape \(11,\) for 12"),
    ],
)
def test_labels_are_whole_numbers(tmp_path, labels, message):
    np.savez(tmp_path / "x.npz", images=GRAY, labels=labels)
    with pytest.raises(ValueError, match=f"x.npz: .*{message}"):
        read(tmp_path / "x.npz", "arrays")


def test_whole_labels_of_any_type_are_read(tmp_path):
    for labels in (np.arange(12.0), np.arange(12, dtype=">i2"), np.arange(12) % 2 == 0):
        np.savez(tmp_path / "x.npz", images=GRAY, labels=labels)
        assert read(tmp_path / "x.npz", "arrays").labels.tolist() == labels.astype(int).tolist()


def zipped(tmp_path: Path, table: object, where: str = "", top: str = "") -> Path:
    save(tmp_path / "x", "1.png", "2.png")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ("1.png", "2.png"):
            archive.write(tmp_path / "x" / name, top + name)
        archive.writestr(where + "dataset.json", json.dumps({"labels": table}))
    return tmp_path / "x.zip"


def test_the_table_of_a_zip_may_lie_in_its_top_folder(tmp_path):
    path = zipped(tmp_path, [["1.png", 4], ["2.png", 5]], "top/", "top/")
    assert read(path, "zip").labels.tolist() == [4, 5]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([["1.png", 0], ["2.png", 1], ["1.png", 2]], "1.png has 2 labels in dataset.json"),
        ([["1.png", 0.5], ["2.png", 1]], "the label of 1.png is 0.5"),
        ([["1.png", [0, 1]], ["2.png", [1, 0]]], r"the label of 1.png is \[0, 1\]"),
        ([["1.png", None], ["2.png", 1]], "the label of 1.png is None"),
        ([["1.png", 0]], "no label for 1 images .first: 2.png"),
        ([["1.png"]], "can't be read as a zip of images"),
        ({"1.png": 0}, "can't be read as a zip of images"),
    ],
)
def test_tables_that_do_not_label_every_image_once_are_refused(tmp_path, table, message):
    with pytest.raises(ValueError, match=f"x.zip.*{message}"):
        read(zipped(tmp_path, table), "zip")


class Odd:
    """A torch data set: what its second sample is, and how its constructor goes."""

    second: object = None

    def __init__(self):
        if self.second is ...:
            raise RuntimeError("no network")

    def __len__(self):
        return 3

    def __getitem__(self, i):
        if i == 1 and isinstance(self.second, Exception):
            raise self.second
        return (COLOUR[i].transpose(2, 0, 1), 1) if i != 1 else self.second


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (..., "RuntimeError: no network"),
        (OSError("disk gone"), "sample 1 can't be read: OSError: disk gone"),
        (KeyError("x"), "sample 1 can't be read: KeyError"),
        ((1, 2, 3), "sample 1 holds 3 things"),
        ((COLOUR[0].transpose(2, 0, 1), 0.5), "label of sample 1 is 0.5"),
        ((COLOUR[0].transpose(2, 0, 1), None), "label of sample 1 is None"),
        ((COLOUR[0].transpose(2, 0, 1), torch.tensor([0, 1])), "label of sample 1 is tensor"),
        ((GRAY[0], 1), r"sample 1 has shape \(7, 5\), those before it \(3, 6, 9\)"),
    ],
)
def test_torch_data_sets_that_go_wrong_are_named(monkeypatch, second, message):
    monkeypatch.setitem(sys.modules, "odd", sys.modules[__name__])
    monkeypatch.setattr(Odd, "second", second)
    with pytest.raises(ValueError, match=f"odd:Odd.*{message}"):
        load("odd:Odd")


# what numbers mean


@pytest.mark.parametrize(
    "values",
    [
        Values(0, 255, 1, (0.0, 255.0)),
        Values(0, 255, 1, (-0.5, 255.5)),
        Values(0, 16, 1, (0.0, 16.0)),
        Values(-3, 40, 1),
        Values(-2, 7.5, 0, (-2, 7.5)),
    ],
)
def test_the_maps_are_inverse_and_bytes_span_the_range(values):
    x = torch.linspace(values.least, values.most, 44, dtype=torch.float64).trunc()
    inside = values.inside(x)
    torch.testing.assert_close(values.outside(inside), x)
    if values.ends:
        assert float(inside.min()) >= -1
        assert float(inside.max()) <= 1
    if values.step:
        torch.testing.assert_close(values.inside(x + values.step) - inside, torch.full_like(x, values.spacing))
    ends = values.inside(torch.tensor([values.least, values.most]))
    assert values.bytes(ends).tolist() == [0, 255]


def test_a_dequantised_image_is_written_as_it_was():
    data = Images(torch.from_numpy(GRAY)[:, None], dequantise=True)
    index = data.indices(0, 0, 12)
    for x in (data.batch(0, 0, 12).x0, data.take(index)):
        assert torch.equal(data.values.outside(x).round()[:, 0], torch.from_numpy(GRAY)[index].float())
    # training adds noise of one bin around the values that are held out
    gap = data.batch(0, 0, 12).x0 - data.take(index)
    assert float(gap.abs().max()) <= data.values.spacing / 2 + 1e-6


def test_floats_have_their_own_range_in_pictures_and_warnings(tmp_path):
    x = RNG.uniform(0, 255, (40, 1, 8, 6)).astype(np.float32)
    x[0, 0, 0, 0], x[0, 0, 0, 1] = 0, 255
    np.save(tmp_path / "x.npy", x)
    data = read(tmp_path / "x.npy", "arrays")
    assert data.values == Values(0.0, 255.0)
    picture = tiled(data.reference()[:4], data.values)
    np.testing.assert_array_equal(picture[:48:6, :36:6], np.round(x[0, 0]))
    config = default_config()
    config.data.source, config.data.path = "arrays", str(tmp_path / "x.npy")
    config.model.codec.name, config.process.sigma_max = "identity", 50.0
    with pytest.warns(RuntimeWarning, match=r"standard deviation of 7[0-9.]+, the largest noise level is 50"):
        build(config)
    config.process.sigma_max = 300.0
    build(config)


# a run and its data


def settings(path: Path, **changes):
    c = default_config()
    c.data.source, c.data.path, c.data.validation = "folder", str(path), 2
    c.model.net.width, c.model.net.blocks, c.model.net.multipliers, c.model.prediction = 8, 1, (1,), "edm"
    c.training.steps, c.training.batch_size, c.training.sample_every, c.training.precision = 2, 4, 0, "fp32"
    for key, value in changes.items():
        c.training[key] = value
    return c


def test_a_run_goes_on_with_its_own_data_only(tmp_path):
    names = [f"{i}.png" for i in range(8)]
    folder, run = save(tmp_path / "x", *names), tmp_path / "run"
    before = train(settings(folder), run, progress=False)
    recorded = json.loads((run / "data.json").read_text())
    assert recorded["samples"] == 8
    train(settings(folder, steps=3), run, progress=False)
    save(folder, "9.png")
    Image.fromarray(255 - COLOUR[0] // 9).save(folder / "99.png")
    with pytest.raises(
        ValueError, match=r"was trained on other data \(samples: 8 there, 10 now; its content\).*--accept"
    ):
        train(settings(folder, steps=4), run, progress=False)
    assert json.loads((run / "data.json").read_text()) == recorded
    after = train(settings(folder, steps=4), run, progress=False, accept_changes=True)
    assert json.loads((run / "data.json").read_text())["samples"] == 10
    # the network's scale is the one that it was trained with
    assert after.prediction.name == before.prediction.name
    for name in ("9.png", "99.png"):
        (folder / name).unlink()
    Image.fromarray(COLOUR[11]).save(folder / "0.png")
    with pytest.raises(ValueError, match="its content"):
        train(settings(folder, steps=5), run, progress=False)


def test_a_run_that_did_not_record_its_data_goes_on(tmp_path):
    folder, run = save(tmp_path / "x", *[f"{i}.png" for i in range(8)]), tmp_path / "run"
    train(settings(folder), run, progress=False)
    (run / "data.json").unlink()
    train(settings(folder, steps=3), run, progress=False)
    assert json.loads((run / "data.json").read_text())["samples"] == 8
    for damage in ("{", '{"values": 3}', '{"values": {"least": 0}}', '{"sigma_data": "wide"}'):
        (run / "data.json").write_text(damage)
        with pytest.raises(ValueError, match="data.json is damaged"):
            train(settings(folder, steps=4), run, progress=False)
        assert main(["sample", f"--workdir={run}", "--n=2"]) == 2


@pytest.mark.parametrize("dequantise", [False, True])
def test_the_likelihood_of_a_run_takes_held_out_data_as_training_saw_it(tmp_path, dequantise, monkeypatch, capsys):
    folder, run, seen = save(tmp_path / "x", *[f"{i}.png" for i in range(8)]), tmp_path / "run", []
    config = settings(folder)
    config.data.dequantise = dequantise
    train(config, run, progress=False)

    def watched(model, x0, *levels, spacing, **options):
        seen.append((x0, spacing))
        return bits_per_dim(model, x0, *levels, spacing=spacing, **options)

    monkeypatch.setattr(analysis, "bits_per_dim", watched)
    options = ["--divergence=hutchinson", "--tolerance=0.3"]
    assert main(["likelihood", f"--workdir={run}", "--n=5", "--levels=256", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["samples"], found["of"]) == (2, "held-out data")
    # the first is one sample, by which the time is estimated
    _, (x, spacing) = seen
    k = torch.from_numpy(np.stack([COLOUR[i].transpose(2, 0, 1) for i in range(8)])).float()
    # bins of equal width that together make up [-1, 1], or values whose ends are -1 and 1
    inside, width = ((k + 0.5) / 128 - 1, 2 / 256) if dequantise else (k / 127.5 - 1, 2 / 255)
    assert spacing == pytest.approx(width)
    place = [int((inside - row).abs().flatten(1).amax(1).argmin()) for row in x]
    torch.testing.assert_close(x, inside[place])
    trained = load("folder", Files(str(folder)))
    trained.hold_out(2)
    assert not set(place) & set(trained.indices(0, 0, 6).tolist())
    assert main(["likelihood", f"--workdir={run}", "--n=1", *options]) == 0
    alone = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert alone["log_prob"]["standard_error"] is None
    assert main(["likelihood", f"--workdir={run}", "--levels=255", *options]) == 2
    assert "from 0 to 255 by 1; expected --levels=256" in capsys.readouterr().err


@pytest.mark.parametrize("dequantise", [False, True])
def test_the_bins_of_a_runs_bound_are_open_at_its_first_and_last_value(tmp_path, dequantise, monkeypatch, capsys):
    """Wherever values stand inside, the bins of all 256 hold all of a Gaussian."""
    folder, run, seen = save(tmp_path / "x", *[f"{i}.png" for i in range(8)]), tmp_path / "run", []
    config = settings(folder)
    config.data.dequantise = dequantise
    train(config, run, progress=False)

    def watched(*args, spacing, data_range=(-1.0, 1.0), **options):
        seen.append(Bins(spacing, *data_range))
        return variational_bound(*args, spacing=spacing, data_range=data_range, **options)

    monkeypatch.setattr(bound, "variational_bound", watched)
    command = ["likelihood", f"--workdir={run}", "--method=bound", "--bits", "--steps=3", f"--out={tmp_path / 'x.png'}"]
    assert main(command) == 0
    assert "bits per dimension" in capsys.readouterr().out
    k = torch.arange(256, dtype=torch.float64)
    inside = (k + 0.5) / 128 - 1 if dequantise else k / 127.5 - 1
    for mean in (-1.0, 0.3, 0.99):
        mass = seen[0].log_mass(inside, torch.tensor(mean, dtype=torch.float64), 0.05).exp()
        assert float(mass.sum()) == pytest.approx(1, abs=1e-9)


def test_continuous_data_has_no_levels(tmp_path, capsys):
    np.save(tmp_path / "x.npy", RNG.normal(size=(30, 1, 6, 6)))
    config = settings(tmp_path / "x.npy")
    config.data.source = "arrays"
    train(config, tmp_path / "run", progress=False)
    assert main(["likelihood", f"--workdir={tmp_path / 'run'}", "--levels=16"]) == 2
    assert "the data is continuous; expected neither" in capsys.readouterr().err


def test_a_run_of_floats_draws_its_pictures_in_their_range(tmp_path):
    x = RNG.uniform(0, 100, size=(30, 1, 6, 6))
    np.save(tmp_path / "x.npy", x)
    config = settings(tmp_path / "x.npy")
    config.data.source, config.process.sigma_max = "arrays", 300.0
    train(config, tmp_path / "run", progress=False)
    run = sample_run(tmp_path / "run", n=4)
    assert run.values == Values(float(np.float32(x.min())), float(np.float32(x.max())))
    write_samples(run, tmp_path / "x.png")
    share = (run.x - x.min()) / (x.max() - x.min())
    expected = (255 * share.clamp(0, 1)).round()[0, 0]
    np.testing.assert_allclose(np.asarray(Image.open(tmp_path / "x.png"))[:48:8, :48:8], expected, atol=1)
    write_samples(run, tmp_path / "x.npz")
    np.testing.assert_array_equal(np.load(tmp_path / "x.npz")["samples"], run.x)
