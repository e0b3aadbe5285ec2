"""The three TRL stages: their numbers are ours, the DPO reference is SFT, training does what it is for or stops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import trl.trainer.utils
from rlhf_trust.models import LoRA
from rlhf_trust import StudyError, models, sources, training
from rlhf_trust.chat import Chat
from rlhf_trust.data.preferences import PreferencePair
from rlhf_trust.training import (
    Curve,
    TrainConfig,
    dpo_trainer,
    held_out_loss,
    margins_of_pairs,
    pair_logps,
    pair_rewards,
    reward_dataset,
    run_trl,
    sft_dataset,
    train_dpo,
    train_reward,
    train_sft,
    training_order,
    trl_arguments,
)
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

PAIRS = [
    PreferencePair(
        f"p{i}",
        (f"what is {'the ' * (i % 3)}question {i}?",),
        f"the answer {'is ' * (i % 4)}not wrong",
        f"human {'user ' * (1 + i % 2)}{i}",
        "helpful",
    )
    for i in range(8)
]
ALL = TrainConfig(learning_rate=1e-2, batch_size=len(PAIRS), epochs=3, warmup=0.0)
BETA = 0.2


@pytest.fixture
def fresh(tiny):
    """Another backbone of the same weights, without adapters."""
    return lambda: models.load_base(tiny.source, "float32")


def targets(base):
    """The MLP too: in so small a model, attention alone can hardly make a token more likely."""
    return (
        ["q_proj", "v_proj", "down_proj"]
        if "q_proj" in str(base.model)
        else ["query_key_value", "dense_4h_to_h"]
    )


def perturbed_sft(base, directory):
    """An SFT adapter far from the start model; leaves the backbone bare."""
    wrapped = models.new_adapter(base, LoRA(4, 8, targets(base)))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    models.save_adapter(base, wrapped, directory)
    wrapped.unload()
    return directory


def values(curve, metric):
    return curve.loc[curve["metric"] == metric, "value"].tolist()


def whole_batch(trainer):
    """All training rows as the trainer would feed them, in one batch."""
    return trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset)))


def weights(base):
    """The backbone's own weights by name, whatever adapters wrap them."""
    return {
        name.replace(".base_layer", ""): tensor.clone()
        for name, tensor in base.model.state_dict().items()
        if ".lora_" not in name
    }


# --- batches -------------------------------------------------------------------------------------------------------


def test_training_order_puts_like_lengths_together():
    lengths = [(7 * i) % 101 for i in range(43)]
    order = training_order(lengths, 8, seed=1)
    assert sorted(order) == list(range(43))
    batches = [sorted(lengths[i] for i in order[k : k + 8]) for k in range(0, 43, 8)]
    for one, other in zip(sorted(batches), sorted(batches)[1:]):
        assert one[-1] <= other[0]  # batches of lengths do not overlap
    assert len(batches[-1]) == 3 and batches != sorted(batches)
    assert training_order(lengths, 8, 1) == order != training_order(lengths, 8, 2)


# --- SFT -----------------------------------------------------------------------------------------------------------


def sft_trainer(base, chat, pairs, config=ALL):
    return SFTTrainer(
        model=models.new_adapter(base, LoRA(4, 8)),
        processing_class=chat.tokenizer,
        args=trl_arguments(SFTConfig, config, len(pairs), completion_only_loss=True),
        train_dataset=sft_dataset(pairs, chat, config),
    )


def test_sft_loss_is_ours(tiny, chat, fresh, tmp_path):
    """TRL's first logged loss is the mean over the batch's answer tokens; ours is a mean for each answer."""
    curve = train_sft(tiny, chat, PAIRS, ALL, 4, 8, None, tmp_path / "sft")
    sequences = [chat.sequence(p.prompt, p.chosen) for p in PAIRS]
    counts = np.array([len(s.answer_ids) for s in sequences])
    losses = held_out_loss(fresh().model, chat, PAIRS, rows=3)
    assert values(curve, "loss")[0] == pytest.approx(
        (losses * counts).sum() / counts.sum(), abs=1e-4
    )


