"""The ``scorelab`` command: which of ``COMMANDS`` is meant, its help, and how it ends.

Bad input ends with one line on standard error and exit code 2.
"""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import sysconfig
import traceback
from pathlib import Path

from absl import flags

__all__ = ["main"]

_USAGE = """usage: scorelab train  --config configs/digits/ncsn.py --workdir runs/x [--config.optim.lr=1e-3] [--dry_run]
                       [--accept_changes] [--step STEP]
       scorelab sample --workdir runs/x [--n 64] [--seed 0] [--out FILE.png|FILE.npz|DIRECTORY]
                       [--sampler NAME|FILE.json] [--nfe 20] [--grid NAME] [--config.sampling.sampler.eta=0.5]
                       [--step STEP] [--weights ema|model|ema_0.9999|ema_power_0.1] [--batch_size 256] [--device cuda]
                       [--condition each|data|none|CLASS] [--guidance 2] [--guidance_interval 0.2,5]
                       [--guidance_rescale 0.7] [--autoguidance STEP] [--classifier runs/c]
                       [--precision fp32|bf16|auto] [--compile]
       scorelab sample --model digits|fashion_mnist [--n 64] ...  (comes with scorelab)
       scorelab restore --workdir runs/x --task inpaint --mask MASK.png --image IMAGE.png [--n 4] [--noise_std 0]
                       [--method ddrm|daps|dps|moment_matching|pseudo_inverse|replacement|repaint] [--nfe 100]
                       [--condition CLASS] ...  (of the mask: white is to be filled in)
       scorelab restore ... --task colourise | super_resolve --factor 2 | deblur --blur STD_IN_PIXELS
       scorelab edit --workdir runs/x --image IMAGE.png --towards CLASS [--strength 1] [--steps 100] [--out FILE.png]
           (by the codes of a diffusion autoencoder)
       scorelab calibrate --workdir runs/x [--nfe 10] [--method least_squares|gradient] [--starts 64] [--out FILE.json]
                       [--condition ...] [--guidance ...] [--guidance_interval ...] [--autoguidance ...] ...
       scorelab report --workdir runs/x
       scorelab density --workdir runs/x [--n 200] [--out FILE.png]  (2-D data)
       scorelab settings  (every setting of a config)
       scorelab convert FILE --release edm --out models/x [--image_size=64 ...]  (a published checkpoint)
       scorelab export RUN_OR_SAVED_MODEL FILE.onnx|FILE.pt2 [--step STEP] [--weights ema|model|...]
       scorelab new images|points runs/my.py --path DATA [--size 32,32] [--layout channels_last]
       scorelab likelihood --workdir runs/x [--n 64] [--bits] [--divergence hutchinson] [--probes 1]
       scorelab likelihood --workdir runs/x --method bound [--n 64] [--bits] [--steps 250] [--out FILE.png]
                       [--variance posterior|forward|learned|analytic]
       scorelab likelihood --workdir runs/x [--n 64] [--codes 100]  (of an autoencoder)
           (--config configs/digits/edm.py: of that config's data, for a saved or converted model)
       scorelab evaluate --workdir runs/x [--n 10000] [--against train|held_out] [--few] [--out FILE.json]
                       [--features pixels|digits|fashion_mnist|classifier:DIR|inception:FILE|package.module:Class]
                       [--sampler ...] [--nfe 20] [--condition ...] [--guidance ...] [--config FILE.py] ...
       scorelab evaluate --samples FILE.npz|DIRECTORY --workdir runs/x ...  (or --config FILE.py: for the data)
       scorelab evaluate --workdir runs/x --samplers heun,dpm2m,calibrated --nfe 5,10,20 [--out FILE.json] ...
           (quality against cost: a JSON of records and a plot)
       scorelab health --workdir runs/x [--n 1000] [--levels 8] [--points 512] [--out FILE.json] [--nfe 20]
                       [--step STEP] [--weights ema|model|...] [--config FILE.py] ..."""
_PAGES = {
    **dict.fromkeys(["train", "report", "settings"], "training.md"),
    "evaluate": "evaluation.md",
    "health": "health.md",
    **dict.fromkeys(["calibrate", "likelihood", "density"], "samplers.md"),
    "sample": "training.md, docs/samplers.md",
    "restore": "inverse.md",
    "edit": "latents.md",
    "new": "first_hour.md",
    "convert": "networks.md",
    "export": "export.md",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 when it is done, 2 for input that can't be used, 130 when interrupted."""
    arguments = [_underscored(text) for text in (sys.argv[1:] if argv is None else argv)]
    for stream in (sys.stdout, sys.stderr):
        # a locale without the letters of a path must not end a command
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if not arguments or arguments[0] == "help" or not {"-h", "--help"}.isdisjoint(arguments):
        print(_usage(arguments))
        return 0 if arguments else 2
    # parts of one's own are found from where the command is given, as python -m finds them
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    # help needs no PyTorch
    from scorelab.checks import nearest_name
    from scorelab.cli.commands import COMMANDS

    try:
        if arguments[0] not in COMMANDS:
            raise ValueError(f"unknown command {arguments[0]!r}; {nearest_name(arguments[0], COMMANDS)}")
        COMMANDS[arguments[0]](arguments)
    except KeyboardInterrupt as stop:
        said = str(stop) or "interrupted; the same command goes on from the last checkpoint, or begins anew"
        # torchrun's processes all stop
        if os.environ.get("RANK", "0") == "0":
            print(f"scorelab: {said}", file=sys.stderr)
        return 128 + int(getattr(stop, "signal", signal.SIGINT))
    except Exception as error:
        place = _own_place(error)
        refused = isinstance(error, (ValueError, OSError, flags.Error))
        if not place and not refused and not _is_input_error(error):
            raise
        said = _one_line(error) if refused or not place else f"{type(error).__name__}: {_one_line(error)}"
        print(f"scorelab: {said}{place}", file=sys.stderr)
        return 2
    return 0


def _usage(arguments: list[str]) -> str:
    """How the command that is named is used, or all of them."""
    named = next((a for a in arguments if a in _PAGES), None)
    if named is None:
        return _USAGE
    # its own lines, and those that go on from there
    blocks = re.split(r"\n {7}(?=scorelab )", _USAGE.removeprefix("usage: "))
    own = "\n       ".join(block for block in blocks if block.split()[1] == named)
    return f"usage: {own}\nmore: docs/{_PAGES[named]}; all commands: scorelab --help"


def _underscored(text: str) -> str:
    """An option's name with underscores for hyphens."""
    name, equals, value = text.partition("=")
    return name[:2] + name[2:].replace("-", "_") + equals + value if text.startswith("--") else text


def _one_line(error: BaseException) -> str:
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split())


def _own_place(error: BaseException) -> str:
    """Where in a user's own code an error arose, " (file, line)"; nothing for one that arose elsewhere."""
    others = [str(Path(__file__).parents[1]), *sysconfig.get_paths().values()]
    cause: BaseException | None = error
    while cause is not None:
        for frame in reversed(traceback.extract_tb(cause.__traceback__)):
            if Path(frame.filename).is_file() and not frame.filename.startswith(tuple(others)):
                said = f" ({frame.filename}, line {frame.lineno})"
                return "" if frame.filename in str(error) else said
        cause = cause.__cause__
    return ""


def _is_input_error(error: BaseException) -> bool:
    """A wrong config key or value: raised by ml_collections or by the config file, not by scorelab."""
    if not isinstance(error, (TypeError, KeyError, AttributeError)):
        return False
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and "scorelab" not in trace.tb_frame.f_globals.get("__name__", "")


if __name__ == "__main__":
    sys.exit(main())
