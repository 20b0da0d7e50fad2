"""The README and docs/: links lead somewhere, every page is on the site, and every block of code runs."""

from __future__ import annotations

import re
import shlex
import sys
import types
from pathlib import Path
from typing import NamedTuple

import diffusers
import numpy as np
import pytest
from PIL import Image

import scorelab
from scorelab.cli.main import main
from scorelab.cli.runs import is_autoencoder

ROOT = Path(__file__).parent.parent
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]}
FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.S | re.M)


class Block(NamedTuple):
    """``name``: the page and the block's place on it, from 0."""

    name: str
    language: str
    code: str


def blocks(page: str) -> list[Block]:
    found = [match for match in FENCE.findall(PAGES[page]) if match[0] in ("python", "bash")]
    return [Block(f"{page} {i}", *match) for i, match in enumerate(found)]


def anchors(text: str) -> set[str]:
    """Of the headings, as code hosts and the site name them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.M):
        name = re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).lower()).replace(" ", "-")
        found.add(next(n for n in (name, *(f"{name}-{i}" for i in range(1, 100))) if n not in found))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """Those inside the repository; of others nothing can be known without a network."""
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", PAGES[page]))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+://", link):
            continue
        place, _, anchor = link.partition("#")
        target = (ROOT / page).parent / place if place else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


@pytest.mark.parametrize("page", PAGES)
def test_blocks_are_of_kinds_that_are_run(page):
    """But for equations, and Sphinx's own on the pages that are lists."""
    assert {kind for kind, _ in FENCE.findall(PAGES[page])} <= {"python", "bash", "math", "{toctree}", "{eval-rst}"}
    assert not re.search(r"^(    |~~~)", FENCE.sub("", PAGES[page]), re.M)


def test_every_page_is_on_the_site():
    listed = re.findall(r"^([\w/*]+)$", "\n".join(code for kind, code in FENCE.findall(PAGES["docs/index.md"])), re.M)
    found = {path for entry in listed for path in (ROOT / "docs").glob(f"{entry}.md")}
    assert found == {ROOT / page for page in PAGES} - {ROOT / "README.md", ROOT / "docs/index.md"}


def test_every_public_name_is_in_the_reference():
    names, modules = re.findall(r"autosummary::\n(.*?)```", PAGES["docs/api.md"], re.S)
    own = {n for n in scorelab.__all__ if not isinstance(getattr(scorelab, n), types.ModuleType)}
    assert set(re.findall(r"^   ~?(?:\w+\.)?(\w+)$", names, re.M)) == own
    described = set(re.findall(r"^   (\w+)$", modules, re.M))
    rooms = {p.name.removesuffix(".py") for p in (ROOT / "scorelab").glob("[!_]*") if not p.is_dir()}
    rooms |= {p.parent.name for p in (ROOT / "scorelab").glob("*/__init__.py")}
    assert described == rooms - INTERNAL


INTERNAL = {"cli", "checks", "described", "noised", "parts", "precision", "saved", "tables", "writing", "py.typed"}
"""Rooms without a page: nothing of theirs is meant for users."""

ELSEWHERE = {
    "README.md": ("test_readme.py", ["log_likelihood", "lambda x, sigma", "scorelab train", "sample --model"]),
    "docs/evaluation.md": ("test_features.py", ["energy_distance"]),
    "docs/export.md": ("test_export.py", ["onnxruntime", "torch.export.load"]),
    "docs/extending.md": ("test_parts.py", ["class EulerMaruyama", "model.save"]),
    "docs/first_hour.md": ("test_slow.py", [""]),
    "docs/howto.md": ("test_guidance.py", ["classifier(score, log_prob, 1)"]),
    "docs/inverse.md": ("test_posterior.py", ["moment_matching(prior", "sdedit(zero"]),
}
"""Blocks, by what they contain, that tests run which look at the results, too."""

NOT_RUN = {
    'load("edm-cifar10-32x32-cond-vp.pkl"': "needs a released checkpoint; test_loading.py has files in its layout",
}
"""It must compile all the same."""

SLOW = ("docs/export.md", "docs/families/score_sde.md", "docs/variational.md")
"""Pages that take 5 to 20 s."""

SMALL = [
    "--config.training.steps=2",
    "--config.training.batch_size=4",
    "--config.training.sample_every=0",
    "--config.model.net.width=8",
]
FEW = {
    "train": SMALL,
    "sample": ["--n=2", "--nfe=2"],
    "restore": ["--n=1", "--nfe=2"],
    "likelihood": ["--n=2"],
    "density": ["--n=4"],
    "evaluate": ["--n=40", "--nfe=2"],
    "health": ["--n=20", "--nfe=2", "--levels=3", "--points=8"],
}
"""What is added to commands, so that they take a moment."""


def prepared(code: str) -> None:
    """What the blocks of a page find in the folder they run in."""
    Path("configs").symlink_to(ROOT / "configs")
    made = re.findall(r"train .*--workdir (\S+)", code)
    for run in sorted(set(re.findall(r"(?:--workdir |load\(\")(runs/\w+)", code)) - set(made)):
        assert main(["train", "--config=configs/digits/conditional.py", f"--workdir={run}", *SMALL]) == 0
    for name, size in (("mask", 8), ("image", 8), ("small", 14)):
        levels = np.linspace(0, 255, size * size).reshape(size, size)
        Image.fromarray((levels // 128 * 255 if name == "mask" else levels).astype(np.uint8)).save(f"{name}.png")
    if "=FOLDER" in code:
        Path("FOLDER").mkdir()
        for part in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
            Path("FOLDER", f"{part}.bin").write_bytes((bytes(range(10)) * 2459)[: 8 * 3073])
    if "DDPMPipeline" in code:
        blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
        net = diffusers.UNet2DModel(32, norm_num_groups=4, layers_per_block=1, **blocks)
        diffusers.DDPMPipeline(net, diffusers.DDPMScheduler()).save_pretrained("ddpm-cifar10-32")


def run_command(line: str) -> None:
    """A line of a shell, in this process."""
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
        return
    if words[0] == "torchrun":
        # one process of it; several are started in test_distributed.py
        words = ["scorelab", *words[words.index("scorelab.cli") + 1 :]]
    assert words[0] == "scorelab"
    few = FEW.get(words[1], [])
    if "--workdir" in words and is_autoencoder(Path(words[words.index("--workdir") + 1])):
        # what it draws takes no evaluations of a score
        few = [option for option in few if not option.startswith("--nfe")]
    assert main([*words[1:], *few]) == 0, line


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers")
@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] * (page in SLOW)) for page in PAGES if blocks(page)]
)
def test_every_block_runs(page, tmp_path, monkeypatch):
    """One after the other in one folder; a block that begins with the name of a file is that file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    known, names = set(sys.modules), {"__name__": "page"}
    where, markers = ELSEWHERE.get(page, ("", []))
    assert not where or Path(page).name in (ROOT / "tests" / where).read_text()
    assert all(len([b for b in blocks(page) if marker in b.code]) == 1 for marker in markers if marker)
    here = [block for block in blocks(page) if not any(marker in block.code for marker in markers)]
    prepared("".join(block.code for block in here))
    for block in here:
        if file := re.match(r"# (\w+\.py)\n", block.code):
            Path(file[1]).write_text(block.code)
        elif any(marker in block.code for marker in NOT_RUN):
            compile(block.code, block.name, "exec")
        elif block.language == "bash":
            for line in block.code.strip().splitlines():
                run_command(line)
        else:
            exec(compile(block.code, block.name, "exec"), names)
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]