def test_sft_learns_answer_tokens_only(tiny, chat):
    """Each batch's labels are the answer with its end token, as tokenised for evaluation, and nothing else."""
    trainer = sft_trainer(tiny, chat, PAIRS)
    batch = whole_batch(trainer)
    wanted = sorted((chat.sequence(p.prompt, p.chosen) for p in PAIRS), key=lambda s: s.input_ids)
    rows = sorted(
        zip(batch["input_ids"].tolist(), batch["labels"].tolist(), batch["attention_mask"].tolist())
    )
    for (ids, labels, attention), sequence in zip(rows, wanted, strict=True):
        padding = len(ids) - len(sequence)
        assert ids[: len(sequence)] == list(sequence.input_ids)
        assert (
            labels == [-100] * sequence.answer_start + list(sequence.answer_ids) + [-100] * padding
        )
        assert attention == [1] * len(sequence) + [0] * padding
        assert labels[len(sequence) - 1] == chat.tokenizer.eos_token_id


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_trl_runs_the_output_head_at_answers_only(tiny, chat, tmp_path, monkeypatch, stage):
    """On a CPU TRL would run it at every position; the first loss is the same and there is less to compute."""
    kernel, rows = trl.trainer.utils._ChunkedLogProbFunction, []

    class Spy:
        @staticmethod
        def apply(states, *args):
            rows.append(len(states))
            return kernel.apply(states, *args)

    config = TrainConfig(learning_rate=1e-3, batch_size=4, warmup=0.0)
    make = {
        "sft": lambda: sft_trainer(tiny, chat, PAIRS, config),
        "dpo": lambda: dpo_trainer(
            tiny, chat, PAIRS, config, BETA, perturbed_sft(tiny, tmp_path / "sft")
        ),
    }[stage]
    trainer = make()
    everywhere = float(
        trainer.compute_loss(
            trainer.model,
            trainer._prepare_inputs(
                trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
            ),
        )
    )
    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", Spy)
    curve = run_trl(trainer, Curve(stage, ("loss",)))
    answers = [
        chat.answer_ids(text)
        for p in PAIRS
        for text in ([p.chosen] if stage == "sft" else [p.chosen, p.rejected])
    ]
    passes = 1 if stage == "sft" else 2  # policy and reference
    assert sum(rows) == passes * sum(map(len, answers))
    assert values(curve, "loss")[0] == pytest.approx(everywhere, abs=1e-4)


# --- the reward model ----------------------------------------------------------------------------------------------


def test_trl_pools_the_token_that_we_read(tiny, chat):
    """Also under padding, which a tokenizer with pad = end token would have it read one token too early."""
    classifier = AutoModelForSequenceClassification.from_pretrained(
        sources.model_directory(tiny.source),
        num_labels=1,
        dtype=torch.float32,
        pad_token_id=chat.tokenizer.pad_token_id,
    )
    trainer = RewardTrainer(
        model=classifier,
        args=trl_arguments(RewardConfig, ALL, len(PAIRS)),
        train_dataset=reward_dataset(PAIRS, chat, ALL),
        processing_class=chat.tokenizer,
    )
    batch = whole_batch(trainer)
    classifier.eval()
    with torch.no_grad():
        loss, outputs = trainer.compute_loss(classifier, dict(batch), return_outputs=True)
        head = classifier.score.weight.squeeze(0)
        ours = pair_rewards(tiny.model, head, chat, PAIRS, rows=5)
    assert (batch["attention_mask"] == 0).any() and (
        batch["input_ids"] == chat.tokenizer.eos_token_id
    ).any()
    theirs = (
        outputs.logits.squeeze(-1).view(2, -1).T.numpy()
    )  # the collator puts all chosen before all rejected
    np.testing.assert_allclose(sorted(theirs.tolist()), sorted(ours.tolist()), atol=1e-4)
    margins = torch.from_numpy(ours[:, 0] - ours[:, 1])
    assert float(loss) == pytest.approx(
        float(-torch.nn.functional.logsigmoid(margins).mean()), abs=1e-4
    )


def test_a_reward_model_read_from_its_files_is_the_one_that_was_trained(
    tiny, chat, fresh, tmp_path, monkeypatch
):
    trained = []
    save = training.save_adapter
    monkeypatch.setattr(
        training,
        "save_adapter",
        lambda base, model, *args, **more: (
            trained.append(model),
            save(base, model, *args, **more),
        ),
    )
    curve = train_reward(tiny, chat, PAIRS, ALL, 4, 8, None, tmp_path / "reward")
    assert values(curve, "loss")[0] == pytest.approx(
        math.log(2), abs=1e-6
    )  # a head of zeros has no preference
    loaded = models.load_adapters(fresh(), {"reward": tmp_path / "reward"})
    ours = pair_rewards(loaded, models.load_reward_head(tmp_path / "reward"), chat, PAIRS)
    with torch.no_grad():
        theirs = [
            [
                float(
                    trained[0](
                        input_ids=torch.tensor([chat.sequence(p.prompt, answer).input_ids])
                    ).logits
                )
                for answer in (p.chosen, p.rejected)
            ]
            for p in PAIRS
        ]
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert np.subtract(*ours.T).mean() > values(curve, "margin")[-1] > 0


# --- DPO -----------------------------------------------------------------------------------------------------------


