"""``scorelab restore`` on the digits model: what is known comes back, rows stand alone, bad input is one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scorelab import ScoreModel
from scorelab.cli.main import main
from scorelab.cli.restoring import measure, operator_of
from scorelab.data import load
from scorelab.nn import UNet
from scorelab.predictions import edm
from scorelab.processes import VE
from scorelab.training.restoring import METHODS

QUICK = "--config.sampling.grid.n=4"


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """A digit as a picture, small, and as an array, and masks, white below and black."""
    monkeypatch.chdir(tmp_path)
    digit = 8 * (load("digits").reference()[5, 0] + 1)
    pixels = (digit * 255 / 16).round().byte().numpy()
    Image.fromarray(pixels).save("digit.png")
    Image.fromarray(pixels[::2, ::2]).save("small.png")
    Image.fromarray(np.stack([pixels] * 3, 2)).save("colour.png")
    Image.fromarray(pixels[:, :5]).save("narrow.png")
    np.save("digit.npy", digit.numpy()[None, None])
    np.save("bright.npy", digit.numpy()[None, None] + 3)
    np.save("points.npy", digit.numpy())
    mask = np.zeros((8, 8), np.uint8)
    Image.fromarray(mask).save("black.png")
    mask[4:] = 255
    Image.fromarray(mask).save("mask.png")
    Image.fromarray(mask[:6]).save("low.png")
    Path("text.png").write_text("no image")
    return tmp_path


def restored(*options: str, n: int = 2, model: str = "digits") -> np.ndarray:
    """Samples as the command writes them, in the data's numbers."""
    assert main(["restore", "--model", model, QUICK, f"--n={n}", "--out=x.npz", *options]) == 0
    return np.load("x.npz")["samples"]


INPAINT = ("--task=inpaint", "--mask=mask.png")


@pytest.mark.parametrize("method", [m for m in METHODS if m != "moment_matching"])
def test_known_pixels_come_back_exactly(files, method):
    x = restored(*INPAINT, "--image=digit.npy", f"--method={method}", "--nfe=10" if method == "repaint" else "--nfe=4")
    digit = np.load("digit.npy")
    assert np.array_equal(x[:, :, :4], np.repeat(digit[:, :, :4], 2, 0))
    assert np.abs(x[0] - x[1]).max() > 0.5
    assert 0 <= x.min() <= x.max() <= 16


def test_pictures_are_read_in_the_data_s_own_numbers(files):
    x = restored(*INPAINT, "--image=digit.png", "--nfe=4")
    assert x[0, 0, :4] == pytest.approx(np.load("digit.npy")[0, 0, :4], abs=0.5 * 16 / 255)


def test_a_folder_of_pictures_is_as_good_as_one(files):
    Path("folder").mkdir()
    Path("digit.png").rename("folder/b.png")
    Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save("folder/a.png")
    x = restored(*INPAINT, "--image=folder", "--nfe=2", n=1)
    assert x.shape == (2, 1, 8, 8)
    assert x[0, 0, :4] == pytest.approx(16 * np.eye(8)[:4])


@pytest.mark.parametrize("image", ["digit.npy", "small.png"])
def test_restored_images_have_the_means_of_the_small_one(files, capsys, image):
    x = restored("--task=super_resolve", f"--image={image}", "--nfe=4")
    said = capsys.readouterr().out
    small = np.load("digit.npy")[0, 0].reshape(4, 2, 4, 2).mean((1, 3))
    if image == "small.png":
        small = np.asarray(Image.open(image), np.float64) * 16 / 255
    assert ("digit.npy was made smaller first" in said) == (image == "digit.npy")
    assert x.reshape(2, 4, 2, 4, 2).mean((2, 4)) == pytest.approx(np.stack([small] * 2), abs=16e-3)


def test_deblurring_agrees_with_the_blurred_image(files):
    operator = operator_of("deblur", (1, 8, 8), blur=0.6)
    digit = torch.from_numpy(np.load("digit.npy"))
    blurred = operator(digit)
    assert float(operator(torch.ones(1, 1, 8, 8)).sub(1).abs().max()) < 1e-5
    np.save("blurred.npy", blurred.clamp(0, 16).numpy())
    x = restored("--task=deblur", "--blur=0.6", "--image=blurred.npy", "--config.sampling.grid.n=12")
    assert float((operator(torch.from_numpy(x)) - blurred).square().mean().sqrt()) < 0.5
    assert np.abs(x - digit.numpy()).mean() < 0.5 * np.abs(blurred.numpy() - digit.numpy()).mean()


