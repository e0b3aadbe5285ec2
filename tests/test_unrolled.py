"""Attribution through training against retrainings with other weights, and against automatic
differentiation of the whole training."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import random_head, some_examples
from datasets import Dataset
from parity import bergson_magic
from peft import LoraConfig, get_peft_model
from rlhf_trust import ROOT, StudyError, losses as loss_module
from rlhf_trust.attribution import unrolled
from rlhf_trust.attribution.unrolled import Stage, train_stages, unrolled_scores
from rlhf_trust.attribution.validate import Queries
from rlhf_trust.chat import preference_row
from rlhf_trust.decode import Example, LowerStates
from rlhf_trust.losses import (
    DPOLoss,
    INPOLoss,
    LogOddsLoss,
    NextTokenLoss,
    RewardGapLoss,
    RewardLoss,
    reference_logps,
    training_loss,
)
from rlhf_trust.models import (
    LoRA,
    load_base,
    load_tokenizer,
    lora_layers,
    new_adapter,
    restore,
    snapshot,
)
from rlhf_trust.training import (
    CLIP,
    TrainConfig,
    Trajectory,
    example_losses,
    fit,
    training_batches,
    trl_arguments,
)
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

PAD = 0
CONFIG = TrainConfig(
    learning_rate=2e-2, batch_size=4, micro_batch_size=3, epochs=2, warmup=0.2, epsilon=1e-2
)

SMOOTH = replace(CONFIG, learning_rate=2e-3, epsilon=0.1)
"""Steps so small and smooth that a hundredth of a weight is a small change of it."""


@pytest.fixture
def network(tiny_directories):
    """A tiny model in float64, whose retrainings differ by less than float32 tells (Llama's
    norms are always in float32, so GPT-NeoX); its adapter has
    weights, so that no gradient is zero."""
    base = load_base(f"path:{tiny_directories['gpt_neox']}", dtype="float32")
    base.model.double()
    network = new_adapter(base, LoRA(2, 4)).double().eval()
    torch.manual_seed(1)
    for layer in lora_layers(network, "default").values():
        torch.nn.init.normal_(layer.weight, std=0.1)
    return network


def losses(network, stage):
    """A stage's loss and seven examples."""
    if stage == "sft":
        return NextTokenLoss(), some_examples(7, 1)
    pairs = some_examples(7, 2)
    if stage == "reward":
        return RewardLoss(torch.nn.Parameter(random_head(32, 0).double())), pairs
    reference = reference_logps(network, "default", pairs, PAD)
    if stage == "dpo":
        return DPOLoss(0.1, reference), pairs
    return INPOLoss(0.05, {id: (a + 0.1, b) for id, (a, b) in reference.items()}), pairs


def asked(loss):
    """Two queries, which do not ask for the same."""
    if isinstance(loss, RewardLoss):
        pairs = some_examples(4, 2, seed=5, prefix="q")
        gap = RewardGapLoss(loss.head)
        return {"gap": Queries(pairs, gap), "one": Queries(pairs[:1], gap)}
    return {
        "answers": Queries(some_examples(5, 1, seed=5, prefix="q"), NextTokenLoss("mean")),
        "odds": Queries(odds(3), LogOddsLoss()),
    }


def odds(count):
    pairs = some_examples(count, 2, seed=6, prefix="o")
    return [with_one_prompt(pair) for pair in pairs]


def with_one_prompt(pair):
    first, second = pair.sequences
    ids = first.prompt_ids + second.answer_ids
    return replace(pair, sequences=(first, replace(first, input_ids=ids)))


