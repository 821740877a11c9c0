"""What a checkpoint's generation_config says of answers: as transformers' generate applies it, everywhere alike."""

import json

import pytest
import torch
from transformers import (
    GenerationConfig,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MBart50Tokenizer,
    MBartTokenizer,
)

from rlkd.errors import ConfigError, ModelError
from rlkd.models.encoder_decoder import EncoderDecoder
from rlkd.models.generation import AnswerRules
from rlkd.models.policy import Policy
from rlkd.models.saving import evaluated_generation
from rlkd.models.spec import ModelSpec, check_pair
from rlkd.models.teacher import Teacher
from rlkd.models.vocabulary import encode_answers
from rlkd.records import Example
from rlkd.sampling.engines.protocol import Decoding
from rlkd.sampling.engines.torch_engine import TorchEngine
from rlkd.sampling.rollouts import sample_rollouts
from rlkd.trainers.supervised import PseudoLabelCollator
from tiny import EOS, KINDS, PAD, VALID, save_pretrained, tiny_bart, tiny_model, tiny_t5, tiny_tokenizer

PROMPTS = [[3 + (7 * i + j * j) % 29 for j in range(1 + i % 5)] + [EOS] for i in range(6)]
NEW = 8
# Each changes what some tiny model writes (the last test of this section checks it).
RULES = {
    "first": {"forced_bos_token_id": 5},
    "last": {"forced_eos_token_id": EOS},
    "suppressed": {"suppress_tokens": list(range(3, 20))},
    "bad words": {"bad_words_ids": [[i] for i in range(15, 30)] + [[EOS]]},
    "bad phrases": {"bad_words_ids": [[i, j] for i in range(VALID) for j in range(10, 25)]},
    "begin": {"begin_suppress_tokens": list(range(2, 28))},
    "begin after first": {"begin_suppress_tokens": list(range(2, 28)), "forced_bos_token_id": 0},
    "min_length": {"min_length": 6},
    "min_new_tokens": {"min_new_tokens": 4},
    "unigrams": {"no_repeat_ngram_size": 1},
    "bigrams": {"no_repeat_ngram_size": 2},
    "several ends": {"eos_token_id": [EOS, *range(20, 30)]},
    "start": {"decoder_start_token_id": 9},
    "bart-large-cnn": {
        "forced_bos_token_id": 0, "forced_eos_token_id": EOS, "no_repeat_ngram_size": 3, "min_length": 4,
        "length_penalty": 2.0, "early_stopping": True, "num_beams": 4, "max_length": 3,
    },
    "short beams": {"length_penalty": -2.0},
}  # fmt: skip
DECODINGS = {"greedy": Decoding("greedy", NEW), "beam": Decoding("beam", NEW, num_beams=3)}


def model_with(kind, rules, seed=3):
    model = tiny_model(kind, seed=seed)
    for name, value in rules.items():
        setattr(model.generation_config, name, value)
    return model


def generated(model, prompt, decoding):
    """The oracle: what plain transformers writes, up to its first end."""
    beams = decoding.num_beams if decoding.strategy == "beam" else 1
    padding = range(VALID, model.config.vocab_size)
    ids = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=NEW,
        num_beams=beams,
        do_sample=False,
        suppress_tokens=[*(model.generation_config.suppress_tokens or []), *padding],
    )[0, 1:].tolist()
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return ids[: next((i for i, token in enumerate(ids) if token in ends), NEW) + 1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RULES)
def test_labels_are_those_of_generate_and_scored_alike(kind, name):
    model = model_with(kind, RULES[name])
    lm = EncoderDecoder(model, VALID)
    engine = TorchEngine(lm)
    for decoding in DECODINGS.values():
        for prompt, (answer,) in zip(PROMPTS, engine.answer(PROMPTS, [[0]] * len(PROMPTS), decoding), strict=True):
            assert answer.ids == generated(model, prompt, decoding)
            cut = len(answer.ids) == NEW and (lm.rules.last is not None or answer.ids[-1] not in lm.rules.eos_ids)
            assert answer.finished == (not cut)
            (scored,) = engine.score([prompt], [answer.ids])
            chosen = len(answer.ids) - (cut and lm.rules.last is not None)
            assert answer.logps[:chosen] == pytest.approx(scored[:chosen], abs=1e-5)
            assert [*answer.logps, 0.0][chosen] == 0.0  # an end that was forced, not chosen


