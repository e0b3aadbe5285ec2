"""RM-Bench: the paper's matrix, scores against plain loops, and what its rows may lack."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from rlhf_trust import StudyError, decode, models, score
from rlhf_trust.chat import Chat
from rlhf_trust.data import choose
from rlhf_trust.rewards import rm_bench
from rlhf_trust.rewards.rm_bench import DOMAINS, LEVELS, Item
from test_ppo import write_adapters
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

FSFAIRX = np.array([[83.61, 3.83, 2.19], [99.45, 66.12, 49.73], [100.0, 80.33, 66.67]])
"""sfairXC/FsfairX-LLaMA3-RM-v0.1 on the chat domain (the paper's figure), percent."""


def some_items(per_domain=2, domains=DOMAINS):
    items, wrong = [], ("b", "no it is not", "not **it**")
    for d in domains:
        right = ("a", f"the answer is {d}", "the **answer**")
        for i in range(per_domain):
            items.append(Item(f"{d}:{i}", d, f"what is {'the ' * i}{d}", right, wrong))
    return items


def test_levels_of_the_papers_matrix():
    rates = rm_bench.level_rates(FSFAIRX[None])
    found = {level: float(rates[level][0]) for level in LEVELS}
    assert found == pytest.approx({"easy": 93.26, "normal": 72.13, "hard": 18.58}, abs=0.005)
    assert rates["average"][0] == pytest.approx(FSFAIRX.mean())
    assert rates["average"][0] == pytest.approx(np.mean(list(found.values())))


def test_wins_are_strict_and_in_the_right_cell():
    scores = np.array([[[3.0, 1.0, 2.0], [1.0, 2.0, 5.0]]])
    assert rm_bench.wins(scores)[0].tolist() == [[1, 1, 0], [0, 0, 0], [1, 0, 0]]
    rates = rm_bench.level_rates(rm_bench.wins(scores))
    assert set(rates) == {*LEVELS, "average"}
    assert [float(rate[0]) for rate in rates.values()] == pytest.approx([1 / 3] * 4)
    with pytest.raises(StudyError, match="rm-bench: 1 scores are not finite"):
        rm_bench.wins(np.where(scores == 5, np.nan, scores))


@pytest.mark.parametrize(
    ("domains", "title"), [(DOMAINS, "overall"), (("chat", "code", "safety"), "3-domain")]
)
def test_domains_weigh_alike_and_missing_ones_are_named(domains, title):
    items = some_items(2, domains) + some_items(30, domains[:1])
    won = np.zeros((len(items), 3, 3))
    won[[i for i, item in enumerate(items) if item.domain == domains[0]]] = 1.0
    table = rm_bench.summary(items, won, released=True).set_index(["domain", "level"])
    assert set(table.index.get_level_values(0)) == {*domains, title}
    assert table.loc[(title, "average"), "value"] == pytest.approx(1 / len(domains))
    assert table.loc[(title, "average"), "n"] == len(items)
    assert table.loc[(domains[0], "hard"), "value"] == 1.0
    rng = np.random.default_rng(0)
    won = (rng.random(won.shape) < 0.6).astype(float)
    mixed = rm_bench.summary(items, won, released=True).set_index(["domain", "level"]).loc[title]
    assert (mixed["ci_low"] < mixed["value"]).all() and (mixed["value"] < mixed["ci_high"]).all()
    # The figure and the table say the same.
    of_matrix, mean = rm_bench.level_rates(rm_bench.matrix(items, won)[None]), mixed["value"]
    for level in (*LEVELS, "average"):
        assert of_matrix[level][0] == pytest.approx(mean[level])
    assert mean["style_gap"] == pytest.approx(mean["easy"] - mean["hard"])
    shipped = rm_bench.summary(items, won, released=False)
    assert shipped["domain"].iloc[-1] == f"shipped items, {len(domains)}-domain"
    labelled = rm_bench.over_domains(shipped.assign(model="m"))
    assert set(labelled["level"]) == {*LEVELS, "average"}
    assert set(labelled["model"]) == {f"m (shipped items, {len(domains)}-domain)"}


def test_style_is_judged_item_by_item():
    """Easy and hard move together: their intervals overlap, but hard is lower item by item."""
    items, rng = some_items(20), np.random.default_rng(0)

    def judged(able, missed):
        won = np.tile((rng.random((len(items), 1, 1)) < able).astype(float), (1, 3, 3))
        won[:, 0, 2] *= rng.random(len(items)) >= missed
        table = rm_bench.summary(items, won, released=True)
        (said,) = rm_bench.words(table.assign(model="m"))
        return table[table["domain"] == "overall"].set_index("level"), said

    overall, said = judged(0.8, 0.5)
    assert overall.loc["easy", "ci_low"] < overall.loc["hard", "ci_high"]
    assert overall.loc["style_gap", "ci_low"] > 0
    for part in (": overall average ", " over 80 items, ", ". Style sways it: easy"):
        assert part in said
    assert "below a coin. Style outweighs substance: easy" in judged(0.4, 0.9)[1]
    assert "Style does not clearly sway it: " in judged(0.8, 0.0)[1]
    alone = rm_bench.summary(items[:21], np.ones((21, 3, 3)), released=True)
    (said,) = rm_bench.words(alone.assign(model="m"))
    assert " over 21 items, too few in a domain for a verdict. By style: easy" in said


def test_bias_of_one_who_likes_markdown_and_of_one_who_likes_length():
    items = some_items(10)
    rng = np.random.default_rng(0)
    lengths = rng.permuted(np.tile(np.arange(6.0), (len(items), 1)), axis=1)
    lengths = lengths.reshape(len(items), 2, 3)
    likes_markdown = 0.1 * rng.normal(size=lengths.shape) + np.array([0.0, 0.0, 1.0])
    found = rm_bench.style_bias(items, likes_markdown, lengths).set_index("bias")
    assert found.loc["markdown", "ci_low"] > 1.5
    assert found.loc["detail", "ci_low"] < 0 < found.loc["detail", "ci_high"]
    found = rm_bench.style_bias(items, lengths**3, lengths).set_index("bias")
    assert found.loc["length", "value"] == pytest.approx(1.0)
    # An item's own level is no style, and a domain with many items weighs like any other.
    own_level = 100 * rng.normal(size=(len(items), 1, 1))
    bias, same = (
        rm_bench.style_bias(items, scores, lengths)["value"].to_numpy()
        for scores in (likes_markdown, likes_markdown + own_level)
    )
    np.testing.assert_allclose(bias, same)
    more = some_items(10) + some_items(200, DOMAINS[:1])
    of_one = rng.normal(size=(len(more), 2, 3))
    of_one[[item.domain == DOMAINS[0] for item in more], :, 2] += 1
    found = rm_bench.style_bias(more, of_one, rng.normal(size=of_one.shape)).set_index("bias")
    # About 1 SD in one domain of four, about 0 in the others.
    assert 0 < found.loc["markdown", "value"] < 0.6
    with pytest.raises(StudyError, match="all scores are equal"):
        rm_bench.style_bias(items, np.ones_like(lengths), lengths)


def test_scores_of_the_studys_models(tiny, chat, tmp_path):
    sft, reward = write_adapters(tiny, tmp_path)
    model = models.load_adapters(tiny, {"sft": sft, "reward": reward})
    head, items = models.load_reward_head(reward), some_items(1)
    kept = decode.Generations(tmp_path / "kept", chat)

    def scored(model, head):
        def scores(adapter, head=None):
            return rm_bench.adapter_scores(model, adapter, items, kept, f"{adapter} of today", head)

        return scores("reward", head), scores("reward") - scores("sft")

    rewards, implicit = scored(model, head)
    for first, again in zip((rewards, implicit), scored(None, head)):  # kept: no model is needed
        assert (first == again).all()
    for item, of_rewards, of_implicit in zip(items, rewards, implicit):
        for side, answers in enumerate((item.chosen, item.rejected)):
            for style, answer in enumerate(answers):
                sequence = chat.sequence((item.prompt,), answer)
                sums = {}
                for adapter in ("reward", "sft"):
                    model.set_adapter(adapter)
                    with torch.no_grad():
                        sums[adapter] = float(decode.token_logps(model, [sequence], 2)[0].sum())
                        if adapter == "reward":
                            alone = float(decode.rewards(model, head, [sequence], 2)[0])
                assert of_rewards[side, style] == pytest.approx(alone, rel=1e-3, abs=1e-3)
                difference = sums["reward"] - sums["sft"]
                assert of_implicit[side, style] == pytest.approx(difference, abs=1e-3)
    assert rm_bench.answer_lengths(items, chat)[0, 0, 1] == len(chat.answer_ids(items[0].chosen[1]))


def save_classifier(
    directory,
    tokenizer_from,
    labels=1,
    template="{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}",
    pad=None,
    kind=LlamaForSequenceClassification,
):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_from)
    tokenizer.chat_template, tokenizer.pad_token = template, pad or tokenizer.pad_token
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=labels,
        pad_token_id=2,
    )
    kind(config).save_pretrained(directory)
    return f"path:{directory}"


