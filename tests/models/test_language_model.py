"""What works with encoder-decoders works with a decoder-only model: engines, teachers, policies, trainers, views; and a
family is added from outside by its row.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from models.decoder_families import tiny_decoder
from torch import Tensor
from trainers import tiny_runs
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

from rlkd.errors import ModelError
from rlkd.inspection.build import reward_view
from rlkd.models.architectures import LANGUAGE_MODELS, architecture_of, language_model
from rlkd.models.decoder_only import DecoderOnly
from rlkd.models.loading import load_model
from rlkd.models.policy import Policy
from rlkd.models.teacher import Teacher
from rlkd.objectives.policy import reduce_tokens, reinforce_loss
from rlkd.records import Example
from rlkd.sampling.decode import decode, greedy, sampler
from rlkd.sampling.engines.protocol import Decoding
from rlkd.sampling.engines.torch_engine import TorchEngine
from rlkd.sampling.proposal import Proposal
from rlkd.sampling.rollouts import sample_rollouts
from rlkd.tensors import pad_rows
from tiny import EOS, VALID, save_pretrained, tiny_tokenizer

PROMPTS = [[3 + (7 * i + j * j) % 29 for j in range(1 + i % 5)] for i in range(12)]
CPU = torch.device("cpu")


def tiny_llama(seed: int = 0, *, width: int = 16, words: int = VALID, dropout: float = 0.0) -> LlamaForCausalLM:
    """Random, with more rows than words; answers end at many different lengths."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=words + 3, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.4, attention_dropout=dropout,
        bos_token_id=None, eos_token_id=EOS, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight[EOS] *= 3.0
    return model


