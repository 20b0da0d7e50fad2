"""Diffusion autoencoders: the network as released, training, codes, edits."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from problems import generator
from published import difference, released
from test_autoencoders import config as experiment
from test_training import same_files

from scorelab import ScoreModel
from scorelab.cli.main import main
from scorelab.cli.sampling import sample_run
from scorelab.data import digits
from scorelab.interop.unets import from_adm
from scorelab.latent import Directions, codes, decoded, latents
from scorelab.nn import DiffAE
from scorelab.training import Trainer, build, train


def test_the_network_is_the_release_s():
    r = released("diffae")
    c = r.config
    net = DiffAE(
        (3, c["image_size"], c["image_size"]),
        code=c["enc_out_channels"],
        encoder_multipliers=tuple(c["enc_channel_mult"]),
        encoder_blocks=c["enc_num_res_block"],
        width=c["model_channels"],
        multipliers=tuple(c["channel_mult"]),
        blocks=c["num_res_blocks"],
        attention=(1,),
        embedded=c["embed_channels"],
    )
    state = {k.replace("time_embed.time_embed", "time_embed"): v for k, v in r.state.items()}
    net.load_state_dict(from_adm(net, state))
    net.eval()
    with torch.no_grad():
        code = net.encode(r.values["x0"])
        assert difference(code, r.values["code"]) < 2e-5
        for condition in (r.values["code"], r.values["x0"]):
            found = net(r.values["x"], r.values["labels"], condition)
            assert difference(found, r.values["output"]) < 2e-5


def config(name: str, steps: int = 2, **changes):
    c = experiment(name, steps, **changes)
    c.sampling.batch_size = 4
    if name == "diffae":
        c.model.net.code, c.sampling.grid.steps = 5, 3
    return c


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A diffusion autoencoder's run, and that of a score of its codes."""
    folder = tmp_path_factory.mktemp("runs")
    train(config("diffae", 4), folder / "diffae", progress=False)
    c = config("diffae_codes", 4, model__codec__path=str(folder / "diffae"))
    c.model.codec.steps = 2
    train(c, folder / "codes", progress=False)
    return folder


def test_the_condition_is_the_sample_itself():
    """Of every row, in training and where the loss is measured; the encoder learns from the loss of the score."""
    c = config("diffae")
    trainer = Trainer(build(c), c)
    batch = trainer.batches.at(3).batch
    assert torch.equal(batch.condition, batch.x0)
    model = trainer.model
    for p in model.net.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.1, generator=generator())
    losses = trainer.experiment.objective.losses(model, *trainer.batches.at(3))
    losses.sum().backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in model.net.encoder.parameters())
    x, sigma = torch.randn(3, 1, 8, 8, generator=generator()), torch.tensor(2.0)
    model.eval()
    by_image, by_code = (model.conditioned(given)(x, sigma) for given in (batch.x0[:3], codes(model, batch.x0[:3])))
    assert torch.allclose(by_image, by_code, atol=1e-5)
    with pytest.raises(ValueError, match=r"told what a sample shows; expected model.conditioned\(codes\)"):
        model(x, sigma)
    with pytest.raises(ValueError, match=r"the condition is \(3,\); expected a code \(B, 5\)"):
        model.conditioned(torch.zeros(3))(x, sigma)


def test_a_run_goes_on_bit_for_bit(runs, tmp_path):
    train(config("diffae", 2), tmp_path / "parts", progress=False)
    train(config("diffae", 4), tmp_path / "parts", progress=False)
    same_files(*(folder / "checkpoints" / "step_00000004" for folder in (tmp_path / "parts", runs / "diffae")))


def test_codes_and_latents_give_the_image_back(runs):
    model, x0 = ScoreModel.load(runs / "diffae"), digits().take(torch.arange(4))
    z = codes(model, x0)
    latent = latents(model, x0, z, steps=10)
    off = float((decoded(model, z, latent, steps=10) - x0).abs().max())
    assert off < 2e-3
    # another code with the same latent is another image, and so is the same code with another
    for given in ((z.flip(0), latent), (z, latent.flip(0))):
        assert float((decoded(model, *given, steps=10) - x0).abs().max()) > 3 * off


