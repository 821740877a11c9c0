"""Manifests, parts, verification and repair, on runs of a stub teacher."""

import json
import random
from pathlib import Path

import pytest
from tokenizers.normalizers import Lowercase

import stub
from rlkd.errors import ConfigError, DataError
from rlkd.labels.maintenance import merge, repair, verify
from rlkd.labels.manifest import Manifest
from rlkd.labels.store import damage, load_pseudolabels
from rlkd.sampling.engines.protocol import Decoding


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    source = stub.write_rows(folder / "rows.jsonl")
    stub.label(source, folder / "out")
    return source, folder / "out"


@pytest.fixture
def run(whole, tmp_path):
    """A run of its own that a test may damage, with the undisturbed one to compare with."""
    source, reference = whole
    stub.label(source, tmp_path / "out")
    return source, tmp_path / "out", reference


def flipped(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]


def test_a_thousand_bit_flips_in_shards_are_caught(run):
    _, out, _ = run
    draw, caught = random.Random(0), 0
    shards = [entry for entry in stub.entries(out) if entry["kind"] == "shard"]
    for _ in range(1000):
        shard = draw.choice(shards)
        file = out / shard["file"]
        good = file.read_bytes()
        file.write_bytes(flipped(good, draw))
        caught += damage(out, shard) is not None
        file.write_bytes(good)
    assert caught == 1000
    assert verify(out) == []


def test_a_thousand_bit_flips_in_the_manifest_are_caught(run):
    _, out, _ = run
    draw, path = random.Random(1), out / "manifest.jsonl"
    good = path.read_bytes()
    for _ in range(1000):
        path.write_bytes(flipped(good, draw))
        if path.read_bytes().splitlines()[0] == good.splitlines()[0]:
            assert Manifest.read(path).damaged
        else:
            with pytest.raises(DataError, match="its first line, the header, is not readable"):
                Manifest.read(path)


