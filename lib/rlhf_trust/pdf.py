"""A run's report and its appendix, all executed notebooks, as two PDFs to publish beside a paper.

What the pages show (:mod:`render`) goes through pandoc and typst, neither of which needs a network:
PDF/UA-1 with every figure's alternative text, and the same bytes for the same notebooks. Harsh text
stays out unless ``--text full`` asks for it.
"""

from __future__ import annotations

import argparse
import base64
import json
import re
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

import matplotlib
import pypandoc
import typst
from matplotlib.ft2font import FT2Font

from . import StudyError, command, visible
from .artifacts import Build, atomic_write, read_manifests
from .params import shown_source
from .render import executed_notebooks, page_body
from .sources import first_line

FOLDED = re.compile(r'(?s)<details class="harsh">.*?</details>')
"""Text that pages fold away."""

MORE_ROWS = re.compile(
    r"(?s)</tbody></table>\s*<details><summary>\d+ more rows</summary>\s*"
    r"<table[^>]*>\s*<thead>.*?</thead>\s*<tbody>(.*?</table>)\s*</details>"
)
"""Rows of a table that pages fold away."""

PAGE = re.compile(r"(?:appendix/)?(\d\d-[\w-]+)\.html")
"""A link to another notebook's page."""

FONT = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
"""Stands in where the fonts that typst brings lack a sign; PDF/UA-1 allows no sign without one."""

STYLE = r"""
#set text(lang: "en", size: 10pt, font: ("Libertinus Serif", "DejaVu Sans"))
#set page(paper: "a4", margin: (x: 2cm, y: 2.2cm), numbering: "1")
#set par(justify: true)
#set heading(numbering: "1.1")
#show heading.where(level: 1): it => pagebreak(weak: true) + it
#show raw: set text(size: 7pt, font: ("DejaVu Sans Mono", "DejaVu Sans"))
#show raw.where(block: true): block.with(fill: luma(246), inset: 5pt, width: 100%)
#show figure: set block(breakable: true)
#show figure.where(kind: table): set figure.caption(position: top)
#show figure.caption: set text(size: 9pt)
#set table(stroke: (x, y) => if y == 0 { (bottom: .6pt) } else { (bottom: .2pt + luma(180)) })
#set table(inset: (x: 3pt, y: 2.5pt))
#show table: set text(size: 7pt, hyphenate: true)
#show table: set par(justify: false)
#show table.cell: set align(left)
#show table: it => { show regex("[_/=]"): sign => sign + sym.zws; it }
#show link: underline
#let horizontalrule = line(length: 100%, stroke: .3pt)
"""
"""Typst's settings."""


def typst_source(
    notebooks: Sequence[Path], title: str, facts: Sequence[str], code: bool, full: bool
) -> tuple[str, dict[str, bytes]]:
    """Executed notebooks as a document of typst's, a chapter each, behind a title page that says
    ``facts``; and its images by name.

    ``code``: with their code; ``full``: with the text that pages fold away.
    """
    names, images, chapters = {path.stem for path in notebooks}, {}, []
    for path in notebooks:
        page = str(page_body(path, code)[1])
        if not full:
            page = FOLDED.sub("<p><em>Texts that are folded away on the page.</em></p>", page)
        tree = json.loads(_pandoc(MORE_ROWS.sub(r"\1", page), "html", "json"))
        blocks = [*_captioned(_ungrouped(tree["blocks"]))]
        tree["blocks"] = _for_print(blocks, path.stem, names, images)
        chapters.append(_pandoc(json.dumps(tree), "json", "typst"))
    text = "\n".join([STYLE, _title_page(title, facts), *chapters])
    has = FT2Font(FONT).get_charmap()
    unknown = {ord(sign) for sign in set(text) if ord(sign) not in has and sign != "\n"}
    return text.translate({sign: f"[U+{sign:04X}]" for sign in unknown}), images


def write_pdf(out: Path, text: str, images: Mapping[str, bytes]) -> None:
    """Set a document of :func:`typst_source`: PDF/UA-1, the same bytes for the same text."""
    with tempfile.TemporaryDirectory() as folder:
        for name, data in images.items():
            Path(folder, name).write_bytes(data)
        source = Path(folder, "document.typ")
        source.write_text(text, encoding="utf-8")
        options = {"root": folder, "font_paths": [str(FONT.parent)], "ignore_system_fonts": True}
        try:
            made = typst.compile(str(source), pdf_standards="ua-1", timestamp=0, **options)
        except (RuntimeError, typst.TypstError) as error:
            raise StudyError(f"typst cannot set {out.name} ({first_line(error)})") from None
    with atomic_write(out) as temporary:
        temporary.write_bytes(made)


def _title_page(title: str, facts: Sequence[str]) -> str:
    name, about = _quoted(title), "".join(f"#align(center, text({_quoted(f)}))\n" for f in facts)
    return (
        f"#set document(title: {name}, date: none)\n#v(5cm)\n"
        f'#align(center, text(size: 22pt, weight: "bold", {name}))\n#v(1cm)\n{about}\n'
        "#pagebreak()\n#outline(depth: 2)\n"
    )