def test_the_reference_is_sft_before_and_after_training(tiny, chat, fresh, tmp_path):
    """What TRL subtracts, log π - reward/β, is the log-probability of the SFT adapter at every step, not the start's."""
    directory = perturbed_sft(tiny, tmp_path / "sft")
    start = pair_logps(tiny.model, chat, PAIRS).mean(0)
    reference = pair_logps(models.load_adapters(fresh(), {"sft": directory}), chat, PAIRS).mean(0)
    assert np.abs(start - reference).min() > 0.5
    trainer = dpo_trainer(tiny, chat, PAIRS, ALL, BETA, directory)
    curve = run_trl(
        trainer,
        Curve(
            "dpo", ("loss", "logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected")
        ),
    )
    for answer, expected in zip(("chosen", "rejected"), reference):
        policy, rewards = values(curve, f"logps/{answer}"), values(curve, f"rewards/{answer}")
        np.testing.assert_allclose(np.array(policy) - np.array(rewards) / BETA, expected, atol=2e-3)
        assert policy[0] == pytest.approx(expected, abs=2e-3) and abs(policy[-1] - policy[0]) > 0.1
    assert values(curve, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    # And the weights themselves: the copy is SFT's still, the policy has left.
    saved = load_file(directory / "adapter_model.safetensors")
    held = dict(trainer.model.named_parameters())
    for key, weight in saved.items():
        assert torch.equal(held[key.replace(".weight", ".ref.weight")], weight)
    assert any(
        not torch.equal(held[k.replace(".weight", ".default.weight")], w) for k, w in saved.items()
    )


def test_the_dpo_loss_is_ours(tiny, chat, fresh, tmp_path):
    """After training: TRL's loss on all pairs, and the margins of the saved adapter beside SFT's."""
    directory = perturbed_sft(tiny, tmp_path / "sft")
    trainer = dpo_trainer(tiny, chat, PAIRS, ALL, BETA, directory)
    run_trl(trainer, Curve("dpo", ()))
    batch = whole_batch(trainer)
    with torch.no_grad():
        loss = float(trainer.compute_loss(trainer.model, dict(batch)))
    models.save_adapter(tiny, trainer.model, tmp_path / "dpo")
    model = models.load_adapters(fresh(), {"sft": directory, "dpo": tmp_path / "dpo"})
    logps = {}
    for name in ("sft", "dpo"):
        model.set_adapter(name)
        logps[name] = pair_logps(model, chat, PAIRS, rows=3)
    margins = margins_of_pairs(logps["dpo"], logps["sft"], BETA)
    assert margins.mean() > 0.05
    assert np.log1p(np.exp(-margins)).mean() == pytest.approx(loss, abs=1e-4)


# --- does it learn? ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_a_tiny_set_can_be_learned_and_the_backbone_stays(tiny, chat, tmp_path, stage):
    before = weights(tiny)
    config, where, out = (
        TrainConfig(learning_rate=2e-2, batch_size=4, epochs=10),
        targets(tiny),
        tmp_path / "out",
    )
    if stage == "sft":
        curve = train_sft(tiny, chat, PAIRS, config, 4, 8, where, out)
    elif stage == "reward":
        curve = train_reward(tiny, chat, PAIRS, config, 4, 8, where, out)
    else:
        curve = train_dpo(
            tiny, chat, PAIRS, config, BETA, perturbed_sft(tiny, tmp_path / "sft"), out
        )
    losses = values(curve, "loss")
    assert len(losses) == 20 and np.mean(losses[-4:]) < 0.6 * np.mean(losses[:2])
    assert list(curve.columns) == ["stage", "step", "metric", "value"] and set(curve["stage"]) == {
        stage
    }
    after = weights(tiny)
    assert before.keys() == after.keys() and all(
        torch.equal(before[name], after[name]) for name in before
    )
    kept = {"adapter_model.safetensors", "adapter_config.json"} | (
        {"head.safetensors"} if stage == "reward" else set()
    )
    assert {p.name for p in out.iterdir()} == kept


SFT_LOSSES = [6.261506, 6.510369, 5.958776]
DPO_LOSSES = [0.693147, 0.575371, 0.296815]


def test_training_has_not_changed(tiny_llama, tmp_path):
    """Losses of three steps as they were when this was written (llama, transformers 5.23, TRL 1.16, torch 2.13)."""
    chat, config = (
        Chat(tiny_llama.tokenizer, "chatml"),
        TrainConfig(learning_rate=5e-3, batch_size=4, epochs=2),
    )
    first = train_sft(tiny_llama, chat, PAIRS[:6], config, 4, 8, None, tmp_path / "sft")
    second = train_dpo(
        models.load_base(tiny_llama.source, "float32"),
        chat,
        PAIRS[:6],
        config,
        BETA,
        tmp_path / "sft",
        tmp_path / "dpo",
    )
    assert values(first, "loss")[:3] == pytest.approx(SFT_LOSSES, abs=1e-4)
    assert values(second, "loss")[:3] == pytest.approx(DPO_LOSSES, abs=1e-4)


# --- trouble -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_a_loss_that_is_no_number_stops_in_one_line(tiny_llama, tmp_path, stage):
    chat, config = (
        Chat(tiny_llama.tokenizer, "chatml"),
        TrainConfig(learning_rate=math.inf, batch_size=4, epochs=3, warmup=0.0),
    )
    train = {
        "sft": lambda: train_sft(tiny_llama, chat, PAIRS, config, 4, 8, None, tmp_path / "out"),
        "reward": lambda: train_reward(
            tiny_llama, chat, PAIRS, config, 4, 8, None, tmp_path / "out"
        ),
        "dpo": lambda: train_dpo(
            tiny_llama,
            chat,
            PAIRS,
            config,
            BETA,
            perturbed_sft(tiny_llama, tmp_path / "sft"),
            tmp_path / "out",
        ),
    }[stage]
    with pytest.raises(
        StudyError, match=rf"^{stage}: (loss|grad_norm) is nan at step 2; lower learning_rate"
    ) as caught:
        train()
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
