"""Settings: what is accepted, and the exact sentence for everything that is not."""

import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Gt
from transformers import TrainingArguments

from rlkd.checks import Count, Fraction, OneOf, check_settings
from rlkd.errors import ConfigError, DataError
from rlkd.io.redaction import REDACTED
from rlkd.settings.parsing import MOST_PROBLEMS, describe_config, parse_config, run_main
from rlkd.settings.trl_compat import ModelConfig


@dataclass
class Arguments(TrainingArguments):
    """A trainer's settings: some 130 fields of transformers and a few of ours."""

    value: Literal["max", "lse", "softmax"] = field(default="max", metadata={"help": "V of the reward."})
    bits: Literal[0, 4, 8] = 0
    group: int = 4
    coef: float | None = None
    names: list[str] = field(default_factory=lambda: ["a"])
    shuffle: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.group < 1:
            raise ValueError(f"group = {self.group}: must be at least 1")


@dataclass
class Data:
    """A small section with a setting that has no default."""

    dataset: str
    limit: int | None = None

    def __post_init__(self):
        if self.limit == 0:
            raise ConfigError("limit = 0: leaves no rows")


@dataclass
class Teacher:
    """One required setting."""

    teacher: str


@dataclass
class Ranged:
    """Settings with ranges."""

    lam: Fraction = 0.5
    beams: Count | None = None
    rate: Annotated[float, Gt(0)] = 1.0

    def __post_init__(self):
        check_settings(self)


REGISTRY = {"regret": 1}


@dataclass
class Registered:
    """Settings whose choices are the keys of a dictionary."""

    reward: Annotated[str, OneOf(REGISTRY)] = field(default="regret", metadata={"help": "Name of a reward."})
    extra: list[Annotated[str, OneOf(REGISTRY)]] = field(default_factory=list)
    maybe: Annotated[str, OneOf(REGISTRY)] | None = None

    def __post_init__(self):
        check_settings(self)


@dataclass
class Other:
    """Shares a name with Data."""

    limit: int = 3


