"""Prompts in chat templates, against transformers' own `apply_chat_template` and `generate`."""

from __future__ import annotations

import logging

import pytest
import torch
from models.chat_templates import GEMMA, KINDS, TURN_ENDS, chat_model, chat_tokenizer
from models.decoder_families import continuing_tokenizer
from transformers import AutoTokenizer

from rlkd.errors import ConfigError, ModelError
from rlkd.models.architectures import language_model
from rlkd.models.chat import as_asked, chat_of, with_chat, without_chat
from rlkd.models.cut_vocabulary import cut_tokenizer, kept_ids
from rlkd.models.digests import tokenizer_digest
from rlkd.models.other_tokenizer import OtherTokenizer
from rlkd.models.served import ServerTeacher
from rlkd.models.server import Server, ServerSettings
from rlkd.models.spec import ModelSpec, TeacherSpec
from rlkd.models.teacher import Teacher
from rlkd.models.vocabulary import decode_texts, encode_answers, encode_prompts
from rlkd.objectives.rewards import induced_advantage
from rlkd.sampling.decode import decode, greedy
from rlkd.sampling.rollouts import greedy_writer
from rlkd.tensors import pad_rows
from tiny import save_pretrained

TEXTS = ["Is it good?", "", "  ünï <b>\nagain ", "x" * 40]
SYSTEMS = {"chatml": (None, "Speak up."), "llama3": (None, "Speak up."), "gemma": (None,)}
CASES = [(kind, system) for kind in KINDS for system in SYSTEMS[kind]]


def oracle(tokenizer, text, system=None, answer=None):
    """Token ids as transformers has them."""
    turns = [{"role": "user", "content": text}]
    if system is not None:
        turns.insert(0, {"role": "system", "content": system})
    if answer is not None:
        turns.append({"role": "assistant", "content": answer})
    return tokenizer.apply_chat_template(turns, add_generation_prompt=answer is None)["input_ids"]


@pytest.mark.parametrize(("kind", "system"), CASES)
def test_prompts_are_those_of_transformers(kind, system):
    plain = chat_tokenizer(kind)
    tokenizer = with_chat(plain, system)
    rows = encode_prompts(tokenizer, TEXTS, 200)
    assert rows == [oracle(chat_tokenizer(kind), text, system) for text in TEXTS]
    if plain.bos_token is not None:
        assert {row.count(plain.bos_token_id) for row in rows} == {1}
        assert plain(TEXTS[0])["input_ids"][0] == plain.bos_token_id  # which the tokenizer would write once more
    assert encode_prompts(plain, TEXTS[:1], 200)[0] != rows[0]  # the tokenizer given is as it was


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_are_those_of_generate(kind):
    """Prompts of unequal length in one batch, each answer up to the end of its turn."""
    model, tokenizer = chat_model(kind, seed=3), with_chat(chat_tokenizer(kind))
    turn = tokenizer.convert_tokens_to_ids(TURN_ENDS[kind])
    model.lm_head.weight.data[turn] *= 3.0  # some answers end
    beyond, want = list(range(len(tokenizer), model.config.vocab_size)), []
    for text in TEXTS:
        ids = torch.tensor([oracle(chat_tokenizer(kind), text)])
        made = model.generate(ids, max_new_tokens=12, do_sample=False, suppress_tokens=beyond)
        want.append(made[0, ids.shape[1] :].tolist())
    assert any(turn in row for row in want)
    lm = language_model(model, tokenizer)
    out = decode(lm, lm.prompt_states(encode_prompts(tokenizer, TEXTS, 200)), greedy, max_new_tokens=12)
    assert [ids[mask].tolist() for ids, mask in zip(out.ids, out.mask, strict=True)] == want
    teacher = Teacher(lm, tokenizer, max_input_tokens=200)
    assert teacher.answer([(TEXTS[0],)], greedy_writer(12), 12) == want[:1]