def unfinish(out: Path) -> list[bytes]:
    """Take the last line, `finished`, from the log; returns the lines left."""
    lines = (out / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    assert json.loads(lines.pop())["kind"] == "finished"
    (out / "manifest.jsonl").write_bytes(b"".join(lines))
    return lines


def test_a_torn_last_line_costs_its_shard_only(run):
    source, out, reference = run
    lines = unfinish(out)
    (out / "manifest.jsonl").write_bytes(b"".join(lines)[:-20])
    with pytest.raises(DataError, match="contains an unfinished run: repeat its command to finish it"):
        load_pseudolabels(out)
    before = {name: (out / name).stat().st_ino for name in stub.shards(out)}
    stub.label(source, out)
    after = {name: (out / name).stat().st_ino for name in stub.shards(out)}
    assert [name for name in before if before[name] != after[name]] == ["labels-00012.parquet"]
    assert stub.shards(out) == stub.shards(reference)
    assert Manifest.read(out / "manifest.jsonl").to_bytes() == (reference / "manifest.jsonl").read_bytes()


def test_truncated_and_missing_shards_are_made_again_on_resume(run, caplog):
    source, out, reference = run
    unfinish(out)
    first = out / "labels-00000.parquet"
    first.write_bytes(first.read_bytes()[:-7])
    (out / "labels-00004.parquet").unlink()
    stub.label(source, out)
    assert "labels-00000.parquet differs from its checksum" in caplog.text
    assert "labels-00004.parquet is missing" in caplog.text
    assert [entry["shards"] for entry in stub.entries(out) if entry["kind"] == "dropped"] == [[0, 4]]
    assert stub.shards(out) == stub.shards(reference)


def test_verify_and_repair_name_what_is_wrong(run):
    source, out, reference = run
    assert verify(out) == []
    shard = out / "labels-00003.parquet"
    other = (out / "labels-00002.parquet").read_bytes()
    shard.write_bytes(other)
    with pytest.raises(DataError, match=r"labels-00003\.parquet differs from its checksum.*rlkd data repair"):
        load_pseudolabels(out)
    (problem,) = verify(out)
    assert problem == f"{shard} differs from its checksum"
    assert repair(out, dry_run=True) == ([problem], [None])
    assert shard.exists()
    assert repair(out) == ([problem], [None])
    assert (out / "damaged" / shard.name).read_bytes() == other
    assert not shard.exists()
    stub.label(source, out)
    assert stub.shards(out) == stub.shards(reference)
    assert verify(out) == []


def test_verify_sees_rows_that_are_not_those_of_the_shard(run):
    """A checksum that fits does not help if the rows are another shard's."""
    _, out, _ = run
    manifest = Manifest.read(out / "manifest.jsonl")
    manifest.shards[3] |= {"sha256": manifest.shards[2]["sha256"]}
    (out / "labels-00003.parquet").write_bytes((out / "labels-00002.parquet").read_bytes())
    del manifest.shards[5]
    manifest.rewrite()
    log = out / "manifest.jsonl"
    assert verify(out) == [
        f"{log} lacks the shards 5",
        f"{log}: 'finished' differs from the sums of its shards (shards 13 against 12, inputs 100 against 92)",
        f"{out / 'labels-00003.parquet'} does not hold the labels of rows 24 .. 31",
        f"{out / 'labels-00005.parquet'} is in no log: remove it",
    ]


@pytest.mark.parametrize("together", [True, False])
def test_merged_parts_equal_one_process(whole, tmp_path, together):
    source, reference = whole
    folders = [tmp_path / ("out" if together else f"part{i}") for i in range(3)]
    for i, folder in enumerate(folders):
        stub.label(source, folder, part=(i, 3))
    if together:
        with pytest.raises(DataError, match=r"3 parts of a job array.*rlkd data merge"):
            load_pseudolabels(folders[0])
    out = tmp_path / "out"
    merge(out, [] if together else folders)
    assert stub.shards(out) == stub.shards(reference)
    for name in ("manifest.jsonl", "README.md"):
        assert (out / name).read_bytes() == (reference / name).read_bytes(), name
    assert not list(out.glob("manifest-*"))
    assert load_pseudolabels(out).to_list() == load_pseudolabels(reference).to_list()


def test_no_secret_is_recorded_and_another_password_is_no_other_run(tmp_path):
    class Remote(stub.StubEngine):
        def identity(self):
            return super().identity() | {"teacher": f"https://me:{self.weights}@host/t", "teacher_weights": "w"}

    source, out = stub.write_rows(tmp_path / "rows.jsonl"), tmp_path / "out"
    request = {"teacher": "https://me:CANARY@host/t", "hub_token": "CANARY-2"}
    stub.label(source, out, Remote(weights="CANARY3"), request=request)
    lines = (out / "manifest.jsonl").read_text().splitlines(keepends=True)
    (out / "manifest.jsonl").write_text("".join(lines[:-1]))  # not finished
    stub.label(source, out, Remote(weights="CANARY4"), request=request)
    files = [file for file in out.rglob("*") if file.is_file()]
    assert len(files) > 3
    assert [file.name for file in files if b"CANARY" in file.read_bytes()] == []


def test_more_machines_than_shards(whole, tmp_path):
    """The parts without a shard finish with nothing, and merge as the others do."""
    source, reference = whole
    parts = [tmp_path / str(i) for i in range(40)]
    rows = [stub.label(source, folder, part=(i, 40))["rows"] for i, folder in enumerate(parts)]
    assert 0 in rows
    out = tmp_path / "out"
    merge(out, parts)
    assert (out / "manifest.jsonl").read_bytes() == (reference / "manifest.jsonl").read_bytes()


def test_merge_refuses_gaps_overlaps_and_other_settings(whole, tmp_path):
    source, reference = whole
    zero, one, again, other = (tmp_path / name for name in ("zero", "one", "again", "other"))
    stub.label(source, zero, part=(0, 2))
    stub.label(source, one, part=(1, 2))
    stub.label(source, again, part=(1, 2))
    stub.label(source, other, part=(1, 2), seed=2)
    out = tmp_path / "out"
    with pytest.raises(DataError, match="1 of 2 parts found; missing: 1/2"):
        merge(out, [zero])
    with pytest.raises(DataError, match="part 1 of 2 is given 2 times"):
        merge(out, [zero, one, again])
    with pytest.raises(DataError, match=r"different settings from .*\n  seed: 1 -> 2"):
        merge(out, [zero, other])
    with pytest.raises(DataError, match="no part of a job array"):
        merge(out, [reference])
    shard = one / "labels-00001.parquet"
    shard.write_bytes(b"x")
    with pytest.raises(DataError, match=r"labels-00001\.parquet differs from its checksum"):
        merge(out, [zero, one])
    with pytest.raises(DataError, match="a run with a different sharding"):
        stub.label(source, zero)


def test_changed_settings_are_listed_and_need_permission(run):
    source, out, reference = run
    unfinish(out)
    (out / "labels-00012.parquet").unlink()
    changed = {"seed": 5, "engine": stub.StubEngine(weights="v")}
    with pytest.raises(DataError) as error:
        stub.label(source, out, **changed)
    assert "\n  teacher_weights: 'w' -> 'v'\n  seed: 1 -> 5\n" in str(error.value)
    assert "--allow-config-change" in str(error.value)
    with pytest.raises(DataError, match="8 input rows per shard -> 4"):
        stub.label(source, out, shard_rows=16, allow_config_change=True)
    stub.label(source, out, allow_config_change=True, **changed)
    rows = load_pseudolabels(out)
    old, new = (entry["generation"] for entry in stub.entries(out) if entry["kind"] == "header")
    assert old != new
    assert {(row // 8 == 12, made) for row, made in zip(rows["row"], rows["generation"], strict=True)} == {
        (False, old), (True, new)
    }  # fmt: skip
    assert stub.shards(out).keys() == stub.shards(reference).keys()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("packages", lambda: {"torch": "9.9"}, "-> 9.9"),
        ("code_digest", lambda: "another", "rlkd's code "),
        ("describe_machine", lambda device: {"threads": "64"}, "-> 64"),
        ("variables", lambda: {"NVIDIA_TF32_OVERRIDE": "1"}, "NVIDIA_TF32_OVERRIDE None -> 1"),
    ],
)
def test_other_versions_and_another_machine_are_named(run, monkeypatch, caplog, name, value, said):
    source, out, _ = run
    unfinish(out)
    stub.label(source, out)
    assert "other versions" not in caplog.text
    unfinish(out)
    monkeypatch.setattr(f"rlkd.labels.run.{name}", value)
    stub.label(source, out)
    assert "was begun by other versions or another machine: " in caplog.text
    assert said in caplog.text


