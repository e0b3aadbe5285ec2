"""What a reader sees: text escaped, harsh text folded away, real people masked; notebooks as pages.

Model text is data: it is escaped before it becomes HTML. A rendered notebook is one HTML file that
contains everything it shows and makes no network request.
"""

from __future__ import annotations

import html
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from itertools import cycle
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pypandoc
from IPython.display import HTML, Image, Markdown
from nbformat.v4 import new_code_cell, new_markdown_cell

from .artifacts import Build, atomic_write, write_text
from .masking import LONGEST, Masker


def escaped(text: str, limit: int = 600) -> str:
    """Text as HTML: escaped, line breaks kept, cut at ``limit`` characters with an ellipsis."""
    text = text if len(text) <= limit else text[: limit - 1].rstrip() + "…"
    # One line in the source: a blank line would end a raw HTML block in Markdown.
    return html.escape(text).replace("\n", "<br>")


def as_markdown(text: str) -> str:
    """Text for Markdown, where it shows as it is: neither HTML nor a link, nor a new table cell."""
    flat = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", flat)


def fold(content: str, warning: str) -> str:
    """HTML behind a warning that the reader opens on purpose."""
    return f'<details class="harsh"><summary>{html.escape(warning)}</summary>{content}</details>'


def conversation(turns: Sequence[str], masker: Masker | None = None) -> str:
    """A prompt's turns as HTML."""
    mask, shown = masker or Masker(), []
    for speaker, turn in zip(cycle(("Human", "Assistant")), turns):
        shown.append(f"<b>{speaker}:</b> {escaped(mask(turn[:LONGEST]))}")
    return "<br>".join(shown)


def coloured(pieces: Sequence[str], values: Sequence[float], largest: float) -> str:
    """Text as HTML, each piece over red where its value is above 0 and over blue where it is below.

    Full colour at ±``largest``. The value itself shows on hovering, and its sign also as a line
    under (below 0) or over the piece where it is at least a third of ``largest``, for readers who
    do not see colours.
    """
    shown = []
    for piece, value in zip(pieces, values, strict=True):
        share = min(1.0, abs(value) / largest) if largest else 0.0
        tint = "196, 60, 40" if value > 0 else "50, 100, 190"
        style = f"background: rgba({tint}, {0.6 * share:.2f})"
        if share >= 1 / 3:
            style += f"; text-decoration: {'overline' if value > 0 else 'underline'}"
        shown.append(f'<span style="{style}" title="{value:+.4f}">{html.escape(piece)}</span>')
    return "".join(shown).replace("\n", "<br>")


def samples(
    rows: Sequence[tuple[str, dict[str, str]]], masker: Masker | None = None, warning: str = ""
) -> HTML:
    """A table of items: the prompt (HTML) and each model's answer (raw text).

    ``warning``: fold the table behind this sentence, for text that may offend.
    """
    mask, shown = masker or Masker(), []
    for asked, answers in rows:
        shown.append({"asked": asked})
        for model, answer in answers.items():
            shown[-1][html.escape(model)] = escaped(mask(answer[:LONGEST])) or "<i>(empty)</i>"
    content = _html_table(pd.DataFrame(shown), "samples", escape=False)
    return HTML(fold(content, warning) if warning else content)


def table(frame: pd.DataFrame, digits: int = 3) -> HTML:
    """A table for reading: numbers rounded, missing values as a dash, text escaped."""

    def cell(value) -> str:
        if isinstance(value, str):
            return value.replace("\n", " ")
        if pd.isna(value):
            return "–"
        if isinstance(value, float):
            return f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.3g}"
        return str(value)

    return HTML(_html_table(frame.map(cell), "figures"))


def _html_table(frame: pd.DataFrame, kind: str, escape: bool = True) -> str:
    """On one line: a blank line would end a raw HTML block in Markdown.

    Without the name of the columns (a pivot has one), which would be a column of its own.
    """
    frame = frame.rename_axis(columns=None)
    with pd.option_context("display.max_colwidth", None):
        rows = frame.to_html(index=False, border=0, classes=kind, escape=escape, justify="left")
    return "".join(line.strip() for line in rows.splitlines())