@pytest.mark.parametrize("name", RULES)
def test_each_rule_changes_answers(name):
    """Controls: without it the tests above would hold for a decoder that knows no rules."""
    changed = False
    for kind in KINDS:
        plain, ruled = (TorchEngine(EncoderDecoder(model_with(kind, r), VALID)) for r in ({}, RULES[name]))
        for decoding in DECODINGS.values():
            one, other = (engine.answer(PROMPTS, [[0]] * len(PROMPTS), decoding) for engine in (plain, ruled))
            changed |= [row[0].ids for row in one] != [row[0].ids for row in other]
    assert changed


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RULES)
def test_ctranslate2_writes_the_same_or_refuses_by_name(kind, name, tmp_path, monkeypatch):
    pytest.importorskip("ctranslate2")
    from rlkd.sampling.engines.ctranslate2_engine import CTranslate2Engine

    monkeypatch.setenv("RLKD_CACHE", str(tmp_path))
    lm = EncoderDecoder(model_with(kind, RULES[name]), VALID)
    if lm.rules.moving:
        with pytest.raises(ConfigError, match=f"does not compute .* under {next(iter(lm.rules.moving))}"):
            CTranslate2Engine(lm)
        return
    engine, reference = CTranslate2Engine(lm), TorchEngine(lm)
    greedy = [e.answer(PROMPTS, [[0]] * 6, DECODINGS["greedy"]) for e in (engine, reference)]
    for ours, theirs in zip(*greedy, strict=True):
        assert ours[0].ids == theirs[0].ids
        assert ours[0].finished == theirs[0].finished
        assert ours[0].logps == pytest.approx(theirs[0].logps, abs=1e-4)
    for (beam,) in engine.answer(PROMPTS, [[0]] * 6, DECODINGS["beam"]):
        assert len(beam.ids) == len(beam.logps)
        assert not {*lm.rules.banned} & {*beam.ids}
        assert beam.ids[0] == (lm.rules.first if lm.rules.first is not None else beam.ids[0])


EXAMPLES = [Example(f"r{i}", text, (f"copy {text}",)) for i, text in enumerate(("a b c", "d e", "f g h i 1 2"))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RULES)
def test_rollouts_are_scored_as_they_were_sampled(kind, name):
    """The ratio of the first update is 1, and the teacher gives every token a finite score."""
    policy = Policy(EncoderDecoder(model_with(kind, RULES[name]), VALID))
    answers = sample_rollouts(
        policy, tiny_tokenizer(), EXAMPLES, rollouts_per_prompt=4, max_input_tokens=20, max_new_tokens=NEW, seed=(0,)
    )
    rules, mask = policy.lm.rules, answers.answer_mask
    (logps, _), _ = policy(*answers.policy_inputs)
    torch.testing.assert_close(logps, answers.behaviour_logps, atol=1e-5, rtol=0)
    assert not torch.isin(answers.answer_ids[mask], torch.tensor(rules.banned or (-1,))).any()
    if rules.first is not None:
        assert (answers.answer_ids[:, 0] == rules.first).all()
        assert (logps[:, 0] == 0).all()
    (logps * mask).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in policy.parameters() if p.grad is not None)
    teacher = Teacher(EncoderDecoder(model_with(kind, RULES[name], seed=4), VALID), tiny_tokenizer())
    signal = teacher.score([e.teacher_inputs for e in answers.examples], answers.answer_ids, mask, distribution=True)
    flat = [row[kept].tolist() for row, kept in zip(answers.answer_ids, mask, strict=True)]
    prompts = [tiny_tokenizer()(e.teacher_inputs[0])["input_ids"] for e in answers.examples]
    want = [value for row in TorchEngine(teacher.lm).score(prompts, flat) for value in row]
    assert (signal.chosen - signal.logsumexp)[mask].tolist() == pytest.approx(want, abs=1e-5)
    states = [value[mask] for value in signal.distribution.token_args]
    table = signal.distribution.logits(*states).log_softmax(-1)
    assert table.gather(-1, answers.answer_ids[mask][:, None]).squeeze(-1).tolist() == pytest.approx(want, abs=1e-5)