def test_scores_of_a_sequence_classifier(tiny_directories, tmp_path):
    source = save_classifier(tmp_path / "one", tiny_directories["llama"])
    items = some_items(1)
    batched, alone = (
        rm_bench.classifier_scores(
            source, rm_bench.dialogues(items), tmp_path / f"kept {rows}", rows=rows
        ).reshape(-1, 2, 3)
        for rows in (8, 1)
    )
    np.testing.assert_allclose(batched, alone, atol=1e-4)
    model = LlamaForSequenceClassification.from_pretrained(tmp_path / "one").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    text = f"user {items[1].prompt} assistant {items[1].rejected[2]} "
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert batched[1, 1, 2] == pytest.approx(float(model(input_ids=ids).logits), abs=1e-4)
    ends = {"pad": tokenizer.eos_token, "template": "{{ messages[1]['content'] }}{{ eos_token }}"}
    ended = save_classifier(tmp_path / "ended", tiny_directories["llama"], **ends)
    ids = tokenizer(f"{items[0].chosen[0]}{tokenizer.eos_token}", return_tensors="pt")["input_ids"]
    model = LlamaForSequenceClassification.from_pretrained(tmp_path / "ended").eval()
    with torch.no_grad():  # at the end token, though the tokenizer would pad with it
        wanted = float(model.score(model.model(input_ids=ids).last_hidden_state)[0, -1, 0])
    assert int(ids[0, -1]) == tokenizer.eos_token_id
    found = rm_bench.classifier_scores(ended, rm_bench.dialogues(items), tmp_path)
    assert found[0] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({"labels": 2}, "has 2 labels; a reward model has one"),
        ({"kind": LlamaForCausalLM}, r"lacks the weights \['score.weight'\]; it is no reward"),
        ({"template": None}, "no chat template"),
    ],
)
def test_what_is_no_reward_model_is_refused(tiny_directories, tmp_path, made, said):
    source = save_classifier(tmp_path / "made", tiny_directories["llama"], **made)
    with pytest.raises(StudyError, match=said):
        rm_bench.classifier_scores(source, rm_bench.dialogues(some_items(1)), tmp_path)