@pytest.fixture
def parse(tmp_path, monkeypatch):
    """parse(yaml text, *flags) -> Arguments, from r.yaml in the working directory."""
    monkeypatch.chdir(tmp_path)

    def run(text: str, *flags: str, kinds: tuple[type, ...] = (Arguments,)) -> Any:
        (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
        parsed = parse_config(kinds, ["--config", "r.yaml", *flags])
        return parsed[0] if len(kinds) == 1 else parsed

    return run


def refusal(parse, text: str, *flags: str, **options) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(text, *flags, **options)
    return str(caught.value)


def test_flags_win_over_the_file_and_the_file_over_defaults(parse):
    arguments, model, data = parse(
        "group: 5\ncoef: 3\ndtype: bfloat16\nseed: 7\ndataset: rows.jsonl",
        *("--group", "8", "--no_shuffle", "--names", "x", "y", "--max-steps=-1"),
        kinds=(Arguments, ModelConfig, Data),
    )
    assert (arguments.group, arguments.coef, arguments.seed, arguments.value) == (8, 3.0, 7, "max")
    assert (arguments.shuffle, arguments.names, arguments.max_steps) == (False, ["x", "y"], -1)
    assert isinstance(arguments.coef, float)
    assert (model.dtype, model.lora_r, data.dataset, data.limit) == ("bfloat16", 16, "rows.jsonl", None)


def test_without_a_file(parse):
    assert parse_config((Arguments,), ["--value", "lse"])[0].value == "lse"


def test_argv_defaults_to_the_command_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["recipe.py", "--dataset", "x", "--limit", "none"])
    assert parse_config((Data,)) == (Data("x", None),)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("learning_rate: 1e-5", "learning_rate", 1e-5),
        ("learning_rate: -2E+3", "learning_rate", -2000.0),
        ("lr_scheduler_kwargs: {min_lr: 1e-6}", "lr_scheduler_kwargs", {"min_lr": 1e-6}),
        ("coef: 3", "coef", 3.0),
        ("coef: null", "coef", None),
        ("save_strategy: no", "save_strategy", "no"),
        ("eval_strategy: 'no'", "eval_strategy", "no"),
        ("bits: 8", "bits", 8),
        ("names: [a, b]", "names", ["a", "b"]),
        ("report_to: [wandb]", "report_to", ["wandb"]),
        ("include_num_input_tokens_seen: all", "include_num_input_tokens_seen", "all"),
        ("include_num_input_tokens_seen: no", "include_num_input_tokens_seen", "no"),
        ("run_name: 2024-01-01", "run_name", "2024-01-01"),
        ('"group": 6', "group", 6),
        ("\ufeffgroup: 6  # with a byte order mark", "group", 6),
        ("<<: {group: 6, seed: 1}\ngroup: 7", "group", 7),
        ("", "group", 4),
        ("# nothing yet", "group", 4),
    ],
)
def test_accepted(parse, text, name, value):
    assert getattr(parse(text), name) == value


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("lerning_rate: 3", "key 'lerning_rate' is not a setting. Did you mean 'learning_rate'?"),
        ("learning-rate: 3", "key 'learning-rate' is not a setting. Did you mean 'learning_rate'?"),
        ("zzz: 3", "key 'zzz' is not a setting."),
        ("_n_gpu: 3", "key '_n_gpu' is not a setting."),
        ("env: {A: 1}", "key 'env' is not a setting."),
        ("? [a]\n: 3", "key '[a]' is not a setting."),
        ("value: maxx", "value = maxx: allowed are 'max', 'lse', 'softmax'. Did you mean 'max'?"),
        ("bits: 5", "bits = 5: allowed are 0, 4, 8."),
        ("bits: false", "bits = false: allowed are 0, 4, 8."),
        ("group: 3.7", "group = 3.7: allowed are whole numbers."),
        ("group: 3.0", "group = 3.0: allowed are whole numbers."),
        ("group: true", "group = true: allowed are whole numbers."),
        ("group: '3'", "group = '3': allowed are whole numbers."),
        ("group:", "group = : allowed are whole numbers."),
        ("coef: abc", "coef = abc: allowed are numbers, null."),
        ("coef: true", "coef = true: allowed are numbers, null."),
        ("coef: 2024-13-01", "coef = 2024-13-01: allowed are numbers, null."),
        ("bf16: yes please", "bf16 = yes please: allowed are true, false."),
        ("bf16: 1", "bf16 = 1: allowed are true, false."),
        ("names: q", "names = q: allowed are lists of text."),
        ("names: [1]", "names = [1]: allowed are lists of text."),
        ("run_name: 3", "run_name = 3: allowed are text, null. Put it in quotes."),
        ("run_name: {a: 1}", "run_name = {a: 1}: allowed are text, null."),
        ("liger_kernel_config: {2024-01-01: 1}", "liger_kernel_config = {2024-01-01: 1}: allowed are mappings, null."),
        ("log_level: loud", "log_level = loud: allowed are 'detail', 'debug', 'info',"),
        ("lr_scheduler_type: cosin", "lr_scheduler_type = cosin: allowed are 'linear', 'cosine',"),
        ("debug: 3", "debug = 3: allowed are text, lists of 'underflow_overflow', 'tpu_metrics_debug'."),
        ("group: 3\ngroup: 4", "key 'group' is given twice."),
        ("lr_scheduler_kwargs: {a: 1, a: 2}", "key 'a' is given twice."),
    ],
)
def test_refused(parse, line, sentence):
    number = 3 if "twice" in sentence and "\n" in line else 2
    assert refusal(parse, f"seed: 3\n{line}").startswith(f"r.yaml:{number}: {sentence}")


def test_all_problems_of_a_file_are_reported_at_once_in_order(parse):
    message = refusal(parse, "value: lsee\ngroup: 3.7\nbf16: yes please\nbf16: true\nlerning_rate: 3")
    assert [line.split()[0] for line in message.splitlines()] == [f"r.yaml:{i}:" for i in range(1, 6)]