def test_restricted_gradients_are_those_of_plain_autograd():
    policy = Policy(EncoderDecoder(model_with("bart", RULES["bart-large-cnn"] | RULES["suppressed"]), VALID))
    ids, mask = torch.tensor([PROMPTS[3]]), torch.ones(1, len(PROMPTS[3]), dtype=torch.bool)
    answer = torch.tensor([[0, 24, 25, 26, EOS]])
    (logps, _), _ = policy(ids, mask, answer, torch.ones_like(answer).bool())
    logps.sum().backward()
    model = policy.student
    got = model.get_output_embeddings().weight.grad.clone()
    model.zero_grad()
    shifted = torch.tensor([[EOS, 0, 24, 25, 26]])
    logits = model(input_ids=ids, decoder_input_ids=shifted).logits[..., :VALID]
    barred = torch.zeros_like(logits, dtype=torch.bool)
    barred[..., 3:20] = True  # suppressed
    barred[:, :3, EOS] = True  # min_length 4, which counts the start
    table = logits.masked_fill(barred, float("-inf")).log_softmax(-1)
    table.gather(-1, answer[..., None])[:, 1:].sum().backward()  # the first token is forced
    torch.testing.assert_close(got, model.get_output_embeddings().weight.grad, atol=1e-5, rtol=1e-4)


def test_a_given_token_is_never_forbidden():
    """Texts of other people break no_repeat_ngram_size; their loss must stay finite, and only they are exempt."""
    lm = EncoderDecoder(model_with("t5", {"no_repeat_ngram_size": 1, "suppress_tokens": [7]}), VALID)
    ((*_, repeated, suppressed, _),) = TorchEngine(lm).score([PROMPTS[0]], [[5, 5, 7, EOS]])
    assert -50 < repeated < 0
    assert -50 < suppressed < 0


# -- from a checkpoint, before weights load ----------------------------------------------------------------------------


def saved(folder, config=(), generation=()):
    """A saved model with these fields in config.json and generation_config.json; None removes the latter file."""
    save_pretrained(folder, tiny_bart())
    for file, fields in (("config.json", config), ("generation_config.json", generation)):
        path = folder / file
        if fields is None:
            path.unlink()
        elif fields:
            path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return ModelSpec(str(folder), "teacher")


def test_a_missing_start_token_falls_back(tmp_path):
    null = {"decoder_start_token_id": None}
    assert saved(tmp_path / "a", config=null).rules.start_id == EOS  # generation_config has it
    both = saved(tmp_path / "b", config=null | {"bos_token_id": 4}, generation=null | {"bos_token_id": 4})
    assert both.rules.start_id == 4
    assert both.language_model().start_id == 4
    assert saved(tmp_path / "c", generation=null).rules.start_id == EOS  # config has it
    gone = null | {"bos_token_id": None}
    with pytest.raises(ModelError, match="has a decoder_start_token_id"):
        saved(tmp_path / "d", config=gone, generation=gone).check()


def test_pad_and_end_tokens_fall_back_alike(tmp_path):
    null = {"pad_token_id": None}
    assert saved(tmp_path / "a", config=null).rules.pad_id == PAD
    assert saved(tmp_path / "b", config=null, generation=null).rules.pad_id == EOS
    null = {"eos_token_id": None}
    assert saved(tmp_path / "c", config=null).rules.eos_ids == (EOS,)
    with pytest.raises(ModelError, match="has an eos_token_id"):
        saved(tmp_path / "d", config=null, generation=null).check()