def test_scores_of_a_classifier_are_kept(tiny_directories, tmp_path, monkeypatch, capsys):
    source = save_classifier(tmp_path / "one", tiny_directories["llama"])
    texts, kept = rm_bench.dialogues(some_items(1)), tmp_path / "kept"
    first = rm_bench.classifier_scores(source, texts[:12], kept)
    read = []
    monkeypatch.setattr(decode, "pad_right", lambda *a, f=decode.pad_right: read.append(a) or f(*a))
    again = rm_bench.classifier_scores(source, texts, kept)
    assert (again[:12] == first).all() and sum(len(ids) for ids, *_ in read) == 6 * 2
    assert capsys.readouterr().out == ""
    rm_bench.classifier_scores(source, texts, kept, max_length=5)
    assert "24 answers lose what is beyond 5 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["reference", *rm_bench.FORMS])
def test_scores_of_language_models(tiny_directories, tmp_path, monkeypatch, capsys, form):
    """Whole models, through the command, against a plain loop over tokens."""
    mine, theirs = (f"path:{tiny_directories[kind]}" for kind in ("llama", "gpt_neox"))
    monkeypatch.setattr(score, "ROOT", tmp_path)
    monkeypatch.setattr(models, "auto_dtype", lambda: torch.float32)  # whatever this processor has
    reference = ["--reference", theirs] if form == "reference" else ["--form", form]
    given = ["rm-bench", mine, "-n", "4", *reference, "--save", str(tmp_path / "table.csv")]
    assert score.main(given) == 0
    assert f"**{mine}**" in capsys.readouterr().out
    items = choose(rm_bench.load_rm_bench("shipped"), 4, 0, by=lambda item: item.domain)

    def of_tokens(source, count):
        base = models.load_base(source)
        chat = Chat(base.tokenizer, "auto")
        found = []
        for sequence in rm_bench.answers_of(items, chat):
            with torch.no_grad():
                logits = base.model(torch.tensor([sequence.input_ids])).logits[0].log_softmax(-1)
            places = range(sequence.answer_start, len(sequence.input_ids))
            found.append(count([float(logits[i - 1, sequence.input_ids[i]]) for i in places]))
        return np.reshape(found, (4, 2, 3))

    if form == "reference":
        wanted = of_tokens(mine, np.sum) - of_tokens(theirs, np.sum)
    else:
        count = {"sum": np.sum, "average": np.mean, "norm": lambda x: -np.linalg.norm(x)}[form]
        wanted = of_tokens(mine, count)
    found = rm_bench.policy_scores(
        mine,
        rm_bench.dialogues(items),
        tmp_path / "build" / "score",
        theirs if form == "reference" else "",
        form if form != "reference" else "average",
    ).reshape(-1, 2, 3)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-3)
    table = rm_bench.summary(items, rm_bench.wins(found), mine, released=False)
    saved = pd.read_csv(tmp_path / "table.csv")
    np.testing.assert_allclose(saved["value"], table["value"], rtol=1e-5)