def test_what_is_drawn_of_codes_becomes_images_by_themselves(runs, tmp_path):
    """Standardised; the noise of each follows from its own code."""
    model = ScoreModel.load(runs / "codes")
    assert (model.data_shape, model.outside_shape) == ((5,), (1, 8, 8))
    z = torch.randn(4, 5, generator=generator())
    whole = model.decode(z)
    assert torch.allclose(whole[2:], model.decode(z[2:]), atol=1e-4)
    assert torch.allclose(whole, model.decode(z + 1e-6), atol=1e-2)
    x0 = digits().take(torch.arange(1797))
    inside = model.encode(x0)
    held = digits()
    held.hold_out(40)
    assert torch.allclose(inside.mean(0), torch.zeros(5), atol=0.1)
    assert torch.allclose(inside.std(0), torch.ones(5), atol=0.1)
    assert sample_run(runs / "codes", n=3).x.shape == (3, 1, 8, 8)
    model.save(tmp_path / "moved")
    assert torch.equal(ScoreModel.load(tmp_path / "moved").decode(z), whole)


def test_directions_are_those_of_a_linear_classifier():
    """Of Gaussians with means of their own: right as often as can be, and moved codes are held for their new class."""
    means = torch.tensor([[3.0, 0, 0, 1], [0, 3.0, 0, 1], [0, 0, 3.0, 1]])
    labels = torch.arange(3000) % 3
    z = 10 + 5 * (means[labels] + torch.randn(3000, 4, generator=generator()))
    ways = Directions.fit(z, labels, ("a", "b", "c"))
    best = torch.cdist((z - 10) / 5, means).argmin(1) == labels
    assert ways.accuracy == pytest.approx(float(best.double().mean()), abs=0.02)
    some = z[labels == 0][:200]
    moved = ways.towards(some, 1)
    assert float(ways.probabilities(some)[:, 1].mean()) < 0.05
    assert float(ways.probabilities(moved)[:, 1].mean()) > 0.85
    # along one line, to where the mean of that class lies
    way = (moved - some)[torch.arange(200)]
    line = torch.nn.functional.normalize(way.double() / ways.std, dim=1)
    assert torch.allclose((line @ line[0]).abs(), torch.ones(200, dtype=torch.float64), atol=1e-4)
    inside = (moved.double() - ways.mean) / ways.std
    assert torch.allclose((ways.means[1] - inside) @ line[0], torch.zeros(200, dtype=torch.float64), atol=1e-4)
    assert torch.equal(ways.towards(some, 1, 0.0), some)
    with pytest.raises(ValueError, match="expected five or more"):
        Directions.fit(z[:3], labels[:3], ("a", "b"))


def test_images_are_edited_by_the_command_line(runs, tmp_path, capsys):
    run = runs / "diffae"
    picture = (digits().take(torch.arange(1))[0, 0] * 127.5 + 127.5).to(torch.uint8).numpy()
    Image.fromarray(picture).save(tmp_path / "a.png")
    command = ["edit", f"--workdir={run}", f"--image={tmp_path / 'a.png'}", "--towards=3", "--steps=4"]
    assert main([*command, f"--out={tmp_path / 'b.png'}"]) == 0
    told = capsys.readouterr().out
    assert "image 0: 3 0." in told
    with Image.open(tmp_path / "b.png") as made:
        assert made.size[0] > 3 * 8
    ways = Directions.load(run / "directions_4_ema.safetensors")
    assert ways.classes == tuple("0123456789")
    for changed, said in [
        (["--towards=seven"], "--towards is 'seven'; known: 0, 1"),
        (["--image=none.png"], "there is no such file"),
        (["--out=x.npz"], "a name that ends in .png"),
        (["--steps=0"], "--steps is 0"),
    ]:
        assert main([*command, *changed]) == 2
        assert said in capsys.readouterr().err
    assert main(["edit", f"--workdir={run}"]) == 2
    assert "--image, --towards missing" in capsys.readouterr().err
    assert main(["sample", f"--workdir={run}"]) == 2
    assert "told what a sample shows" in capsys.readouterr().err
