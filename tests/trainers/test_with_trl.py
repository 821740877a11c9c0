"""TRL's own trainers under our reward, and our divergences against TRL's."""

from dataclasses import replace

import datasets
import pytest
import torch
from models.test_language_model import tiny_llama
from models.test_other_tokenizer import byte_level, teacher_of, words
from tokenizers.processors import TemplateProcessing
from trainers import tiny_runs

from rlkd import teacher_reward_func
from rlkd.errors import ConfigError
from rlkd.models.architectures import language_model
from rlkd.models.other_tokenizer import OtherTokenizer
from rlkd.models.several import AveragedTeachers
from rlkd.models.teacher import Teacher
from rlkd.objectives.rewards import REWARDS, induced_advantage
from rlkd.tensors import pad_rows
from tiny import EOS, tiny_tokenizer

PROMPTS = ["hello", "there x", "x"]
IDS = [[3, 4, EOS], [4, 5, 3], [EOS]]


def returns(teacher, rows, name="max", prompts=PROMPTS):
    ids, mask = pad_rows(rows, 0)
    return induced_advantage(teacher.score([(p,) for p in prompts], ids, mask), name).sum(1).tolist()


@pytest.mark.parametrize("name", REWARDS)
def test_the_reward_is_the_return_of_the_whole_completion(name):
    teacher = teacher_of(words())
    function = teacher_reward_func(teacher, words(), reward_value=name)
    texts = ["hello there", "there x hello", ""]
    got = function(prompts=PROMPTS, completions=texts, completion_ids=IDS, trainer_state=None)
    assert got == pytest.approx(returns(teacher, IDS, name), abs=1e-5)
    ended = teacher_reward_func(teacher, words(), reward_value=name, cut_answers="end_price")
    want = returns(teacher, [IDS[0], [*IDS[1], EOS], IDS[2]], name)
    assert ended(PROMPTS, texts, IDS) == pytest.approx(want, abs=1e-5)
    assert want[1] != pytest.approx(got[1], abs=1e-3)
    assert function(PROMPTS[:1], [""], [[]]) == [0.0]


def test_the_teacher_may_read_a_column_and_several_templates():
    teacher = teacher_of(words())
    function = teacher_reward_func(teacher, words(), teacher_input="asked")
    messages = [[{"role": "user", "content": "hello"}]] * 3
    got = function(messages, ["", "", ""], IDS, asked=PROMPTS)
    assert got == pytest.approx(returns(teacher, IDS), abs=1e-5)
    twice = [returns(teacher, IDS, prompts=own) for own in (PROMPTS, ["x", "x", "hello"])]
    asked = [[a, b] for a, b in zip(PROMPTS, ["x", "x", "hello"], strict=True)]
    want = [(a + b) / 2 for a, b in zip(*twice, strict=True)]
    assert function(messages, ["", "", ""], IDS, asked=asked) == pytest.approx(want, abs=1e-5)


def test_another_vocabulary_is_scored_as_text():
    teacher = teacher_of(byte_level())
    source = OtherTokenizer(teacher, words(), language_model(tiny_llama(words=6), words()).head().rules)
    function = teacher_reward_func(teacher, words())
    assert function(PROMPTS, ["", "", ""], IDS) == pytest.approx(returns(source, IDS), abs=1e-4)
    text = teacher.tokenizer("hello there")["input_ids"]
    assert function(PROMPTS[:1], [""], [[3, 4, EOS]])[0] == pytest.approx(
        returns(teacher, [text], prompts=PROMPTS[:1])[0], abs=1e-4
    )