@pytest.mark.parametrize(("kind", "system"), CASES)
def test_long_texts_are_cut_and_their_frame_is_whole(kind, system):
    tokenizer = with_chat(chat_tokenizer(kind), system)
    frame, text = len(oracle(tokenizer, "", system)), "abcdefghij ünï"
    assert encode_prompts(tokenizer, [text, "ab"], frame + 5) == [
        oracle(tokenizer, "abcde", system), oracle(tokenizer, "ab", system)
    ]  # fmt: skip
    # Never within a character: the third has two bytes.
    assert encode_prompts(tokenizer, ["ünïünï"], frame + 4) == [oracle(tokenizer, "ün", system)]
    with pytest.raises(ConfigError, match=f"max_input_tokens = {frame}: the chat template of .* takes {frame} tokens"):
        encode_prompts(tokenizer, ["abc"], frame)


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_follows_as_the_template_has_it(kind):
    tokenizer, end = with_chat(chat_tokenizer(kind)), chat_tokenizer(kind).convert_tokens_to_ids(TURN_ENDS[kind])
    lm = language_model(chat_model(kind), tokenizer)
    assert lm.rules.eos_ids[0] == end
    for text in ("yes", "no way", ""):
        whole, prompt = oracle(tokenizer, "Is it?", answer=text), oracle(tokenizer, "Is it?")
        rest = whole[len(prompt) :]
        want = rest[: rest.index(end) + 1]
        assert encode_answers(tokenizer, [text, f" {text}"], 20, lm.rules) == [want, want]
        assert decode_texts(tokenizer, [want]) == [text]
    assert encode_answers(tokenizer, ["yes"], 2, lm.rules)[0][-1] == end
    # Without the template an answer follows a space, and ends as a text does.
    plain = language_model(chat_model(kind), chat_tokenizer(kind))
    (row,) = encode_answers(chat_tokenizer(kind), ["yes"], 20, plain.rules)
    assert (chat_tokenizer(kind).decode(row[:-1]), row[-1]) == (" yes", chat_tokenizer(kind).eos_token_id)


def test_a_base_model_learns_the_end_of_a_turn(tmp_path):
    """A checkpoint that ends texts otherwise: turns end answers too, in rollouts, scores and what is saved."""
    tokenizer = chat_tokenizer("gemma")
    eos, turn = tokenizer.convert_tokens_to_ids(["<eos>", "<end_of_turn>"])
    folder = save_pretrained(tmp_path / "base", chat_model("gemma", eos_token_id=eos), tokenizer)
    spec = ModelSpec(folder, "student", chat=True)
    assert spec.rules.eos_ids == (turn, eos)
    lm = spec.language_model()
    assert lm.rules == spec.rules
    assert lm.model.generation_config.eos_token_id == [turn, eos]
    assert ModelSpec(folder, "student", chat=False).rules.eos_ids == (eos,)
    again = language_model(lm.model, spec.tokenizer)
    assert again.rules == lm.rules


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_a_plain_forward(kind):
    """Rows of different lengths together; and what a server is sent."""
    tokenizer, end = with_chat(chat_tokenizer(kind)), chat_tokenizer(kind).convert_tokens_to_ids(TURN_ENDS[kind])
    model = chat_model(kind, seed=5)
    teacher = Teacher(language_model(model, tokenizer), tokenizer, max_input_tokens=200)
    answers = [[20, 30, end], [40, 50, 60, 70]]
    ids, mask = pad_rows(answers, 0)
    signal = teacher.score([(text,) for text in TEXTS[:2]], ids, mask)
    rewards = induced_advantage(signal, "max")
    for i, answer in enumerate(answers):
        prompt = oracle(chat_tokenizer(kind), TEXTS[i])
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1, : len(tokenizer)]
        want = logits[range(len(answer)), answer] - logits.max(-1).values
        torch.testing.assert_close(rewards[i, : len(answer)], want, atol=1e-5, rtol=1e-5)
    server = Server(ServerSettings("http://localhost:1/v1"), len(tokenizer))
    served = ServerTeacher("t", server, tokenizer, teacher.rules, max_input_tokens=200)
    assert served.prompt_ids(TEXTS) == [oracle(chat_tokenizer(kind), text) for text in TEXTS]


def test_another_tokenizers_student_and_a_teacher_in_a_chat():
    """The text of an answer is scored in the teacher's chat: sums are the teacher's own."""
    theirs, ours = with_chat(chat_tokenizer("gemma")), chat_tokenizer("chatml")
    model = chat_model("gemma", seed=5)
    teacher = Teacher(language_model(model, theirs), theirs, max_input_tokens=200)
    student = language_model(chat_model("chatml"), ours)
    (row,) = encode_answers(ours, ["yes"], 9, student.rules)
    signal = OtherTokenizer(teacher, ours, student.rules).score([(TEXTS[0],)], *pad_rows([row], 0))
    whole, prompt = oracle(theirs, TEXTS[0], answer="yes"), oracle(theirs, TEXTS[0])
    answer = whole[len(prompt) : -1]  # without the line end after the turn
    with torch.no_grad():
        logps = model(torch.tensor([[*prompt, *answer]])).logits[0, :, : len(theirs)].log_softmax(-1)
    want = sum(float(logps[len(prompt) - 1 + k, token]) for k, token in enumerate(answer))
    assert float((signal.chosen - signal.logsumexp).sum()) == pytest.approx(want, abs=1e-4)


# -- what is saved, asked for and refused ------------------------------------------------------------------------------


