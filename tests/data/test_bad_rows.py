"""One row ends no job: whatever a row holds, the others are read, rendered, tokenised and written."""

import json
import logging

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import stub
from rlkd.data.examples import Examples, PromptedRows, RowRenderer
from rlkd.data.rows import RowStream, load_rows
from rlkd.errors import DataError
from rlkd.labels.store import load_pseudolabels
from rlkd.templates.template import Template

DIGITS = "9" * 5000
# JSON of one value that no row can have, and what is said about it.
BAD_VALUES = {
    DIGITS: "has a whole number of more than 64 bits. Write it as text",
    f"-{DIGITS}": "has a whole number of more than 64 bits",
    "18446744073709551616": "has a whole number of more than 64 bits",
    f'{{"b": [1, {DIGITS}]}}': "has a whole number of more than 64 bits",
    '"\\ud800"': "contains an unpaired surrogate",
    '["x", {"k": "\\udfff"}]': "contains an unpaired surrogate",
    '{"\\ud800": 1}': "contains an unpaired surrogate",
    '{"b": 1, "b": 2}': "has an object that gives a key twice",
    "[" * 100 + "]" * 100: "is nested more than 64 levels deep",
}


@pytest.mark.parametrize("kind", ["jsonl", "json"])
@pytest.mark.parametrize("value", BAD_VALUES)
def test_values_that_no_row_can_have(tmp_path, value, kind):
    rows = ['{"a": null}', f'{{"a": {value}}}', '{"a": null, "c": "x"}']
    file = tmp_path / f"rows.{kind}"
    file.write_text("\n".join(rows) if kind == "jsonl" else f"[{', '.join(rows)}]")
    place = "rows.jsonl:2" if kind == "jsonl" else "rows.json, entry 2"
    for read in (load_rows, lambda source: RowStream(source).scan()):
        with pytest.raises(DataError) as error:
            read(str(file))
        assert f"{place}: column 'a' {BAD_VALUES[value]}" in str(error.value)
    assert load_rows(str(file), on_bad_row="skip")["c"] == [None, "x"]
    kept: list = []
    assert RowStream(str(file), on_bad_row="skip").scan(quarantine=kept.append).rows == 2
    assert [(bad["place"]) for bad in kept] == [2]
    assert load_rows(str(file), only={"c"})["c"] == [None, None, "x"]  # what is not read cannot be bad


def test_a_key_given_twice_is_not_decided_in_silence(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1, "a": 2}\n{"a": 3}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:1 gives a key twice\. Remove or rename one"):
        load_rows(str(tmp_path / "a.jsonl"))


def test_numbers_up_to_64_bits_are_kept(tmp_path):
    (tmp_path / "a.jsonl").write_text(f'{{"a": {2**64 - 1}, "b": 1}}\n{{"a": 1, "b": {-(2**63)}}}\n')
    assert load_rows(str(tmp_path / "a.jsonl")).to_list() == [{"a": 2**64 - 1, "b": 1}, {"a": 1, "b": -(2**63)}]
    (tmp_path / "a.jsonl").write_text(f'{{"a": {2**64 - 1}}}\n{{"a": -1}}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: column 'a' has a number here but a number of 64 bits in"):
        load_rows(str(tmp_path / "a.jsonl"))


def test_nan_is_a_missing_value_and_a_bad_row_decides_no_type(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": NaN, "n": Infinity}\n{"a": "x", "n": 1}\n')
    assert load_rows(str(tmp_path / "a.jsonl")).to_list() == [{"a": None, "n": float("inf")}, {"a": "x", "n": 1.0}]
    # The second row is bad for b; its a must not make the rows after it bad.
    (tmp_path / "b.jsonl").write_text('{"b": 1}\n{"a": 1, "b": "x"}\n{"a": "y", "b": 2}\n')
    assert load_rows(str(tmp_path / "b.jsonl"), on_bad_row="skip").to_list() == [
        {"b": 1, "a": None}, {"b": 2, "a": "y"}
    ]  # fmt: skip


@pytest.mark.parametrize("odd", [5, [1], True])
def test_an_odd_first_row_does_not_make_all_others_bad(tmp_path, odd):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"a": value}) + "\n" for value in [odd, "x", None, "y"]))
    assert load_rows(str(tmp_path / "a.jsonl"), on_bad_row="skip")["a"] == ["x", None, "y"]
    kept: list = []
    assert RowStream(str(tmp_path / "a.jsonl"), on_bad_row="skip").scan(quarantine=kept.append).rows == 3
    assert [bad["place"] for bad in kept] == [1]
    assert "a.jsonl:1: column 'a' has " in kept[0]["error"]