def show(figure, path: Path, alt: str) -> Image:
    """Save a figure as PNG and put it on the page at its drawn size; ``alt`` says what it shows.

    Without the name of the software, whose version would make equal runs differ.
    """
    with atomic_write(path) as aside:
        figure.savefig(aside, format="png", metadata={"Software": None})
    width = round(figure.get_size_inches()[0] * 100)
    plt.close(figure)
    return Image(data=path.read_bytes(), format="png", width=width, alt=alt)


def say(*sentences: str) -> Markdown:
    """Sentences computed from the run, as prose."""
    return Markdown(" ".join(sentences))


# --- notebooks to HTML ---------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 Georgia, 'DejaVu Serif', serif; color: #1c1c1c;
  max-width: 62rem; margin: 2rem auto; padding: 0 1.2rem; }
h1, h2, h3, table, summary, nav { font-family: 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; }
h2 { margin-top: 2.4rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
img { max-width: 100%; height: auto; }
pre { overflow-x: auto; font-size: .82rem; line-height: 1.4; }
div.sourceCode { background: #f6f6f4; padding: .1rem .8rem; border-left: 3px solid #ddd; }
.output pre { padding: .4rem .8rem; border-left: 3px solid #ddd; white-space: pre-wrap; }
table { border-collapse: collapse; font-size: .85rem; margin: 1rem 0; max-width: 100%;
  display: block; overflow-x: auto; }
th, td { padding: .3rem .45rem; border-bottom: 1px solid #e3e3e3; vertical-align: top;
  text-align: left; }
th { border-bottom: 2px solid #999; } table.figures td { font-variant-numeric: tabular-nums; }
table.samples td { min-width: 6.2rem; max-width: 22rem; overflow-wrap: anywhere; }
details.harsh { border: 1px solid #d8b4b4; background: #fdf7f7; padding: .5rem .8rem;
  margin: 1rem 0; }
summary { cursor: pointer; }
nav { font-size: .9rem; display: flex; gap: 1.2rem; flex-wrap: wrap; margin: 1rem 0; }
nav.sequence { justify-content: space-between; }
@media print { details.harsh { display: none; } }
"""


NEIGHBOURS = re.compile(r"^(?:← )?\[[^\]]*\]\(\d\d-[\w-]+\.ipynb\).*$", re.MULTILINE)
"""A notebook's line of links to its neighbours, which a rendered page replaces by its own."""

LINK = re.compile(r"\[([^\]]*)\]\((\d\d-[\w-]+)\.ipynb\)")
"""A link to another notebook."""

NO_CODE = re.compile(r'<div class="sourceCode"[^>]*><pre[^>]*><code[^>]*></code></pre></div>')
"""What pandoc makes of a code cell without source."""


def page_cells(notebook, code: bool, pages: Collection[str] = (), folder: str = "") -> Iterator:
    """A notebook's cells as pandoc should read them.

    Code that is not to be seen is removed, and so are warnings and progress bars (stderr). Markdown
    outputs become cells, since pandoc renders those and drops Markdown outputs. Links to other
    notebooks become links to their pages (``pages``: the names of those there are) in ``folder``.
    """

    def to_page(link: re.Match) -> str:
        text, name = link.groups()
        return f"[{text}]({folder}{name}.html)" if name in pages else text

    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            yield new_markdown_cell(LINK.sub(to_page, NEIGHBOURS.sub("", cell.source)))
            continue
        source, tags = cell.source, cell.metadata.get("tags", [])
        if "injected-parameters" in tags:  # by papermill
            source = source.replace("# Parameters", "# This run's values", 1)
        yield new_code_cell("" if not code or "hide-input" in tags else source)
        for output in cell.outputs:
            if "text/markdown" in output.get("data", {}):
                yield new_markdown_cell(LINK.sub(to_page, output.data["text/markdown"]))
            elif output.get("name") != "stderr":
                yield new_code_cell(outputs=[output])


def write_html(
    notebook_path: Path, out: Path, code: bool, navigation: str = "", folder: str = ""
) -> None:
    """Render an executed notebook as one HTML file that makes no network request.

    ``folder``: where, from this page, the pages of the notebooks beside it are.
    """
    notebook = nbformat.read(notebook_path, as_version=4)
    title = _title(notebook, notebook_path.stem)
    pages = {path.stem for path in notebook_path.parent.glob("[0-9][0-9]-*.ipynb")}
    notebook.cells = list(page_cells(notebook, code, pages, folder))
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # equal runs give equal pages
    rendered = _page(nbformat.writes(notebook), "ipynb+smart", title, navigation)
    write_text(out, NO_CODE.sub("", rendered))


def write_markdown_page(text: str, out: Path, title: str) -> None:
    """Render Markdown as one HTML file that makes no network request. HTML in it shows as text."""
    write_text(out, _page(text, "gfm-raw_html-tex_math_dollars-autolink_bare_uris", title))


def _page(text: str, form: str, title: str, navigation: str = "") -> str:
    """What pandoc makes of a text of that form: a page with the study's style."""
    options = [
        "--standalone",
        "--embed-resources",
        "--mathml",
        f"--metadata=pagetitle:{title}",
        "--metadata=lang:en",
        "--metadata=document-css:false",
        f"--variable=header-includes:<style>{STYLE}</style>",
        f"--variable=include-before:{navigation}",
        f"--variable=include-after:{navigation}",
    ]
    return pypandoc.convert_text(text, "html5", format=form, extra_args=options)


def write_appendix(notebooks: Path, out: Path) -> list[Path]:
    """All executed notebooks as linked HTML pages, with an index; returns the pages."""
    found = sorted(notebooks.glob("[0-9][0-9]-*.ipynb"))
    sources = [path for path in found if not path.name.endswith(".failed.ipynb")]
    titles = [html.escape(_title(nbformat.read(p, as_version=4), p.stem)) for p in sources]
    pages = [out / f"{source.stem}.html" for source in sources]
    for index, (source, page) in enumerate(zip(sources, pages)):
        links = ['<a href="index.html">Contents</a>']
        if index:
            links.insert(0, f'<a href="{pages[index - 1].name}">← {titles[index - 1]}</a>')
        if index + 1 < len(pages):
            links.append(f'<a href="{pages[index + 1].name}">{titles[index + 1]} →</a>')
        navigation = f'<nav class="sequence">{"".join(links)}</nav>'
        write_html(source, page, code=True, navigation=navigation)
    entries = "".join(
        f'<li><a href="{page.name}">{page.name[:2]} · {title}</a></li>'
        for page, title in zip(pages, titles)
    )
    write_text(
        out / "index.html",
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Appendix</title>'
        f"<style>{STYLE}</style><h1>Appendix: the notebooks as they ran</h1>"
        f"<p>One page a notebook, with its code and results. The last one is the report.</p>"
        f'<ol style="list-style:none">{entries}</ol></html>',
    )
    return [out / "index.html", *pages]


def _title(notebook, default: str) -> str:
    """The first line of the first Markdown cell."""
    first = next((c.source for c in notebook.cells if c.cell_type == "markdown"), default)
    return first.splitlines()[0].lstrip("# ").strip()


def main() -> None:
    """``python -m rlhf_trust.render report|appendix <profile>``"""
    kind, profile = sys.argv[1:]
    build = Build(profile)
    if kind == "report":
        report, source = build.path("report.html"), build.path("notebooks", "90-report.ipynb")
        links = '<nav><a href="appendix/index.html">All notebooks as they ran</a></nav>'
        write_html(source, report, code=False, navigation=links, folder="appendix/")
        print(report)
    else:
        print(write_appendix(build.path("notebooks"), build.path("appendix"))[0])


if __name__ == "__main__":
    main()
