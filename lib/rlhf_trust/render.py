"""What a reader sees: text escaped, harsh text folded away, real people masked; notebooks as pages.

Text is data: only :class:`Html` becomes HTML as it stands, and what is put into one is escaped. A
rendered notebook is one HTML file that contains everything it shows and makes no network request:
pandoc runs where it can open nothing, what it returns is cleaned by a list of what may stay, and a
policy tells browsers to load nothing but images that the page holds.
"""

from __future__ import annotations

import argparse
import ast
import html
import re
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import cycle
from pathlib import Path

import markupsafe
import matplotlib.pyplot as plt
import nh3
import pandas as pd
import pypandoc
from IPython.display import HTML, Image, Markdown
from matplotlib.text import Text

from . import ROOT, UNSEEN, StudyError, command, require, visible
from .artifacts import Build, atomic_write, write_text
from .figures import narrow
from .masking import LONGEST, Masker
from .params import shown_path
from .sources import first_line


class Html(markupsafe.Markup):
    """HTML that is safe, on one line. Text that :meth:`format`, :meth:`join` or ``+`` puts into it
    is escaped, its line breaks are kept, and what acts unseen in it gets a mark."""

    @classmethod
    def escape(cls, text: object) -> Html:
        if hasattr(text, "__html__"):
            return cls(text)
        # A blank line would end a raw HTML block in Markdown.
        return cls(str(markupsafe.escape(visible(str(text)))).replace("\n", "<br>"))


def escaped(text: str, limit: int = 600) -> Html:
    """Text as HTML, cut at ``limit`` characters with an ellipsis."""
    return Html.escape(text if len(text) <= limit else text[: limit - 1].rstrip() + "…")


def as_html(*parts: str | HTML) -> HTML:
    """Parts one after the other, to end a cell with: HTML as it stands, text escaped."""
    return _holding(HTML(), str(Html("").join(parts)))


def _holding(output: HTML | Markdown, text: str) -> HTML | Markdown:
    """IPython takes a text that it is made with and that begins with "http" for an address, and
    fetches it."""
    output.data = text
    return output


IN_MARKDOWN = re.compile(
    # What stays: escaped characters, code, links to notebooks.
    r"\\[!-/:-@\[-`{-~]|&(?:lt|gt|amp);|(?<!`)`[^`\n]+`(?!`)|\[[^\[\]<`\\]*\]\(\d\d-[\w-]+\.ipynb\)"
    r"|(?P<html>[<&](?=[a-z#/!?]))"
    r"|(?P<acts>\](?=[(\[:{])|!(?=\[)|:(?=//)|(?<=www)\.|(?<=\w)@(?=\w)|[\\`_~$|{])",
    re.IGNORECASE,
)


def prose(text: str) -> str:
    """Markdown of which headings, lists, emphasis by ``*``, code and links to notebooks remain; the
    rest shows as it is written: HTML, images, other links, formulas, tables."""

    def literal(found: re.Match) -> str:
        if found["html"]:
            return html.escape(found[0])
        return "\\" * bool(found["acts"]) + found[0]

    return IN_MARKDOWN.sub(literal, visible(text))


def as_markdown(text: str) -> str:
    """Text for Markdown, where it shows as it is: neither HTML nor a link, nor a new table cell."""
    flat = html.escape(" ".join(visible(text).split()), quote=False)
    flat = re.sub(r"([\\`*_\[\]|~${}]|(?<=\w)@|:(?=//)|(?<=www)\.)", r"\\\1", flat)
    return re.sub(r"^(\d*)([-+.)]|#+)(?=\s|$)", r"\1\\\2", flat)  # no list, no heading


def fold(content: str, warning: str) -> Html:
    """HTML (or text) behind a warning that the reader opens on purpose."""
    folded = Html('<details class="harsh"><summary>{}</summary>{}</details>')
    return folded.format(warning, content)


def conversation(turns: Sequence[str], masker: Masker | None = None) -> Html:
    """A prompt's turns as HTML."""
    mask, shown = masker or Masker(), []
    for speaker, turn in zip(cycle(("Human", "Assistant")), turns):
        shown.append(Html("<b>{}:</b> {}").format(speaker, escaped(mask(turn[:LONGEST]))))
    return Html("<br>").join(shown)