def test_what_it_cannot_score_is_refused():
    teacher = teacher_of(words())
    with pytest.raises(ConfigError, match="cut_answers = 'drop': allowed are 'keep', 'end_price'"):
        teacher_reward_func(teacher, words(), cut_answers="drop")
    with pytest.raises(ConfigError, match="reward_value = 'maxx'"):
        teacher_reward_func(teacher, words(), reward_value="maxx")
    several = AveragedTeachers({"a": teacher, "b": teacher})
    with pytest.raises(ConfigError, match="another vocabulary than the teacher answers in"):
        teacher_reward_func(several, byte_level())
    with pytest.raises(ConfigError, match="prompts are messages: name a column"):
        teacher_reward_func(teacher, words())([[{"role": "user", "content": "x"}]], [""], [[3]])
    named = teacher_reward_func(teacher, words(), teacher_input="asked")
    with pytest.raises(ConfigError, match="teacher_input = 'asked': the data set has no such column"):
        named(PROMPTS, [""] * 3, IDS)
    with pytest.raises(ConfigError, match="teacher_input = 'asked': holds no texts"):
        named(PROMPTS, [""] * 3, IDS, asked=[[], ["x"], ["y"]])


def continuing(tokenizer):
    """Without an end of its own: a decoder-only student continues its prompts."""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    return tokenizer


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_stock_trainers_raise_the_reward(tmp_path, monkeypatch, name):
    """A decoder-only student, under an encoder-decoder teacher of another vocabulary."""
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    import trl

    tokenizer = continuing(words())
    args = getattr(trl, f"{name}Config")(
        str(tmp_path), per_device_train_batch_size=32, num_generations=8, max_completion_length=5, max_steps=25,
        learning_rate=5e-3, lr_scheduler_type="constant", beta=0.0, use_cpu=True, bf16=False, save_strategy="no",
        logging_steps=1, report_to=[], disable_tqdm=True, gradient_checkpointing=False, seed=3,
    )  # fmt: skip
    trainer = getattr(trl, f"{name}Trainer")(
        tiny_llama(5, words=6),
        reward_funcs=teacher_reward_func(teacher_of(byte_level()), tokenizer, cut_answers="end_price"),
        args=args,
        train_dataset=datasets.Dataset.from_dict({"prompt": PROMPTS * 4}),
        processing_class=tokenizer,
    )
    trainer.train()
    rewards = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    assert len(rewards) == 25
    first, last = sum(rewards[:4]) / 4, sum(rewards[-4:]) / 4
    assert last > first + 0.2 * abs(first)
    assert "rewards/teacher_reward/mean" in trainer.state.log_history[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("objective", "ours", "theirs"),
    [("forward_kl", {}, 0.0), ("reverse_kl", {}, 1.0), ("jensen_shannon", {"beta": 0.3}, 0.3),
     ("jensen_shannon", {"beta": 0.5}, 0.5)],
)  # fmt: skip
def test_the_loss_of_a_batch_is_trls(tmp_path, objective, ours, theirs):
    """Rollouts of our GKD; TRL's loss from full logits of transformers' own forward, with each model's own prompt."""
    from trl.experimental.gkd import GKDTrainer

    tokenizer, valid = tiny_tokenizer(tiny_runs.WORDS), tiny_runs.VALID
    models = {"student": tiny_llama(11, words=valid), "teacher": tiny_llama(2, words=valid)}
    teacher = Teacher(language_model(models["teacher"], tokenizer), tokenizer)
    trainer = tiny_runs.make(
        "gkd", tmp_path, model=models["student"], teacher=teacher, objective=objective, rollouts_per_prompt=2, **ours
    )
    batch = trainer.annotate(trainer.sample(0))
    minibatch = replace(next(trainer.minibatches(batch, 0)), denominator=None)
    loss = trainer.compute_loss(trainer.model, {"minibatch": minibatch})

    logits = {}
    for role, model in models.items():
        rows = []
        for example, row, mask in zip(
            minibatch.answers.examples, minibatch.answers.answer_ids, minibatch.answers.answer_mask, strict=True
        ):
            text = example.student_input if role == "student" else example.teacher_inputs[0]
            prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
            whole = torch.tensor([[*prompt, *row[mask].tolist()]])
            with torch.no_grad():
                rows.append(model(input_ids=whole).logits[0, len(prompt) - 1 : -1, :valid])
        logits[role] = torch.cat(rows)[None]
    labels = torch.zeros(logits["student"].shape[:2], dtype=torch.long)
    want = GKDTrainer.generalized_jsd_loss(logits["student"], logits["teacher"], labels, beta=theirs)
    assert float(loss) == pytest.approx(float(want), abs=1e-4)
