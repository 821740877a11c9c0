"""What works with which family of models, and with which kind of file: tables, made by running each cell.

python tests/matrix.py [--only NAME ...] [--out docs/families.md]

Models are tiny and random, of transformers' own classes, saved with a tokenizer; every cell runs the commands and
recipes that a user runs. A cell is `yes`, `refused` (one line, before anything is loaded or trained) or what went
wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import re
import runpy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "models")]
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

from rlkd.cli.main import main as rlkd  # noqa: E402
from rlkd.models.architectures import LANGUAGE_MODELS  # noqa: E402

ENCODER_DECODERS = LANGUAGE_MODELS["encoder-decoder"].model_types
DECODERS = LANGUAGE_MODELS["decoder-only"].model_types
WORDS = ["<s>", "</s>", "<unk>", *"abcdefghijm", "copy", ":"]  # of the decoder-only models
ENCODERS = (
    "bert", "roberta", "distilbert", "electra", "albert", "camembert", "xlm-roberta", "deberta-v2", "mpnet",
    "modernbert",
)  # fmt: skip
NOT_TRAINED = "-"
STRATEGIES = {"greedy": [], "beam": ["--num-beams", "2"], "sample": ["--labels-per-input", "2"], "rank": []}
TEMPLATES = """\
templates:
  one: !Template
    id: one
    name: copy
    answer_choices: a ||| b c
    reference: ''
    metadata: !TemplateMetadata {original_task: true}
    jinja: 'copy : {{ text }} ||| a'