def values(network, queries):
    with torch.no_grad():
        return np.array(
            [float(q.loss.loss(network, q.examples, PAD).mean()) for q in queries.values()]
        )


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "inpo"])
def test_scores_are_the_slopes_of_retrainings(network, stage, tmp_path):
    loss, examples = losses(network, stage)
    queries, own = asked(loss), [weight.detach().clone() for weight in loss.parameters()]
    start = snapshot(network, "default")

    def train(weights, trajectory=None):
        restore(network, "default", start)
        for weight, before in zip(loss.parameters(), own):
            weight.data.copy_(before)
        more = {"weights": weights, "trajectory": trajectory}
        curve = fit(network, "default", examples, loss, PAD, SMOOTH, **more)
        return values(network, queries), curve

    trajectory = Trajectory(tmp_path / "run")
    after, curve = train(None, trajectory)
    clipped = curve["grad_norm"] > CLIP
    assert not clipped.any() if stage == "dpo" else clipped.all()  # both ways are tried
    stages = [Stage(examples, loss, SMOOTH, trajectory)]
    (scores,) = unrolled_scores(network, "default", stages, queries, PAD)
    assert scores.shape == (7, 2)
    np.testing.assert_array_equal(values(network, queries), after)  # everything is put back

    for i in (0, 3, 6):
        both = []
        for step in (0.01, -0.01):
            weights = np.ones(7)
            weights[i] += step
            both.append(train(weights)[0])
        slope = (both[0] - both[1]) / 0.02
        np.testing.assert_allclose(scores[i], slope, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("stage", ["sft", "dpo", "inpo"])
def test_a_tokens_score_is_what_not_learning_from_it_takes_away(
    network, stage, tmp_path, monkeypatch
):
    """Trained again with one token's gradient scaled by 1 ± .01 wherever its example is seen."""
    loss, examples = losses(network, stage)
    queries, start = asked(loss), snapshot(network, "default")
    example, answer, token = examples[3], len(examples[3].sequences) - 1, 1
    plain = loss_module.answer_token_logps

    def scaled(weight, model, some, pad, kept=None):
        logps, owner = plain(model, some, pad, kept)
        if example in some:
            text = some.index(example) * len(example.sequences) + answer
            gates = torch.ones_like(logps)
            gates[torch.nonzero(owner == text)[token]] = weight
            logps = logps.detach() + gates * (logps - logps.detach())
        return logps, owner

    def train(weight, trajectory=None):
        monkeypatch.setattr(loss_module, "answer_token_logps", partial(scaled, weight))
        restore(network, "default", start)
        fit(network, "default", examples, loss, PAD, SMOOTH, trajectory=trajectory)
        monkeypatch.undo()
        return values(network, queries)

    trajectory = Trajectory(tmp_path / "run")
    train(1.0, trajectory)
    stages = [Stage(examples, loss, SMOOTH, trajectory)]
    (by_example,) = unrolled_scores(network, "default", stages, queries, PAD)
    (by_token,) = unrolled_scores(network, "default", stages, queries, PAD, by_token=True)
    for some, scores in zip(by_token, by_example):
        np.testing.assert_allclose(sum(own.sum(0) for own in some), scores, rtol=1e-6, atol=1e-12)
    lengths = [[len(text.answer_ids) for text in e.sequences] for e in examples]
    assert [[len(own) for own in some] for some in by_token] == lengths

    both = []
    for weight in (1.01, 0.99):
        both.append(train(weight))
    slope = (both[0] - both[1]) / 0.02
    assert np.abs(slope).max() > 1e-6
    np.testing.assert_allclose(by_token[3][answer][token], slope, rtol=2e-3, atol=1e-8)


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "inpo"])
def test_scores_are_those_of_automatic_differentiation(network, stage, tmp_path):
    """Through the whole training at once, its graph in memory."""
    loss, examples = losses(network, stage)
    head = [weight.detach().clone() for weight in loss.parameters()]
    queries, start = asked(loss), snapshot(network, "default")
    trajectory = Trajectory(tmp_path / "run")
    rates = fit(network, "default", examples, loss, PAD, CONFIG, trajectory=trajectory)
    stages = [Stage(examples, loss, CONFIG, trajectory)]
    (scores,) = unrolled_scores(network, "default", stages, queries, PAD)

    layers = list(lora_layers(network, "default").values())
    theta = [weight.clone().requires_grad_(True) for weight in [*start.values(), *head]]
    for layer in layers:
        del layer.weight

    def put(tensors):
        for layer, tensor in zip(layers, tensors):
            layer.weight = tensor
        if head:
            object.__setattr__(loss, "head", tensors[-1])
            for query in queries.values():
                object.__setattr__(query.loss, "head", tensors[-1])

    w = torch.ones(7, dtype=torch.float64, requires_grad=True)
    m = v = [torch.zeros_like(tensor) for tensor in theta]
    for t, batch in enumerate(training_batches(examples, CONFIG), start=1):
        put(theta)
        some = [examples[i] for i in batch]
        value = (loss.loss(network, some, PAD) * w[batch]).sum() / loss.denominator(some)
        g = torch.autograd.grad(value, theta, create_graph=True)
        norm = torch.sqrt(sum((x**2).sum() for x in g))
        g = [x * torch.clamp(CLIP / (norm + 1e-6), max=1.0) for x in g]
        m = [0.9 * old + 0.1 * x for old, x in zip(m, g)]
        v = [0.999 * old + 0.001 * x**2 for old, x in zip(v, g)]
        rate = rates["learning_rate"][t - 1]
        theta = [
            x - rate * (a / (1 - 0.9**t)) / ((b / (1 - 0.999**t)).sqrt() + CONFIG.epsilon)
            for x, a, b in zip(theta, m, v)
        ]
    put(theta)
    for column, query in enumerate(queries.values()):
        phi = query.loss.loss(network, query.examples, PAD).mean()
        (wanted,) = torch.autograd.grad(phi, w, retain_graph=True)
        np.testing.assert_allclose(scores[:, column], wanted, rtol=1e-5, atol=1e-9)


