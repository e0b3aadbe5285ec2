"""Report and appendix as PDF: what stands in them, what stays out, and the same bytes again."""

from __future__ import annotations

import json

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from rlhf_trust import StudyError, pdf, render
from test_render import PIXEL

FACTS = ['Run "smoke" of #2 notebooks', "Model: path:…/a_b"]


@pytest.fixture
def notebooks(tmp_path):
    picture = {"image/png": PIXEL}
    told = render.samples([("Who?", {"sft": "something harsh"})], warning="Harsh.").data
    rows = pd.DataFrame({"model": ["sft"] * 14, "change_in_rate": [0.25] * 14})
    numbers = render.table(rows).data
    first = [
        new_markdown_cell("# First?\n\n[Second?](02-reward.ipynb) →\n\nLoss $x_1 = \\frac{1}{2}$."),
        new_markdown_cell("## Part\n\nSee [rewards](02-reward.ipynb), [none](30-none.ipynb)."),
        new_code_cell('say("# code")', outputs=[new_output("display_data", {"text/html": told})]),
        new_code_cell("table", outputs=[new_output("display_data", {"text/html": numbers})]),
        new_code_cell("show", outputs=[new_output("display_data", picture)]),
    ]
    first[-1].outputs[0].metadata = {"image/png": {"alt": "A dot"}}
    second = [new_markdown_cell("# Second?\n\n$$y$$"), new_code_cell("x = 1")]
    paths = [tmp_path / "01-sft.ipynb", tmp_path / "02-reward.ipynb"]
    for path, cells in zip(paths, (first, second)):
        nbformat.write(new_notebook(cells=cells), path)
    return paths


def test_an_appendix_has_chapters_that_link_to_each_other(notebooks):
    text, images = pdf.typst_source(notebooks, "An appendix", FACTS, code=True, full=False)
    assert "= First?\n<01-sft>" in text and "= Second?\n<02-reward>" in text
    assert "#link(<02-reward>)[rewards]" in text and "30-none" not in text
    assert 'say("# code")' in text and "```python" in text
    assert "something harsh" not in text and "folded away" in text
    assert "change\\_in\\_rate" in text and '#set document(title: "An appendix"' in text
    assert json.dumps(FACTS[0]) in text and "…/a_b" in text
    assert 'alt: "x_{1} = \\\\frac{1}{2}"' in text
    assert len(images) == 1 and f'#figure(image("{[*images][0]}"' in text
    assert "something harsh" in pdf.typst_source(notebooks, "x", [], code=False, full=True)[0]


def test_a_table_is_whole_and_has_its_section_as_caption(notebooks):
    text, _ = pdf.typst_source(notebooks, "x", [], code=False, full=False)
    assert text.count("kind: table\n") == 1 and text.count("table.header(") == 1
    caption = text[text.index("table.header(") :].partition("kind: table")[0]
    assert "caption: [Part]" in caption and text.count("[sft]") == 14 and "more rows" not in text


def test_a_pdf_is_tagged_and_made_alike_twice(notebooks, tmp_path):
    out = tmp_path / "out" / "appendix.pdf"
    made = []
    for _ in range(2):
        document = pdf.typst_source(notebooks, "An appendix", FACTS, code=True, full=False)
        pdf.write_pdf(out, *document)
        made.append(out.read_bytes())
    assert made[0] == made[1] and made[0].startswith(b"%PDF-1.")
    assert b"pdfuaid:part" in made[0] and b"/StructTreeRoot" in made[0]


def test_what_cannot_be_set_leaves_the_old_file(tmp_path):
    out = tmp_path / "report.pdf"
    out.write_bytes(b"old")
    with pytest.raises(StudyError, match=r"typst cannot set report\.pdf \(") as caught:
        pdf.write_pdf(out, "#set document(title: [x])\n#nothing", {})
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["report.pdf"] and out.read_bytes() == b"old"
