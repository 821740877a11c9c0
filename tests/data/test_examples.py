import logging

import datasets
import pytest

from rlkd.data.answered import supervised_pairs
from rlkd.data.examples import Examples, PromptedRows, RowRenderer
from rlkd.data.row_maps import parse_row_map
from rlkd.data.rows import RowStream
from rlkd.errors import ConfigError, DataError
from rlkd.records import Example
from rlkd.templates.template import Template

ASK = Template("ask", "Ask {{ q }} ||| {{ a }}", id="1")
EVEN = Template("even", "{% if n % 2 == 0 %}Even {{ q }} ||| {{ a }}{% endif %}", id="2")


def rows(**columns):
    return datasets.Dataset.from_dict(
        {"q": ["p", "q", "", "s"], "a": ["A", "B", "C", None], "n": [0, 1, 2, 4]} | columns
    )


def test_examples_as_both_models_see_them():
    examples = Examples(rows(), [ASK, EVEN], student_column="q", reference_column="a")
    # Row 1 is odd; row 2 has no student input.
    assert list(examples) == [
        Example("0", "p", ("Ask p", "Even p"), ("A",)),
        Example("3", "s", ("Ask s", "Even s"), ()),
    ]
    assert examples.skipped == {"even": 1, "student input": 1}
    assert examples.template_names == ["ask", "even"]
    assert examples[-1] == examples[1] == examples[0:2][1]
    assert examples[::-1] == list(examples)[::-1]
    with pytest.raises(IndexError):
        examples[2]


def test_skipped_rows_are_reported(caplog):
    with caplog.at_level(logging.WARNING):
        Examples(rows(), [EVEN], student_column="q", source="f.jsonl")
    assert caplog.messages == ["f.jsonl: skipped 2 of 4 rows without input (even: 1, student input: 1)"]


def test_no_template_own_template_ids_and_reference_lists():
    data = rows(name=["w", "x", "y", "z"], refs=[["r", "s"], [], ["t"], [""]])
    bare = Examples(data, [], student_column="q", id_column="name", reference_column="refs")
    assert bare.template_names == ["none"]
    assert list(bare) == [
        Example("w", "p", ("p",), ("r", "s")),
        Example("x", "q", ("q",), ()),
        Example("z", "s", ("s",), ()),
    ]
    own = Examples(data, [ASK], student_template=Template("own", "student: {{ q }}"))
    assert own[0] == Example("0", "student: p", ("Ask p",), ())
    assert len(own) == 4


def test_unlabeled_rows_need_no_target_column():
    unlabeled = rows().remove_columns("a")
    assert Examples(unlabeled, [ASK], student_column="q")[0].teacher_inputs == ("Ask p",)
    with pytest.raises(DataError, match=r"a in template 'ask'.*\n.*found    q, n"):
        supervised_pairs(unlabeled, [ASK], student_column="q")


def test_errors():
    with pytest.raises(ConfigError, match="student_column and student_template are both unset"):
        Examples(rows(), [ASK])
    with pytest.raises(DataError, match=r"student_column: 'Q'\.") as error:
        Examples(rows(), [Template("t", "{{ question }}")], student_column="Q", source="f.jsonl")
    assert "'f.jsonl'" in str(error.value)
    assert "question in template 't': 'question'." in str(error.value)
    with pytest.raises(DataError, match=r"column 'n' contains .*int64.*, not text"):
        Examples(rows(), [], student_column="n")
    with pytest.raises(DataError, match="not text or lists of texts"):
        Examples(rows(), [], student_column="q", reference_column="n")
    with pytest.raises(DataError, match=r"id_column 'i' contains 'x' 3 times\. Ids must be unique"):
        Examples(rows(i=["x", "x", "y", "x"]), [], student_column="q", id_column="i")
    with pytest.raises(DataError, match=r"none of the 4 rows has an input \(never: 3, student input: 1\)"):
        Examples(rows(), [Template("never", "{% if false %}x{% endif %}")], student_column="q")


def test_supervised_pairs(caplog):
    with caplog.at_level(logging.WARNING):
        pairs = supervised_pairs(rows(a=["A", "B", "", "D"]), [ASK, EVEN], student_column="q", source="f")
    assert pairs.to_list() == [
        {"id": "0:ask", "student_input": "Ask p", "label": "A"},
        {"id": "0:even", "student_input": "Even p", "label": "A"},
        {"id": "1:ask", "student_input": "Ask q", "label": "B"},
        {"id": "3:ask", "student_input": "Ask s", "label": "D"},
        {"id": "3:even", "student_input": "Even s", "label": "D"},
    ]
    assert caplog.messages == ["f: left out 3 of 8 prompts (template does not apply: 1, no student input: 2)"]
    gold = rows(a=["A", None, "C", "D"], n=[1, 0, -1, 0])
    labels = Template("t", "{{ q }}? ||| {{ answer_choices[n] }}", "no ||| yes")
    assert supervised_pairs(gold, [labels], student_column="q")["label"][:] == ["yes", "no", "no"]
    assert supervised_pairs(gold, [ASK], student_column="q")["label"][:] == ["A", "D"]
    with pytest.raises(
        DataError, match=r"none of 4 prompts has an answer to learn \(no target: 3, no student input: 1\)"
    ):
        supervised_pairs(rows(), [Template("t", "{{ q }}")], student_column="q")


def test_a_row_on_which_a_template_fails_is_an_error_where_every_row_trains():
    with pytest.raises(
        DataError, match=r"(?s)template 'T' cannot be rendered: ZeroDivisionError.*Check that the row's"
    ):
        Examples(rows(), [Template("T", "{{ 10 // n }}")], student_column="q")


def test_an_unknown_label_is_reported_with_its_line(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"q": "a", "label": 0}\n{"q": "b", "label": 7}\n')
    render = RowRenderer((ASK,), "q")
    with pytest.raises(DataError, match=r"rows\.jsonl:2: label_map: column 'label' has 7, which is not mapped"):
        PromptedRows(RowStream(str(file)), render, row_map=parse_row_map([], ["0=no,1=yes"]))
