"""RM-Bench: the paper's matrix, scores against plain loops, and what its rows may lack."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from rlhf_trust import StudyError, decode, models
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
    return [
        Item(
            f"{d}:{i}",
            d,
            f"what is {'the ' * i}{d}",
            ("a", f"the answer is {d}", "the **answer**"),
            ("b", "no it is not", "not **it**"),
        )
        for d in domains
        for i in range(per_domain)
    ]


def test_levels_of_the_papers_matrix():
    rates = rm_bench.level_rates(FSFAIRX[None])
    assert {level: round(float(rates[level][0]), 2) for level in LEVELS} == {
        "easy": 93.26,
        "normal": 72.13,
        "hard": 18.58,
    }
    assert (
        rates["average"][0]
        == pytest.approx(FSFAIRX.mean())
        == pytest.approx(np.mean([rates[level][0] for level in LEVELS]))
    )


def test_wins_are_strict_and_in_the_right_cell():
    scores = np.array([[[3.0, 1.0, 2.0], [1.0, 2.0, 5.0]]])
    assert rm_bench.wins(scores)[0].tolist() == [[1, 1, 0], [0, 0, 0], [1, 0, 0]]
    rates = rm_bench.level_rates(rm_bench.wins(scores))
    assert {k: round(float(v[0]), 3) for k, v in rates.items()} == {
        "easy": 0.333,
        "normal": 0.333,
        "hard": 0.333,
        "average": 0.333,
    }
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
    assert (
        table.loc[(title, "average"), "n"] == len(items)
        and table.loc[(domains[0], "hard"), "value"] == 1.0
    )
    rng = np.random.default_rng(0)
    won = (rng.random(won.shape) < 0.6).astype(float)
    mixed = rm_bench.summary(items, won, released=True).set_index(["domain", "level"]).loc[title]
    assert (mixed["ci_low"] < mixed["value"]).all() and (mixed["value"] < mixed["ci_high"]).all()
    of_matrix = rm_bench.level_rates(
        rm_bench.matrix(items, won)[None]
    )  # the figure and the table say the same
    assert all(
        of_matrix[level][0] == pytest.approx(mixed.loc[level, "value"])
        for level in (*LEVELS, "average")
    )
    assert mixed.loc["style_gap", "value"] == pytest.approx(
        mixed.loc["easy", "value"] - mixed.loc["hard", "value"]
    )
    shipped = rm_bench.summary(items, won, released=False)
    assert shipped["domain"].iloc[-1] == f"shipped items, {len(domains)}-domain"
    labelled = rm_bench.over_domains(shipped.assign(model="m"))
    assert set(labelled["level"]) == {*LEVELS, "average"}
    assert set(labelled["model"]) == {f"m (shipped items, {len(domains)}-domain, n = {len(items)})"}


def test_style_is_judged_item_by_item():
    """Easy and hard move together: their intervals overlap, but hard is lower item by item."""
    items, rng = some_items(20), np.random.default_rng(0)

    def judged(able, missed):
        won = np.tile((rng.random((len(items), 1, 1)) < able).astype(float), (1, 3, 3))
        won[:, 0, 2] *= rng.random(len(items)) >= missed
        table = rm_bench.summary(items, won, released=True)
        return table[table["domain"] == "overall"].set_index("level"), rm_bench.words(
            table.assign(model="m")
        )[0]

    overall, said = judged(0.8, 0.5)
    assert (
        overall.loc["easy", "ci_low"] < overall.loc["hard", "ci_high"]
        and overall.loc["style_gap", "ci_low"] > 0
    )
    assert (
        ": overall average " in said
        and " over 80 items, " in said
        and ". Style sways it: easy" in said
    )
    assert "below a coin. Style outweighs substance: easy" in judged(0.4, 0.9)[1]
    assert "Style does not clearly sway it: " in judged(0.8, 0.0)[1]
    alone = rm_bench.words(
        rm_bench.summary(items[:21], np.ones((21, 3, 3)), released=True).assign(model="m")
    )[0]
    assert " over 21 items, too few in a domain for a verdict. By style: easy" in alone


def test_bias_of_one_who_likes_markdown_and_of_one_who_likes_length():
    items = some_items(10)
    rng = np.random.default_rng(0)
    lengths = rng.permuted(np.tile(np.arange(6.0), (len(items), 1)), axis=1).reshape(
        len(items), 2, 3
    )
    likes_markdown = 0.1 * rng.normal(size=lengths.shape) + np.array([0.0, 0.0, 1.0])
    found = rm_bench.style_bias(items, likes_markdown, lengths).set_index("bias")
    assert (
        found.loc["markdown", "ci_low"] > 1.5
        and found.loc["detail", "ci_low"] < 0 < found.loc["detail", "ci_high"]
    )
    found = rm_bench.style_bias(items, lengths**3, lengths).set_index("bias")
    assert found.loc["length", "value"] == pytest.approx(1.0)
    # An item's own level is no style, and a domain with many items weighs like any other.
    own_level = 100 * rng.normal(size=(len(items), 1, 1))
    np.testing.assert_allclose(
        rm_bench.style_bias(items, likes_markdown + own_level, lengths)["value"].to_numpy(),
        rm_bench.style_bias(items, likes_markdown, lengths)["value"].to_numpy(),
    )
    more = some_items(10) + some_items(200, DOMAINS[:1])
    of_one = rng.normal(size=(len(more), 2, 3))
    of_one[[item.domain == DOMAINS[0] for item in more], :, 2] += 1
    markdown = (
        rm_bench.style_bias(more, of_one, rng.normal(size=of_one.shape))
        .set_index("bias")
        .loc["markdown"]
    )
    assert 0 < markdown["value"] < 0.6  # about 1 SD in one domain of four, about 0 in the others
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
                assert of_implicit[side, style] == pytest.approx(
                    sums["reward"] - sums["sft"], abs=1e-3
                )
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
    kind(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_labels=labels,
            pad_token_id=2,
            eos_token_id=2,
            bos_token_id=1,
        )
    ).save_pretrained(directory)
    return f"path:{directory}"


def test_scores_of_a_sequence_classifier(tiny_directories, tmp_path):
    source = save_classifier(tmp_path / "one", tiny_directories["llama"])
    items = some_items(1)
    batched, alone = (rm_bench.classifier_scores(source, items, rows=rows) for rows in (8, 1))
    np.testing.assert_allclose(batched, alone, atol=1e-4)
    model = LlamaForSequenceClassification.from_pretrained(tmp_path / "one").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    ids = tokenizer(
        f"user {items[1].prompt} assistant {items[1].rejected[2]} ", return_tensors="pt"
    )["input_ids"]
    assert batched[1, 1, 2] == pytest.approx(float(model(input_ids=ids).logits), abs=1e-4)
    with pytest.raises(StudyError, match="has 2 labels; a reward model has one"):
        rm_bench.classifier_scores(
            save_classifier(tmp_path / "two", tiny_directories["llama"], labels=2), items
        )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    ended = save_classifier(
        tmp_path / "ended",
        tiny_directories["llama"],
        pad=tokenizer.eos_token,
        template="{{ messages[1]['content'] }}{{ eos_token }}",
    )
    ids = tokenizer(f"{items[0].chosen[0]}{tokenizer.eos_token}", return_tensors="pt")["input_ids"]
    model = LlamaForSequenceClassification.from_pretrained(tmp_path / "ended").eval()
    with torch.no_grad():  # at the end token, though the tokenizer would pad with it
        wanted = float(model.score(model.model(input_ids=ids).last_hidden_state)[0, -1, 0])
    assert int(ids[0, -1]) == tokenizer.eos_token_id
    assert rm_bench.classifier_scores(ended, items)[0, 0, 0] == pytest.approx(wanted, abs=1e-4)
    source = save_classifier(
        tmp_path / "headless", tiny_directories["llama"], kind=LlamaForCausalLM
    )
    with pytest.raises(
        StudyError, match=r"lacks the weights \['score.weight'\]; it is no reward model"
    ):
        rm_bench.classifier_scores(source, items)
    with pytest.raises(StudyError, match="no chat template"):
        rm_bench.classifier_scores(
            save_classifier(tmp_path / "bare", tiny_directories["llama"], template=None), items
        )


# --- data -----------------------------------------------------------------------------------------


def test_shipped_items():
    items = rm_bench.load_rm_bench("shipped")
    assert (
        len(items) == 24
        and {item.domain for item in items} == set(DOMAINS)
        and len({item.id for item in items}) == 24
    )
    for item in items:
        assert len(set(item.chosen + item.rejected)) == 6
        for concise, plain, markdown in (item.chosen, item.rejected):
            assert len(concise.split()) < 0.75 * min(len(plain.split()), len(markdown.split()))
            assert (
                any(mark in markdown for mark in ("**", "\n- ", "\n1. ", "```", "## "))
                and "**" not in plain
                and "```" not in plain
            )


def test_real_items(real_data):
    items = rm_bench.load_rm_bench(f"path:{real_data}")
    counts = {d: sum(item.domain == d for item in items) for d in DOMAINS}
    assert counts == {"chat": 129, "math": 0, "code": 228, "safety": 441}
    assert (
        rm_bench.summary(items, np.ones((len(items), 3, 3)), released=True)["domain"].iloc[-1]
        == "3-domain"
    )


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"prompt": "p", "chosen": ["a", "b"], "rejected": ["a", "b", "c"]},
            "item 2: needs a prompt, and chosen and rejected",
        ),
        ({"chosen": ["a"] * 3, "rejected": ["b"] * 3}, "item 2: needs a prompt"),
        ("text", "item 2: needs a prompt"),
        ({"prompt": "p", "chosen": ["a", "", "c"], "rejected": ["b"] * 3}, "item 2: needs"),
        ({"prompt": ["p"], "chosen": ["a"] * 3, "rejected": ["b"] * 3}, "item 2: needs a prompt"),
        ({"prompt": " ", "chosen": ["a"] * 3, "rejected": ["b"] * 3}, "item 2: needs a prompt"),
        (
            {"prompt": "p", "chosen": ["a", "b", "c"], "rejected": ["b", "c", "c"]},
            "item 2: .* are the same markdown answer",
        ),
    ],
)
def test_a_row_without_its_answers_is_named(tmp_path, row, said):
    (tmp_path / "rm-bench").mkdir()
    good = {"prompt": "p", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"]}
    (tmp_path / "rm-bench" / "code_filtered.json").write_text(json.dumps([good, row]))
    with pytest.raises(StudyError, match=f"code_filtered.json: {said}"):
        rm_bench.load_rm_bench(f"path:{tmp_path}")


def test_no_file_at_all(tmp_path):
    with pytest.raises(StudyError, match="has no rm-bench/<domain>_filtered.json"):
        rm_bench.load_rm_bench(f"path:{tmp_path}")