def coloured(pieces: Sequence[str], values: Sequence[float], largest: float) -> Html:
    """Text as HTML, each piece over red where its value is above 0 and over blue where it is below.

    Full colour at ±``largest``. The value itself shows on hovering, and its sign also as a line
    under (below 0) or over the piece where it is at least a third of ``largest``, for readers who
    do not see colours.
    """
    shown = []
    for piece, value in zip(pieces, values, strict=True):
        share = min(1.0, abs(value) / largest) if largest else 0.0
        tint = "196, 60, 40" if value > 0 else "50, 100, 190"
        style = f"background-color: rgba({tint}, {0.6 * share:.2f})"
        if share >= 1 / 3:
            style += f"; text-decoration: {'overline' if value > 0 else 'underline'}"
        span = Html('<span style="{}" title="{:+.4f}">{}</span>')
        shown.append(span.format(style, value, piece))
    return Html("").join(shown)


def samples(
    rows: Sequence[tuple[str, dict[str, str]]], masker: Masker | None = None, warning: str = ""
) -> HTML:
    """A table of items: what was asked (:class:`Html`, or text) and each model's answer (text).

    ``warning``: fold the table behind this sentence, for text that may offend.
    """
    mask, shown = masker or Masker(), []
    for asked, answers in rows:
        cells = {name: escaped(mask(answer[:LONGEST])) for name, answer in answers.items()}
        shown.append({"asked": asked} | cells)
    heads = list(dict.fromkeys(name for cells in shown for name in cells))
    nothing, absent = Html("<i>(empty)</i>"), "–"
    body = [[cells.get(head, absent) or nothing for head in heads] for cells in shown]
    content = _html_table(heads, body, "samples")
    return as_html(fold(content, warning) if warning else content)


def table(frame: pd.DataFrame, digits: int = 3) -> HTML:
    """A table for reading: numbers rounded, missing values as a dash, text escaped, no p of 0; rows
    after the first ``ROWS`` folded away."""

    def cell(value) -> str:
        if isinstance(value, str):
            return value.replace("\n", " ")
        if pd.isna(value):
            return "–"
        if isinstance(value, float):
            return f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.3g}"
        return str(value)

    cells, least = frame.map(cell), 10**-digits
    for name in {"p", "p_holm", "p_null"} & set(frame):
        cells[name] = cells[name].mask(frame[name] < least / 2, f"<{least:.{digits}f}")
    rows = list(cells.itertuples(index=False, name=None))
    first, rest = (_html_table(frame, part, "figures") for part in (rows[:ROWS], rows[ROWS:]))
    folded = Html("<details><summary>{} more rows</summary>{}</details>")
    return as_html(first, folded.format(len(rows) - ROWS, rest) if rows[ROWS:] else "")


ROWS = 12
"""How many of a table's rows are seen at once."""


def _html_table(heads: Iterable, rows: Iterable[Iterable], kind: str) -> Html:
    """Without an index. Not pandas' own, which escapes all cells or none."""

    def line(tag: str, cells: Iterable) -> Html:
        return Html("").join(Html(f"<{tag}>{{}}</{tag}>").format(cell) for cell in cells)

    head = '<table class="dataframe {}"><thead><tr style="text-align: left;">{}</tr></thead>'
    body = Html("").join(Html("<tr>{}</tr>").format(line("td", row)) for row in rows)
    return Html(head + "<tbody>{}</tbody></table>").format(kind, line("th", heads), body)


def show(figure, path: Path, alt: str) -> Image:
    """Save a figure as PNG and, to print at its drawn size, as PDF beside it, and put it on the
    page, larger, as text there is; ``alt`` says what it shows. ``<name>-column.pdf`` is as wide as
    one of two columns, of figures that can be (:func:`figures.narrow`).

    Without time and software, which would make equal runs differ. Names on it are shown as they
    are: a dollar sign does not begin a formula (see :func:`figures.use_style`).
    """
    for text in figure.findobj(Text):
        text.set_text(visible(text.get_text()))
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        names = [label.get_text() for label in axis.get_ticklabels()]
        if any(map(UNSEEN.search, names)):
            axis.set_ticks(axis.get_ticklocs(), map(visible, names))
    unsaid = {".png": ("Software",), ".pdf": ("Creator", "Producer", "CreationDate")}

    def save(end: str) -> None:
        out = path.with_name(path.stem + end)
        with atomic_write(out) as aside:
            metadata = dict.fromkeys(unsaid[out.suffix])
            figure.savefig(aside, format=out.suffix[1:], metadata=metadata)

    save(".png")
    save(".pdf")
    width = round(figure.get_figwidth() * 140)
    if narrow(figure):
        save("-column.pdf")
    plt.close(figure)
    return Image(data=path.read_bytes(), format="png", width=width, alt=visible(alt))