def test_a_tokenizer_that_reads_otherwise_is_another_run(run, monkeypatch):
    """Its vocabulary is the same: what comes before the tokens is not."""
    source, out, _ = run
    unfinish(out)
    lower = stub.tiny_tokenizer()
    lower.backend_tokenizer.normalizer = Lowercase()
    monkeypatch.setattr(stub, "tiny_tokenizer", lambda: lower)
    with pytest.raises(DataError, match="tokenizer: "):
        stub.label(source, out)


def test_a_changed_source_is_refused(run, tmp_path):
    source, out, _ = run
    unfinish(out)
    other = stub.write_rows(tmp_path / "other.jsonl", 99)
    with pytest.raises(DataError, match=r"source\.sha256"):
        stub.label(other, out)
    # The name of the file does not count.
    same = tmp_path / "same.jsonl"
    same.write_bytes(source.read_bytes())
    stub.label(same, out)


@pytest.mark.parametrize("on_long", ["truncate", "skip", "error"])
def test_prompts_that_are_too_long(whole, tmp_path, on_long):
    source, _ = whole
    settings = {"templates": (), "max_input_tokens": 6, "on_long": on_long}
    if on_long == "error":
        with pytest.raises(DataError, match=r"row 5 \(id '5'\), template 'none' has 7 tokens, max_input_tokens is 6"):
            stub.label(source, tmp_path, **settings)
        return
    totals = stub.label(source, tmp_path, **settings)
    words = [1 + i % 9 for i in range(100)]
    long = [i for i in range(100) if words[i] + 1 > 6]
    rows = load_pseudolabels(tmp_path, statuses=None).to_list()
    if on_long == "truncate":
        assert [row["row"] for row in rows if row["truncated"]] == [i for i in long for _ in range(2)]
        assert totals["truncated"] == 2 * len(long)
        assert all(row["n_in"] == min(words[row["row"]] + 1, 6) for row in rows)
    else:
        assert [row["row"] for row in rows if row["status"] == "skipped"] == [i for i in long for _ in range(2)]
        assert totals["reasons"] == {"prompt longer than 6 tokens": 2 * len(long)}


