"""A UNet of diffusers as a score: DDIM and the reader's first sample, against diffusers' own sampler.

The network has random weights; both sides run it from the same start over the same 10 of 1,000 steps.

    python -m benchmarks.foreign
"""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler, UNet2DModel

from scorelab import from_eps, sample, sigmas
from scorelab.processes import DiscreteVP, linear_betas
from scorelab.samplers import DDIM, Heun


def main() -> None:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    ).eval()
    betas = linear_betas(1000)
    process = DiscreteVP(betas)
    # the network counts steps from 0, the least noise
    score = from_eps(lambda x, t: unet(x, t).sample, process, label=lambda s: 1000 * process.time(s) - 1)
    levels = sigmas.from_betas(betas, "leading10")
    start = torch.randn(4, 1, 16, 16)
    # the standard deviation of the noisiest level in scaled coordinates is nearly 1
    scale = (1 + levels[0] ** 2).sqrt().float()
    mine = sample(score, start * scale, levels, DDIM())

    scheduler = DDIMScheduler(1000, beta_start=1e-4, beta_end=0.02, clip_sample=False, timestep_spacing="leading")
    scheduler.set_timesteps(10)
    theirs = start
    with torch.no_grad():
        for t in scheduler.timesteps:
            theirs = scheduler.step(unet(theirs, t).sample, t, theirs).prev_sample
    difference = float((mine - theirs).abs().max() / theirs.abs().max())
    print(f"DDIM, 10 steps: largest difference {difference:.2g} of the largest value")
    if difference > 1e-4:
        raise SystemExit("scorelab and diffusers disagree")
    images = sample(score, (4, 1, 16, 16), levels, Heun(), generator=torch.Generator().manual_seed(0))
    print(f"Heun: {tuple(images.shape)}, standard deviation {float(images.std()):.3g}")


if __name__ == "__main__":
    main()