def test_scores_equal_bergsons(tmp_path):
    """bergson 2.5.1's MAGIC on the same run, kept by ``tests/parity/bergson_magic.py``."""
    theirs = pd.read_csv(bergson_magic.REFERENCE, index_col="example")
    examples = bergson_magic.some_examples(bergson_magic.N, 1)
    asked = bergson_magic.some_examples(bergson_magic.M, 2)
    own, _ = bergson_magic.own_scores(bergson_magic.tiny_network(), examples, asked, tmp_path)
    wanted = theirs.loc[[e.id for e in examples], [e.id for e in asked]].to_numpy()
    np.testing.assert_allclose(own, wanted, atol=1e-4 * np.abs(wanted).max())


def chain(network, folder=None, weights=None):
    """SFT, then DPO from it and against it; the network is left as DPO left it."""
    answers, pairs = some_examples(5, 1), some_examples(6, 2, prefix="p")
    dpo = Stage(pairs, DPOLoss(0.3, {}), SMOOTH, reference={1: 1.0})
    stages = [Stage(answers, NextTokenLoss(), SMOOTH), dpo]
    return train_stages(network, "default", stages, PAD, weights=weights, folder=folder)


def test_a_chain_scores_the_examples_of_both_stages(network, tmp_path):
    start, queries = snapshot(network, "default"), {"odds": Queries(odds(3), LogOddsLoss())}
    stages = chain(network, tmp_path)
    scores = unrolled_scores(network, "default", stages, queries, PAD)
    assert [len(some) for some in scores] == [5, 6]
    constant = [stages[0], replace(stages[1], reference={})]
    without = unrolled_scores(network, "default", constant, queries, PAD)
    assert np.abs(without[0] - scores[0]).max() > 1e-2 * np.abs(scores[0]).max()
    for number, count in enumerate((5, 6)):
        for i in (0, count - 1):
            both = []
            for step in (0.01, -0.01):
                weights = [np.ones(5), np.ones(6)]
                weights[number][i] += step
                restore(network, "default", start)
                chain(network, weights=weights)
                both.append(values(network, queries))
            slope = (both[0] - both[1]) / 0.02
            np.testing.assert_allclose(scores[number][i], slope, rtol=1e-3, atol=1e-7)


def test_a_loss_refers_to_weights_that_its_chain_went_through(network, tmp_path):
    pairs = some_examples(4, 2)
    references = [{}, {1: 1.0}, {1: 0.3, 2: 0.7}]  # SFT's end, and INPO's second round
    stages = [Stage(some_examples(4, 1), NextTokenLoss(), SMOOTH)]
    stages += [Stage(pairs, INPOLoss(0.05, {}), SMOOTH, reference=r) for r in references[1:]]
    ran = train_stages(network, "default", stages, PAD, folder=tmp_path)
    at_start = []
    for stage in ran[1:]:
        restore(network, "default", stage.trajectory.state(0)["weight"])
        found = reference_logps(network, "default", pairs, PAD)
        at_start.append(np.array([found[pair.id] for pair in pairs]))
    for stage, wanted in zip(ran[1:], (at_start[0], 0.3 * at_start[0] + 0.7 * at_start[1])):
        np.testing.assert_allclose([stage.loss.reference[pair.id] for pair in pairs], wanted)
    assert np.abs(at_start[1] - at_start[0]).max() > 1e-3
    scores = unrolled_scores(network, "default", ran, asked(NextTokenLoss()), PAD)
    assert [some.shape for some in scores] == [(4, 2)] * 3