"""
TEXTS = ("a b c", "d e", "f", "g h i j", "k l m", "a a", "b d", "c", "e f g", "h", "i j a", "m m")
ROWS = [{"text": text, "answer": text, "label": "long" if len(text) > 3 else "short"} for text in TEXTS]


def run(function: Callable[[], object]) -> str:
    """The cell of one job: what it prints is kept out of the table."""
    said = io.StringIO()
    level = logging.root.level
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            function()
    except SystemExit as end:
        if end.code:
            lines = [line for line in said.getvalue().splitlines() if line.startswith("error:")]
            return (
                f"refused: {lines[-1].removeprefix('error: ')}" if lines and end.code in (2, 3) else f"exit {end.code}"
            )
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        logging.root.setLevel(level)
    return "yes"


def recipe(name: str, *flags: str) -> None:
    before = sys.argv
    sys.argv = [f"recipes/{name}.py", *flags, "--report_to", "none", "--use_cpu", "true", "--disable_tqdm", "true"]
    try:
        runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
    finally:
        sys.argv = before


def label(teacher: str, out: str, *flags: str, rows: str = "rows.jsonl") -> None:
    what = ["--teacher", teacher, "--dataset", rows, "--input-column", "text", "--templates", "templates.yaml"]
    short = ["--max-input-tokens", "32", "--max-new-tokens", "4"]
    rlkd(["generate-pseudolabels", *what, *short, "--out", out, "--quiet", *flags])


def train(name: str, out: str, *flags: str, rows: str = "rows.jsonl") -> None:
    what = ["--teacher", "teacher", "--model_name_or_path", "student", "--dataset", rows, "--input_column", "text"]
    what += ["--eval_dataset", "held_out.jsonl", "--reference_column", "answer", "--templates", "templates.yaml"]
    steps = ["--max_steps", "4", "--save_steps", "4", "--eval_steps", "4", "--eval_strategy", "steps"]
    small = ["--per_device_train_batch_size", "4", "--output_dir", out]
    small += ["--max_input_tokens", "32", "--max_new_tokens", "4"]
    recipe(f"{name}_t0_to_t5", *what, *steps, *small, *flags)


def inspect(student: str, *flags: str, rows: str = "rows.jsonl") -> None:
    what = ["--teacher", "teacher", "--student", student, "--dataset", rows, "--input-column", "text"]
    what += ["--templates", "templates.yaml"]
    rlkd(["inspect-rewards", *what, "--max-input-tokens", "32", "--max-new-tokens", "4", "--json", *flags])


def tkd(preset: str, *flags: str, rows: str = "rows.jsonl") -> None:
    what = ["--train_file", rows, "--dev_file", "rows.jsonl", "--teacher", "encoder", "--preset", preset]
    small = ["--max_steps", "2", "--teacher_epochs", "1", "--student_layers", "2", "--max_length", "16"]
    recipe("tkd_glue", *what, *small, "--output_dir", f"runs/{preset}", "--per_device_train_batch_size", "4", *flags)


def generating_model(family: str) -> tuple[Any, Any]:
    """A tiny random model of a family, and its tokenizer."""
    import torch
    from decoder_families import continuing_tokenizer, tiny_decoder
    from test_architectures import small_model, tiny_t5gemma

    from tiny import tiny_tokenizer

    if family in DECODERS:
        return tiny_decoder(family, words=len(WORDS), bos_token_id=0, eos_token_id=1), continuing_tokenizer(WORDS)
    tokenizer = tiny_tokenizer()
    if family == "t5gemma":  # whose parts have a configuration each
        return tiny_t5gemma(), tokenizer
    model = small_model(family)
    model.resize_token_embeddings(len(tokenizer))
    with torch.no_grad():  # random weights may answer with padding alone, which is no label
        model.get_output_embeddings().weight[tokenizer.pad_token_id] = 0
    return model, tokenizer


def prepare(family: str = "t5", encoder: str = "bert") -> None:
    """Models, rows and templates in an empty working directory."""
    from encoder_families import tiny_config
    from transformers import AutoModel

    from tiny import classifier_tokenizer

    for name in ("teacher", "student"):
        for saved in generating_model(family):
            saved.save_pretrained(name)
    AutoModel.from_config(tiny_config(encoder)).save_pretrained("encoder")
    classifier_tokenizer().save_pretrained("encoder")
    Path("templates.yaml").write_text(TEMPLATES)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    Path("held_out.jsonl").write_text("".join(json.dumps(row | {"text": f"{row['text']} : :"}) + "\n" for row in ROWS))


def generating(family: str) -> dict[str, str]:
    """The cells of a family of generating models."""
    prepare(family)
    ours = ["--engine", "torch"]
    cells = {
        name: run(lambda name=name, more=more: label("teacher", f"labels/{name}", "--strategy", name, *ours, *more))
        for name, more in STRATEGIES.items()
    }
    cells["ctranslate2"] = run(lambda: label("teacher", "labels/ct2", "--engine", "ctranslate2"))
    cells["seqkd"] = run(lambda: train("seqkd", "runs/seqkd", "--pseudo_labels", "labels/greedy"))
    for name in ("reinforce", "ppo"):
        cells[name] = run(lambda name=name: train(name, f"runs/{name}", "--weak_start", "ignore"))
    trained = cells["seqkd"] == "yes"
    for name, job in {
        "inspect": lambda: inspect("runs/seqkd"),
        "as teacher": lambda: label("runs/seqkd", "labels/student", *ours),
        "generate()": _same_answers,
    }.items():
        cells[name] = run(job) if trained else NOT_TRAINED
    return cells


def encoding(family: str) -> dict[str, str]:
    """The cells of a family of encoders."""
    prepare(encoder=family)
    cells = {preset: run(lambda preset=preset: tkd(preset)) for preset in ("kd", "pkd", "tkd")}
    probe = ["probe", "runs/kd", "--train", "rows.jsonl", "--test", "rows.jsonl", "--max-length", "16"]
    for name, words in {"probe": probe, "export-onnx": ["export-onnx", "runs/kd", "onnx"]}.items():
        cells[name] = run(lambda words=words: rlkd(words)) if cells["kd"] == "yes" else NOT_TRAINED
    return cells


def files(kind: str) -> dict[str, str]:
    """The cells of a kind of file."""
    prepare()
    rows, flags = FILES[kind]()
    dashes = [flag.replace("_", "-") if flag.startswith("--") else flag for flag in flags]
    return {
        "label": run(lambda: label("teacher", "labels", *dashes, rows=rows)),
        "train": run(lambda: train("reinforce", "runs/r", "--weak_start", "ignore", *flags, rows=rows)),
        "inspect": run(lambda: inspect("student", *dashes, rows=rows)),
        "render": run(lambda: rlkd(["prompts", "render", "templates.yaml", "--dataset", rows, *dashes])),
        "tkd": run(lambda: tkd("kd", *flags, rows=rows)),
        "probe": run(
            lambda: rlkd(["probe", "encoder", "--train", rows, "--test", rows, "--max-length", "16", *dashes])
        ),
    }


def _same_answers() -> None:
    """transformers' own `generate` on the saved student gives the labels that rlkd's decoding gave."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    from rlkd import load_pseudolabels

    kind = AutoConfig.from_pretrained("runs/seqkd").model_type
    loaded = AutoModelForCausalLM if kind in DECODERS else AutoModelForSeq2SeqLM
    model = loaded.from_pretrained("runs/seqkd").eval()
    tokenizer = AutoTokenizer.from_pretrained("runs/seqkd")
    for row in load_pseudolabels("labels/student"):
        ids = torch.tensor([tokenizer(row["teacher_input"])["input_ids"]])
        (made,) = model.generate(ids, max_new_tokens=4, do_sample=False, num_beams=1).tolist()
        if made[len(made) - len(row["token_ids"]) :] != row["token_ids"]:
            raise AssertionError(f"generate() gives {made}, labels have {row['token_ids']}")