def say(*sentences: str) -> Markdown:
    """Sentences computed from the run, as :func:`prose`."""
    return _holding(Markdown(), prose(" ".join(sentences)))


def paragraphs(sentences: Iterable[str]) -> Markdown:
    """:func:`say`, a paragraph each."""
    return say(*(f"{sentence}\n\n" for sentence in sentences))


# --- notebooks to HTML ---------------------------------------------------------------------------

STYLE = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")

PAGE = Html(
    '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
    "style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'\">\n"
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    "<title>{title}</title><style>\n{style}</style></head>\n<body>\n"
    "{before}<main>\n{body}\n</main>{after}\n</body></html>\n"
)
"""A page's frame. Its policy: browsers load nothing but images that the page itself holds."""

MATHS = set(
    "math semantics mrow mi mn mo mtext mspace ms mfrac msqrt mroot mstyle mpadded mphantom "
    "menclose msub msup msubsup munder mover munderover mmultiscripts mtable mtr mtd".split()
)
TAGS = (nh3.ALLOWED_TAGS | MATHS | {"section", "label"}) - {"area", "map"}
EVERYWHERE = set("class id style title align role display stretchy columnalign accent".split())
OWN = {"img": {"src", "alt", "width", "height"}, "a": {"href"}, "ol": {"start", "type"}}
OWN |= {cell: {"colspan", "rowspan"} for cell in ("td", "th")}
STYLES = set("background-color color font-weight text-align text-decoration width".split())


NEIGHBOURS = re.compile(r"^(?:← )?\[[^\]]*\]\(\d\d-[\w-]+\.ipynb\).*$", re.MULTILINE)
"""A notebook's line of links to its neighbours, which a rendered page replaces by its own."""

LINK = re.compile(r"\[([^\]]*)\]\((\d\d-[\w-]+)\.ipynb\)")
"""A link to another notebook."""

NO_CODE = re.compile(
    r'<div class="sourceCode"[^>]*><pre[^>]*><code[^>]*></code></pre></div>'
    r'|<a href="#cb[\d-]+"[^>]*></a>'
)
"""What pandoc makes of a code cell without source, and its links to lines of code."""

SHOW_CODE = Html('<label><input type="checkbox" checked> Show code</label>')
"""Folds a page's code: the style sheet reads it, so that no script needs to."""


def page_cells(notebook, code: bool, pages: Collection[str] = (), folder: str = "") -> Iterator:
    """A notebook's cells as pandoc should read them.

    The parameters stand there once, with this run's values. Code that is not to be seen is removed,
    and so are warnings and progress bars (stderr). Markdown outputs become cells, since pandoc
    renders those and drops Markdown outputs; as they may quote data they are :func:`prose`, and
    HTML outputs are cleaned of links. Links to other notebooks become links to their pages
    (``pages``: the names of those there are) in ``folder``. Directories of this machine are
    shortened everywhere.
    """
    from nbformat.v4 import new_code_cell, new_markdown_cell

    shown = _without_directories(notebook)

    def to_page(link: re.Match) -> str:
        text, name = link.groups()
        return f"[{text}]({folder}{name}.html)" if name in pages else text

    tagged = {tag: cell for cell in notebook.cells for tag in cell.metadata.get("tags", [])}
    given = tagged.get("injected-parameters", new_code_cell()).source
    for cell in notebook.cells:
        if cell is tagged.get("injected-parameters") and "parameters" in tagged:
            continue
        if cell.cell_type == "markdown":
            yield new_markdown_cell(LINK.sub(to_page, NEIGHBOURS.sub("", shown(cell.source))))
            continue
        source, tags = cell.source, cell.metadata.get("tags", [])
        if "parameters" in tags:
            source = with_values(source, given)
        source = shown(source)
        yield new_code_cell("" if not code or "hide-input" in tags else source)
        for output in cell.outputs:
            data = output.get("data", {})
            if "text/markdown" in data:
                yield new_markdown_cell(LINK.sub(to_page, prose(shown(data["text/markdown"]))))
                continue
            for kind in {"text/html", "text/plain"} & set(data):
                data[kind] = shown(data[kind])
            if "text/html" in data:
                data["text/html"] = clean(data["text/html"], links=False)
            if output.output_type == "stream":
                output.text = shown(output.text, prints=True)
            if output.output_type == "error":
                plain = (re.sub(r"\x1b\[[\d;]*m", "", line) for line in output.traceback)
                output.traceback = [shown(line, prints=True) for line in plain]
                output.ename, output.evalue = shown(output.ename), shown(output.evalue, prints=True)
            if output.get("name") != "stderr":
                yield new_code_cell(outputs=[output])