def test_types_inside_lists_and_objects(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": [1]}\n{"a": ["x"]}\n{"a": [2, "y"]}\n{"a": [2.5, null]}\n')
    assert load_rows(str(tmp_path / "a.jsonl"), on_bad_row="skip")["a"] == [[1.0], [2.5, None]]
    with pytest.raises(DataError, match=r"a\.jsonl:2: column 'a' has values that do not fit one type"):
        load_rows(str(tmp_path / "a.jsonl"))


def test_an_open_quote_swallows_no_other_row(tmp_path):
    (tmp_path / "a.csv").write_text('t,n\na,1\n"open,2\nc,3\n"d",4\ne\r x,5\nf,6\n')
    assert load_rows(str(tmp_path / "a.csv"), on_bad_row="skip")["t"] == ["a", "c", "d", "f"]
    (tmp_path / "b.csv").write_text('t,n\n"open,2\n' + "c,3\n" * 12_000)
    assert len(load_rows(str(tmp_path / "b.csv"), on_bad_row="skip")) == 12_000
    with pytest.raises(DataError, match=r"b\.csv:2 is malformed: a quote is not closed within 10,000 lines"):
        load_rows(str(tmp_path / "b.csv"))


def test_a_repeated_id_is_a_bad_row(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"id": i, "text": "a"}) + "\n" for i in [1, 2, 1, 3, 2, 4]))
    render = RowRenderer((), "text", id_column="id")
    rows = PromptedRows(RowStream(str(file), on_bad_row="skip", limit=5), render)
    assert [bad["place"] for bad in rows.bad_rows] == [3, 5]
    assert [row.id for _, block in rows.blocks(2, lambda k: True) for row in block] == ["1", "2", "3"]


@pytest.mark.parametrize("trusted", [True, False])
def test_half_a_surrogate_that_a_template_prints(trusted):
    template = Template("t", "{{ a }}{% if n == 2 %}{{ '\\ud83d' }}{% endif %}", trusted=trusted)
    assert template.parts({"a": "x", "n": 1}) == ["x"]
    with pytest.raises(DataError, match=r"template 't' prints half a surrogate pair.*\n.*'n': 2"):
        template.parts({"a": "x", "n": 2})
    with pytest.raises(DataError, match="prints half a surrogate pair"):
        Template("t", "{{ a }}", trusted=trusted).parts({"a": "\ud800"})


def test_a_row_too_large_to_show_in_its_own_error():
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    for value, trusted in [(value, trusted) for value in (10**5000, deep) for trusted in (True, False)]:
        with pytest.raises(DataError, match=r"cannot be rendered|limit|cannot be sent"):
            Template("t", "{{ a + 'x' }}", trusted=trusted).parts({"a": value})


def test_training_skips_rows_that_a_template_fails_on(caplog):
    rows = datasets.Dataset.from_dict({"q": ["a", "b", "c"], "n": [1, 0, 2]})
    templates = (Template("T", "{{ q }} {{ 2 // n }}"),)
    with pytest.raises(DataError, match="cannot be rendered: ZeroDivisionError"):
        Examples.of(rows, RowRenderer(templates, "q"))
    with caplog.at_level(logging.WARNING):
        kept = Examples.of(rows, RowRenderer(templates, "q", on_bad_row="skip"))
    assert [example.teacher_inputs for example in kept] == [("a 2",), ("c 1",)]
    assert caplog.messages == ["the rows: skipped 1 of 3 rows without input (T: 1)"]