def prompt_of(tokenizer: Any, text: str) -> list[int]:
    """Without the end that this tokenizer writes: the answer continues the text."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def lm_of(seed: int = 0, **options: Any) -> Any:
    return language_model(tiny_llama(seed, **options), tiny_tokenizer())


@torch.no_grad()
def plain_logits(model: Any, prompt: list[int], answer: list[int], valid: int = VALID) -> Tensor:
    """Logits [R, V] that predict `answer`, from one forward over one row without padding or cache, in float64."""
    double = copy.deepcopy(model).double()
    logits = double(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, :, :valid]
    return logits[len(prompt) - 1 : -1]


def ended(row: list[int]) -> list[int]:
    return row[: row.index(EOS) + 1] if EOS in row else row


def answers_of(decoded: Any) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(decoded.ids, decoded.mask, strict=True)]


# -- the protocol ------------------------------------------------------------------------------------------------------


def test_the_table_chooses_by_configuration_and_loads_with_its_class(tmp_path):
    assert isinstance(lm_of(), DecoderOnly)
    assert architecture_of(tiny_llama().config, "teacher", "t") is LANGUAGE_MODELS["decoder-only"]
    folder = save_pretrained(tmp_path, tiny_llama(dropout=0.5))
    loaded = load_model(folder, "student")
    assert type(loaded) is LlamaForCausalLM
    assert loaded.config.attention_dropout == 0.0
    assert language_model(loaded, tiny_tokenizer()).valid_vocab == VALID


def test_a_family_is_added_by_its_row(monkeypatch, tmp_path):
    """From outside: rlkd loads it, and decodes with it."""
    model = tiny_decoder("nemotron", words=VALID)
    folder = save_pretrained(tmp_path, model)
    with pytest.raises(ModelError, match=r"teacher '.*' has model_type 'nemotron'\. Supported: t5"):
        load_model(folder, "teacher")
    row = replace(LANGUAGE_MODELS["decoder-only"], model_types=("nemotron",))
    monkeypatch.setitem(LANGUAGE_MODELS, "more", row)
    lm = language_model(load_model(folder, "teacher"), tiny_tokenizer())
    out = decode(lm, lm.prompt_states(PROMPTS[:3]), greedy, max_new_tokens=3)
    for prompt, answer in zip(PROMPTS, answers_of(out), strict=False):
        assert answer == plain_logits(lm.model, prompt, answer).argmax(-1).tolist()


def test_a_tokenizer_with_more_ids_than_the_model_is_refused():
    words = [*tiny_tokenizer().get_vocab(), "four", "more", "words", "here"]
    with pytest.raises(ModelError, match=f"model 'LlamaForCausalLM': the tokenizer has ids up to {VALID + 3}"):
        language_model(tiny_llama(), tiny_tokenizer(words))


def test_greedy_decoding_equals_generate_while_rows_end():
    lm = lm_of()
    out = decode(lm, lm.prompt_states(PROMPTS), greedy, max_new_tokens=10)
    assert len({len(answer) for answer in answers_of(out)}) >= 3
    settings = GenerationConfig(do_sample=False, max_new_tokens=10, eos_token_id=EOS, pad_token_id=EOS)
    settings.suppress_tokens = list(range(VALID, VALID + 3))
    for prompt, answer in zip(PROMPTS, answers_of(out), strict=True):
        row = lm.model.generate(torch.tensor([prompt]), generation_config=settings)[0, len(prompt) :].tolist()
        assert answer == ended(row)


@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_an_engine_samples_scores_and_searches(batch_tokens):
    engine = TorchEngine(lm_of(), batch_tokens)
    seeds = [[2 * i, 2 * i + 1] for i in range(len(PROMPTS))]
    for decoding in (Decoding("sample", 6, labels_per_input=2, top_k_logprobs=3), Decoding("beam", 6, 2, num_beams=3)):
        made = engine.answer(PROMPTS, seeds, decoding)
        for prompt, row in zip(PROMPTS, made, strict=True):
            assert len(row) == 2
            for answer in row:
                table = plain_logits(engine.lm.model, prompt, answer.ids).log_softmax(-1)
                want = table[range(len(answer.ids)), answer.ids]
                np.testing.assert_allclose(answer.logps, want, atol=1e-5)
                assert answer.finished == (answer.ids[-1] == EOS)
                assert answer.finished or len(answer.ids) == 6


def test_teacher_scores_equal_a_plain_forward():
    tokenizer = tiny_tokenizer()
    teacher = Teacher(lm_of(1), tokenizer)
    texts = ["copy a b c", "reverse d", "answer of 1 2 3 is", "m", "copy a b c"]
    ids, mask = pad_rows([[3, 4, 5, EOS], [6, EOS], [10, 11, 12, 13], [EOS], [0, 4, EOS]], EOS)
    for _ in range(2):  # the second time from the cache
        scores = teacher.score([(text,) for text in texts], ids, mask, distribution=True)
        for i, text in enumerate(texts):
            answer = ids[i][mask[i]].tolist()
            logits = plain_logits(teacher.lm.model, prompt_of(tokenizer, text), answer)
            log_p = logits.log_softmax(-1)
            want = {
                "chosen": logits[range(len(answer)), answer],
                "max": logits.max(-1).values,
                "logsumexp": logits.logsumexp(-1),
                "mean": logits.mean(-1),
                "entropy": -(log_p.exp() * log_p).sum(-1),
            }
            for name, values in want.items():
                got = getattr(scores, name)[i]
                np.testing.assert_allclose(got[mask[i]], values, atol=1e-5, err_msg=name)
                assert not got[~mask[i]].any()
    assert teacher.cache.hits == 4
    assert teacher.cache.bytes == sum(s.numel() * s.element_size() for s in teacher.prompt_states(texts[:4]))


# -- the policy --------------------------------------------------------------------------------------------------------


def test_the_policy_gradient_equals_that_of_full_logits():
    """Two answers to one prompt share its state, and its gradient comes from both."""
    policy = Policy(lm_of(), critic=True)
    prompts, answers = [[5, 6, 7], [9, EOS], [5, 6, 7]], [[8, 9, EOS], [10], [EOS]]
    inputs, (ids, mask) = pad_rows(prompts, EOS), pad_rows(answers, EOS)
    advantages = torch.tensor([[1.0, -2.0, 0.5], [3.0, 0.0, 0.0], [-1.5, 0.0, 0.0]])
    (logps, _), _ = policy(*inputs, ids, mask)
    reduce_tokens(reinforce_loss(logps, advantages, mask.float()), mask, "token_mean").backward()

    plain = tiny_llama()
    loss = torch.tensor(0.0)
    for prompt, answer, row in zip(prompts, answers, advantages, strict=True):
        logits = plain(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1, :VALID]
        chosen = logits.log_softmax(-1)[range(len(answer)), answer]
        loss = loss - (row[: len(answer)] * chosen).sum() / 5
    loss.backward()
    for name, parameter in plain.named_parameters():
        got = dict(policy.student.named_parameters())[name].grad
        torch.testing.assert_close(got, parameter.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_recorded_log_probs_are_those_the_loss_recomputes():
    policy = Policy(lm_of()).train()
    drawn = decode(policy.lm, policy.lm.prompt_states(PROMPTS), sampler([*range(12)], 6, CPU), max_new_tokens=6)
    (logps, _), _ = policy(*pad_rows(PROMPTS, EOS), drawn.ids, drawn.mask)
    torch.testing.assert_close(logps, drawn.logps, atol=1e-5, rtol=0)


def test_a_share_of_the_teacher_is_that_of_its_scores():
    policy, teacher = Policy(lm_of()), Teacher(lm_of(3), tiny_tokenizer())
    examples = [Example(f"row {i}", " ".join("abcde"[: 1 + i]), (f"copy {'xyz'[i % 3]} a",)) for i in range(4)]
    answers = sample_rollouts(
        policy, tiny_tokenizer(), examples, rollouts_per_prompt=3, max_input_tokens=16, max_new_tokens=6, seed=(0,),
        proposal=Proposal(teacher_mix=0.4, teacher=teacher),
    )  # fmt: skip
    mask = answers.answer_mask
    (own, _), _ = policy(*answers.policy_inputs)
    signal = teacher.score([e.teacher_inputs for e in answers.examples], answers.answer_ids, mask)
    mixed = torch.log(0.6 * own.exp() + 0.4 * (signal.chosen - signal.logsumexp).exp())
    torch.testing.assert_close(answers.policy_logps, own.detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(answers.behaviour_logps[mask], mixed.detach()[mask], atol=1e-5, rtol=0)


def test_a_frozen_copy_has_its_own_model():
    policy = Policy(lm_of())
    frozen = policy.frozen_copy()
    assert frozen.lm.model is frozen.student
    assert frozen.student is not policy.student
    assert frozen.state_dict().keys() == policy.state_dict().keys()


# -- training ----------------------------------------------------------------------------------------------------------


def trained(folder: Any, kind: str, **options: Any) -> Any:
    """Two steps of a decoder-only student with a decoder-only teacher, with an evaluation at the end."""
    tokenizer = tiny_tokenizer(tiny_runs.WORDS)
    teacher = language_model(tiny_llama(2, words=tiny_runs.VALID), tokenizer)
    trainer = tiny_runs.make(
        kind, folder, model=tiny_llama(11, words=tiny_runs.VALID), teacher=Teacher(teacher, tokenizer),
        eval_examples=tiny_runs.examples(4), max_steps=2, **options,
    )  # fmt: skip
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", ["reinforce", "ppo", "supervised"])
def test_two_steps_and_an_evaluation(kind, tmp_path):
    options = {"objective": "reverse_kl"} if kind == "supervised" else {"one_step": "exact"}
    trainer = trained(tmp_path, kind, **options)
    losses = [line["loss"] for line in tiny_runs.logged(tmp_path) if "loss" in line]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    assert tiny_runs.differ(trainer.policy.student.state_dict(), tiny_llama(11, words=tiny_runs.VALID).state_dict())

    metrics = trainer.evaluate()
    regrets, lengths = [], []
    for example, row in zip(tiny_runs.examples(4), trainer.evaluate_policy(None), strict=True):
        prompt = prompt_of(trainer.tokenizer, example.student_input)
        best = plain_logits(trainer.policy.student, prompt, row["ids"], tiny_runs.VALID).argmax(-1)
        assert row["ids"] == best.tolist()
        prompt = prompt_of(trainer.tokenizer, example.teacher_inputs[0])
        logits = plain_logits(trainer.teacher.lm.model, prompt, row["ids"], tiny_runs.VALID)
        regrets.append(float((logits.max(-1).values - logits[range(len(row["ids"])), row["ids"]]).sum()))
        lengths.append(len(row["ids"]))
    assert metrics["eval_regret"] == pytest.approx(np.mean(regrets), abs=1e-4)
    assert metrics["eval_length"] == np.mean(lengths)

    trainer.save_model(str(tmp_path / "saved"))
    assert "AutoModelForCausalLM.from_pretrained" in (tmp_path / "saved" / "README.md").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    tiny_runs.assert_same(again.state_dict(), trainer.policy.student.state_dict())


def test_the_rewards_that_reinforce_learns_from_are_the_plain_ones(tmp_path):
    trainer = trained(tmp_path, "reinforce")
    batch = trainer.annotate(trainer.sample(7))
    for i, example in enumerate(batch.answers.examples):
        answer = batch.answers.answer_ids[i][batch.answers.answer_mask[i]].tolist()
        prompt = prompt_of(trainer.tokenizer, example.teacher_inputs[0])
        logits = plain_logits(trainer.teacher.lm.model, prompt, answer, tiny_runs.VALID)
        want = logits[range(len(answer)), answer] - logits.max(-1).values
        np.testing.assert_allclose(batch.annotations.rewards[i][: len(answer)], want, atol=1e-5)


def test_a_reward_view_takes_plain_decoder_only_models():
    tokenizer = tiny_tokenizer(tiny_runs.WORDS)
    teacher = Teacher(language_model(tiny_llama(2, words=tiny_runs.VALID), tokenizer), tokenizer)
    student = tiny_llama(11, words=tiny_runs.VALID)
    view = reward_view(teacher, tokenizer, tiny_runs.examples(3), student=student, max_new_tokens=4)
    assert {sample.source for sample in view.samples} == {"student", "teacher greedy", "reference"}
