"""What a reader sees: model text escaped, real people masked, pages that ask nothing of the
network."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from rlhf_trust import StudyError, render
from rlhf_trust.render import (
    Masker,
    conversation,
    escaped,
    samples,
    table,
    write_appendix,
    write_html,
)

EVIL = "<script>alert(1)</script>\n\n<img src=http://evil.example/x.png> & ~~~~~\n~~~~~\n![x](http://evil.example/y.png)"
PIXEL = base64.b64encode(
    bytes.fromhex(
        "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
        "1f15c4890000000d49444154789c6360606060000000050001a5f64540"
        "0000000049454e44ae426082"
    )
).decode()


# --- people --------------------------------------------------------------------------------------

MASK = Masker(["Jane Q. Dorset", "Bo Li"])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Ask Jane Q. Dorset.", "Ask [name]."),
        ("DORSET's son jane", "[name]'s son [name]"),
        ("Bo Li, but not Bo or Lisbon", "[name], but not Bo or Lisbon"),
        ("Dorsetshire", "Dorsetshire"),
        ("write to jdorset@corp.com, or a.b-c+d@mail.co.uk!", "write to [e-mail], or [e-mail]!"),
        ("made up: ann@example.com", "made up: ann@example.com"),
        ("real: ann@example.com.evil.net", "real: [e-mail]"),
    ],
)
def test_masking(text, shown):
    assert MASK(text) == shown


def test_a_word_that_begins_like_a_name_is_left():
    masked = Masker(["Don Black"])("I don't know Don. Don’t ask don.")
    assert masked == "I don't know [name]. Don’t ask [name]."


def test_nobody_to_mask():
    assert Masker()("Jane Dorset, jane@corp.com") == "Jane Dorset, [e-mail]"


def test_model_answers_and_prompts_are_masked():
    said = samples(
        [(conversation(["Who is Dorset?"], MASK), {"sft": "Jane Dorset <jdorset@corp.com>"})], MASK
    ).data
    assert "orset" not in said and "ane" not in said
    assert said.count("[name]") == 3 and "&lt;[e-mail]&gt;" in said


# --- text ----------------------------------------------------------------------------------------


def test_model_text_is_escaped():
    safe = "&lt;script&gt;x&lt;/script&gt; &amp; &#34;q&#34;<br>next"
    assert escaped('<script>x</script> & "q"\nnext') == safe
    assert len(escaped("a" * 1000, limit=50)) == 50 and escaped("a" * 1000, limit=50).endswith("…")
    for html in (
        conversation([EVIL]),
        samples([("asked", {EVIL: EVIL})], warning=EVIL).data,
        table(pd.DataFrame({EVIL: [EVIL]})).data,
    ):
        assert "<script" not in html and "<img" not in html
    assert "<i>(empty)</i>" in samples([("asked", {"sft": ""})]).data


def test_harsh_text_is_folded():
    folded = samples([("asked", {"sft": "x"})], warning="harsh").data
    assert folded.startswith('<details class="harsh"><summary>harsh</summary><table')


def test_colours_say_sign_and_size_and_text_stays_text():
    shown = render.coloured(["<b>", " and\n", "x"], [0.5, -1.0, 0.0], largest=1.0)
    red, blue, none = re.findall(r"<span style=\"(.*?)\" title=\"(.*?)\">(.*?)</span>", shown)
    half = "background-color: rgba(196, 60, 40, 0.30); text-decoration: overline"
    assert red == (half, "+0.5000", "&lt;b&gt;")
    assert blue[0] == "background-color: rgba(50, 100, 190, 0.60); text-decoration: underline"
    assert (blue[2], none[0], none[2]) == (
        " and<br>",
        "background-color: rgba(50, 100, 190, 0.00)",
        "x",
    )
    assert "0.00" in render.coloured(["x"], [0.0], largest=0.0)
    with pytest.raises(ValueError):
        render.coloured(["x"], [0.1, 0.2], 1.0)


def test_tables_have_no_nan():
    frame = pd.DataFrame({"x": [0.12345, np.nan, 1e9], "n": [1, 2, 3], "who": ["a", None, "b"]})
    cells = re.findall("<td>(.*?)</td>", table(frame).data)
    assert cells == ["0.123", "1", "a", "–", "2", "–", "1e+09", "3", "b"]


def test_a_pivot_has_no_column_for_its_name():
    long = pd.DataFrame({"text": ["a"], "model": ["sft"], "value": [0.5]})
    pivot = long.pivot(index="text", columns="model", values="value").reset_index()
    assert re.findall("<th>(.*?)</th>", table(pivot).data) == ["text", "sft"]
    assert pivot.columns.name == "model"  # the frame itself is left alone


# --- pages ---------------------------------------------------------------------------------------


class Page(HTMLParser):
    """All tags of a page with their attributes."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def write_notebook(path: Path, title: str) -> Path:
    def output(**data):
        return new_output(
            "display_data", data={key.replace("_", "/"): value for key, value in data.items()}
        )

    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = table(pd.DataFrame({"value": [0.5, np.nan]})).data
    nbformat.write(
        new_notebook(
            cells=[
                new_markdown_cell(
                    f"# {title}\n\nA loss $L = -\\log \\sigma(r)$, as in [the paper](https://arxiv.org/abs/2404.18870)."
                ),
                new_code_cell(
                    "text = '''\n```\nhttp://evil.example\n'''",
                    outputs=[
                        output(text_html=numbers),
                        new_output(
                            "display_data",
                            data={"image/png": PIXEL + "\n", "text/plain": "<Image>"},
                            metadata={"image/png": {"alt": "a curve", "width": 720}},
                        ),
                        output(
                            text_html=samples([("asked", {"sft": EVIL})], warning="Harsh text").data
                        ),
                        output(text_markdown="**3** of 4 got *better*.", text_plain="<Markdown>"),
                        new_output("stream", name="stdout", text=EVIL),
                        new_output("stream", name="stderr", text="progress nan"),
                    ],
                ),
                new_code_cell("print('unseen')", metadata={"tags": ["hide-input"]}),
            ]
        ),
        path,
    )
    return path


