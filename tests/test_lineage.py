"""CKA against its definition and the specification's constants; disguised copies are recognised."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from rlhf_trust import StudyError, lineage
from rlhf_trust.artifacts import TABLES
from rlhf_trust.models import LoRA, load_base, new_adapter, save_adapter

M = 200


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def one(first, second, **options) -> float:
    return float(lineage.cka(first[None], second[None], **options)[0, 0])


def test_independent_noise_looks_derived_to_the_biased_estimator_only():
    rng = np.random.default_rng(0)
    for width, biased, unbiased in (
        (256, 0.561, 0.003),
        (1024, 0.835, -0.001),
        (4096, 0.953, -0.012),
    ):
        x, y = rng.standard_normal((M, width)), rng.standard_normal((M, width))
        assert one(x, y, unbiased=False) == pytest.approx(biased, abs=6e-4)
        assert one(x, y) == pytest.approx(unbiased, abs=6e-4)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("kernel", lineage.KERNELS)
def test_what_leaves_the_similarity_alone(kernel, unbiased):
    x = noise(1, 60, 24) * np.geomspace(3, 0.1, 24)
    rotation = np.linalg.qr(noise(2, 24, 24))[0]
    for copy in (x, x[:, ::-1], 0.8 * x, x @ rotation, x + 5):
        assert one(x, copy, kernel=kernel, unbiased=unbiased) == pytest.approx(1)
    standardised = one(x, x @ rotation, kernel=kernel, unbiased=unbiased, standardised=True)
    assert standardised < 0.95 and one(
        x, 3 * x[:, ::-1], kernel=kernel, unbiased=unbiased, standardised=True
    ) == pytest.approx(1)


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(5, 12),
    widths=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    seed=st.integers(0, 2**16),
    kernel=st.sampled_from(lineage.KERNELS),
)
def test_all_layer_pairs_at_once_are_the_definition(m, widths, seed, kernel):
    rng = np.random.default_rng(seed)
    first, second = (
        rng.standard_normal((layers, m, width)) for layers, width in zip((2, 3), widths)
    )

    def gram(x):
        squares = ((x[:, None] - x[None]) ** 2).sum(-1)
        x = x - x.mean(0)
        return (
            x @ x.T
            if kernel == "linear"
            else np.exp(-squares / (2 * np.median(squares[squares > 1e-12 * squares.max()])))
        )

    def biased(a, b):
        h = np.eye(m) - 1 / m
        return np.trace(a @ h @ b @ h) / (m - 1) ** 2

    def unbiased(a, b):
        a, b, ones = a * (1 - np.eye(m)), b * (1 - np.eye(m)), np.ones(m)
        return (
            np.trace(a @ b)
            + ones @ a @ ones * (ones @ b @ ones) / ((m - 1) * (m - 2))
            - 2 / (m - 2) * (ones @ a @ b @ ones)
        ) / (m * (m - 3))

    for hsic, option in ((biased, False), (unbiased, True)):
        found = lineage.cka(first, second, option, kernel=kernel)
        for i, x in enumerate(map(gram, first)):
            for j, y in enumerate(map(gram, second)):
                own = hsic(x, x) * hsic(y, y)
                if own > 1e-12:
                    assert found[i, j] == pytest.approx(hsic(x, y) / own**0.5, abs=1e-6)


def kernels(seed: int, layers: int = 3, m: int = 60, width: int = 12) -> np.ndarray:
    return lineage.kernel_matrices(noise(seed, layers, m, width))


def test_a_null_and_an_interval_tell_relations_from_chance():
    shared = noise(0, 3, 80, 8)
    first, second = (
        lineage.kernel_matrices(np.concatenate([shared, noise(seed, 3, 80, 8)], 2))
        for seed in (1, 2)
    )
    values = lineage.one_number(lineage.shuffled(first, second))
    assert values[0] == pytest.approx(np.diagonal(lineage.aligned(first, second)).mean())
    assert lineage.p_value(values) == pytest.approx(1 / 200) and abs(values[1:].mean()) < 0.02
    found = lineage.interval(first, second)
    assert found.low < found.value < found.high and found.value == pytest.approx(
        np.diagonal(lineage.aligned(first, second)).mean()
    )
    cubes = [lineage.shuffled(kernels(s), kernels(s + 100), draws=99) for s in range(60)]
    for best in (False, True):  # a maximum over layers is high by chance, too, and its null knows
        ps = np.array([lineage.p_value(lineage.one_number(cube, best=best)) for cube in cubes])
        assert 0.3 < ps.mean() < 0.7 and np.mean(ps <= 0.1) < 0.25
    same = lineage.interval(first, first)
    assert (same.low, same.value, same.high) == pytest.approx((1, 1, 1))


def test_the_interval_covers_the_similarity_over_many_texts():
    """Half-samples of 60 texts hold the value that 1,500 have, in about 95 of 100 studies."""
    truth = lineage.cka(
        *(np.concatenate([noise(0, 1, 1500, 4), noise(s, 1, 1500, 4)], 2) for s in (1, 2))
    )[0, 0]
    hits = 0
    for study in range(120):
        shared = noise(1000 + study, 1, 60, 4)
        first, second = (
            lineage.kernel_matrices(
                np.concatenate([shared, noise(2000 + 2 * study + s, 1, 60, 4)], 2)
            )
            for s in (0, 1)
        )
        found = lineage.interval(first, second, draws=100, name=str(study))
        hits += found.low <= truth <= found.high
    assert hits / 120 > 0.87


def test_layers_are_compared_at_equal_relative_depth():
    assert lineage.same_depth(32, 32, lineage.PAPER_DEPTH) == [(17, 17)]
    assert lineage.same_depth(30, 6, lineage.PAPER_DEPTH) == [(16, 2)]
    assert lineage.same_depth(30, 6) == [(4, 0), (9, 1), (14, 2), (19, 3), (24, 4), (29, 5)]
    assert lineage.same_depth(2, 2) == [(0, 0), (1, 1)]


def test_verdicts():
    def found(low, high):
        return lineage.Interval((low + high) / 2, low, high, 200)

    assert lineage.verdict(found(0.9, 0.99), 0.005, 0.3) == "derived"
    assert (
        lineage.verdict(found(0.9, 0.99), 0.2, 0.3) == "unrelated"
    )  # a high number that shuffled texts reach as well
    assert (
        lineage.verdict(found(0.9, 0.99), 0.005, 0.92) == "open"
    )  # or one that random weights reach
    assert (
        lineage.verdict(found(0.75, 0.85), 0.005, 0.3) == "open"
        and lineage.verdict(found(0.55, 0.7), 0.005, 0.3) == "open"
    )
    assert lineage.verdict(found(0.2, 0.4), 0.005, 0.3) == "unrelated"


def test_bad_states_are_named():
    for compare in (
        lineage.aligned,
        lineage.shuffled,
        lineage.interval,
        lambda a, b: lineage.alignments({"a": a, "b": b}),
    ):
        with pytest.raises(StudyError, match="60 texts of one model against 50 of the other"):
            compare(kernels(0), kernels(1, m=50))
    with pytest.raises(
        StudyError,
        match=r"mine: states must be \[layers, texts, hidden\] of at least 5 texts, got",
    ):
        lineage.kernel_matrices(noise(0, 2, 4, 3), name="mine")
    states = noise(0, 2, 10, 3)
    states[1, 4, 2] = np.nan
    with pytest.raises(StudyError, match="lineage: mine: states of layer 2 are not finite"):
        lineage.kernel_matrices(states, name="mine")
    states = noise(0, 2, 10, 3)
    states[1] = [0.1, 0.7, 1.3]  # whose mean over texts is not exactly these
    with pytest.raises(
        StudyError, match="lineage: mine: layer 2 has the same state for every text"
    ):
        lineage.kernel_matrices(states, name="mine")
    states = noise(0, 2, 10, 3)
    states[0, :, 1] = 0.1
    with pytest.raises(StudyError, match="1 features are the same for every text"):
        lineage.kernel_matrices(states, standardised=True)
    with pytest.raises(StudyError, match="kernel: must be one of linear, radial"):
        lineage.kernel_matrices(states, "rbf")
    with pytest.raises(StudyError, match="4 texts; comparing models takes at least 5"):
        lineage.last_token_states(None, None, ["a"] * 4)
    with pytest.raises(StudyError, match="Linear has no list of num_hidden_layers blocks"):
        lineage.last_token_states(torch.nn.Linear(2, 2), None, ["a"] * 5)


@pytest.mark.parametrize(
    "changed, said",
    [
        (dict(trained=[]), "trained: name at least one adapter"),
        (dict(pruned_share=1.0), "pruned_share: must lie between 0 and 1, got 1"),
        (dict(n_twins=0), "n_twins: must be at least 1"),
        (dict(texts=9), "n_texts: 9 texts, intervals need at least 10"),
        (
            dict(text_counts=[4, 300]),
            r"text_counts: none of \[4, 300\] lies between 5 and 200",
        ),
    ],
)
def test_settings_that_cannot_work_end_before_a_model_is_read(changed, said):
    fine = dict(
        texts=M, trained=["sft"], pruned_share=0.3, n_twins=3, text_counts=[100, 10, 4, 300]
    )
    assert lineage.usable_counts(**fine) == [10, 100]
    with pytest.raises(StudyError, match=f"50-lineage: {said}"):
        lineage.usable_counts(**fine | changed)


def test_models_that_cannot_be_read_are_named(tiny_llama):
    with pytest.raises(StudyError, match="lineage: mine: text 9 has no tokens"):
        lineage.last_token_states(tiny_llama.model, tiny_llama.tokenizer, [*TEXTS, ""], desc="mine")
    with torch.no_grad():
        tiny_llama.model.model.layers[1].mlp.down_proj.weight[0] = torch.nan
    with pytest.raises(StudyError, match="lineage: mine: states of layer 2 are not finite"):
        lineage.last_token_states(tiny_llama.model, tiny_llama.tokenizer, TEXTS, desc="mine")


TEXTS = [
    "the answer",
    "the question is not wrong",
    "human",
    "what is the assistant to the user?",
    "not",
    "the system",
    "is it",
    "to the answer",
]


def test_states_do_not_depend_on_the_batch(tiny):
    states = lineage.last_token_states(tiny.model, tiny.tokenizer, TEXTS, rows=3)
    assert states.shape == (2, len(TEXTS), 32)
    for index, text in enumerate(TEXTS):
        with torch.no_grad():
            hidden = tiny.model(
                **tiny.tokenizer(text, return_tensors="pt"), output_hidden_states=True
            ).hidden_states
            norm = (
                getattr(tiny.model.base_model, "norm", None)
                or tiny.model.base_model.final_layer_norm
            )  # after the last block
            np.testing.assert_allclose(
                norm(torch.tensor(states[1, index])), hidden[2][0, -1], atol=1e-4
            )
        np.testing.assert_allclose(states[0, index], hidden[1][0, -1], atol=1e-4)
    assert (
        lineage.last_token_states(tiny.model.base_model, tiny.tokenizer, TEXTS, rows=3) == states
    ).all()


def test_copies_that_compute_the_same_are_seen_through(tiny_llama):
    model, tokenizer = tiny_llama.model, tiny_llama.tokenizer
    mine = lineage.last_token_states(model, tokenizer, TEXTS)
    ids = torch.tensor([tokenizer(TEXTS[3]).input_ids])
    for copy, tolerance in ((lineage.permuted(model), 1e-4), (lineage.rescaled(model, 0.8), 1e-2)):
        with torch.no_grad():
            torch.testing.assert_close(
                copy(ids).logits, model(ids).logits, atol=tolerance, rtol=tolerance
            )
        other = lineage.last_token_states(copy, tokenizer, TEXTS)
        assert np.abs(other - mine).max() > 0.1
        np.testing.assert_allclose(np.diagonal(lineage.cka(mine, other)), 1, atol=1e-4)
    for copy in (lineage.pruned(model, 0.3), lineage.rounded(model)):
        weights = copy.model.layers[0].mlp.up_proj.weight
        assert not torch.equal(weights, model.model.layers[0].mlp.up_proj.weight)
        assert (
            0.5
            < np.diagonal(
                lineage.cka(mine, lineage.last_token_states(copy, tokenizer, TEXTS))
            ).mean()
            < 1
        )
    assert (
        lineage.pruned(model, 0.3).model.layers[0].mlp.up_proj.weight == 0
    ).float().mean() == pytest.approx(0.3, abs=0.01)
    assert torch.equal(
        lineage.pruned(model, 0.3).model.embed_tokens.weight, model.model.embed_tokens.weight
    )


def test_a_family_is_told_from_unrelated_models(tiny_llama, tmp_path):
    """From random weights of the same shape, and from a model trained on the same texts."""
    base, tokenizer = tiny_llama, tiny_llama.tokenizer
    adapted = new_adapter(base, LoRA(4, 8))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.02)
    save_adapter(base, adapted, tmp_path / "sft")
    expected = lineage.last_token_states(adapted, tokenizer, TEXTS)
    adapted.unload()
    before = [p.clone() for p in base.model.parameters()]
    whole = lineage.merged(base, tmp_path / "sft")
    ids = [tuple(tokenizer(text).input_ids) for text in TEXTS]
    scratch = lineage.trained_from_scratch(base, ids, steps=8, batch=4, learning_rate=1e-2)
    assert all(torch.equal(a, b) for a, b in zip(before, base.model.parameters()))
    fresh, again = lineage.random_init(base), lineage.random_init(base)
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), again.parameters()))

    def loss(model):
        return np.mean(
            [
                model(input_ids=torch.tensor([i]), labels=torch.tensor([i])).loss.item()
                for i in ids
                if len(i) > 1
            ]
        )

    assert loss(scratch) < loss(fresh) - 0.5
    untrained = lineage.trained_from_scratch(base, ids, steps=0)  # other weights than `fresh`
    assert not torch.equal(
        untrained.model.layers[0].mlp.up_proj.weight, fresh.model.layers[0].mlp.up_proj.weight
    )
    models = {
        "start": base.model,
        "sft": whole,
        "renamed": lineage.permuted(whole),
        "random": fresh,
        "scratch": scratch,
    }
    states = {
        name: lineage.last_token_states(model, tokenizer, TEXTS * 2)
        for name, model in models.items()
    }
    np.testing.assert_allclose(states["sft"][:, : len(TEXTS)], expected, atol=1e-4)
    table = lineage.similarities(states)
    assert len(table) == 10 * len(lineage.MEASURES)
    first = table[(table["first"] == "sft") & (table["second"] == "random")].set_index("measure")[
        "value"
    ]
    assert first["unbiased at all depths"] == pytest.approx(
        np.diagonal(lineage.cka(states["sft"], states["random"])).mean()
    )
    assert first["biased at one depth"] == pytest.approx(
        lineage.cka(states["sft"], states["random"], unbiased=False)[0, 0]
    )
    assert first["unbiased, best pair of layers"] == pytest.approx(
        lineage.cka(states["sft"], states["random"]).max()
    )
    told = lineage.separation(table, ["start", "sft", "renamed"]).set_index("measure")
    assert told.loc["unbiased at all depths", "auc"] == 1.0 and tuple(
        told.iloc[0][["n_derived", "n_unrelated"]]
    ) == (3, 7)

    own = {name: lineage.kernel_matrices(s) for name, s in states.items()}
    random_init = [
        lineage.kernel_matrices(
            lineage.last_token_states(lineage.random_init(base, seed), tokenizer, TEXTS * 2)
        )
        for seed in (2, 3)
    ]
    found = lineage.against_start(own, table, ["start", "sft", "renamed"], random_init, draws=39)
    assert list(found) == TABLES["lineage"] and len(found) == 4 * len(lineage.MEASURES)
    study, best = (
        found[found["measure"] == measure].set_index("suspect")
        for measure in (lineage.STUDY, lineage.BEST)
    )
    assert (
        study["twins"]
        == max(np.diagonal(lineage.aligned(own["start"], other)).mean() for other in random_init)
    ).all()
    assert study["derived"].to_dict() == {
        "sft": True,
        "renamed": True,
        "random": False,
        "scratch": False,
    }
    assert study.loc["random", "value"] == pytest.approx(
        np.diagonal(lineage.aligned(own["start"], own["random"])).mean()
    )
    assert best.loc["random", "value"] == pytest.approx(
        lineage.aligned(own["start"], own["random"]).max()
    )
    assert (
        (best["shuffled"] >= study["shuffled"]).all()
        and best["ci_low"].isna().all()
        and (best["verdict"] == "").all()
    )
    assert study.loc["sft", "p"] == 1 / 40 and (study.loc["random", "verdict"] != "derived")
    said = lineage.words(found, told.reset_index())[0]
    assert said.startswith(
        "**Derived models** (unbiased at all depths with start, 95 % interval over 16 texts): sft"
    )


def test_the_measures_are_all_variants():
    assert len(lineage.MEASURES) == 13 and next(iter(lineage.MEASURES)) == lineage.STUDY
    one_depth = {"depth": lineage.PAPER_DEPTH}
    assert lineage.MEASURES[lineage.PAPER] == ("linear", False, False, one_depth)
    authors = lineage.MEASURES["biased standardised at one depth"]
    assert authors == ("linear", True, False, one_depth)
    states = {name: noise(seed, 2, 20, 4) for seed, name in enumerate("abc")}
    found = lineage.similarities(states).set_index(["first", "second", "measure"])["value"]
    for measure, how in (
        ("biased radial standardised at all depths", dict(unbiased=False, standardised=True)),
        ("unbiased radial at all depths", dict(unbiased=True)),
    ):
        assert found["a", "c", measure] == pytest.approx(
            np.diagonal(lineage.cka(states["a"], states["c"], kernel="radial", **how)).mean()
        )


def test_words_say_what_the_rule_misses():
    nan = np.nan
    rows = [
        ("sft", True, 0.95, 0.93, 0.97, 0.005, "derived", 0.7),
        ("cut", True, 0.85, 0.75, 0.9, 0.005, "open", 0.9),
        ("dull", True, 0.9, 0.85, 0.95, 0.2, "unrelated", 0.95),
        ("twin", False, 0.6, 0.55, 0.65, 0.005, "open", 0.85),
        ("other", False, 0.1, 0.05, 0.2, 0.005, "unrelated", 0.3),
    ]
    table = pd.concat(
        pd.DataFrame(
            {
                "suspect": name,
                "derived": derived,
                "measure": [lineage.STUDY, lineage.PAPER, lineage.BEST],
                "value": [value, paper, value],
                "ci_low": [low, nan, nan],
                "ci_high": [high, nan, nan],
                "p": [p, nan, p],
                "shuffled": 0.1,
                "twins": [0.76, nan, nan],
                "verdict": [called, "", ""],
                "n": 200,
            }
        )
        for name, derived, value, low, high, p, called, paper in rows
    )
    told = pd.DataFrame(
        {
            "measure": ["m", "k"],
            "auc": [1.0, 0.9],
            "derived": [0.8, 0.5],
            "unrelated": [0.3, 0.6],
            "n_derived": 3,
            "n_unrelated": 7,
        }
    )
    said = lineage.words(table, told)
    assert said[2] == (
        "The rule misses cut (0.850, 0.750 to 0.900, p = 0.005, open); dull (0.900, 0.850 to "
        "0.950, p = 0.200, unrelated); twin (0.600, 0.550 to 0.650, p = 0.005, open)."
    )
    assert "twin (0.850) would be called derived, and sft (0.700) would be missed" in said[3]
    assert "the least similar derived model reaches 0.850 (cut; 95 % of" in said[4]
    assert "the most similar unrelated model reaches 0.600 (twin; 95 % of" in said[5]
    assert "1 of 2 measures separate without error (the others: k)" in said[-1]
    right = table[table["suspect"].isin(["sft", "other"])]
    assert lineage.words(right, told)[2] == "The rule misses no model."


def test_separation_counts_pairs():
    table = pd.DataFrame(
        {
            "first": list("aaab"),
            "second": list("bcdc"),
            "measure": "m",
            "value": [0.9, 0.4, 0.95, 0.1],
        }
    )
    found = lineage.separation(table, list("ab")).iloc[0]
    assert found["auc"] == pytest.approx(2 / 3) and (found["derived"], found["unrelated"]) == (
        0.9,
        0.95,
    )
    curve = lineage.roc(table, list("ab"))
    assert curve["false_positive"].tolist() == pytest.approx([0, 1 / 3, 1 / 3, 2 / 3, 1])
    assert curve["true_positive"].tolist() == [0, 0, 1, 1, 1]
    assert np.trapezoid(curve["true_positive"], curve["false_positive"]) == pytest.approx(
        found["auc"]
    )


def test_the_margin_with_fewer_texts():
    shared = noise(0, 3, 60, 6)
    own = {
        name: lineage.kernel_matrices(np.concatenate([shared, 0.5 * noise(seed, 3, 60, 6)], 2))
        for seed, name in enumerate("abc", 1)
    }
    own["random"] = kernels(9, layers=2)
    made = lineage.alignments(own)
    assert lineage.margin(made, list("abc")) == pytest.approx(
        min(np.diagonal(made[pair]).mean() for pair in (("a", "b"), ("a", "c"), ("b", "c")))
        - max(made[name, "random"][[1, 2], [0, 1]].mean() for name in "abc")
    )
    found = lineage.margin_by_texts(own, list("abc"), [5, 20, 60])
    assert (found["low"] <= found["median"]).all() and (
        found["high"] - found["low"]
    ).is_monotonic_decreasing
    assert found["median"].iloc[-1] == pytest.approx(lineage.margin(made, list("abc")))

    def fewest(*lows):
        return lineage.enough(pd.DataFrame({"texts": [10, 25, 50, 100][: len(lows)], "low": lows}))

    # A small count with a margin by chance is not enough.
    assert (
        fewest(0.1, -0.1, 0.1, 0.2) == 50 and fewest(0.1, 0.2) == 10 and fewest(0.1, -0.1) is None
    )


def test_permuting_needs_a_llama(tiny_directories):
    with pytest.raises(StudyError, match="in Llama models only, this is 'gpt_neox'"):
        lineage.permuted(load_base(f"path:{tiny_directories['gpt_neox']}", "float32").model)