def test_older_checkpoints_keep_their_rules_in_config_json(tmp_path):
    spec = saved(tmp_path, config={"forced_bos_token_id": 6, "no_repeat_ngram_size": 2}, generation=None)
    assert (spec.rules.first, spec.rules.ngram) == (6, 2)
    assert spec.language_model().rules == spec.rules


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("exponential_decay_length_penalty", [5, 1.1]),
        ("sequence_bias", [[[4], -2.0]]),
        ("guidance_scale", 1.5),
        ("force_words_ids", [[1, 5]]),
        ("stop_strings", ["a"]),
    ],
)
def test_what_is_not_applied_is_refused_by_name(tmp_path, field, value):
    with pytest.raises(ModelError, match=f"generation_config sets {field} = "):
        saved(tmp_path, generation={field: value}).check()


@pytest.mark.parametrize(
    ("field", "value"),
    [("repetition_penalty", 1.3), ("encoder_repetition_penalty", 0.5), ("encoder_no_repeat_ngram_size", 3)],
)
def test_what_is_of_a_search_is_ignored_and_said_once(tmp_path, caplog, field, value):
    spec = saved(tmp_path, generation={field: value, "no_repeat_ngram_size": 2})
    with caplog.at_level("WARNING"):
        lm = spec.language_model()
        spec.language_model()
    (line,) = [record.getMessage() for record in caplog.records if "generation_config" in record.getMessage()]
    assert line.startswith(f"teacher '{spec.name}': its generation_config sets {field} = {value}, which is ignored")
    assert lm.rules == spec.rules
    assert spec.rules.identity()["generation_config_ignored"] == {field: value}
    assert spec.rules.identity()["generation_config"] == {"no_repeat_ngram_size": 2}
    kept = evaluated_generation(lm, 5)
    assert getattr(kept, field) in (None, 1.0, 0)
    assert kept.no_repeat_ngram_size == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [("forced_bos_token_id", 999), ("suppress_tokens", [-4]), ("bad_words_ids", [[3, 999]]), ("eos_token_id", [1, 77])],
)
def test_ids_that_are_no_tokens_are_refused(tmp_path, field, value):
    with pytest.raises(ModelError, match=f"{field}.*Correct generation_config.json"):
        saved(tmp_path, generation={field: value}).check()


def test_a_broken_generation_config_is_named(tmp_path):
    spec = saved(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"generation_config\.json is cut off or no JSON"):
        spec.check()


def test_a_pair_must_begin_and_end_answers_alike(tmp_path):
    teacher = saved(tmp_path / "teacher", generation={"forced_bos_token_id": 0, "min_length": 5})
    check_pair(teacher, saved(tmp_path / "same", generation={"forced_bos_token_id": 0}))
    with pytest.raises(ModelError, match=r"forced_bos_token_id = 0 and student .* None"):
        check_pair(teacher, saved(tmp_path / "other"))


# -- texts as answers --------------------------------------------------------------------------------------------------


def test_labels_begin_with_the_forced_token_and_end_as_the_teacher_did():
    rules = AnswerRules(eos_ids=(EOS,), first=PAD)
    collate = PseudoLabelCollator(tiny_tokenizer(), 20, 4, rules=rules)
    text = collate([{"student_input": "a", "label": "a b"}])
    assert text["answer_ids"].tolist() == [[PAD, 3, 4, EOS]]
    assert text["answer_mask"].all()
    rows = [
        {"student_input": "a", "token_ids": [PAD, 3, EOS], "finish_reason": "eos"},
        {"student_input": "a", "token_ids": [3, 4, EOS], "finish_reason": "eos"},
        {"student_input": "a", "token_ids": [PAD, 3, 4, EOS], "finish_reason": "length"},  # a forced end
        {"student_input": "a", "token_ids": [3, 4, 5, 6, EOS], "finish_reason": "eos"},
    ]
    batch = collate(rows)
    answers = [ids[mask].tolist() for ids, mask in zip(batch["answer_ids"], batch["answer_mask"], strict=True)]
    assert answers == [[PAD, 3, EOS], [PAD, 3, 4, EOS], [PAD, 3, 4], [PAD, 3, 4, 5]]