def check_asks_nothing(page: Page):
    assert not page.of("script") and not page.of("link") and not page.of("iframe")
    for tag, attributes in page.tags:
        sources = {
            key: value
            for key, value in attributes.items()
            if key in ("src", "srcset", "data", "poster", "background")
        }
        assert all(value.startswith("data:") for value in sources.values()), (tag, sources)
        assert "href" not in attributes or tag == "a"
        assert not any(key.startswith("on") for key in attributes)
        assert "url(" not in attributes.get("style", "")


def check_readable(page: Page):
    """What a screen reader goes by."""
    assert page.of("html") == [{"lang": "en"}] and len(page.of("title")) == 1
    assert len(page.of("main")) == len(page.of("h1")) == 1
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert all(deeper <= level + 1 for level, deeper in zip(levels, levels[1:]))
    assert all(image["alt"] for image in page.of("img"))
    assert all(cell["scope"] == "col" for cell in page.of("th"))
    labels = [navigation["aria-label"] for navigation in page.of("nav")]
    names = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(labels)) == len(labels) and len(set(names)) == len(names)
    boxes = [a for _, a in page.tags if a.get("class") == "wide"]
    assert len(boxes) >= len(page.of("table"))
    assert all(box["tabindex"] == "0" and box["aria-label"] for box in boxes)


def test_a_page_holds_everything_it_shows(tmp_path):
    source = write_notebook(tmp_path / "90-report.ipynb", "Did it help?")
    write_html(source, tmp_path / "out" / "report.html", code=False)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["report.html"]
    report = tmp_path / "out" / "report.html"
    page, text = Page(report), report.read_text()
    check_asks_nothing(page)
    style = "".join(re.findall("<style.*?</style>", text, re.DOTALL))
    assert "url(" not in style and "@import" not in style
    assert [a["href"] for a in page.of("a")] == ["https://arxiv.org/abs/2404.18870"]
    assert len(page.of("img")) == 1 and len(page.of("math")) == 1
    assert page.of("img")[0]["alt"] == "a curve" and page.of("img")[0]["width"] == "720"
    assert not page.of("code") or "text =" not in text  # the report hides its code
    assert {a.get("class") for a in page.of("table")} == {"dataframe figures", "dataframe samples"}
    assert [a.get("class") for a in page.of("details")] == ["harsh"]
    assert "<title>Did it help?</title>" in text and "<strong>3</strong> of 4" in text
    words = re.sub('<style.*?</style>|base64,[^"]*', "", text, flags=re.DOTALL)
    assert not re.search(r"\bnan\b", words, re.IGNORECASE)
    shown = render.html.unescape(re.sub("<[^>]+>", "", text.replace("<br>", "\n")))
    assert text.count("evil.example") == shown.count("evil.example") == 4  # as text


def test_an_appendix_links_its_neighbours(tmp_path):
    notebooks = tmp_path / "notebooks"
    write_notebook(notebooks / "01-sft.ipynb", "First & foremost?")
    write_notebook(notebooks / "02-reward.ipynb", "Second?")
    write_notebook(notebooks / "90-report.ipynb", "Last?")
    write_notebook(notebooks / "03-ppo.failed.ipynb", "Broken")
    pages, links = write_appendix(notebooks, tmp_path / "appendix"), []
    for page in pages:
        hrefs = [a["href"] for a in Page(page).of("a")]
        links.append([href for href in hrefs if not href.startswith(("https:", "#"))])
    assert [p.name for p in pages] == ["index.html", *links[0][:3]]
    assert links[0][:3] == ["01-sft.html", "02-reward.html", "90-report.html"]
    assert {"01-sft.html#table-1", "90-report.html#figure-1"} < set(links[0])
    for link in links[0][3:]:  # to sections, figures and tables
        page, _, name = link.partition("#")
        assert f' id="{name}"' in (tmp_path / "appendix" / page).read_text()
    assert links[1] == 2 * ["index.html", "02-reward.html"]  # above and below
    assert links[2] == 2 * ["01-sft.html", "index.html", "90-report.html"]
    assert links[3] == 2 * ["02-reward.html", "index.html"]
    for path in pages:
        check_asks_nothing(Page(path))
        check_readable(Page(path))
    text = pages[1].read_text()
    assert "text = " in re.sub("<[^>]+>", "", text) and "unseen" not in text
    assert "First &amp; foremost?" in pages[2].read_text()