def with_values(declared: str, given: str) -> str:
    """The source of a notebook's parameters with the values that papermill gave them, so that a
    page shows both comments and values, once."""
    assigned = (node for node in ast.parse(given).body if isinstance(node, ast.Assign))
    values = {node.targets[0].id: ast.get_source_segment(given, node.value) for node in assigned}
    lines = declared.split("\n")
    for node in ast.parse(declared).body:
        if isinstance(node, ast.AnnAssign) and node.value.lineno == node.value.end_lineno:
            line, value = lines[node.lineno - 1].encode(), values.get(node.target.id)
            head, tail = line[: node.value.col_offset], line[node.value.end_col_offset :]
            if value is not None:
                lines[node.lineno - 1] = f"{head.decode()}{value}{tail.decode()}"
    return "\n".join(lines)


GIVEN = re.compile(r"""(["'])(?:[^"'=:]+=)?path:((?:\\.|(?!\1).)+)\1""")
"""A directory among a notebook's parameters."""

USERS = (
    "/(?:home|Users|root|tmp|mnt|media|data|scratch|srv|opt|usr|var|work|workspace|Volumes|private)"
)
"""Where directories of users lie."""


def _without_directories(notebook) -> Callable:
    """Text to show, with its directories of this machine as :func:`shown_path` has them.

    Those are the ones given as parameters and those under the repository, the home folder and
    Python's; in what was printed (``prints``) also others that lie where directories of users do.
    """
    sources = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    given = {place for _, place in GIVEN.findall(sources) if len(Path(place).parts) > 1}
    given |= {str(markupsafe.escape(place)) for place in given}
    machine = {str(folder) for folder in (ROOT, Path.home(), sys.prefix, tempfile.gettempdir())}
    folders = "|".join(map(re.escape, sorted(given | machine - {"/"}, key=len, reverse=True)))
    name = r"[^\s\"'<>|:;,()\\]"
    here = rf"(?:path:)?(?:{folders})(?![\w.-])(?:/{name}*)?|path:/[^\s\"'<>|\\]+"
    in_page, printed = (
        re.compile(rf"(?:(?<![\w./…])|(?<=file://))(?:{found})")
        for found in (here, rf"{here}|{USERS}/{name}+")
    )

    def short(found: re.Match) -> str:
        kind, _, place = found[0].rpartition("path:")
        return f"{'path:' * ('path:' in found[0])}{shown_path(place)}"

    def shown(text: str, prints: bool = False) -> str:
        return visible((printed if prints else in_page).sub(short, text))

    return shown


def clean(page: str, links: bool = True) -> str:
    """HTML without anything that runs or asks for something: by a list of what may stay. Images
    must be data; links lead to the web, to other pages beside this one or (without ``links``)
    nowhere."""

    def kept(tag: str, name: str, value: str) -> str | None:
        if name == "src":
            return value if re.match(r"data:image/[\w.+-]+[;,]", value) else None
        if name == "href":
            near = re.fullmatch(r"(?:[\w-]+/)?[\w.-]+\.html|#[^\s]*", value)
            return value if links and (near or re.match(r"https?://|mailto:", value)) else None
        return value

    return nh3.clean(
        page,
        tags=TAGS,
        attributes=OWN | {"*": EVERYWHERE},
        attribute_filter=kept,
        url_schemes={"http", "https", "mailto", "data"},
        filter_style_properties=STYLES,
        clean_content_tags={"script", "style", "annotation", "title"},
        set_tag_attribute_values={"th": {"scope": "col"}},
    )


def read_notebook(path: Path):
    """An executed notebook; a :class:`StudyError` if it is missing or broken."""
    import nbformat  # it takes 3 s, which a notebook that renders no page need not wait

    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
    except Exception as error:  # no such file, not JSON, or another form of it
        problem = f"is no executed notebook ({first_line(error)}); run `make reproduce`"
        raise StudyError(f"{path}: {problem}") from None
    return notebook