def test_a_sample_depends_neither_on_how_many_nor_on_other_images(files):
    one = restored(*INPAINT, "--image=digit.npy", n=1)
    three = restored(*INPAINT, "--image=digit.npy", "--config.sampling.batch_size=2", n=3)
    digit = np.load("digit.npy")
    np.save("two.npy", np.concatenate([digit[..., ::-1], digit]))
    two = restored(*INPAINT, "--image=two.npy", n=1)
    assert three[0] == pytest.approx(one[0], abs=1e-3)
    assert two[1] == pytest.approx(one[0], abs=1e-3)


def test_the_picture_has_a_row_for_each_image_and_its_name_the_seed(files, capsys):
    assert main(["restore", "--model=digits", *INPAINT, "--image=digit.png", "--n=3", "--seed=7", "--nfe=4"]) == 0
    place = Path("samples/digits/inpaint_digit_nfe_4_seed_7.png")
    assert str(place) in capsys.readouterr().out
    # four of 8x8, six times as large, with gaps of 2
    page = np.asarray(Image.open(place))
    assert page.shape == (48, 4 * 48 + 3 * 2)
    assert set(page[24:48, :48].flatten().tolist()) == {128}
    assert np.array_equal(page[:24, :48], page[:24, 50:98])


def test_a_class_can_be_asked_for(files):
    unasked, asked = (restored(*INPAINT, "--image=digit.npy", *c) for c in ((), ("--condition=9",)))
    assert np.abs(unasked - asked).max() > 1


def coloured(data_range: tuple[float, float] | None) -> ScoreModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = UNet((3, 8, 8), width=8, multipliers=(1,), blocks=1, attention=(), group=4)
    return ScoreModel(net, VE(0.01, 10.0), edm(0.5), data_shape=(3, 8, 8), data_range=data_range)


def test_colours_have_the_gray_image_as_their_mean(files, capsys):
    coloured((0.0, 255.0)).save("model")
    x = restored("--task=colourise", "--image=digit.png", "--method=ddrm", "--nfe=4", model="model")
    assert x.shape == (2, 8, 8, 3)
    assert x.dtype == np.uint8
    gray = np.asarray(Image.open("digit.png"), np.float64)
    assert x.mean(3) == pytest.approx(np.stack([gray] * 2), abs=0.5 + 1e-3 * 255)
    capsys.readouterr()
    restored("--task=colourise", "--image=colour.png", "--method=ddrm", "--nfe=4", model="model")
    assert "colour.png was made gray first" in capsys.readouterr().out
    # a gray image has three equal channels
    assert restored(*INPAINT, "--image=digit.png", "--nfe=4", model="model")[0, 0, 0].tolist() == [gray[0, 0]] * 3


def test_colour_images_of_every_kind_come_back_where_they_are_known(files):
    """Red, green and blue as they are; gray thrice; before white where transparent; turned as EXIF says."""
    coloured((0.0, 255.0)).save("model")
    colours = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    gray, clear = colours[..., 0], np.where(np.arange(8) % 2, 0, 255).astype(np.uint8)[:, None].repeat(8, 1)
    turn = Image.Exif()
    turn[0x112] = 6
    images = {
        "rgb": (Image.fromarray(colours), colours),
        "palette": (Image.fromarray(gray).convert("P"), np.stack([gray] * 3, 2)),
        "rgba": (Image.fromarray(np.dstack([colours, clear])), np.where(clear[..., None] == 0, 255, colours)),
        "deep": (Image.fromarray(gray.astype(np.uint16) * 257), np.stack([gray] * 3, 2)),
        # 6: a quarter turn to the right
        "turned": (Image.fromarray(colours), np.rot90(colours, -1)),
    }
    for name, (image, expected) in images.items():
        image.save(f"{name}.png", **({"exif": turn} if name == "turned" else {}))
        x = restored(*INPAINT, f"--image={name}.png", "--nfe=2", n=1, model="model")
        assert np.array_equal(x[0, :4], expected[:4]), name


def test_masks_that_are_no_black_and_white_are_told(files):
    """A photo; not the soft edge of JPEG, nor other modes of black and white."""
    mask = np.asarray(Image.open("mask.png"))
    Image.fromarray(mask).save("edge.jpg", quality=50)
    Image.fromarray(mask > 0).save("bits.png")
    Image.fromarray(np.dstack([mask] * 3 + [255 - 0 * mask])).save("rgba.png")
    Image.fromarray(mask.astype(np.uint16) * 257).save("deep.png")
    for name in ("mask.png", "edge.jpg", "bits.png", "rgba.png", "deep.png"):
        operator = operator_of("inpaint", (1, 8, 8), mask=name)
        assert torch.equal(operator(torch.arange(64.0).view(1, 1, 8, 8)), torch.arange(32.0)[None])
    photo = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    Image.fromarray(photo).save("photo.png")
    # of 0, 4, ..., 252 those from 32 to 220
    with pytest.warns(RuntimeWarning, match="--mask=photo.png is gray in 75% of its pixels, taken for the nearer of"):
        operator_of("inpaint", (1, 8, 8), mask="photo.png")