def test_a_chain_leads_through_a_reward_model(network, tmp_path):
    """Its head is its own: it begins and ends with that stage."""
    head = torch.nn.Parameter(random_head(32, 0).double())
    answers, own, start = some_examples(4, 1), head.detach().clone(), snapshot(network, "default")
    stages = [Stage(answers, NextTokenLoss(), SMOOTH)]
    stages += [Stage(some_examples(4, 2, prefix="p"), RewardLoss(head), SMOOTH), stages[0]]
    queries = {"odds": Queries(odds(3), LogOddsLoss())}

    ran = train_stages(network, "default", stages, PAD, folder=tmp_path)
    first, second, _ = unrolled_scores(network, "default", ran, queries, PAD)
    both = []
    for weight in (1.01, 0.99):
        restore(network, "default", start)
        head.data.copy_(own)
        weights = [[1, 1, weight, 1], [weight, 1, 1, 1], np.ones(4)]
        train_stages(network, "default", stages, PAD, weights=weights)
        both.append(values(network, queries))
    slope = (both[0] - both[1]) / 0.02
    assert first[2].any() and second[0].any()
    np.testing.assert_allclose(first[2] + second[0], slope, rtol=1e-3)


def test_a_replay_goes_on_where_it_was_killed(network, tmp_path, monkeypatch):
    queries = {"odds": Queries(odds(3), LogOddsLoss())}
    stages = chain(network, tmp_path)
    wanted = unrolled_scores(network, "default", stages, queries, PAD)
    before, steps = snapshot(network, "default"), []
    step = unrolled._Replay._step

    def killed_at(last):
        def one(self, number, t, places):
            if len(steps) == last:
                raise KeyboardInterrupt
            steps.append((number, t))
            step(self, number, t, places)

        monkeypatch.setattr(unrolled._Replay, "_step", one)

    for last in (1, 4, 5, None):  # in DPO, at the border, in SFT
        killed_at(last)
        try:
            found = unrolled_scores(
                network, "default", stages, queries, PAD, resume=tmp_path / "replay"
            )
        except KeyboardInterrupt:
            assert last is not None
        after = snapshot(network, "default")
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert steps == [(number, t) for number in (1, 0) for t in (3, 2, 1, 0)]
    for one, other in zip(wanted, found):
        np.testing.assert_array_equal(one, other)
    (tmp_path / "replay").write_bytes(b"not a file of tensors")
    monkeypatch.setattr(unrolled._Replay, "_step", step)
    again = unrolled_scores(network, "default", stages, queries, PAD, resume=tmp_path / "replay")
    np.testing.assert_array_equal(again[0], wanted[0])


def test_what_cannot_be_replayed_is_named(network, tmp_path):
    examples, loss = some_examples(5, 1), NextTokenLoss()
    queries = {"odds": Queries(odds(2), LogOddsLoss())}

    def replay(*stages, asked=queries):
        return unrolled_scores(network, "default", stages, asked, PAD)

    first, second = Trajectory(tmp_path / "first"), Trajectory(tmp_path / "second")
    start = snapshot(network, "default")
    fit(network, "default", examples, loss, PAD, CONFIG, trajectory=first)
    with pytest.raises(StudyError, match="stage 0 has no trajectory"):
        replay(Stage(examples, loss, CONFIG))
    with pytest.raises(StudyError, match="trajectory.json: no such file.*did not end"):
        replay(Stage(examples, loss, CONFIG, second))
    with pytest.raises(StudyError, match="first: these states are of other examples"):
        replay(Stage(examples[:4], loss, CONFIG, first))
    with pytest.raises(StudyError, match="other settings"):
        replay(Stage(examples, loss, SMOOTH, first))
    restore(network, "default", start)
    fit(network, "default", examples, loss, PAD, CONFIG, trajectory=second)
    one, two = (Stage(examples, loss, CONFIG, kept) for kept in (first, second))
    with pytest.raises(StudyError, match="stage 1 did not start where the last one ended"):
        replay(one, two)
    with pytest.raises(StudyError, match="query 'none' has no examples"):
        replay(one, asked={"none": Queries([], LogOddsLoss())})
    blind = Queries(odds(1), RewardGapLoss(torch.zeros(32, dtype=torch.float64)))
    with pytest.raises(StudyError, match="query 'none' has no gradient"):
        replay(one, asked={"none": blind})
    head = RewardLoss(torch.nn.Parameter(random_head(32, 0).double()))
    with pytest.raises(StudyError, match="first: these states are of another adapter or loss"):
        replay(Stage(some_examples(5, 2), head, CONFIG, first))
    layer = next(iter(lora_layers(network, "default").values()))
    frozen = network.get_input_embeddings().weight
    with torch.no_grad():
        frozen[:, ::2] += 0.5
    with pytest.raises(StudyError, match=r"step 4: the gradient is not what it was .*same model"):
        replay(one)
    with torch.no_grad():
        frozen[:, ::2] -= 0.5
    (tmp_path / "first" / "step-00002.safetensors").unlink()
    with pytest.raises(StudyError, match="step-00002.safetensors: no such file"):
        replay(one)
    network.bfloat16()
    with pytest.raises(StudyError, match="need float32 weights.*bfloat16"):
        replay(two)
    assert layer.weight.dtype == torch.bfloat16


