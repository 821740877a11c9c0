"""Rewards carried over by character spans, against texts whose spans are known and teachers asked directly."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from trainers import tiny_runs
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlkd.errors import ModelError
from rlkd.inspection.build import reward_view
from rlkd.models.architectures import language_model
from rlkd.models.other_tokenizer import OtherTokenizer, Speller, _matched, _spaced, shares
from rlkd.models.teacher import Teacher
from rlkd.models.vocabulary import NO_LIMIT, decode_texts, encode_answers
from rlkd.objectives.rewards import REWARDS, induced_advantage
from rlkd.records import Example
from rlkd.sampling.rollouts import greedy_writer
from rlkd.tensors import pad_rows
from tiny import EOS, tiny_bart, tiny_t5, tiny_tokenizer

SPECIAL = ["<pad>", "</s>", "<unk>"]
TRUE_T5 = Path(__file__).parents[2] / "shared" / "data" / "tokenizers" / "t5"
TEXTS = ["hello there", "hello  there hello", "漢字 é", "there 👩‍👩‍👧 hello", " hello", "", "x"]


def finished(backend: Tokenizer) -> PreTrainedTokenizerFast:
    backend.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def byte_level(merges: int = 14) -> PreTrainedTokenizerFast:
    """As BART's and GPT-2's: pieces of UTF-8 bytes, single bytes with no merges."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=3 + 256 + merges, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    made.train_from_iterator(["hello there"] * 3, trainer)
    return finished(made)


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama's: SentencePiece, with single bytes for what it does not know."""
    pieces = [*((s, 0.0) for s in SPECIAL), ("▁hello", -1.0), ("▁", -2.0), ("the", -2.0), ("re", -2.0)]
    made = Tokenizer(models.Unigram([*pieces, *((f"<0x{i:02X}>", -9.0) for i in range(256))], 2, True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return finished(made)


def words() -> PreTrainedTokenizerFast:
    """Whole words; what it does not know is `<unk>`, and spaces are all alike."""
    return tiny_tokenizer([*SPECIAL, "hello", "there", "x"])


KINDS = {"bytes": lambda: byte_level(0), "byte level": byte_level, "byte fallback": byte_fallback, "words": words}


def teacher_of(tokenizer, seed=3, **options) -> Teacher:
    model = tiny_t5(tied=False, seed=seed, vocab=len(tokenizer) + 2)
    return Teacher(language_model(model, tokenizer), tokenizer, **options)


def rules_for(tokenizer):
    return language_model(tiny_t5(vocab=len(tokenizer) + 2), tokenizer).rules


def seen_by(tokenizer, teacher: Teacher) -> OtherTokenizer:
    return OtherTokenizer(teacher, tokenizer, rules_for(tokenizer))


def rewards(source, rows, name="max"):
    """One list per row of token ids."""
    ids, mask = pad_rows(rows, 0)
    signal = source.score([(f"prompt {i}",) for i in range(len(rows))], ids, mask)
    found = induced_advantage(signal, name)
    assert (found[~mask] == 0).all()
    return [row[m].tolist() for row, m in zip(found, mask, strict=True)]


@pytest.mark.parametrize("name", REWARDS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tokenizer_gives_the_same_reward(kind, name):
    tokenizer = KINDS[kind]()
    teacher = teacher_of(tokenizer)
    whole = encode_answers(tokenizer, TEXTS, NO_LIMIT, rules_for(tokenizer))
    rows = [*whole, *(row[:-1] for row in whole if len(row) > 1)]  # as cut as well
    texts = decode_texts(tokenizer, rows)
    rows = [row for row, text in zip(rows, texts, strict=True) if "\ufffd" not in text]
    for got, want in zip(rewards(seen_by(tokenizer, teacher), rows, name), rewards(teacher, rows, name), strict=True):
        assert got == pytest.approx(want, abs=1e-5)


def test_each_character_of_a_word_has_an_equal_part_of_its_reward():
    """Spans known by hand: the words are `hello` and ` there`, and end-of-sequence is itself."""
    teacher, student = teacher_of(words()), byte_level(0)
    (hello, there, end), *_ = rewards(teacher, [[3, 4, EOS]])
    row = student("hello there")["input_ids"]
    assert len(row) == 12
    (got,) = rewards(seen_by(student, teacher), [row])
    assert got == pytest.approx([hello / 5] * 5 + [there / 6] * 6 + [end], abs=1e-6)


def test_a_word_has_the_sum_of_its_characters():
    teacher = teacher_of(byte_level(0))
    letters = teacher.tokenizer("hello there")["input_ids"]
    (known,) = rewards(teacher, [letters])
    (got,) = rewards(seen_by(words(), teacher), [[3, 4, EOS]])
    assert got == pytest.approx([sum(known[:5]), sum(known[5:11]), known[11]], abs=1e-5)


def test_tokens_that_split_a_character_share_it_equally():
    teacher, student = teacher_of(words()), byte_level(0)
    (unknown, end), *_ = rewards(teacher, [[2, EOS]])  # "漢" is `<unk>` to the teacher
    row = student("漢")["input_ids"]
    (got,) = rewards(seen_by(student, teacher), [row])
    assert got == pytest.approx([unknown / 3] * 3 + [end], abs=1e-6)


@pytest.mark.parametrize("ours", KINDS)
@pytest.mark.parametrize("theirs", KINDS)
def test_sums_are_the_teachers_whatever_the_student_writes(ours, theirs):
    """Random tokens: special ones, halves of characters, with an end and without."""
    student, teacher = KINDS[ours](), teacher_of(KINDS[theirs]())
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randint(len(student), (n,), generator=generator).tolist() for n in (1, 2, 5, 9, 14)]
    rows = [[t for t in row if t != EOS] + [EOS] * (k % 2) for k, row in enumerate(drawn)]
    rows += [[EOS], [], [0, EOS], [0, 2]]
    source, speller = seen_by(student, teacher), Speller(student, rules_for(student))
    read = [speller.read(row) for row in rows]
    texts = encode_answers(teacher.tokenizer, [one.text for one in read], NO_LIMIT, teacher.rules)
    known = [row if one.ended else row[:-1] for row, one in zip(texts, read, strict=True)]
    for name in REWARDS:
        asked = [sum(rewards(teacher, [row] * (k + 1), name)[k]) if row else 0.0 for k, row in enumerate(known)]
        got = [sum(row) for row in rewards(source, rows, name)]
        assert got == pytest.approx([x if row else 0.0 for x, row in zip(asked, rows, strict=True)], rel=1e-4, abs=1e-4)


def test_the_log_likelihood_is_that_of_transformers():
    teacher, student = teacher_of(byte_level()), words()
    (got,) = rewards(seen_by(student, teacher), [[3, 4, 5, EOS]], "lse")
    labels = teacher.tokenizer("hello there x", return_tensors="pt")["input_ids"]
    prompt = teacher.tokenizer("prompt 0", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = teacher.model(input_ids=prompt, labels=labels).logits[0, :, : teacher.lm.valid_vocab]
    want = logits.log_softmax(-1)[range(labels.shape[1]), labels[0]].sum()
    assert sum(got) == pytest.approx(float(want), abs=1e-4)


class Asked:
    """What a teacher is given to score."""

    def __init__(self, teacher, monkeypatch):
        self.rows, score = [], teacher.score

        def asked(inputs, answers, mask, **options):
            self.rows += [row[m].tolist() for row, m in zip(answers, mask, strict=True)]
            return score(inputs, answers, mask, **options)

        monkeypatch.setattr(teacher, "score", asked)


def test_an_end_is_asked_for_only_where_there_is_one(monkeypatch):
    teacher = teacher_of(words())
    asked, student = Asked(teacher, monkeypatch), byte_level(0)
    row = student("hello there")["input_ids"]
    rewards(seen_by(student, teacher), [row, row[:-1], row[:5], [EOS]])
    assert asked.rows == [[3, 4, EOS], [3, 4], [3], [EOS]]


def test_what_is_no_text_counts_for_nothing_but_special_tokens_are_text(monkeypatch):
    teacher, student = teacher_of(words()), byte_level(0)
    half = student("漢")["input_ids"][:2]
    x, end = student("x")["input_ids"]
    (cut, none, padded) = rewards(seen_by(student, teacher), [half, [], [x, 0, x, end]])
    assert cut == [0.0, 0.0]
    assert none == []
    # A special token is no way to write for free: it reaches the teacher as text.
    asked = Asked(teacher, monkeypatch)
    rewards(seen_by(student, teacher), [[x, 0, x, end]])
    assert asked.rows == [[5, 0, 5, EOS]]
    assert len(padded) == 4
    assert padded[1] < 0


def test_what_begins_every_answer_of_a_model_is_no_text(monkeypatch):
    """As BART's `<s>`: neither shown to the teacher nor lost where it is the teacher's."""
    begun = words()
    begun.backend_tokenizer.post_processor = TemplateProcessing(
        single="<unk> $A </s>", special_tokens=[("</s>", EOS), ("<unk>", 2)]
    )
    teacher, plain = teacher_of(words()), byte_level(0)
    asked = Asked(teacher, monkeypatch)
    rewards(seen_by(begun, teacher), [[2, 3, EOS]])
    assert asked.rows == [[3, EOS]]
    theirs = teacher_of(begun)
    (first, hello, end), *_ = rewards(theirs, [[2, 3, EOS]])
    (got,) = rewards(seen_by(plain, theirs), [plain("hello")["input_ids"]])
    assert got == pytest.approx([first + hello / 5] + [hello / 5] * 4 + [end], abs=1e-6)
    (empty,) = rewards(seen_by(plain, theirs), [[EOS]])
    (start, only), *_ = rewards(theirs, [[2, EOS]])
    assert empty == pytest.approx([start + only], abs=1e-5)


def test_shares_of_each_teacher_token_sum_to_one_and_follow_the_overlap():
    ours, theirs = [(0, 2), (2, 5), (5, 5)], [(0, 0), (0, 4), (4, 5), (5, 5)]
    w = shares(ours, theirs)
    torch.testing.assert_close(w.sum(0), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(w[:, 1], torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64))
    assert w[:, 0].tolist() == [1, 0, 0]
    assert w[:, 2].tolist() == [0, 1, 0]
    assert w[:, 3].tolist() == [0, 0, 1]


def test_changed_spaces_and_characters_keep_their_places():
    speller = Speller(words(), rules_for(words()))
    text = "hello   there 漢 x"
    spans = speller.spans(words()(text)["input_ids"], text)
    assert [text[round(a) : round(b)].strip() for a, b in spans] == ["hello", "there", "漢", "x"]


def test_the_cost_of_an_end_is_that_at_the_teachers_states():
    teacher, student = teacher_of(words()), byte_level(0)
    rows, inputs = [[3, 4, EOS], [4]], [("a",), ("b",)]
    signal, want = teacher.score_ends(inputs, *pad_rows(rows, 0))
    own = [student("hello there")["input_ids"], student(" there")["input_ids"][:-1]]
    shared, got = seen_by(student, teacher).score_ends(inputs, *pad_rows(own, 0))
    torch.testing.assert_close(got, want)
    sums = [(s.chosen - s.max).sum(1) for s in (signal, shared)]
    torch.testing.assert_close(sums[0], sums[1], atol=1e-5, rtol=1e-5)
    # By hand: the three states at which the answers go on, each asked for its best token and its end.
    states = teacher.score(inputs, *pad_rows(rows, 0), distribution=True)
    logits = states.distribution.logits(states.distribution.states)
    gaps = logits.amax(-1) - logits[..., EOS]
    assert got[0] == pytest.approx(float(gaps[0, :2].sum() + gaps[1, 0]), rel=1e-5)
    assert got[1] == 3


def test_its_answers_are_the_teachers_texts_in_the_students_tokens():
    teacher, student = teacher_of(words(), seed=5), byte_level(0)
    inputs = [("hello",), ("there x",), ("x",)]
    own = teacher.answer(inputs, greedy_writer(6), 6)
    texts = decode_texts(teacher.tokenizer, own)
    rows = seen_by(student, teacher).answer(inputs, greedy_writer(6), 6)
    assert all(len(row) <= 6 for row in rows)
    whole = seen_by(student, teacher).answer(inputs, greedy_writer(6), 200)[: len(rows)]
    long = OtherTokenizer(teacher, student, rules_for(student)).answer(inputs, greedy_writer(6), 200)
    assert decode_texts(student, long) == texts
    assert [row[-1] == EOS for row in whole] == [row[-1] == EOS for row in own]
    assert [row[:6] for row in whole] == rows


def test_answers_beyond_the_teachers_positions_are_cut_and_said(caplog):
    teacher_tokenizer, student = byte_level(0), words()
    model = tiny_bart(vocab=len(teacher_tokenizer) + 2)
    teacher = Teacher(language_model(model, teacher_tokenizer), teacher_tokenizer)
    source = seen_by(student, teacher)
    (got,) = rewards(source, [[3] * 20])  # 119 characters, 64 positions
    assert "1 of 1 answers have more tokens in the teacher's vocabulary than its 64 positions" in caplog.text
    assert got[9] < 0
    assert got[12:] == [0.0] * 8
    assert source.cut == 1


def test_the_true_t5_vocabulary_and_bytes():
    if not TRUE_T5.exists():
        pytest.skip("no T5 vocabulary here")
    t5, student = AutoTokenizer.from_pretrained(TRUE_T5), byte_level(0)
    speller = Speller(t5, rules_for(words()))
    for text in ["The quick  brown fox 42 jumps", "ﬁne ② naïve 漢字", " lead"]:
        spans = speller.spans(t5(text)["input_ids"], text)
        assert spans == sorted(spans)
        covered = "".join(text[round(a) : round(b)] for a, b in spans)
        assert covered.replace(" ", "") == text.replace(" ", "")
        ours = Speller(student, rules_for(words())).read(student(text)["input_ids"])
        assert ours.text == text
        torch.testing.assert_close(
            shares(ours.spans, spans).sum(0), torch.ones(len(spans), dtype=torch.float64), atol=1e-9, rtol=0
        )


@pytest.mark.parametrize("spelled", ["a  b c", " a b  c ", "ab c", "a bc"])
def test_white_space_of_either_side_keeps_letters_in_place(spelled):
    """The quick way and the general one put every letter where it is."""
    text = "a b   c"
    for places in (_spaced(spelled, text), _matched(spelled, text)):
        assert len(places) == len(spelled)
        assert [p for p, c in zip(places, spelled, strict=True) if c != " "] == [(0, 1), (2, 3), (6, 7)]
        assert all(start <= end for start, end in places)
        assert places == sorted(places)


def test_trainers_refuse_two_vocabularies_as_they_are(tmp_path):
    with pytest.raises(ModelError, match=r"different vocabularies: .* wrap the teacher in OtherTokenizer"):
        tiny_runs.make("reinforce", tmp_path, teacher=teacher_of(words()))
    with pytest.raises(ModelError, match="different vocabularies"):
        reward_view(teacher_of(words()), byte_level(), [Example("1", "x", ("x",))])
