"""Diffusion autoencoders: the network as released, training, codes, edits."""

from __future__ import annotations

import torch
from published import difference, released

from scorelab.interop.unets import from_adm
from scorelab.nn import DiffAE


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
