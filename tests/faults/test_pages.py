"""Nothing that data, models or people wrote runs, becomes a link or asks for anything: on pages, in
outputs of notebooks, in Markdown, on a terminal. And no page tells where it was made."""

from __future__ import annotations

import base64
import re
import shutil
import socket
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pypandoc
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from rlhf_trust import ROOT, StudyError, card, figures, params, pdf, render, stats, visible
from rlhf_trust.artifacts import Build, Manifest
from rlhf_trust.sources import first_line
from test_render import PIXEL

BIDI = "".join(map(chr, (0x202A, 0x202E, 0x2066, 0x2069, 0x200E, 0x200F)))
HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=http://evil.example/x.png onerror=alert(1)>",
    "<img src=/etc/hostname><svg/onload=alert(1)><iframe srcdoc='<script>x</script>'>",
    "</td></table></details></style></title><base href=//evil.example><div\nonclick=x>",
    '" onmouseover="alert(1)" x="',
    "a](javascript:alert(1)).jsonl",
    "![x](http://evil.example/y.png) [x](javascript:alert(1)) ![](/etc/hostname)",
    "<http://evil.example> http://evil.example www.evil.example me@example.com",
    "http://127.0.0.1:9/ at the beginning, which IPython would fetch",
    "[x]: javascript:alert(1)\n\n[x] [x][] ![x]",
    "`<b>`{=html} [s]{.c onclick=x} `a\nb` <img src=x> `c` `` ` <b>",
    "\\[x\\\\](javascript:alert(1)) \\<b> \\\\<b> &lt;b&gt; &#60;b&#62;",
    "$x$ $$\\href{javascript:alert(1)}{x}$$ \\(y\\) $\\frac{",
    "x | y\n--|--\n<b> | ![](http://evil.example/z.png)",
    "~~~\n</code></pre><script>x</script>\n~~~\n```\n<b>\n```",
    "<style>@import url(http://evil.example/s.css);</style><link href=//evil.example>",
    "\U0001f600 \u4e2d\u6587 \u0627\u0644 \u0e01 \U0001d53c",
    f"\x1b[31m\x00\x07\x85\x9b\u200b\ufeff\ud83d{BIDI}",
]
TAGS_MADE = {"table", "thead", "tbody", "tr", "th", "td", "details", "summary", "b", "i", "br"} | {
    "span",
    "p",
}


