import datasets
import pytest

from rlkd.data.row_maps import RowMap, parse_row_map
from rlkd.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("columns", "labels", "row", "wanted"),
    [
        (["coarse_label=label_coarse"], [], {"coarse_label": 1, "t": "x"}, {"label_coarse": 1, "t": "x"}),
        (["a=b, b=a"], [], {"a": 1, "b": 2}, {"b": 1, "a": 2}),
        (["a=b", "c=d"], [], {"a": 1, "c": 2}, {"b": 1, "d": 2}),
        (['{"a=1": "b,c"}'], [], {"a=1": 1}, {"b,c": 1}),
        ([], ["0=1,1=0"], {"label": 0}, {"label": 1}),
        ([], ["0=no,1=yes"], {"label": 1}, {"label": "yes"}),
        ([], ["World=0,Sci/Tech=3"], {"label": "Sci/Tech"}, {"label": 3}),
        ([], ["y:0=2,1=0"], {"y": [0, 1], "label": 7}, {"y": [2, 0], "label": 7}),
        ([], ['{"y": {"0": 2}}'], {"y": 0}, {"y": 2}),
        ([], ['{"0": "a,b"}'], {"label": 0}, {"label": "a,b"}),
        (["y=label"], ["0=5"], {"y": 0}, {"label": 5}),
        ([], ["0=1"], {"label": -1}, {"label": -1}),
        ([], ["0=1"], {"label": None}, {"label": None}),
        ([], ["-1=0,0=1"], {"label": -1}, {"label": 0}),
        ([], ["0=1", "1=0"], {"label": 1}, {"label": 0}),
    ],
)
def test_maps(columns, labels, row, wanted):
    before = dict(row)
    row_map = parse_row_map(columns, labels)
    assert row_map(row) == wanted
    assert row == before
    assert row_map.dataset(datasets.Dataset.from_list([row])).to_list() == [wanted]


def test_no_map_is_the_same_rows():
    rows = datasets.Dataset.from_dict({"a": [1]})
    assert RowMap().dataset(rows) is rows


@pytest.mark.parametrize(
    ("columns", "labels", "row", "message"),
    [
        (["labl=x"], [], {"label": 1}, r"column_map: there is no column 'labl'.*Did you mean 'label'\? Write old=new"),
        (["a=b"], [], {"a": 1, "b": 2}, "column_map: two columns would have the name 'b'. Rename the other one too"),
        ([], ["y:0=1"], {"label": 1}, "label_map: there is no column 'y'. Found: label"),
        ([], ["0=1"], {"label": 2}, r"label_map: column 'label' has 2, which is not mapped. Mapped: 0. Add it: 2="),
        ([], ["0=1"], {"label": True}, "has True, which is not mapped"),
    ],
)
def test_rows_that_do_not_fit(columns, labels, row, message):
    with pytest.raises(DataError, match=message):
        parse_row_map(columns, labels)(row)


@pytest.mark.parametrize(
    ("columns", "labels", "message"),
    [
        (["a"], [], r"--column-map 'a': write old=new\[,old=new"),
        (["a=b=c"], [], "--column-map 'a=b=c'"),
        (["a=b,a=c"], [], "a name is given twice on the left"),
        (["a="], [], "'a' maps to ''"),
        (['{"a": 1}'], [], "'a' maps to 1; a column's new name must be text"),
        (["{a"], [], "'{a' is not valid JSON"),
        ([], ["0"], r"--label-map '0': write \[column:\]old=new"),
    ],
)
def test_malformed_flags(columns, labels, message):
    with pytest.raises(ConfigError, match=message):
        parse_row_map(columns, labels)