def test_a_screen_of_problems_at_most(parse):
    lines = refusal(parse, "\n".join(f"zzz{i}: 1" for i in range(MOST_PROBLEMS + 5))).splitlines()
    assert len(lines) == MOST_PROBLEMS + 1
    assert lines[-1] == "... and 5 more"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("- a", "r.yaml:1: the file must contain settings, one 'name: value' per line."),
        ("group: [1", "r.yaml:2:1: not valid YAML: did not find expected ',' or ']'"),
        ("group: 3\n\tcoef: 3", "r.yaml:2:1: not valid YAML: found a tab character that violates indentation."),
        ("group: @3", "r.yaml:1:8: not valid YAML: found character '@' that cannot start any token."),
        ("group: !!python/object:os.system 3", "r.yaml:1:8: not valid YAML: could not determine a constructor"),
        ("coef: &x [*x]", "r.yaml:1:11: not valid YAML: alias 'x' is inside what it stands for"),
        ("group: 3\n---\ngroup: 4", "r.yaml:2:1: not valid YAML: expected a single document in the stream, but found"),
        ("group: 3\na\0", "r.yaml:2:2: not valid YAML: it contains the control character U+0000"),
    ],
)
def test_not_settings(parse, text, sentence):
    assert refusal(parse, text).startswith(sentence)


@pytest.mark.parametrize(
    "text",
    [
        "group: [" + "[]," * 100_000 + "]",
        "coef: " + "9" * 100_000,
        "coef: " + ":".join(["1"] * 50_000),
        "run_name: " + "[" * 30 + "x" * 100_000 + "]" * 30,
        "x" * 100_000 + ": 1",
        "? [" + "x" * 100_000 + "]\n: 1",
        "".join(f"zzz{i}: 1\n" for i in range(20_000)),
        "".join("group: 1\n" for i in range(20_000)),
        "l0: &l0 [x, x]\n" + "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]\n" for i in range(1, 10)),
        "#" * 2**21,
    ],
    ids=range(10),
)
def test_hostile_files_are_refused_in_few_words(parse, text):
    started = time.process_time()
    assert len(refusal(parse, text)) < 4000
    assert time.process_time() - started < 8


def test_missing_and_unreadable_files(parse, tmp_path):
    parse("")
    (tmp_path / "latin.yaml").write_bytes(b"run_name: \xe9")
    with pytest.raises(ConfigError, match=r"^--config rr.yaml: no such file\. Did you mean 'r.yaml'\?$"):
        parse_config((Arguments,), ["--config=rr.yaml"])
    with pytest.raises(ConfigError, match=r"^latin\.yaml: is not UTF-8 text: unexpected end of data at byte 10\.$"):
        parse_config((Arguments,), ["--config", "latin.yaml"])
    with pytest.raises(ConfigError, match=r"^\.: cannot be read: Is a directory\.$"):
        parse_config((Arguments,), ["--config", "."])
    with pytest.raises(ConfigError, match=r"^--config: expected one argument\. See --help\.$"):
        parse_config((Arguments,), ["--config"])
    twice = refusal(parse, "", "--config", "b.yaml")
    assert twice == "--config is given 2 times (r.yaml, b.yaml): only one file is allowed."


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--lerning-rate=3"], "--lerning-rate is not a flag. Did you mean '--learning_rate'?\nSee --help."),
        (["--valu", "max", "-q"], "--valu is not a flag. Did you mean '--value'?\n-q is not a flag.\nSee --help."),
        (["--confg", "r.yaml"], "--confg is not a flag. Did you mean '--config'?\nSee --help."),
        (["stray"], "'stray' does not belong to a flag: settings are given as --name value.\nSee --help."),
        (
            ["--value", "maxx"],
            "--value: invalid choice: 'maxx': allowed are 'max', 'lse', 'softmax'. Did you mean 'max'? See --help.",
        ),
        (["--group", "3.7"], "--group: invalid int value: '3.7': allowed are whole numbers. See --help."),
        (["--group"], "--group: expected one argument: allowed are whole numbers. See --help."),
        (["--names"], "--names: expected at least one argument: allowed are lists of text. See --help."),
        (["--bf16", "maybe"], "--bf16: Truthy value expected: got maybe: allowed are true, false. See --help."),
    ],
)
def test_flags_refused(parse, flags, sentence, capsys):
    assert refusal(parse, "", *flags) == sentence
    assert capsys.readouterr() == ("", "")  # argparse's page of usage is not printed


def test_required_settings_are_named_together(parse):
    kinds = (Teacher, Data)
    message = refusal(parse, "", kinds=kinds)
    assert message == "--teacher, --dataset: required. Give it as a flag or in the file of --config."
    assert parse("dataset: x", "--teacher", "t", kinds=kinds)[1] == Data("x")


