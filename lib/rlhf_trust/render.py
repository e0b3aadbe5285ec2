"""What a reader sees of texts and tables: escaped, harsh text folded away, real people masked.

Model text is data: it is escaped before it becomes HTML. Then notebooks become HTML files that hold everything they
show and ask nothing of the network.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pypandoc
from IPython.display import HTML, Image, Markdown

from . import figures
from .artifacts import Build, Manifest, atomic_write, versions
from .params import NOTEBOOKS, notebook_parameters

EMAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
SAFE_EMAIL = re.compile(r"@example\.(?:com|org|net)$", re.IGNORECASE)


class Masker:
    """Blots out real people's names and addresses, wherever they turn up.

    Parameters
    ----------
    names
        Full names of real people; each part of at least three letters is masked too, since a model may use only one.

    E-mail addresses are masked in any case, except made-up ones at example.com.
    """

    def __init__(self, names: Iterable[str] = ()):
        names = list(names)
        words = {part for name in names for part in name.split() if len(part) >= 3} | set(names)
        # Longest first, so that a full name is blotted out before its parts.
        ordered = sorted(words, key=len, reverse=True)
        self._words = (
            re.compile(
                r"(?<!\w)(?:" + "|".join(map(re.escape, ordered)) + r")(?!\w|['’]t\b)",
                re.IGNORECASE,
            )
            if ordered
            else None
        )  # not in don't

    def __call__(self, text: str) -> str:
        text = EMAIL.sub(lambda m: m.group() if SAFE_EMAIL.search(m.group()) else "[e-mail]", text)
        return self._words.sub("[name]", text) if self._words else text


def escaped(text: str, limit: int = 600) -> str:
    """Text as HTML: escaped, line breaks kept, cut at ``limit`` characters with an ellipsis."""
    text = text if len(text) <= limit else text[: limit - 1].rstrip() + "…"
    # One line in the source: a blank line would end a raw HTML block in Markdown.
    return html.escape(text).replace("\n", "<br>")


def fold(content: str, warning: str) -> str:
    """HTML behind a warning that a reader opens deliberately."""
    return f'<details class="harsh"><summary>{html.escape(warning)}</summary>{content}</details>'


def conversation(turns: Sequence[str], masker: Masker | None = None) -> str:
    """A prompt's turns as HTML."""
    mask = masker or Masker()
    return "<br>".join(
        f"<b>{'Assistant' if i % 2 else 'Human'}:</b> {escaped(mask(t))}"
        for i, t in enumerate(turns)
    )


def samples(
    rows: Sequence[tuple[str, dict[str, str]]], masker: Masker | None = None, warning: str = ""
) -> HTML:
    """A table of items: what was asked (HTML), and what each model answered (raw text).

    ``warning``: fold the table behind this sentence, for text that may offend.
    """
    mask = masker or Masker()
    models = list(rows[0][1]) if rows else []
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ["asked", *models])
    body = "".join(
        f"<tr><td>{asked}</td>"
        + "".join(f"<td>{escaped(mask(answers[m])) or '<i>(empty)</i>'}</td>" for m in models)
        + "</tr>"
        for asked, answers in rows
    )
    table = f'<table class="samples"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return HTML(fold(table, warning) if warning else table)


