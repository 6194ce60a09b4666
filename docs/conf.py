"""The documentation site: `make site` builds it into out/site. Its pages are docs/*.md, which GitHub shows too."""

import html
import re

import ziamath
from docutils import nodes

import fusedlstm

project, release = "fusedlstm", fusedlstm.__version__
html_title = f"fusedlstm {release}"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
html_static_path, html_css_files = ["_static"], ["site.css"]
html_copy_source = html_show_copyright = html_show_sphinx = False
html_math_renderer = "svg"
pygments_style, pygments_dark_style = "friendly", "github-dark"

# Links to headings work as they do on GitHub.
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]

# In docstrings, single backticks are code. Signatures have no annotations, because the texts name types and shapes.
default_role = "literal"
autodoc_typehints = "none"
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 90

# It is not in index.md, which GitHub shows. A page that is missing here is a warning, and so the build fails.
NAVIGATION = {
    "Guides": ["sequences", "training", "engines", "troubleshooting", "inspect", "distributed"],
    "Understand": ["carry", "lstm", "family", "precision"],
    "Kernels": ["kernels", "design", "add_a_cell", "on_a_gpu", "benchmarks", "endurance"],
    "Models": ["migrate", "onnx", "compatibility"],
    "Examples": ["examples", "gallery"],
    "Reference": ["support", "command_line", "api"],
}


def for_the_site(app, page, source):
    if page == "index":
        trees = (f":caption: {caption}\n\n" + "\n".join(pages) for caption, pages in NAVIGATION.items())
        source[0] += "".join(f"\n```{{toctree}}\n:hidden:\n{tree}\n```\n" for tree in trees)
    # A link that has the name of a file gets the title of the page. Files that are no pages are named, without a link.
    source[0] = re.sub(r"\[(\w+\.md)\]\((\1[^)]*)\)", r"[](\2)", source[0])
    source[0] = re.sub(r"\[([^\]]+)\]\(\.\./[^)]+\)", r"\1", source[0])


def as_rst(app, kind, name, value, options, lines):
    """Sections such as `Args:` become fields, and the names in them a list."""
    section, found = "", []
    for line in lines:
        line = re.sub(r"(?<=[ \[(])\*(?=[,\]])", r"\*", line)  # [B, *, I]
        if match := re.match(r"([A-Z]\w+(?: \w+){0,2}):(?: (.*))?$", line):
            section, text = match.groups()
            found.append(f":{section}: {text or ''}")
        elif section in ("Args", "Attributes", "Raises") and (match := re.match(r"    ([\w, ]+): (.*)", line)):
            names = ", ".join(f"``{each}``" for each in match[1].split(", "))
            found += [f"    {names}", f"        {match[2]}"]
        else:
            section = "" if line[:1].strip() else section
            found.append(line)
    lines[:] = found


def svg(self, node):
    """Draw a formula while the site is built, so that a page loads no script and no font for it.

    Where a formula has a \\quad, a narrow screen may begin a new line.
    """
    tex, block = node.astext(), isinstance(node, nodes.math_block)
    drawn = [ziamath.Latex(part, size=17, color="currentColor") for part in re.split(r"\\quad|\\qquad", tex)]
    images = (f'<span style="vertical-align: {each.getyofst():.1f}px">{each.svg()}</span>' for each in drawn)
    tag, kind = ("div", "math block") if block else ("span", "math")
    label = html.escape(" ".join(tex.split()))
    self.body.append(f'<{tag} class="{kind}" role="img" aria-label="{label}">{" ".join(images)}</{tag}>')
    raise nodes.SkipNode


def setup(app):
    app.connect("source-read", for_the_site)
    app.connect("autodoc-process-docstring", as_rst)
    app.add_html_math_renderer("svg", inline_renderers=(svg, None), block_renderers=(svg, None))