# -- languages ---------------------------------------------------------------------------------------------------------

PIECES = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)] + [("▁" + word, -1.0) for word in "abcdefgh"]


def translator(folder, kind):
    """A tiny model and the tokenizer of a family that translates; its generation_config names no language."""
    tokenizer = (MBartTokenizer if kind == "mbart" else MBart50Tokenizer)(vocab=PIECES, src_lang="en_XX")
    torch.manual_seed(0)
    config = M2M100Config(
        vocab_size=len(tokenizer) + 3, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64, init_std=0.5,
        bos_token_id=0, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    save_pretrained(folder, M2M100ForConditionalGeneration(config).eval(), tokenizer)
    return tokenizer


@pytest.mark.parametrize("kind", ["mbart", "mbart50"])
def test_the_language_of_answers_is_set(tmp_path, kind):
    tokenizer = translator(tmp_path, kind)
    french = tokenizer.convert_tokens_to_ids("fr_XX")
    spec = ModelSpec(str(tmp_path), "teacher", src_lang="de_DE", tgt_lang="fr_XX")
    lm = spec.language_model()
    prompt = spec.tokenizer("a b")["input_ids"]
    assert tokenizer.convert_tokens_to_ids("de_DE") in prompt
    # The oracle: transformers' own recipe for each of the two.
    forced = {"decoder_start_token_id": french} if kind == "mbart" else {"forced_bos_token_id": french}
    extra = list(range(lm.valid_vocab, lm.config.vocab_size))
    want = lm.model.generate(torch.tensor([prompt]), max_new_tokens=5, suppress_tokens=extra, num_beams=1, **forced)
    ((answer,),) = TorchEngine(lm).answer([prompt], [[0]], Decoding("greedy", 5))
    assert answer.ids == want[0, 1 : len(answer.ids) + 1].tolist()
    (label,) = encode_answers(spec.tokenizer, ["a b"], 10, spec.rules)
    assert label == [
        *([] if kind == "mbart" else [french]),
        *tokenizer("a b", add_special_tokens=False)["input_ids"],
        2,
    ]
    lm.model.save_pretrained(tmp_path / "again")
    kept = GenerationConfig.from_pretrained(tmp_path / "again")
    assert {name: getattr(kept, name) for name in forced} == forced


def test_languages_are_asked_for_and_checked(tmp_path):
    translator(tmp_path / "mbart50", "mbart50")
    for settings, reason in (
        ({}, "tgt_lang = None"),
        ({"tgt_lang": "xx"}, "tgt_lang = 'xx'"),
        ({"tgt_lang": "fr_XX", "src_lang": "xx"}, "src_lang = 'xx'"),
    ):
        with pytest.raises(ModelError, match=f"{reason}.*translates between 52 languages"):
            ModelSpec(str(tmp_path / "mbart50"), "teacher", **settings).check()
    save_pretrained(tmp_path / "t5", tiny_t5())
    with pytest.raises(ModelError, match="has no languages"):
        ModelSpec(str(tmp_path / "t5"), "teacher", src_lang="en_XX").check()


def test_a_language_that_the_checkpoint_forces_needs_no_setting(tmp_path):
    french = translator(tmp_path, "mbart50").convert_tokens_to_ids("fr_XX")
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"forced_bos_token_id": french}))
    spec = ModelSpec(str(tmp_path), "teacher")
    assert spec.rules.first == french
    assert spec.tokenizer.tgt_lang == "fr_XX"