@pytest.mark.usefixtures("files")
def test_arrays_that_hardly_use_the_range_are_warned_of():
    """As those scaled to [0, 1], of data that goes to 16 here."""
    np.save("scaled.npy", np.load("digit.npy") / 16)
    with pytest.warns(
        RuntimeWarning, match=r"--image=scaled.npy spans \[0, 1\] of the data's \[0, 16\]: are they scaled"
    ):
        restored(*INPAINT, "--image=scaled.npy")


def test_what_is_shown_of_a_measurement():
    x0 = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
    operator = operator_of("super_resolve", (1, 8, 8), factor=4)
    seen = measure(operator, x0)
    assert seen.picture.shape == x0.shape
    assert torch.equal(seen.picture[0, 0, :4, :4], operator(x0)[0, 0, 0, 0].expand(4, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--task=inpaint", "--mask=low.png"), "--mask=low.png is 8x6, the model's images 8x8; expected the same"),
        (("--task=inpaint", "--mask=black.png"), "is black everywhere; expected white where pixels are to be filled"),
        (("--task=inpaint",), "--mask is missing; expected an image of 8x8 pixels, white where pixels are to be"),
        (("--task=inpaint", "--mask=text.png"), "--mask is text.png, which can't be used: it is no image"),
        (("--task=inpaint", "--mask=none.png"), "--mask is none.png, and there is no such file"),
        ((*INPAINT, "--image=narrow.png"), "narrow.png is 5x8; expected 8x8; crop or scale it"),
        ((*INPAINT, "--image=text.png"), "--image is text.png, which can't be used: it is no image of a format"),
        (
            (*INPAINT, "--image=bright.npy"),
            "--image=bright.npy spans [3, 19] of the data's [0, 16]; expected the data's own values",
        ),
        ((*INPAINT, "--image=points.npy"), "--image=points.npy holds (8, 8); expected images (N, C, H, W)"),
        ((*INPAINT, "--image=none.npy"), "--image is none.npy, and there is no such file; expected an image"),
        ((*INPAINT, "--image="), "--image is missing; expected an image file, a folder of them"),
        (("--task=inpant",), "--task is inpant; known: colourise, deblur, inpaint, super_resolve"),
        ((), "--task is missing; known: colourise, deblur, inpaint, super_resolve"),
        (("--task=colourise",), "--task=colourise needs a model of colour images, and this one is of gray ones"),
        (("--task=super_resolve", "--factor=3"), "factor is 3 for data (1, 8, 8); expected one that divides"),
        (
            ("--task=super_resolve", "--image=narrow.png"),
            "narrow.png is 5x8; expected 4x4 pixels, or 8x8",
        ),
        (("--task=deblur",), "--blur is missing; expected the standard deviation of the blur in pixels"),
        (("--task=deblur", "--blur=-1"), "--blur is -1.0; expected the standard deviation of the blur in pixels"),
        (("--task=deblur", "--blur=1", "--mask=mask.png"), "--mask is for --task=inpaint; expected none with"),
        ((*INPAINT, "--method=ddmr"), "--method is 'ddmr'; did you mean 'ddrm'?"),
        (("--task=super_resolve", "--method=repaint"), "--method=repaint is for --task=inpaint; expected another with"),
        ((*INPAINT, "--noise_std=-1"), "--noise_std is -1.0; expected a number >= 0, black being -1 and white 1"),
        ((*INPAINT, "--n=0"), "--n is 0, --nfe is None; expected 1 or more"),
        ((*INPAINT, "--out=x.jpg"), "--out is x.jpg; expected a name that ends in .png or .npz"),
        ((*INPAINT, "--condition=ten"), "--condition is 'ten'; known: 0, 1, 2"),
        ((*INPAINT, "--model=digit"), "--model is 'digit', no directory of a saved model; did you mean 'digits'?"),
        ((*INPAINT, "--workdir=runs/x"), "got --model and --workdir; expected one of them"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(files, capsys, options, message):
    assert main(["restore", "--model=digits", "--image=digit.png", *options]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