def write_html(
    notebook_path: Path,
    out: Path,
    code: bool,
    navigation: Sequence[tuple[str, str]] = (),
    folder: str = "",
) -> list[tuple[str, str, Html, str]]:
    """Render an executed notebook as one HTML file that makes no network request; returns what is
    on it, as :func:`_with_anchors` does.

    ``navigation``: links, as addresses and texts, to stand above and below; ``folder``: where, from
    this page, the pages of the notebooks beside it are.
    """
    title, body = page_body(notebook_path, code, folder)
    body, places = _with_anchors(body)
    sections = [(f"#{name}", said) for kind, name, said, _ in places if kind == "h2"]
    folded = Html("<details><summary>Contents</summary>{}</details>").format(_list(sections))
    before = _navigation("Chapters", _links(navigation))
    before += _navigation("Sections", folded if len(sections) > 1 else "")
    after = _navigation("Chapters, below", _links(navigation))
    body = (SHOW_CODE if "sourceCode" in body else Html("")) + body
    write_text(out, _page(title, body, before, after))
    return places


PLACE = re.compile(
    r"""(?sx) <(?P<head>h[23])\ id="(?P<id>[^"]+)"[^>]*>(?P<said>.*?)</h[23]>
    | <img\ (?:[^>"]|"[^"]*")*> | </?table\b[^>]*> | <math\ display="block".*?</math>"""
)
"""Sections, figures and tables, which can be linked to; and what else gets a box."""


OPENING = re.compile(r"\s*<p>((?:(?!</p>).)*?[.:?!])(?:\s|</p>)", re.DOTALL)
"""A section's first sentence."""


def _with_anchors(body: Html) -> tuple[Html, list[tuple[str, str, Html, Html]]]:
    """A page's body with anchors, and what they lead to: kind (h2, h3, figure, table), name, words,
    first sentence of a section. Tables and formulas scroll in boxes of their own, by keys too."""
    places: list[tuple[str, str, Html, Html]] = []

    def place(kind: str, name: str, *said: str) -> str:
        places.append((kind, name, *(Html(re.sub("<[^>]+>", "", text)) for text in said)))
        return name

    def anchored(found: re.Match) -> str:
        part, box = found[0], 'class="wide" role="group" tabindex="0" aria-label='
        if part == "</table>":
            return f"{part}</div>"
        if part.startswith("<math"):
            return f'<span {box}"Formula">{part}</span>'
        if found["id"]:
            opening = OPENING.match(body, found.end())
            name = place(found["head"], found["id"], found["said"], opening[1] if opening else "")
            link = f'<a class="anchor" href="#{name}" aria-label="Link to this section"></a>'
            return f"{part[:-5]}{link}{part[-5:]}"
        kind = "figure" if part.startswith("<img") else "table"
        number = 1 + sum(other == kind for other, *_ in places)
        label, (rows, _, _) = (
            f"{kind.capitalize()} {number}",
            body[found.end() :].partition("</table>"),
        )
        said = re.findall('alt="([^"]*)"', part) or re.findall("(?s)<th[^>]*>(.*?)</th>", rows)
        name = place(kind, f"{kind}-{number}", f"{label}: {', '.join(said)}", "")
        if kind == "figure":
            return f'<img id="{name}"{part[4:]}'
        return f'<div id="{name}" {box}"{label}">{part}'

    return Html(PLACE.sub(anchored, body)), places


def page_body(notebook_path: Path, code: bool, folder: str = "") -> tuple[str, Html]:
    """An executed notebook's title, and what it shows as HTML that is safe."""
    import nbformat

    notebook = read_notebook(notebook_path)
    title = _title(notebook, notebook_path.stem)
    pages = {path.stem for path in notebook_path.parent.glob("[0-9][0-9]-*.ipynb")}
    notebook.cells = list(page_cells(notebook, code, pages, folder))
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # equal runs give equal pages
    made = _converted(nbformat.writes(notebook), "ipynb+smart-autolink_bare_uris")
    return title, Html(NO_CODE.sub("", made))


def write_markdown_page(text: str, out: Path, title: str) -> None:
    """Render Markdown as one HTML file that makes no network request. HTML in it shows as text."""
    form = "gfm-raw_html-tex_math_dollars-autolink_bare_uris"
    body, _ = _with_anchors(Html(_converted(visible(text), form)))
    write_text(out, _page(title, body))