def test_a_long_table_is_folded_and_no_p_is_0():
    frame = pd.DataFrame({"n": range(14), "p": [1e-9, 0.0006, np.nan, *[0.5] * 11]})
    first, _, folded = table(frame).data.partition("<details><summary>2 more rows</summary>")
    assert re.findall("<td>(.*?)</td>", first)[:6] == ["0", "&lt;0.001", "1", "0.001", "2", "–"]
    assert first.count("<tr>") == 12 and re.findall("<td>(1.)</td>", folded) == ["12", "13"]
    assert "<details>" not in table(frame[:12]).data


def test_links_to_notebooks_lead_to_their_pages(tmp_path):
    data = {"text/markdown": "Computed: [pairs](01-sft.ipynb)."}
    said = new_output("display_data", data=data)
    cells = [
        new_markdown_cell("# Last?\n\nSee [pairs](01-sft.ipynb) and [rewards](30-rewards.ipynb)."),
        new_code_cell("say()", outputs=[said]),
    ]
    nbformat.write(new_notebook(cells=cells), tmp_path / "90-report.ipynb")
    write_notebook(tmp_path / "01-sft.ipynb", "First?")
    page = tmp_path / "out.html"
    write_html(tmp_path / "90-report.ipynb", page, code=True, folder="pages/")
    links = [a["href"] for a in Page(page).of("a") if not a["href"].startswith("#")]
    assert links == 2 * ["pages/01-sft.html"]  # 30-rewards was not run
    text = render.html.unescape(re.sub("<[^>]+>", "", page.read_text()))
    assert "and rewards." in text


DECLARED = 'é: str = "é"  # a name\nn: int = 60  # items; > 0\nkept: list[str] = ["a"]  # words'
INJECTED = '# Parameters\né = "ü"\nn = 4\n'


def test_a_page_lists_its_sections(tmp_path):
    cells = [new_markdown_cell("# One\n\n## First & *last*\n\ntext"), new_markdown_cell("## Part")]
    nbformat.write(new_notebook(cells=cells), tmp_path / "01-sft.ipynb")
    write_html(tmp_path / "01-sft.ipynb", tmp_path / "page.html", code=True)
    text = (tmp_path / "page.html").read_text()
    contents = text.partition("<summary>Contents</summary>")[2].partition("</details>")[0]
    links = dict(re.findall(r'href="#([^"]+)">(.*?)</a>', contents))
    assert list(links.values()) == ["First &amp; last", "Part"]
    assert all(text.count(f'<h2 id="{name}"') == 1 for name in links)


def test_the_index_has_the_first_sentence_of_each_section(tmp_path):
    begins = "## Part\n\nIt *begins*, by 0.5 < 1. Then more.\n\n## Next\n\n- a list\n\nA text."
    cells = [new_markdown_cell(f"# One\n\n{begins}")]
    nbformat.write(new_notebook(cells=cells), tmp_path / "01-sft.ipynb")
    index = write_appendix(tmp_path, tmp_path / "appendix")[0].read_text()
    assert '#part">Part</a> It begins, by 0.5 &lt; 1.</li>' in index
    assert '#next">Next</a> </li>' in index and "more" not in index


def test_parameters_stand_on_a_page_once_with_their_values(tmp_path):
    cells = [
        new_markdown_cell("# One"),
        new_code_cell(DECLARED, metadata={"tags": ["parameters"]}),
        new_code_cell(INJECTED, metadata={"tags": ["injected-parameters"]}),
    ]
    nbformat.write(new_notebook(cells=cells), tmp_path / "01-sft.ipynb")
    write_html(tmp_path / "01-sft.ipynb", tmp_path / "page.html", code=True)
    text = render.html.unescape(re.sub("<[^>]+>", "", (tmp_path / "page.html").read_text()))
    shown = 'é: str = "ü"  # a name\nn: int = 4  # items; > 0\nkept: list[str] = ["a"]  # words'
    assert shown in text and text.count("n = 4") == 0 and "# Parameters" not in text


def test_a_page_that_cannot_be_made_leaves_the_old_one(tmp_path, monkeypatch):
    source = write_notebook(tmp_path / "01-sft.ipynb", "x")
    page = tmp_path / "out" / "x.html"
    page.parent.mkdir()
    page.write_text("old")

    def fail(*args, **more):
        raise RuntimeError("no pandoc")

    monkeypatch.setattr(render.pypandoc, "convert_text", fail)
    with pytest.raises(StudyError):
        write_html(source, page, code=True)
    assert [p.name for p in page.parent.iterdir()] == ["x.html"] and page.read_text() == "old"