class Stubborn:
    """A tokenizer that fails on some texts, as Rust and SentencePiece do."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __call__(self, texts, **options):
        if any("c" in text for text in ([texts] if isinstance(texts, str) else texts)):
            raise TypeError("TextEncodeInput must be Union[...]")
        return self._tokenizer(texts, **options)


def test_a_text_that_the_tokenizer_fails_on(tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a b", "c d", "e")))
    tokenizer = stub.tiny_tokenizer()
    monkeypatch.setattr(stub, "tiny_tokenizer", lambda: Stubborn(tokenizer))
    totals = stub.label(file, tmp_path / "out", templates=())
    assert totals["status"] == {"ok": 4, "skipped": 0, "failed": 2}
    failed = load_pseudolabels(tmp_path / "out", statuses=("failed",)).to_list()
    assert {(row["row"], row["error"][:48]) for row in failed} == {
        (1, "the tokenizer fails on the prompt: TypeError: Te")
    }
    file.write_text('{"text": "c"}\n')
    with pytest.raises(TypeError):  # it fails on everything: that is no bad row
        stub.label(file, tmp_path / "other", templates=())


class Hub:
    """A streamed data set."""

    features = None

    def __init__(self, rows):
        self.rows, self.info = rows, datasets.DatasetInfo(splits={})

    def __iter__(self):
        return iter(self.rows)


def test_bad_rows_of_the_hub_fail_alone(monkeypatch):
    bad = [{"text": 5}, {"text": "\ud800"}, {"text": 10**5000}]
    monkeypatch.setattr("rlkd.data.hub.load_hub", lambda *_, **__: Hub([{"text": "a"}, *bad, {"text": "b"}]))
    rows = PromptedRows(RowStream("some/name"), RowRenderer((), "text"))
    found = [row for _, block in rows.blocks(2, lambda k: True) for row in block]
    assert [row.prompts[0].status for row in found] == ["ok", "failed", "failed", "failed", "ok"]
    assert [row.number for row in found] == [0, 1, 2, 3, 4]


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=5,
)
GOOD = [{"text": "a b", "n": 1, "ref": "x", "extra": None}, {"text": "c", "n": 2, "ref": None}]
TEMPLATES = (Template("t", "{{ text }} {{ n }} {{ extra }}"), Template("u", "{{ extra | length }} {{ text }}"))


@settings(max_examples=12, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(["text", "n", "ref", "extra"]), anything), min_size=1, max_size=6))
def test_any_row_may_stand_beside_good_ones(tmp_path_factory, rows):
    """Every row of any JSON gets a status or is put aside; the good ones are always labelled."""
    folder = tmp_path_factory.mktemp("any")
    file = folder / "rows.jsonl"
    lines = [json.dumps(row) for row in [GOOD[0]] * 7 + [*rows, GOOD[1]]]  # most values have these types
    file.write_text("\n".join(lines))
    totals = stub.label(file, folder / "out", templates=TEMPLATES, on_bad_row="skip")
    assert totals["inputs"] + totals["bad_rows"] == len(lines)
    labels = load_pseudolabels(folder / "out", statuses=None).to_list()
    assert len(labels) == totals["rows"] == totals["inputs"] * len(TEMPLATES) * 2
    first = [row["teacher_input"] for row in labels if row["row"] == 0 and row["template"] == "t"]
    assert first == ["a b 1 None"] * 2 or first == ["a b 1.0 None"] * 2
    put_aside = (folder / "out" / "bad_rows.jsonl").read_text() if totals["bad_rows"] else ""
    assert len([json.loads(line) for line in put_aside.splitlines()]) == totals["bad_rows"]


def test_only_the_needed_columns_of_the_hub_are_read(monkeypatch):
    rows = datasets.Dataset.from_dict({"text": ["a"], "image": [b"x"], "n": [1]}).to_iterable_dataset()
    monkeypatch.setattr("rlkd.data.hub.load_hub", lambda *_, **__: rows)
    stream = RowStream("some/name", only={"text", "absent"})
    assert [row for _, row in stream.reader.records()] == [{"text": "a"}]
    assert list(stream.reader.columns()) == ["text", "image", "n"]