class Parsed(HTMLParser):
    """Tags, with attributes, and text as a browser would show it."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text, self._hidden = [], "", False
        self.feed(str(text))  # a slice of Html is Html

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._hidden = tag in ("style", "title")
        self.text += "\n" * (tag == "br")

    def handle_endtag(self, tag):
        self._hidden = False

    def handle_data(self, data):
        self.text += data * (not self._hidden)


def flat(text: str) -> str:
    return " ".join(text.split())


def assert_harmless(text: str, own_links: tuple[str, ...] = ()) -> Parsed:
    """No script, no event, no address but images in the page and links to pages beside it."""
    found = Parsed(text)
    for tag, attributes in found.tags:
        assert tag not in "script iframe object embed link base svg form".split(), tag
        assert tag != "input" or attributes == {"type": "checkbox", "checked": None}  # a page's own
        assert not [name for name in attributes if name.startswith("on")]
        for name, value in attributes.items():
            near = re.fullmatch(r"(\w+/)?[\w.-]+\.html(#\S*)?|#\S*", value or "")
            near = near or value in own_links
            image = tag == "img" and name == "src" and value.startswith("data:image/")
            assert name != "href" or near, value
            assert name not in ("src", "srcset", "data", "poster", "srcdoc") or image, value
            assert name != "style" or "(" not in value.replace("rgba(", ""), value
    assert not re.search(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]", text
    )
    text.encode()  # without halves of surrogate pairs
    return found


# --- the functions -------------------------------------------------------------------------------


def frame(text: str) -> pd.DataFrame:
    """pandas holds no half of a surrogate pair."""
    text = text.replace("\ud83d", "[U+D83D]")
    return pd.DataFrame({text: [text, None], "n": [1.0, 2.0]})


OF_TEXT = {
    "escaped": lambda x: render.escaped(x, 10_000),
    "fold": lambda x: render.fold(x, x),
    "conversation": lambda x: render.conversation([x, x]),
    "coloured": lambda x: render.coloured([x], [1.0], 1.0),
    "as_html": lambda x: render.as_html(x, render.as_html(x)).data,
    "samples": lambda x: render.samples([(x, {x: x})], warning=x).data,
    "samples, no warning": lambda x: render.samples([(x, {"sft": x}), ("", {x: x})]).data,
    "samples of Html": lambda x: render.samples([(render.conversation([x]), {"sft": x})]).data,
    "table": lambda x: render.table(frame(x)).data,
    "Html.format": lambda x: render.Html("<b>{}</b>{:>3}").format(x, x),
    "Html.join": lambda x: render.Html("<br>").join([x, x]),
    "Html + text": lambda x: render.Html("<b>") + x,
}


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("make", OF_TEXT)
def test_text_stays_text_in_html(make, text):
    made = OF_TEXT[make](text)
    found = assert_harmless(made)
    assert {tag for tag, _ in found.tags} <= TAGS_MADE
    assert flat(visible(text)) in flat(found.text)
    assert "\n" not in made  # a blank line would end the block in Markdown


def test_an_f_string_of_html_is_text_again():
    question = f"{render.Html('<b>q</b>')} {HOSTILE[0]}"
    found = assert_harmless(render.samples([(question, {"sft": "x"})]).data)
    assert "b" not in dict(found.tags) and f"<b>q</b> {HOSTILE[0]}" in found.text


IN_SENTENCES = {
    "say": lambda x: render.say("A", x, "b").data,
    "say, alone": lambda x: render.say(x).data,
    "by_conclusion": lambda x: render.say(*stats.by_conclusion({x: ("0.1", x)})).data,
    "as_markdown": render.as_markdown,
    "as_markdown in bold": lambda x: f"**{render.as_markdown(x)}**",
    "a cell of the card": lambda x: card._table([x], [[x]]),
}


@pytest.mark.parametrize("make", IN_SENTENCES)
@pytest.mark.parametrize("form", ["gfm", "commonmark_x-smart", "ipynb-autolink_bare_uris"])
def test_text_stays_text_in_markdown(form, make):
    """Of any reader of Markdown, without cleaning what it makes of it."""
    made = [IN_SENTENCES[make](text) for text in HOSTILE]
    source = "\n\n***\n\n".join(made)
    source.encode()
    if form.startswith("ipynb"):
        cells = [new_markdown_cell(text, id=f"a{place}") for place, text in enumerate(made)]
        source = nbformat.writes(new_notebook(cells=cells))
    found = assert_harmless(pypandoc.convert_text(source, "html5", format=form))
    made = {tag for tag, _ in found.tags} - TAGS_MADE
    assert made <= {"strong", "code", "div", "col", "colgroup", "pre", "hr"}
    for text in HOSTILE if "as_markdown" in make else ():
        assert flat(visible(text)) in flat(found.text)


@pytest.mark.parametrize(
    "sentence",
    [
        "**sft**: *worse* by +0.1 (95 % interval [0.1, 0.2], p < 0.05).\n\n- a\n- b",
        "Add [the chapter](16-headline.ipynb) by `make reproduce`, `bbq/*.jsonl` & more; 5 > 3.",
        "## Title\n\nΣs / √(Σs²)",
    ],
)
def test_what_a_sentence_needs_stays(sentence):
    assert render.say(sentence).data == render.say(render.say(sentence).data).data == sentence


@pytest.mark.parametrize("name", HOSTILE)
def test_names_on_a_figure_are_shown_as_they_are(tmp_path, monkeypatch, name):
    figures.use_style()
    shown = []
    monkeypatch.setattr(render.Image, "__init__", lambda self, **given: shown.append(given["alt"]))
    (column, _) = frame(name)
    rows = {
        "model": [column],
        "label": [column],
        "value": 0.1,
        "ci_low": 0.0,
        "ci_high": 0.2,
        "n": 9,
    }
    figure = figures.intervals(pd.DataFrame(rows), name, name)
    figure.axes[0].set_xticks([0.1], [name])
    render.show(figure, tmp_path / "x.png", name)
    heat = figures.agreements({name: np.eye(2)}, [column, "b"])
    render.show(heat, tmp_path / "y.png", "alt")
    assert shown == [visible(name), "alt"]
    assert not any(label.get_parse_math() for label in heat.findobj(plt.Text) if label.get_text())


# --- the terminal --------------------------------------------------------------------------------

MARKS = [
    ("\x1b[31mred\x00\r!", "␛[31mred␀␍!"),
    ("\x7f\x9b\u202eabc\u2066", "␡[U+009B][U+202E]abc[U+2066]"),
    ("a\u200bb\ufeffc\u00add\u200de", "a[U+200B]b[U+FEFF]c[U+00AD]d[U+200D]e"),
    ("\ud83d \U000e0041 \u2028.", "[U+D83D] [U+E0041] [U+2028]."),
    ("a\r\nb\tc", "a\nb\tc"),
    ("👩\u200d💻 ❤\ufe0f می\u200cخواهم é 中文", "👩\u200d💻 ❤\ufe0f می\u200cخواهم é 中文"),
]


@pytest.mark.parametrize(("text", "shown"), MARKS)
def test_what_acts_unseen_gets_a_mark(text, shown):
    assert visible(text) == shown == visible(shown)
    said = str(StudyError(f"a: {text}"))
    assert said == f"a: {shown}".replace("\n", "␊") and len(said.splitlines()) == 1
    assert first_line(ValueError(text)) == shown.splitlines()[0]


def test_an_error_on_the_terminal_cites_data_without_its_effects(monkeypatch, capsys):
    def fail(*_):
        raise StudyError("x.csv: \x1b]0;title\x07 \u202e \ud800\nerror: no")

    monkeypatch.setattr(card, "write_card", fail)
    assert card.main(["smoke"]) == 2
    assert capsys.readouterr().err == "error: x.csv: ␛]0;title␇ [U+202E] [U+D800]␊error: no\n"


# --- pages ---------------------------------------------------------------------------------------

SVG = '<svg xmlns="http://www.w3.org/2000/svg"><script>x</script><image href="{}"/></svg>'


def display(metadata=None, **data):
    data = {name.replace("_", "/"): value for name, value in data.items()}
    return new_output("display_data", data=data, metadata=metadata or {})


def notebook(address: str, secret: Path) -> nbformat.NotebookNode:
    """Every kind of cell and output, asking for an address and a file in every way."""
    asks = [
        f"<img src={address}/a.png><img src={secret}><img src=file://{secret}>",
        f"<link rel=stylesheet href={address}/s.css><style>@import url({address}/i.css)</style>",
        f"<iframe src={secret}></iframe><object data={secret}></object><embed src={secret}>",
        f"<div style='background: url({address}/b.png)'>x</div><table background={secret}></table>",
        f"<svg><image href='{address}/c.svg'/><use href='{secret}#x'/></svg><video src={address}>",
        f"<script src={address}/x.js></script><base href={address}><meta http-equiv=refresh>",
    ]
    marks = f"![]({address}/d.png) ![]({secret}) <img src={secret}> [file]: {secret}\n\n![file]"
    outputs = [display(text_html=ask) for ask in asks + HOSTILE]
    outputs += [display(text_markdown=text) for text in (marks, *asks, *HOSTILE)]
    outputs += [new_output("stream", name="stdout", text=text) for text in HOSTILE]
    outputs += [display(text_plain=text) for text in HOSTILE]
    outputs += [
        display({"image/png": {"alt": x, "onerror": x}}, **{"image/png": PIXEL}) for x in HOSTILE
    ]
    outputs += [display(**{"image/svg+xml": SVG.format(place)}) for place in (address, secret)]
    outputs += [display(text_latex=f"\\input{{{secret}}}"), display(application_javascript="x")]
    outputs += [new_output("error", ename="E", evalue=x, traceback=[x]) for x in HOSTILE]
    whole = pd.DataFrame({"a & b": ["<i>", "x"], "value": [0.5, 1.0]})
    outputs += [display(text_html=whole.to_html()), display(text_html=whole._repr_html_())]
    cells = [new_markdown_cell(f"# Title {HOSTILE[0]} {HOSTILE[-1]}\n\n{marks}")]
    cells += [new_markdown_cell(text) for text in (*asks, *HOSTILE)]
    cells += [new_code_cell(text) for text in HOSTILE]
    return new_notebook(cells=[*cells, new_code_cell("x = 1", outputs=outputs)])


def write(notebook: nbformat.NotebookNode, path: Path) -> Path:
    """As Jupyter does; half a surrogate pair as an escape."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        nbformat.writes(notebook)
        .encode(errors="surrogatepass")
        .replace("\ud83d".encode(errors="surrogatepass"), b"\\ud83d")
    )
    return path