def test_what_a_dataclass_refuses_names_the_setting_and_its_place(parse):
    message = refusal(parse, "group: 0\nseed: 3\ndataset: x", "--limit", "0", kinds=(Arguments, Data))
    assert message == (
        "Arguments: group = 0: must be at least 1\n  given: group (r.yaml:1)\n"
        "Data: limit = 0: leaves no rows\n  given: limit (--limit)"
    )
    message = refusal(parse, "load_in_8bit: true", "--load_in_4bit", kinds=(ModelConfig,))
    assert message.endswith("at the same time\n  given: load_in_8bit (r.yaml:1), load_in_4bit (--load_in_4bit)")


def test_a_refusal_without_settings_has_no_places():
    @dataclass
    class Never:
        size: int = 0

        def __post_init__(self):
            raise ValueError("size = 0: too small")

    with pytest.raises(ConfigError, match=r"^Never: size = 0: too small$"):
        parse_config((Never,), [])


def test_types_that_cannot_be_checked_pass(parse):
    class Opaque:
        pass

    @dataclass
    class Loose:
        thing: Opaque | str | None = None
        free: Any = None

    assert parse("thing: 3\nfree: [1, {a: 2}]", kinds=(Loose,)) == Loose(3, [1, {"a": 2}])


def test_one_name_in_two_dataclasses_is_a_programming_error():
    with pytest.raises(TypeError, match="Data and Other both have a field 'limit'"):
        parse_config((Data, Other), ["--help"])


def test_help_shows_the_settings_even_with_a_broken_command_line(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_config((Arguments, ModelConfig), ["--config", "absent.yaml", "--help"])
    printed = capsys.readouterr().out
    assert caught.value.code == 0
    assert all(part in printed for part in ("--config FILE", "--value", "V of the reward. (default: max)", "--lora_r"))


def test_a_file_leaves_the_defaults_as_they_were(parse):
    assert parse("group: 9").group == 9
    assert parse("").group == 4


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("lam: 1.5", "lam = 1.5: allowed are numbers (at least 0 and at most 1)."),
        ("lam: -1", "lam = -1: allowed are numbers (at least 0 and at most 1)."),
        ("lam: .nan", "lam = .nan: allowed are numbers (at least 0 and at most 1)."),
        ("beams: 0", "beams = 0: allowed are whole numbers (at least 1), null."),
        ("beams: 2.5", "beams = 2.5: allowed are whole numbers (at least 1), null."),
        ("rate: 0", "rate = 0: allowed are numbers (above 0)."),
    ],
)
def test_ranges(parse, line, sentence):
    assert refusal(parse, line, kinds=(Ranged,)) == f"r.yaml:1: {sentence}"
    assert refusal(parse, f"seed: 1\n{line}", kinds=(Ranged, Arguments)) == f"r.yaml:2: {sentence}"


def test_ranges_at_their_bounds(parse):
    assert parse("lam: 1\nbeams: 1\nrate: 1e-9", kinds=(Ranged,)) == Ranged(1.0, 1, 1e-9)
    assert parse("lam: 0\nbeams: null", kinds=(Ranged,)) == Ranged(0.0, None)


def test_choices_registered_by_name(parse, monkeypatch, capsys):
    """The file, flags, --help and the list of settings know a name as soon as it is registered."""
    text, kinds = "reward: mine\nextra: [mine, regret]\nmaybe: null", (Registered,)
    assert refusal(parse, text, kinds=kinds).splitlines() == [
        "r.yaml:1: reward = mine: allowed are 'regret'.",
        "r.yaml:2: extra = [mine, regret]: allowed are lists of 'regret'.",
    ]
    sentence = "--reward: invalid choice: 'mine': allowed are 'regret'. See --help."
    assert refusal(parse, "", "--reward", "mine", kinds=kinds) == sentence
    assert refusal(parse, "", "--extra", "regret", "mine", kinds=kinds).startswith("--extra: invalid choice: 'mine'")
    monkeypatch.setitem(REGISTRY, "mine", 2)
    assert parse(text, kinds=kinds) == Registered("mine", ["mine", "regret"], None)
    flags = ("--reward", "mine", "--extra", "mine", "regret", "--maybe", "mine")
    assert parse("", *flags, kinds=kinds) == Registered("mine", ["mine", "regret"], "mine")
    assert parse("maybe: mine", "--maybe", "null", kinds=kinds) == Registered()
    (reward, *_) = describe_config(kinds, [])
    assert (reward.allowed, reward.default) == ("'regret', 'mine'", "regret")
    with pytest.raises(SystemExit):
        parse_config(kinds, ["--help"])
    assert "--reward {regret,mine}" in capsys.readouterr().out