def _converted(text: str, form: str) -> str:
    """What pandoc makes of a text of that form, cleaned. In its sandbox it opens no file and no
    connection; images are embedded where the text itself holds them."""
    options = ["--sandbox", "--embed-resources", "--mathml", "--quiet"]
    text = text.encode(errors="replace").decode()  # half a surrogate pair, in an image's metadata
    try:
        made = pypandoc.convert_text(text, "html5", format=form, extra_args=options)
    except RuntimeError as error:  # such as no room for its temporary files
        raise StudyError(f"pandoc cannot render a page ({first_line(error)})") from None
    # Between a function and its argument a formula has a character that is not seen.
    parts = re.split(r"(?s)(<math\b.*?</math>)", clean(made))
    return "".join(part if part.startswith("<math") else visible(part) for part in parts)


def _page(title: str, body: Html, before: str = "", after: str = "") -> Html:
    return PAGE.format(title=title, style=Html(STYLE), body=body, before=before, after=after)


def _navigation(label: str, links: str) -> Html:
    return Html('<nav aria-label="{}">{}</nav>\n').format(label, links) if links else Html("")


def write_appendix(notebooks: Path, out: Path) -> list[Path]:
    """All executed notebooks as linked HTML pages, with an index; returns the pages."""
    sources = executed_notebooks(notebooks)
    titles = [_title(read_notebook(p), p.stem) for p in sources]
    pages = [out / f"{source.stem}.html" for source in sources]
    entries, contents = [], Html("")
    for index, (source, page) in enumerate(zip(sources, pages)):
        links = [("index.html", "Contents")]
        if index:
            links.insert(0, (pages[index - 1].name, f"← {titles[index - 1]}"))
        if index + 1 < len(pages):
            links.append((pages[index + 1].name, f"{titles[index + 1]} →"))
        places = write_html(source, page, code=True, navigation=links)
        entries.append((page.name, f"{page.name[:2]} · {titles[index]}"))
        inside = _list((f"{page.name}#{name}", said, opening) for _, name, said, opening in places)
        contents += Html("<h3>{}</h3>{}").format(titles[index], inside)
    body = Html(
        "<h1>Appendix: the notebooks as they ran</h1>"
        "<p>One page a notebook, with its code and results. The last one is the report.</p>{}"
        "<h2>Sections, figures and tables</h2>"
        "<p>Of all pages, sections with their first sentence, tables by their columns: search here "
        "with the browser.</p>{}"
    ).format(_list(entries), contents)
    write_text(out / "index.html", _page("Appendix", body))
    return [out / "index.html", *pages]


def executed_notebooks(folder: Path) -> list[Path]:
    """Those that ran to their end, in reading order."""
    found = sorted(folder.glob("[0-9][0-9]-*.ipynb"))
    sources = [path for path in found if not path.name.endswith(".failed.ipynb")]
    require(sources, f"{folder}: no notebook has run; run `make reproduce` first")
    return sources


def _links(links: Iterable[tuple[str, str]]) -> Html:
    return Html("").join(Html('<a href="{}">{}</a>').format(*link) for link in links)


def _list(links: Iterable[Sequence[str]]) -> Html:
    """Links by address and text, and perhaps what stands behind them."""
    parts = (Html(" ").join([_links([link[:2]]), *link[2:]]) for link in links)
    entries = (Html("<li>{}</li>").format(part) for part in parts)
    return Html("<ul>{}</ul>").format(Html("").join(entries))


def _title(notebook, default: str) -> str:
    """The first line of the first Markdown cell."""
    first = next((c.source for c in notebook.cells if c.cell_type == "markdown"), default)
    return first.splitlines()[0].lstrip("# ").strip()


@command
def main(argv: list[str] | None = None) -> int:
    about = "Render a run's executed notebooks."
    parser = argparse.ArgumentParser("python -m rlhf_trust.render", description=about)
    parser.add_argument("page", choices=("report", "appendix"))
    parser.add_argument("run", help="the name of its folder in build/")
    arguments = parser.parse_args(argv)
    build = Build(arguments.run)
    if arguments.page == "report":
        report, source = build.path("report.html"), build.path("notebooks", "90-report.ipynb")
        links = [("appendix/index.html", "All notebooks as they ran")]
        write_html(source, report, code=False, navigation=links, folder="appendix/")
        print(report)
    else:
        print(write_appendix(build.path("notebooks"), build.path("appendix"))[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
