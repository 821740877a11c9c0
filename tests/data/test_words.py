"""Words and their tags: which token a tag is read at, what is not read, and columns that are refused."""

import json

import pytest
import torch

from rlkd.data.glue import TableLayout, load_labelled
from rlkd.data.words import UNREAD, EncodedWords, by_word, encoded_rows, read_the_same_words, with_unread
from rlkd.errors import DataError
from tiny import classifier_tokenizer, tiny_tokenizer

LAYOUT = TableLayout("tokens", "tags", problem_type="token_classification")
# A word of two letters is two tokens, one of spaces none.
ROWS = [
    {"words": ["a b", "c", " ", "d"], "label": [1, 0, 0, 2]},
    {"words": ["e", "f g h", "i"], "label": None},
]


def encoded(rows=ROWS, length=16):
    return EncodedWords(rows, classifier_tokenizer(), length, 3)


def test_a_word_is_read_at_its_first_token():
    texts = encoded()
    assert texts.starts == [[1, 3, UNREAD, 4], [1, 2, 5]]  # after [CLS]
    assert texts.unread == [1, 0]
    batch = texts.collate([texts[0], texts[1]])
    assert batch["words"].tolist() == [[1, 3, UNREAD, 4], [1, 2, 5, UNREAD]]
    assert batch["labels"].tolist() == [[1, 0, 0, 2], [-100] * 4]
    assert texts.true.tolist() == batch["labels"].tolist()
    logits = torch.randn(2, batch["input_ids"].shape[1], 3)
    read = [(0, 1), (0, 3), (0, 4), (1, 1), (1, 2), (1, 5)]
    assert torch.equal(by_word(logits, batch["words"]), torch.stack([logits[row, token] for row, token in read]))
    whole = with_unread(logits, batch["words"], 2)
    assert torch.equal(whole[0, 3], logits[0, 4])
    assert whole[0, 2].tolist() == whole[1, 3].tolist() == [0, 0, 1]


def test_words_beyond_the_longest_text_are_not_read():
    texts = encoded(length=5)  # [CLS], three tokens, [SEP]
    assert texts.starts == [[1, 3, UNREAD, UNREAD], [1, 2, UNREAD]]
    assert texts.unread == [2, 1]


def test_two_tokenizers_read_the_words_that_both_read():
    one, other = encoded(length=16), encoded(length=5)
    read_the_same_words(one, other)
    assert [[start != UNREAD for start in row] for row in one.starts] == [
        [start != UNREAD for start in row] for row in other.starts
    ]
    assert one.unread == [2, 1]
    with pytest.raises(DataError, match="row 0: the tokenizer has a token for none of its words"):
        read_the_same_words(encoded([{"words": [" "]}]), encoded([{"words": ["a"]}]))


def test_the_digest_knows_where_words_begin():
    rows = [{"words": ["a b", "c"], "label": [1, 0]}], [{"words": ["a", "b c"], "label": [1, 0]}]
    assert len({encoded(one).digest() for one in rows}) == 2
    assert {len(ids) for one in rows for ids in encoded(one).ids["input_ids"]} == {5}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"words": []}, r"row 1: words must be a list of at least one text, found \[\]"),
        ({"words": "a b"}, "row 1: words must be a list"),
        ({"words": ["a", None]}, "row 1: words must be a list"),
        ({"words": ["a", "b"], "label": [0]}, "row 1: 2 words and 1 tags"),
        ({"words": ["a"], "label": [3]}, "row 1: label 3 is not in the label set"),
        ({"words": ["a"], "label": [None]}, "row 1: label .* is not a list with the number of a tag"),
        ({"words": ["a"], "label": [0], "logits": [[1.0, 2.0, 3.0]]}, "row 1: logits of words are not supported"),
    ],
)
def test_rows_without_words_or_tags_are_refused(row, message):
    with pytest.raises(DataError, match=message):
        encoded_rows([ROWS[0], row], classifier_tokenizer(), 16, 3, "token_classification")


def test_a_tokenizer_of_another_framing_is_read_alike():
    texts = EncodedWords([{"words": ["a b", "c"]}], tiny_tokenizer(), 8, 3)
    assert texts.starts == [[0, 2]]  # which has no token before the text


def table(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_words_and_tags_of_a_file(tmp_path):
    path = table(tmp_path, [{"tokens": ["A", "b"], "tags": ["B-X", "O"]}, {"tokens": ["c"], "tags": None}])
    rows = load_labelled(path, LAYOUT, labels=["O", "B-X"])
    assert rows == [
        {"text": "A b", "text_pair": None, "words": ["A", "b"], "label": [1, 0]},
        {"text": "c", "text_pair": None, "words": ["c"], "label": None},
    ]
    numbered = table(tmp_path, [{"tokens": ["A", "b"], "tags": [1, 0]}])
    assert load_labelled(numbered, LAYOUT, labels=["O", "B-X"])[0]["label"] == [1, 0]
    assert load_labelled(numbered, TableLayout("tokens", None, problem_type="token_classification"))[0]["label"] is None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"tokens": "a b", "tags": ["O", "O"]}], "column 'tokens' contains .*, not lists of words"),
        ([{"tokens": [1, 2], "tags": ["O", "O"]}], "column 'tokens' contains .*, not lists of words"),
        ([{"tokens": ["a"], "tags": ["O"]}, {"tokens": [], "tags": []}], "rows 1: column 'tokens' has no words"),
        ([{"tokens": ["a", None], "tags": ["O", "O"]}], "rows 0: column 'tokens' has no words, or null among them"),
        ([{"tokens": ["a"], "tags": "O"}], "row 0: column 'tags' contains 'O', not a list"),
        ([{"tokens": ["a", "b"], "tags": ["O"]}], "row 0: column 'tags' has 1 tags for 2 words"),
        ([{"tokens": ["a", "b"], "tags": ["O", None]}], "row 0: column 'tags' has the tag None"),
        ([{"tokens": ["a", "b"], "tags": [0, -100]}], "row 0: column 'tags' has the tag -100"),
        ([{"tokens": ["a"], "tags": [0.5]}], "row 0: column 'tags' has the tag 0.5"),
        ([{"tokens": ["a"], "tags": ["B-Y"]}], "labels not in the label set: 'B-Y' in rows 0"),
    ],
)
def test_columns_without_words_or_tags_are_refused(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        load_labelled(table(tmp_path, rows), LAYOUT, labels=["O", "B-X"])