def _captioned(blocks: Iterable[dict]) -> Iterator[dict]:
    """A table's caption is the section in which it stands."""
    section: list[dict] = []
    for block in blocks:
        if block["t"] == "Header":
            section = block["c"][2]
        elif block["t"] == "Table":
            block["c"][1] = [None, [{"t": "Plain", "c": section}]]
        yield block


def _for_print(node, chapter: str, chapters: Collection[str], images: dict[str, bytes]):
    """A part of pandoc's tree with images as numbered figures in files (put into ``images``), links
    to other notebooks as links to their chapters, and no other anchors than chapters."""
    if isinstance(node, list):
        return [_for_print(part, chapter, chapters, images) for part in _ungrouped(node)]
    if not isinstance(node, dict):
        return node
    kind, content = node.get("t"), node.get("c")
    if kind == "Para" and [part["t"] for part in content] == ["Image"]:
        _, alt, (source, _) = content[0]["c"]
        data = base64.b64decode(source.partition(",")[2])
        name = f"{sha256(data).hexdigest()[:16]}.{source.partition(';')[0].rpartition('/')[2]}"
        images[name] = data
        said = _quoted("".join(part["c"] if part["t"] == "Str" else " " for part in alt))
        return _typst("Block", f'#figure(image("{name}", alt: {said}), caption: {said})')
    if kind == "Math":
        # A formula's alternative text is its TeX.
        begin = f"#{{set math.equation(alt: {_quoted(content[1])}); ["
        whole = [_typst("Inline", begin), node, _typst("Inline", "]}")]
        return {"t": "Span", "c": [["", [], []], whole]}
    if kind == "Header":
        level, _, text = content
        node = {"t": kind, "c": [level, [chapter if level == 1 else "", [], []], text]}
    elif kind == "CodeBlock" and "sourceCode" in content[0][1]:
        node = {"t": kind, "c": [["", ["python"], []], content[1]]}
    elif kind == "Span":
        node = {"t": kind, "c": [["", *content[0][1:]], content[1]]}
    elif kind == "Link":
        _, text, (target, _) = content
        page = PAGE.fullmatch(target)
        if page and page[1] not in chapters or target.startswith("#"):
            return {"t": "Span", "c": [["", [], []], text]}
        target = f"#{page[1]}" if page else target
        node = {"t": kind, "c": [["", [], []], text, [target, ""]]}
    return node | {"c": _for_print(node.get("c"), chapter, chapters, images)}


def _ungrouped(parts: list) -> Iterator:
    """Without what pages group: in print it would be a block, in which no chapter can begin."""
    for part in parts:
        if isinstance(part, dict) and part.get("t") == "Div":
            yield from _ungrouped(part["c"][1])
        else:
            yield part


def _typst(kind: str, text: str) -> dict:
    """Typst's own text as a part of pandoc's tree."""
    return {"t": f"Raw{kind}", "c": ["typst", text]}


def _quoted(text: str) -> str:
    """As a string of Typst's."""
    return json.dumps(visible(text).encode(errors="replace").decode(), ensure_ascii=False)


def _pandoc(text: str, source: str, target: str) -> str:
    try:
        options = ["--sandbox", "--quiet", "--wrap=none"]
        return pypandoc.convert_text(text, target, format=source, extra_args=options)
    except RuntimeError as error:
        raise StudyError(f"pandoc cannot convert a page ({first_line(error)})") from None


def provenance(build: Build) -> list[str]:
    """What ran, in a few lines for a title page."""
    manifests = read_manifests(build)
    parameters = {"seed": 0} | next(iter(manifests.values()))["parameters"]
    versions = next(iter(manifests.values()))["versions"]
    named = ("python", "torch", "transformers", "trl", "peft")
    code = sha256(json.dumps([m["code"] for m in manifests.values()], sort_keys=True).encode())
    return [
        f"Run {build.profile} of {len(manifests)} notebooks, seed {parameters['seed']}",
        f"Model: {shown_source(parameters.get('model', 'as in the tables'))}",
        f"Preferences: {shown_source(parameters.get('preferences', 'none'))}",
        ", ".join(f"{name} {versions[name]}" for name in named if name in versions),
        f"Code: sha256 {code.hexdigest()[:16]}",
    ]


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m rlhf_trust.pdf", description="A run as two PDFs.")
    parser.add_argument("run", help="the name of its folder in build/")
    parser.add_argument("--text", choices=("folded", "full"), default="folded", help="harsh text")
    arguments = parser.parse_args(argv)
    build, full = Build(arguments.run), arguments.text == "full"
    facts, notebooks = provenance(build), executed_notebooks(build.path("notebooks"))
    titles = {"report": "More RLHF, more trust?", "appendix": "Appendix: the notebooks as they ran"}
    for name, title in titles.items():
        shown = notebooks if name == "appendix" else [build.path("notebooks", "90-report.ipynb")]
        out = build.path(f"{name}.pdf")
        write_pdf(out, *typst_source(shown, title, facts, name == "appendix", full))
        print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