# -- kinds of files: a function that writes ROWS and returns the path to give and the flags that go with it -------


def _csv(
    name: str, delimiter: str = ",", encoding: str = "utf-8", flags: tuple[str, ...] = (), index: bool = False
) -> Any:
    def write() -> tuple[str, list[str]]:
        lines = [delimiter.join(ROWS[0]), *(delimiter.join(row.values()) for row in ROWS)]
        if index:
            lines = [f"{'' if not i else i - 1}{delimiter}{line}" for i, line in enumerate(lines)]
        _pack(Path(name), ("\n".join(lines) + "\n").encode(encoding))
        return name, flags or []

    return write


def _jsonl(*names: str, given: str | None = None) -> Any:
    def write() -> tuple[str, list[str]]:
        for i, name in enumerate(names):
            part = ROWS[i :: len(names)]
            _pack(Path(name), "".join(json.dumps(row) + "\n" for row in part).encode())
        return given or names[0], []

    return write


def _pack(path: Path, content: bytes) -> None:
    import bz2
    import gzip

    import pyarrow as pa

    path.parent.mkdir(parents=True, exist_ok=True)
    zstd = lambda data: pa.compress(data, codec="zstd", asbytes=True)  # noqa: E731
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstd}.get(path.suffix, bytes)
    path.write_bytes(pack(content))


def _parquet(*names: str, given: str | None = None) -> Any:
    def write() -> tuple[str, list[str]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        for i, name in enumerate(names):
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(ROWS[i :: len(names)]), name)
        return given or names[0], []

    return write


def _json_list() -> tuple[str, list[str]]:
    Path("d.json").write_text(json.dumps(ROWS))
    return "d.json", []


def _saved_to_disk() -> tuple[str, list[str]]:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk("saved")
    return "saved", []


def _excel() -> tuple[str, list[str]]:
    import zipfile

    with zipfile.ZipFile("d.xlsx", "w") as book:
        book.writestr("xl/workbook.xml", "<workbook/>")
    return "d.xlsx", []