def test_it_is_saved_with_the_tokenizer_and_told_apart(tmp_path):
    plain = chat_tokenizer()
    made = with_chat(plain, "Speak up.")
    made.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert chat_of(loaded).system == "Speak up."
    assert encode_prompts(loaded, TEXTS, 200) == encode_prompts(made, TEXTS, 200)
    assert tokenizer_digest(loaded) == tokenizer_digest(made)
    digests = {tokenizer_digest(t) for t in (plain, made, with_chat(plain), with_chat(plain, "Speak."))}
    assert len(digests) == 4
    assert tokenizer_digest(without_chat(loaded)) == tokenizer_digest(plain)
    assert without_chat(plain) is plain


def test_settings_decide_and_null_is_as_saved(tmp_path, caplog):
    plain = chat_tokenizer()
    with caplog.at_level(logging.WARNING):
        assert as_asked(plain, None, None, "teacher", "folder") is plain
    assert "teacher 'folder' has a chat template, and reads its prompts as plain text: set teacher_chat" in caplog.text
    caplog.clear()
    saved = with_chat(plain, "Speak up.")
    assert as_asked(plain, False, None, "teacher", "folder") is plain
    assert as_asked(continuing_tokenizer(["<s>", "</s>", "<unk>"]), None, None, "teacher", "f").chat_template is None
    assert chat_of(as_asked(saved, None, None, "student", "folder")).system == "Speak up."
    assert chat_of(as_asked(saved, True, None, "student", "folder")).system is None
    assert chat_of(as_asked(saved, False, None, "student", "folder")) is None
    assert chat_of(as_asked(plain, True, "Be brief.", "student_before", "folder")).system == "Be brief."
    assert not caplog.text


def test_what_cannot_be_a_chat_is_refused_before_weights_load(tmp_path):
    def spec(template, role="teacher", **options):
        tokenizer = chat_tokenizer("gemma")
        tokenizer.chat_template = template
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        save_pretrained(folder, chat_model("gemma"), tokenizer)
        return ModelSpec(str(folder), role, **{"chat": True, **options})

    with pytest.raises(ConfigError, match=r"teacher_chat = True: the tokenizer of teacher '.*' has no chat template"):
        spec(None).check()
    with pytest.raises(
        ConfigError, match=r"student_system_prompt: the chat template of student .* refuses it: System role"
    ):
        spec(GEMMA, "student", system_prompt="Be brief.").check()
    with pytest.raises(ConfigError, match=r"teacher_chat = True: the chat template .* refuses it: .*strawberry"):
        spec("{{ raise_exception('strawberry') }}").check()
    with pytest.raises(ModelError, match=r"its chat template leaves out the text 'rlkd probe' that it is given"):
        spec("{% for m in messages %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}").check()
    with pytest.raises(ConfigError, match="teacher_system_prompt is set without teacher_chat"):
        spec(GEMMA, chat=None, system_prompt="Be brief.").check()
    with pytest.raises(ConfigError, match=r"append_eos = True: the chat template says how prompts end"):
        _ = TeacherSpec(spec(GEMMA), input_eos=True).append_eos
    with pytest.raises(ConfigError, match=r"max_input_tokens = 9: the chat template of teacher .* takes \d+ tokens"):
        spec(GEMMA).check_lengths(9)
    assert TeacherSpec(spec(GEMMA)).append_eos is False


def test_a_template_that_writes_the_date_writes_the_same_tomorrow(tmp_path):
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} " + tokenizer.chat_template
    made = with_chat(tokenizer)
    assert made.decode(encode_prompts(made, ["a"], 200)[0]).startswith("26 Jul 2024 <|im_start|>")
    made.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert oracle(loaded, "a") == encode_prompts(loaded, ["a"], 200)[0] == encode_prompts(made, ["a"], 200)[0]
    assert with_chat(loaded).chat_template == loaded.chat_template


def test_a_template_for_prompts_alone_ends_as_the_checkpoint_does():
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no') if messages | length > 1 }}Q: {{ messages[0]['content'] }} A:"
    made = with_chat(tokenizer)
    assert chat_of(made).end is None
    assert language_model(chat_model(), made).rules.eos_ids == (tokenizer.eos_token_id,)
    assert encode_answers(made, ["yes"], 9, language_model(chat_model(), made).rules)[0][-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_vocabulary_keeps_the_frame(kind):
    """The words and special tokens that only the template writes."""
    tokenizer = with_chat(chat_tokenizer(kind))
    keep = kept_ids(tokenizer, lambda: ["ab"], [])
    cut = cut_tokenizer(tokenizer, keep, lambda: ["ab"])
    (row,) = encode_prompts(cut, ["ab"], 99)
    assert [keep[i] for i in row] == oracle(chat_tokenizer(kind), "ab")
    assert keep[chat_of(cut).end] == chat_of(tokenizer).end