@pytest.fixture
def hostile(tmp_path):
    """Pages of hostile notebooks, the address that these name, and who asked for it so far."""
    secret, asked = tmp_path / "secret.svg", []
    secret.write_text("<svg xmlns='http://www.w3.org/2000/svg'><text>SECRET-MARKER</text></svg>")
    server = socket.create_server(("127.0.0.1", 0))

    def listen():
        while True:
            try:
                connection, address = server.accept()
                asked.append(address)
                connection.close()
            except OSError:
                return

    threading.Thread(target=listen, daemon=True).start()
    address = f"http://127.0.0.1:{server.getsockname()[1]}"
    folder = tmp_path / "notebooks"
    write(notebook(address, secret), folder / "17-mine.ipynb")
    write(notebook(address, secret), folder / "90-report.ipynb")
    yield render.write_appendix(folder, tmp_path / "appendix"), address, asked
    server.close()


def test_in_a_browser_no_page_runs_or_asks_for_anything(hostile, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no Chromium")
    pages, address, asked = hostile
    options = "--headless=new --no-sandbox --disable-gpu --disable-background-networking"
    options += f" --user-data-dir={tmp_path}/profile --virtual-time-budget=5000 --dump-dom"

    def opened(page: Path) -> str:
        command = [browser, *options.split(), page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    tried = tmp_path / "tried.html"
    tried.write_text(f"<title>a</title><img src={address}><script>document.title='ran'</script>")
    assert "<title>ran</title>" in opened(tried) and asked
    asked.clear()
    for page in pages:
        written = page.read_text(encoding="utf-8")
        (title,) = re.findall("<title>.*?</title>", written)
        dom = opened(page)
        assert title in dom and "<script" not in dom
    assert not asked


def test_a_page_of_hostile_outputs_asks_for_nothing_and_opens_nothing(hostile):
    pages, _, asked = hostile
    assert not asked
    for path in pages:
        page = path.read_text(encoding="utf-8")
        own = re.findall("http://evil.example|mailto:me@example.com", page)  # in Markdown cells
        found = assert_harmless(page, tuple(own))
        policy = [a for tag, a in found.tags if tag == "meta" and "http-equiv" in a]
        assert "default-src 'none'; img-src data:" in policy[0]["content"]
        inside = b"".join(map(base64.b64decode, re.findall(r"base64,([\w+/=]+)", page)))
        assert "SECRET-MARKER" not in page and b"SECRET-MARKER" not in inside
        assert page.count("<title>") == page.count("<body>") == 1
    mine = Parsed(pages[1].read_text(encoding="utf-8"))
    assert sum(tag == "table" for tag, _ in mine.tags) >= 2 and "a & b" in mine.text
    assert sum(tag == "img" and "src" in a for tag, a in mine.tags) >= len(HOSTILE)
    links = [a["href"] for tag, a in mine.tags if tag == "a" and "href" in a]
    assert "90-report.html" in links and "index.html" in links


def test_a_formula_stays_one(tmp_path):
    cells = [new_markdown_cell("# T\n\n$L = \\frac{1}{2} \\log p(y_{<t})$")]
    path = write(new_notebook(cells=cells), tmp_path / "01-sft.ipynb")
    render.write_html(path, tmp_path / "page.html", code=True)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<mfrac><mn>1</mn><mn>2</mn></mfrac>" in page and "&lt;" in page
    assert "U+2061" not in page and "annotation" not in page


def test_the_card_shows_names_as_text(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_TRUST_BUILD", str(tmp_path))
    build = Build("hostile")
    row = {"vertical": "ethics", "value": 0.7, "ci_low": 0.6, "ci_high": 0.8, "n": 60, "seed": 0}
    for name in HOSTILE[::4]:
        rows = [
            row | {"model": model, "metric": "roc_auc", "condition": f"answers={how}"}
            for model in ("start", visible(name))
            for how in ("contrast", "options")
        ]
        change = {"model": visible(name), "baseline": "start", "vertical": "ethics"} | {
            "metric": "roc_auc",
            "condition": "answers=contrast",
            "change": 0.2,
            "ci_low": 0.1,
            "ci_high": 0.3,
            "p": 0.01,
            "p_holm": 0.01,
            "n": 60,
            "seed": 0,
        }
        pd.DataFrame(rows).to_csv(build.path("tables", "trust.csv"), index=False)
        pd.DataFrame([change]).to_csv(build.path("tables", "trust_change.csv"), index=False)
        settings = {"model": f"path:/home/jane/{name}", "trained": [f"{name}=hub:{name}"]}
        settings |= {"dtype": "float32", "prompt_format": name, "benchmarks": "shipped", "seed": 0}
        Manifest(build, "12-ethics", settings, {"start": name}).write()
        markdown, page = card.write_card(build)
        assert_harmless(page.read_text(encoding="utf-8"))
        front = re.match("---\n(.*?)\n---\n", markdown.read_text(encoding="utf-8"), re.S)
        yaml.safe_load(front[1])
        for path in (markdown, page):
            assert "/home/jane" not in path.read_text(encoding="utf-8")


# --- where it was made ---------------------------------------------------------------------------

PLACES = [
    ("path:/home/jane/data", "path:…/data"),
    ("mine=path:/home/jane/my model/x y", "mine=path:…/x y"),
    (f"path:{ROOT}/shared/data", "path:shared/data"),
    (f"path:{ROOT}", "path:."),
    (f"path:{ROOT}-other/data", "path:…/data"),
    (f"path:{ROOT}/../data", "path:…/data"),
    ("path:data/own", "path:data/own"),
    ("hub:a/b@1", "hub:a/b@1"),
    ("shipped", "shipped"),
    ("models/sft", "models/sft"),
]


@pytest.mark.parametrize(("source", "shown"), PLACES)
def test_a_source_without_its_directory(source, shown):
    assert params.shown_source(source) == shown


PRINTED = [
    ("/home/jane/corpus/train.jsonl:3: bad", "…/train.jsonl:3: bad"),
    (f"{ROOT}/lib/rlhf_trust/run.py", "lib/rlhf_trust/run.py"),
    (f"File {Path.home()}/x/y.py, line 2", "File …/y.py, line 2"),
    (f"file://{Path.home()}/x/y.py", "file://…/y.py"),
    (PACKAGED := f"{sys.prefix}/lib/torch/nn.py", params.shown_path(PACKAGED)),
    ("/data/jane smith/own set/part one.csv", "…/part"),
    ("and/or, 3/4, https://a.example/home/x, /etc", "and/or, 3/4, https://a.example/home/x, /etc"),
]


def test_a_page_does_not_tell_where_it_was_made(tmp_path):
    given = ["/data/jane smith/own set", "/home/jane/corpus", f"{ROOT}/build/smoke/R&D"]
    source = f'# Parameters\nmodel = "path:{given[0]}"\nbenchmarks = "path:{given[1]}"\n'
    source += f'trained = ["sft", "mine=path:{given[2]}"]'
    facts = pd.DataFrame({"data": [f"path:{place}" for place in given]})
    outputs = [new_output("stream", name="stdout", text=f"{text}\n") for text, _ in PRINTED]
    outputs += [
        new_output("stream", name="stderr", text="/home/jane/warns"),
        display(text_html=render.table(facts).data),
        display(text_html=render.samples([("Where?", {"sft": "In /usr/bin or /home/you"})]).data),
        display(text_markdown=f"Data: {given[0]}/a.csv, path:{given[1]}."),
        new_output("error", ename="OSError", evalue=given[0], traceback=[f"at {given[1]}/x.py"]),
    ]
    cell = new_code_cell(source, metadata={"tags": ["injected-parameters"]})
    cells = [new_markdown_cell("# T"), cell, new_code_cell("facts", outputs=outputs)]
    path = write(new_notebook(cells=cells), tmp_path / "01-sft.ipynb")
    before = path.read_bytes()
    render.write_html(path, tmp_path / "page.html", code=True)
    shown = Parsed((tmp_path / "page.html").read_text(encoding="utf-8")).text
    for place in ("/home/jane", "jane smith", "own set/", str(ROOT), str(Path.home()), sys.prefix):
        assert place not in shown, place
    for _, text in PRINTED:
        assert text in shown
    assert 'model = "path:…/own set"' in shown and '"mine=path:build/smoke/R&D"' in shown
    assert "path:…/corpus" in shown and "Data: …/a.csv, path:…/corpus." in shown
    assert "In /usr/bin or /home/you" in shown  # a model's words
    assert path.read_bytes() == before  # the notebook itself still runs


def test_every_output_of_a_notebook_is_made_by_the_library():
    """No chapter makes HTML or Markdown of its own, past what escapes it."""
    for stage in params.stages():
        cells = nbformat.read(params.NOTEBOOKS / f"{stage}.ipynb", as_version=4).cells
        code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
        own = r"IPython|\bHTML\b|\bMarkdown\b|_repr_|to_html|\.style\b|Html\(f|Html\([a-z]|Markup"
        assert not re.findall(own, code), stage


@pytest.mark.parametrize("text", HOSTILE)
def test_what_data_say_is_text_in_a_pdf(tmp_path, text):
    """In typst's source too: nothing of it is a command, and the document can be set."""
    typst = '#read("/etc/hostname") #import "@preview/x:1.0.0" $a$ \\u{41} <b> @b = *c* _d_ ]} //'
    outputs = [
        display(text_html=render.samples([(text, {"sft": text, "dpo": typst})]).data),
        display(text_markdown=render.say(render.as_markdown(text), render.as_markdown(typst)).data),
        new_output("stream", name="stdout", text=f"{text}\n{typst}\n"),
    ]
    cells = [new_markdown_cell(f"# {typst}"), new_code_cell("x", outputs=outputs)]
    path = write(new_notebook(cells=cells), tmp_path / "01-sft.ipynb")
    made = pdf.typst_source([path], text, [text, typst], code=True, full=True)
    outside_strings = re.sub(r'"(?:\\.|[^"\\])*"|(?s:```.*?```)', "", made[0])
    assert not re.search(r"(?<!\\)#(read|import|link\(\"(?!https?://))", outside_strings)
    pdf.write_pdf(tmp_path / "page.pdf", *made)