def test_one_example_and_kept_states(network, tmp_path):
    """A single example has a score, and states of the lower layers change none."""
    examples, kept = some_examples(1, 1), LowerStates(network)
    queries = {"odds": Queries(odds(2), LogOddsLoss())}
    trajectory = Trajectory(tmp_path / "run")
    fit(network, "default", examples, NextTokenLoss(), PAD, SMOOTH, trajectory=trajectory)
    stages = [Stage(examples, NextTokenLoss(), SMOOTH, trajectory)]
    (plain,) = unrolled_scores(network, "default", stages, queries, PAD)
    (faster,) = unrolled_scores(network, "default", stages, queries, PAD, kept)
    assert plain.shape == (1, 1) and plain.any()
    np.testing.assert_allclose(faster, plain, rtol=1e-9)


WORDS = "the answer to a question is not wrong but human and right when it says so".split()
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>\n{% endfor %}"


def text_rows(count, seed=0):
    """A preference data set of texts."""
    draw = random.Random(seed)
    names = ("prompt", "chosen", "rejected")
    return [{name: " ".join(draw.choices(WORDS, k=4)) for name in names} for _ in range(count)]


def message_rows(count, seed=0):
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return [
        {name: [{"role": roles[name], "content": text}] for name, text in row.items()}
        for row in text_rows(count, seed)
    ]


@pytest.fixture
def own(tiny_directories):
    """A reader's model: as PEFT makes it, but that its adapter already does something. In float64,
    as ``network``."""
    model = AutoModelForCausalLM.from_pretrained(tiny_directories["gpt_neox"], dtype="float32")
    torch.manual_seed(0)
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["query_key_value"]))
    peft.double().eval()
    for layer in lora_layers(peft, "default").values():
        torch.nn.init.normal_(layer.weight, std=0.1)
    return peft


@pytest.mark.parametrize("rows", [text_rows, message_rows])
def test_rows_become_the_tokens_that_trl_trains_on(own, rows):
    tokenizer = AutoTokenizer.from_pretrained(own.get_base_model().name_or_path)
    tokenizer.chat_template = CHAT
    arguments = trl_arguments(DPOConfig, CONFIG, 3)
    data = Dataset.from_list(rows(3))
    trainer = DPOTrainer(own, args=arguments, train_dataset=data, processing_class=tokenizer)
    for row, wanted in zip(rows(3), trainer.train_dataset):
        for side, text in zip(("chosen", "rejected"), preference_row(row, tokenizer)):
            assert list(text.prompt_ids) == wanted["prompt_ids"]
            assert list(text.answer_ids) == wanted[f"{side}_ids"]


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "inpo"])
def test_any_run_is_attributed(own, stage, tmp_path, monkeypatch):
    """The scores predict the mean loss of the query's rows without an example, from trainings that
    know nothing of replays; a kept training is taken, wherever the adapter has got to."""
    rows, held_out, start = text_rows(5), text_rows(3, seed=1), snapshot(own, "default")
    queries = {"held out": held_out, "odds": Queries(held_out, LogOddsLoss())}
    scores = unrolled.attribute(own, rows, stage, queries, SMOOTH, tmp_path)
    assert list(scores.columns) == list(queries) and len(scores) == 5
    end = snapshot(own, "default")

    tokenizer = load_tokenizer(own.get_base_model().name_or_path)
    texts = [preference_row(row, tokenizer) for row in rows + held_out]
    sides = 1 if stage == "sft" else 2
    pool = [Example(str(n), "", text[:sides]) for n, text in enumerate(texts[:5])]
    asked = [Example(f"q{n}", "", text[:sides]) for n, text in enumerate(texts[5:])]

    def held_out_loss(weights):
        restore(own, "default", start)
        loss = training_loss(stage, own, "default", pool + asked, PAD)
        fit(own, "default", pool, loss, PAD, SMOOTH, weights=weights)
        loss = NextTokenLoss("mean") if stage == "sft" else loss
        return example_losses(own, "default", asked, loss, PAD).mean()

    # A smaller step loses INPO's slope, 5e-11, in the last bits of its loss, 25.
    weights = np.ones((2, 5))
    weights[:, 2] += 0.05, -0.05
    slope = np.subtract(*map(held_out_loss, weights)) / 0.1
    assert scores["held out"][2] == pytest.approx(slope, rel=2e-2)

    monkeypatch.setattr(unrolled, "fit", None)
    again = unrolled.attribute(own, rows, stage, queries, SMOOTH, tmp_path)
    pd.testing.assert_frame_equal(again, scores)
    assert all(torch.equal(weight, end[name]) for name, weight in snapshot(own, "default").items())
    with pytest.raises(StudyError, match="these states are of other examples"):
        unrolled.attribute(own, rows[:4], stage, queries, SMOOTH, tmp_path)