def test_the_example_in_the_documents():
    text = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    found: dict[str, Any] = {}
    exec(code, found)
    assert (found["settings"].reward, found["settings"].order) == ("max", "shuffled")
    with pytest.raises(ConfigError, match="order = 'x': allowed are 'given', 'shuffled'"):
        found["MyArguments"](order="x")


def test_values_out_of_range_are_named_together_wherever_they_come_from(parse):
    message = refusal(parse, "rate: 2", "--lam", "2", "--beams", "0", kinds=(Ranged,))
    assert message == (
        "Ranged: lam = 2.0: must be at least 0 and at most 1\nbeams = 0: must be at least 1\n"
        "  given: lam (--lam), beams (--beams)"
    )
    with pytest.raises(ConfigError, match=r"^lam = nan: must be at least 0 and at most 1$"):
        Ranged(lam=float("nan"))


def test_what_transformers_does_not_check(parse):
    message = refusal(parse, "per_device_train_batch_size: 0\nmax_grad_norm: -1")
    assert message.splitlines() == [
        "r.yaml:1: per_device_train_batch_size = 0: allowed are whole numbers (at least 1).",
        "r.yaml:2: max_grad_norm = -1: allowed are numbers (at least 0).",
    ]


def test_every_setting_is_described_with_its_place(parse):
    parse("")
    with open("r.yaml", "w") as file:
        file.write("lam: 0.25\nhub_token: abc\nseed: 3")
    found = {s.name: s for s in describe_config((Ranged, Arguments), ["--config", "r.yaml", "--seed", "4"])}
    shown = {name: (found[name].value, found[name].origin, found[name].own) for name in ("lam", "rate", "seed")}
    assert shown == {
        "lam": (0.25, "r.yaml:1", True),
        "rate": (1.0, "default", True),
        "seed": (4, "--seed", False),
    }
    assert (found["lam"].allowed, found["lam"].default) == ("numbers (at least 0 and at most 1)", 0.5)
    assert (found["value"].help, found["value"].section) == ("V of the reward.", "Arguments")
    assert (found["hub_token"].value, found["hub_token"].origin) == (REDACTED, "r.yaml:2")
    assert found["report_to"].value == []  # resolved, not the "none" it stands for


def test_no_message_shows_a_secret(parse, capsys, monkeypatch):
    secret = "hf_" + "a1B2" * 8
    assert secret not in refusal(parse, f"hub_token: [{secret}]")
    monkeypatch.setenv("SOME_TOKEN", "canary-in-a-path")

    def main():
        raise ConfigError(f"{secret} canary-in-a-path")

    with pytest.raises(SystemExit):
        run_main(main)
    assert capsys.readouterr().err == f"error: {REDACTED} {REDACTED}\n"


@pytest.mark.parametrize("error", [ConfigError("a = 3: allowed are 1, 2"), DataError("rows.csv:3: no label")])
def test_run_main_prints_the_error_and_exits_with_its_code(error, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        run_main(main)
    assert caught.value.code == error.exit_code
    assert capsys.readouterr() == ("", f"error: {error}\n")


def test_run_main_lets_other_errors_and_success_through():
    assert run_main(lambda: None) is None
    with pytest.raises(ZeroDivisionError):
        run_main(lambda: 1 / 0)  # a fault of ours keeps its traceback


def test_scripts_that_write_to_a_file_show_no_bars(tmp_path):
    script = (
        "import transformers\nfrom rlkd import run_main\nfrom transformers.utils import logging\n"
        "run_main(lambda: list(logging.tqdm(range(3))))\nprint(logging.is_progress_bar_enabled())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr
    assert "\r" not in done.stderr


@pytest.mark.parametrize("call", ["warn()", "run_main(warn)"])
def test_a_warning_reaches_the_terminal_once(tmp_path, call):
    script = (
        "from pathlib import Path\nfrom rlkd import run_main\nfrom rlkd.runs.checkpoints import find_checkpoint\n"
        f"warn = lambda: find_checkpoint('auto', Path('new'))\n{call}"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "no checkpoint in new yet: starting a new run\n")