def table(frame: pd.DataFrame, digits: int = 3, text_columns: Sequence[str] = ()) -> HTML:
    """A table for reading: rounded, missing values as a dash, text escaped."""

    def cell(value) -> str:
        if isinstance(value, str):
            return html.escape(value).replace("\n", " ")
        if pd.isna(value):
            return "–"
        if isinstance(value, float):
            return f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.3g}"
        return html.escape(str(value))

    head = "".join(f"<th>{html.escape(str(c))}</th>" for c in frame.columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{cell(v)}</td>" for v in row) + "</tr>"
        for row in frame.itertuples(index=False)
    )
    return HTML(
        f'<table class="figures"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    )


# --- notebooks to HTML -------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 Georgia, 'DejaVu Serif', serif; max-width: 62rem; margin: 2rem auto; padding: 0 1.2rem; color: #1c1c1c; }
h1, h2, h3, table, summary, nav, .note { font-family: 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; } h2 { margin-top: 2.4rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
img { max-width: 100%; height: auto; } pre { overflow-x: auto; font-size: .82rem; line-height: 1.4; }
div.sourceCode, pre.output { background: #f6f6f4; padding: .1rem .8rem; border-left: 3px solid #ddd; }
pre.output { background: none; padding: .4rem .8rem; white-space: pre-wrap; }
table { border-collapse: collapse; font-size: .85rem; margin: 1rem 0; display: block; overflow-x: auto; max-width: 100%; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #e3e3e3; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #999; } table.figures td { font-variant-numeric: tabular-nums; }
table.samples td { min-width: 9rem; max-width: 22rem; overflow-wrap: anywhere; }
details.harsh { border: 1px solid #d8b4b4; background: #fdf7f7; padding: .5rem .8rem; margin: 1rem 0; }
summary { cursor: pointer; } nav { font-size: .9rem; display: flex; gap: 1.2rem; flex-wrap: wrap; margin: 1rem 0; }
nav.sequence { justify-content: space-between; }
@media print { details.harsh { display: none; } }
"""


NEIGHBOURS = re.compile(r"^(?:← )?\[[^\]]*\]\(\d\d-[\w-]+\.ipynb\).*$", re.MULTILINE)
"""A notebook's line of links to the notebooks before and after it, which rendered pages replace by their own."""


def notebook_markdown(notebook, code: bool) -> str:
    """An executed notebook as Markdown: prose as it is, code as fenced blocks (if ``code``), outputs as raw HTML."""
    parts = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(NEIGHBOURS.sub("", cell.source))
            continue
        hidden = not code or "hide-input" in cell.metadata.get("tags", [])
        if cell.source.strip() and not hidden:
            parts.append(fenced("`", "python", cell.source))
        parts += [_raw(output) for output in cell.outputs]
    return "\n\n".join(part for part in parts if part)


def _raw(output) -> str:
    if output.output_type == "stream":
        return (
            _html_block(f'<pre class="output">{html.escape(output.text)}</pre>')
            if output.name == "stdout"
            else ""
        )
    data = output.get("data", {})
    if "text/html" in data:
        return _html_block(data["text/html"])
    if "image/png" in data:
        about = output.get("metadata", {}).get("image/png", {})
        alt = html.escape(about.get("alt", "figure"), quote=True)
        width = f' width="{about["width"]}"' if "width" in about else ""
        encoded = data["image/png"].replace("\n", "")
        return _html_block(f'<img alt="{alt}"{width} src="data:image/png;base64,{encoded}">')
    if "text/markdown" in data:
        return data["text/markdown"]
    if "text/plain" in data:
        return _html_block(f'<pre class="output">{html.escape(data["text/plain"])}</pre>')
    return ""


def _html_block(content: str) -> str:
    return fenced("~", "{=html}", content)


def fenced(mark: str, kind: str, content: str) -> str:
    """A fenced Markdown block that its content cannot close: the fence is longer than any run of its mark inside."""
    fence = mark * max(5, 1 + max((len(run) for run in re.findall(f"{mark}+", content)), default=0))
    return f"{fence}{kind}\n{content}\n{fence}"


def write_html(notebook_path: Path, out: Path, code: bool, navigation: str = "") -> None:
    """Render an executed notebook as one HTML file that makes no network request."""
    notebook = nbformat.read(notebook_path, as_version=4)
    text = notebook_markdown(notebook, code)
    title = next(
        (line[2:].strip() for line in text.splitlines() if line.startswith("# ")),
        notebook_path.stem,
    )
    body = (
        f"{_html_block(navigation)}\n\n{text}\n\n{_html_block(navigation)}" if navigation else text
    )
    with atomic_write(out) as aside:
        style = aside.with_suffix(".style.html")
        style.write_text(f"<style>{STYLE}</style>", encoding="utf-8")
        try:
            rendered = pypandoc.convert_text(
                body,
                "html5",
                format="markdown-yaml_metadata_block-tex_math_single_backslash",
                extra_args=[
                    "--standalone",
                    "--embed-resources",
                    "--mathml",
                    "--include-in-header",
                    str(style),
                    "--metadata",
                    f"pagetitle={title}",
                    "--metadata",
                    "lang=en",
                    "--metadata",
                    "document-css=false",
                ],
            )
        finally:
            style.unlink()
        aside.write_text(rendered, encoding="utf-8")


def write_appendix(notebooks: Path, out: Path) -> list[Path]:
    """All executed notebooks as linked HTML pages, with an index; returns the pages."""
    sources = sorted(
        p for p in notebooks.glob("[0-9][0-9]-*.ipynb") if not p.name.endswith(".failed.ipynb")
    )
    titles = {p: _title(p) for p in sources}
    pages = []
    for index, source in enumerate(sources):
        neighbours = ['<a href="index.html">Contents</a>']
        if index:
            neighbours.insert(
                0,
                f'<a href="{sources[index - 1].stem}.html">← {html.escape(titles[sources[index - 1]])}</a>',
            )
        if index + 1 < len(sources):
            neighbours.append(
                f'<a href="{sources[index + 1].stem}.html">{html.escape(titles[sources[index + 1]])} →</a>'
            )
        page = out / f"{source.stem}.html"
        write_html(
            source, page, code=True, navigation=f'<nav class="sequence">{"".join(neighbours)}</nav>'
        )
        pages.append(page)
    entries = "".join(
        f'<li><a href="{p.stem}.html">{html.escape(p.stem[:2])} · {html.escape(titles[p])}</a></li>'
        for p in sources
    )
    with atomic_write(out / "index.html") as aside:
        aside.write_text(
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Appendix</title><style>{STYLE}</style>'
            f'<h1>Appendix: the notebooks as they ran</h1><ol style="list-style:none">{entries}</ol></html>',
            encoding="utf-8",
        )
    return [out / "index.html", *pages]


def _title(path: Path) -> str:
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            return cell.source.splitlines()[0].lstrip("# ").strip()
    return path.stem


def main() -> None:
    """``python -m rlhf_trust.render report|appendix <profile>``"""
    import sys

    from .artifacts import Build

    kind, profile = sys.argv[1:]
    build = Build(profile)
    if kind == "report":
        write_html(
            build.path("notebooks", "90-report.ipynb"), build.path("report.html"), code=False
        )
        print(build.path("report.html"))
    else:
        print(write_appendix(build.path("notebooks"), build.path("appendix"))[0])


def show(figure, path: Path, alt: str) -> Image:
    """Save a figure as PNG and put it on the page at the size it was drawn for, with a text for those who cannot see it."""
    figures.save(figure, path)
    width = round(figure.get_size_inches()[0] * 100)
    plt.close(figure)
    return Image(data=path.read_bytes(), format="png", width=width, alt=alt)


def say(*sentences: str) -> Markdown:
    """Sentences computed from the run, as prose."""
    return Markdown(" ".join(sentences))


if __name__ == "__main__":
    main()