FILES: dict[str, Callable[[], tuple[str, list[str]]]] = {
    ".jsonl": _jsonl("d.jsonl"),
    ".json (a list)": _json_list,
    ".csv": _csv("d.csv"),
    ".csv, semicolons": _csv("d.csv", ";"),
    ".csv with pandas' index": _csv("d.csv", index=True),
    ".csv, UTF-16": _csv("d.csv", encoding="utf-16"),
    ".csv, UTF-8 with BOM": _csv("d.csv", encoding="utf-8-sig"),
    ".csv, bars, `delimiter`": _csv("d.csv", "|", flags=["--delimiter", "|"]),
    ".csv, `encoding` cp1252": _csv("d.csv", encoding="cp1252", flags=["--encoding", "cp1252"]),
    ".tsv": _csv("d.tsv", "\t"),
    ".parquet": _parquet("d.parquet"),
    ".csv.gz": _csv("d.csv.gz"),
    ".jsonl.gz": _jsonl("d.jsonl.gz"),
    ".jsonl.zst": _jsonl("d.jsonl.zst"),
    ".jsonl.bz2": _jsonl("d.jsonl.bz2"),
    "folder of .parquet": _parquet("many/a.parquet", "many/b.parquet", given="many"),
    "folder of .jsonl": _jsonl("many/a.jsonl", "many/b.jsonl", given="many"),
    "pattern": _jsonl("many/a.jsonl", "many/b.jsonl", given="many/*.jsonl"),
    "hive folder": _parquet("hive/part=a/0.parquet", "hive/part=b/0.parquet", given="hive"),
    "save_to_disk": _saved_to_disk,
    ".xlsx": _excel,
}
TABLES: dict[str, tuple[tuple[str, ...], Callable[[str], dict[str, str]]]] = {
    "Encoder-decoders": (ENCODER_DECODERS, generating),
    "Decoder-only": (DECODERS, generating),
    "Encoders": (ENCODERS, encoding),
    "Files": (tuple(FILES), files),
}


def row(make: Callable[[str], dict[str, str]], name: str) -> dict[str, str]:
    """The cells of one line, made in an empty working directory."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            return make(name)
        finally:
            os.chdir(here)


def table(rows: dict[str, dict[str, str]]) -> str:
    """Markdown; what is not `yes` has a numbered note, in which names of the line are left out."""
    names = list(next(iter(rows.values())))
    notes: list[str] = []
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for name, cells in rows.items():
        shown = []
        for text in map(cells.get, names):
            if text in ("yes", NOT_TRAINED):
                shown.append(str(text))
                continue
            word, _, note = str(text).partition(": ") if str(text).startswith("refused") else ("**fails**", "", text)
            note = re.sub(rf"'{re.escape(name)}'", "'...'", str(note))
            notes += [note] * (note not in notes)
            shown.append(f"{word} ({notes.index(note) + 1})")
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join([*lines, "", *(f"{i}. {note}" for i, note in enumerate(notes, 1))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="families or kinds of files")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    text = ["# Families and files", "", "Made by `python tests/matrix.py --out docs/families.md`: " + INTRODUCTION, ""]
    for title, (names, make) in TABLES.items():
        rows: dict[str, dict[str, str]] = {}
        for name in (name for name in names if options.only is None or name in options.only):
            rows[name] = row(make, name)
            odd = {cell: text for cell, text in rows[name].items() if text != "yes"}
            print(name, odd or "yes", file=sys.__stderr__, flush=True)
        if rows:
            text += [f"## {title}", "", table(rows), ""]
    if options.out:
        options.out.write_text("\n".join(text).rstrip() + "\n")
    else:
        print("\n".join(text))


INTRODUCTION = """each cell runs the command or recipe on a tiny random model of the family.
`yes`: it ran; `-`: there is no student; `refused`: one line said why, before anything was loaded or trained.
`as teacher`: the trained student labels data; `generate()`: transformers' own decoding of the saved student gives the
same answers."""


if __name__ == "__main__":
    main()