# --- data -----------------------------------------------------------------------------------------


def test_shipped_items():
    items = rm_bench.load_rm_bench("shipped")
    assert len(items) == len({item.id for item in items}) == 24
    assert {item.domain for item in items} == set(DOMAINS)
    for item in items:
        assert len(set(item.chosen + item.rejected)) == 6
        for concise, plain, markdown in (item.chosen, item.rejected):
            assert len(concise.split()) < 0.75 * min(len(plain.split()), len(markdown.split()))
            assert any(mark in markdown for mark in ("**", "\n- ", "\n1. ", "```", "## "))
            assert "**" not in plain and "```" not in plain


def test_real_items(real_data):
    items = rm_bench.load_rm_bench(f"path:{real_data}")
    counts = {d: sum(item.domain == d for item in items) for d in DOMAINS}
    assert counts == {"chat": 129, "math": 0, "code": 228, "safety": 441}
    table = rm_bench.summary(items, np.ones((len(items), 3, 3)), released=True)
    assert table["domain"].iloc[-1] == "3-domain"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"chosen": ["a", "b"]}, "item 2: chosen and rejected must have three answers each"),
        ({"prompt": None}, "item 2: no prompt"),
        ("text", r"items\[1\] must be an object"),
        ({"chosen": ["a", "", "c"]}, r"item 2: no chosen\[1\]"),
        ({"prompt": ["p"]}, "item 2: prompt must be a text"),
        ({"prompt": " "}, "item 2: no prompt"),
        ({"rejected": ["d", "e", "c"]}, "item 2: .* are the same markdown answer"),
    ],
)
def test_a_row_without_its_answers_is_named(tmp_path, row, said):
    (tmp_path / "rm-bench").mkdir()
    good = {"prompt": "p", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"]}
    row = good | row if isinstance(row, dict) else row
    (tmp_path / "rm-bench" / "code_filtered.json").write_text(json.dumps([good, row]))
    with pytest.raises(StudyError, match=f"code_filtered.json: {said}"):
        rm_bench.load_rm_bench(f"path:{tmp_path}")


def test_all_items_in_one_file(tmp_path):
    (tmp_path / "rm-bench").mkdir()
    row = {"prompt": "p", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"]}
    rows = [row | {"domain": domain} for domain in rm_bench.FILES]
    whole = tmp_path / "rm-bench" / "total_dataset.json"
    whole.write_text(json.dumps(rows))
    items = rm_bench.load_rm_bench(f"path:{tmp_path}")
    assert [item.domain for item in items] == ["chat", "math", "code", "safety", "safety"]
    assert len(rm_bench.by_domain(items, np.zeros(5))["safety"]) == 2
    whole.write_text(json.dumps([*rows, row]))
    with pytest.raises(StudyError, match="item 6: no domain"):
        rm_bench.load_rm_bench(f"path:{tmp_path}")


def test_no_file_at_all(tmp_path):
    with pytest.raises(StudyError, match="has no rm-bench/<domain>_filtered.json"):
        rm_bench.load_rm_bench(f"path:{tmp_path}")
