"""The site of ``make docs``."""

import re
import sys

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

import scorelab

project = "scorelab"
release = scorelab.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 4

autosummary_ignore_module_all = False
autodoc_inherit_docstrings = False
autodoc_member_order = "groupwise"
autodoc_typehints_format = "short"
maximum_signature_line_length = 100

html_theme = "furo"
html_title = "scorelab"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["site.css"]
templates_path = ["_templates"]


def _math(self, node):
    """An equation in MathML, which browsers draw by themselves: neither scripts nor fonts are fetched."""
    # without the empty group docutils sets the index below the letter, and without the space "log p" is "logp"
    tex = node.astext().replace(r"\hat x_0", r"{\hat x{}}_0")
    found = tex2mathml(tex, as_block=isinstance(node, nodes.math_block))
    self.body.append(found.replace("<mo>&ApplyFunction;</mo>", '<mspace width="0.17em"></mspace>'))
    raise nodes.SkipNode


def _plain(app, what, name, obj, options, lines):
    """Docstrings are plain text with ``code``: stars, bars and underscores mean themselves, indented lines are code.

    A package's goes on with those of the modules that its public names come from, where the mathematics stands.
    """
    titles = {}
    if what == "module":
        homes = {getattr(getattr(obj, public), "__module__", "") for public in obj.__all__}
        for home in sorted(home for home in homes if home.startswith(f"{name}.")):
            lines += ["", home, "", *sys.modules[home].__doc__.splitlines()]
            titles[home] = f".. rubric:: {home.removeprefix(f'{name}.')}"
    paragraphs = re.split(r"\n\s*\n", "\n".join(lines))
    for i, paragraph in enumerate(paragraphs):
        if all(line.startswith(" ") for line in paragraph.splitlines()):
            paragraphs[i] = f".. code-block:: text\n\n{paragraph}"
        else:
            parts = re.split(r"(``.+?``)", paragraph, flags=re.S)
            parts[::2] = [re.sub(r"([*|_`\\])", r"\\\1", part) for part in parts[::2]]
            paragraphs[i] = titles.get(paragraph, "".join(parts))
    lines[:] = "\n\n".join(paragraphs).splitlines()


def setup(app):
    app.add_html_math_renderer("mathml", (_math, None), (_math, None))
    app.connect("autodoc-process-docstring", _plain)