def test_a_reader_attributes_in_ten_lines(tiny_directories, tmp_path, monkeypatch):
    text = (ROOT / "lib" / "docs" / "own-models.md").read_text(encoding="utf-8")
    part = text.partition("## Attribute a run of your own")[2]
    code = part.partition("```python\n")[2].partition("```")[0]
    assert 0 < len(code.strip().splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").symlink_to(tiny_directories["llama"])
    lines = "".join(json.dumps(row) + "\n" for row in text_rows(24))
    (tmp_path / "pairs.jsonl").write_text(lines)
    names = {}
    exec(code, names)
    assert names["scores"].shape == (16, 1)
    assert np.isfinite(names["scores"]).all(axis=None) and names["scores"].any(axis=None)


def test_what_cannot_be_attributed_is_named(own):
    rows, tokenizer = text_rows(3), load_tokenizer(own.get_base_model().name_or_path)
    queries, texts = {"q": rows}, {"prompt": "a", "chosen": "b", "rejected": "c"}

    def refused(message, examples=rows, loss="dpo", queries=queries, network=own):
        with pytest.raises(StudyError, match=message) as caught:
            unrolled.attribute(network, examples, loss, queries, tokenizer=tokenizer)
        assert "\n" not in str(caught.value)

    refused("the examples must have at least one row", [])
    refused("the query 'q' must have at least one row", queries={"q": []})
    refused("queries must be a mapping", queries=rows)
    refused("queries must be a mapping", queries={})
    refused("loss: must be one of sft, reward, dpo, inpo, got 'ppo'", loss="ppo")
    refused("row 0 of the examples is not a mapping with prompt", pd.DataFrame(rows))
    refused(
        "row 1 of the query 'q' has no 'rejected'",
        queries={"q": [texts, {"prompt": "a", "chosen": "b"}]},
    )
    refused("row 0 of the examples has an empty prompt", [texts | {"prompt": ""}])
    refused("are not all texts, or all lists of messages", [texts | {"chosen": None}])
    refused("holds messages, and the tokenizer has no chat template", message_rows(1))
    own.train()
    refused("training mode")
    own.eval()
    refused("the model has no adapter", network=own.get_base_model())
    own.bfloat16()
    refused("need float32 weights")


def test_weight_zero_leaves_an_example_out(network):
    """Of its batch nothing else changes: the sum is divided by as many tokens as before."""
    examples, start = some_examples(6, 1), snapshot(network, "default")
    ends = []
    for weights in ([1, 0, 1, 1, 0, 1], [1, 1e-9, 1, 1, 1e-9, 1], None, np.zeros(6)):
        restore(network, "default", start)
        curve = fit(network, "default", examples, NextTokenLoss(), PAD, CONFIG, weights=weights)
        ends.append(torch.cat([w.flatten() for w in snapshot(network, "default").values()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-9)
    assert not torch.allclose(ends[0], ends[2], rtol=1e-3)
    assert (curve["loss"] == 0).all()
    with pytest.raises(StudyError, match="2 weights for 6 examples"):
        fit(network, "default", examples, NextTokenLoss(), PAD, CONFIG, weights=[1, 1])