def test_ranking_keeps_the_choices_and_their_scores(whole, tmp_path):
    source, _ = whole
    choices = stub.Template("rank", "{% if n != 4 %}is {{ text }}{% endif %}", "a ||| b c ||| {{ n % 3 }}", id="r")
    stub.label(source, tmp_path, decoding=None, templates=(choices,))
    rows = load_pseudolabels(tmp_path, statuses=None).to_list()
    assert [row["row"] for row in rows if row["status"] == "skipped"] == [4]
    tokenizer, engine = stub.tiny_tokenizer(), stub.StubEngine()
    for row in rows[:4] + rows[5:]:
        assert row["choices"] == ["a", "b c", str(row["row"] % 3)]
        prompt = tokenizer(row["teacher_input"])["input_ids"]
        sums = [sum(engine.score([prompt], [tokenizer(c)["input_ids"]])[0]) for c in row["choices"]]
        assert row["choice_logprobs"] == pytest.approx(sums)
        assert row["label"] == row["choices"][sums.index(max(sums))]
        assert (row["finish_reason"], row["sum_logprob"]) == ("ranked", pytest.approx(max(sums)))
    with pytest.raises(ConfigError, match="template 'some' has no answer choices to rank"):
        stub.label(source, tmp_path / "x", decoding=None, templates=stub.TEMPLATES[:1])


def test_choices_that_the_tokenizer_cannot_tell_apart_fail_their_rows(whole, tmp_path):
    source, _ = whole
    choices = ("{ ||| <", "a ||| {% if n == 2 %}{% else %}b{% endif %}", "a ||| {{ 'ab'[n % 2] }}{{ ' ' * (n % 2) }}")
    templates = [stub.Template(f"t{i}", "is {{ text }}", choice, id=f"t{i}") for i, choice in enumerate(choices)]
    totals = stub.label(source, tmp_path, decoding=None, templates=templates)
    assert totals["status"] == {"ok": 199, "skipped": 0, "failed": 101}
    assert totals["reasons"] == {
        "the tokenizer has no tokens for the answer choice '{'": 100, "an answer choice is empty": 1
    }  # fmt: skip
    rows = load_pseudolabels(tmp_path, statuses=None).to_list()
    assert {(row["template"], row["row"]) for row in rows if row["status"] == "failed"} == {
        *(("t0", i) for i in range(100)), ("t1", 2)
    }  # fmt: skip
    assert all(row["label"] is None and row["token_ids"] is None for row in rows if row["status"] == "failed")


def test_bad_rows_are_counted_and_kept_aside(tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_bytes(
        b'\xef\xbb\xbf{"text": "a", "n": 1}\r\n{"text": \r\n{"text": 5, "n": 1}\n{"text": "b", "n": "x"}\n'
        b'{"text": "c"}\n'
    )
    with pytest.raises(DataError, match=r"rows\.jsonl:2:9 is not valid JSON") as error:
        stub.label(source, tmp_path / "out", templates=())
    assert error.value.exit_code == 3
    assert not (tmp_path / "out").exists()
    totals = stub.label(source, tmp_path / "out", templates=(), on_bad_row="skip")
    assert totals["bad_rows"] == 3
    rows = load_pseudolabels(tmp_path / "out").to_list()
    assert [(row["row"], row["student_input"]) for row in rows[::2]] == [(0, "a"), (1, "c")]
    bad = [json.loads(line) for line in (tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines()]
    assert [(entry["place"], entry["record"].strip()) for entry in bad] == [
        (2, '{"text":'), (3, '{"text": 5, "n": 1}'), (4, '{"text": "b", "n": "x"}')
    ]  # fmt: skip
    assert "rows.jsonl:4: column 'n' has text here but a number in " in bad[2]["error"]


def test_top_k_columns_are_there_only_if_asked_for(tmp_path, whole):
    from rlkd.labels.pseudolabels import generate_pseudolabels
    from rlkd.records import Example
    from tiny import tiny_teacher

    out = tmp_path / "out"
    examples = [Example(str(i), text, (text,)) for i, text in enumerate(["a b", "c", "d e f"])]
    decoding = Decoding("greedy", 4, top_k_logprobs=3)
    generate_pseudolabels(tiny_teacher(), examples, out=out, template_names=["t"], decoding=decoding)
    for row in load_pseudolabels(out):
        assert [ids[0] for ids in row["top_ids"]] == row["token_ids"]
        assert sum(logps[0] for logps in row["top_logps"]) == pytest.approx(row["sum_logprob"], abs=1e-4)
        assert {len(ids) for ids in row["top_ids"]} == {3}
    assert "top_ids" not in load_pseudolabels(whole[1]).column_names
    assert Decoding("greedy", 4).top_k_logprobs == 0
