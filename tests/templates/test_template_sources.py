import hashlib
import importlib
import io
import subprocess
import sys
import tarfile
import zipfile

import datasets
import pytest

from rlkd.data.rows import load_rows
from rlkd.errors import DataError
from rlkd.io.files import sha256
from rlkd.templates import sources as template_sources
from rlkd.templates.aliases import HUB_IDS, hub_id, template_name
from rlkd.templates.sources import PACKAGE_PROMPTS, Source, cached_archive, find, sources
from rlkd.templates.template import load_templates


def yaml_of(name, dataset="toy"):
    return f"dataset: {dataset}\ntemplates:\n  id-{name}: !Template\n    name: {name}\n    jinja: '{{{{ a }}}} ||| b'\n"


def tar_of(path, members):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content.encode()))
            else:
                info.type, info.linkname = content
                tar.addfile(info)
    return path


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A working folder, an empty cache and no installed promptsource."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    return tmp_path


def put(path, name):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml_of(name))


def names(spec, **options):
    return [template.name for template in load_templates(spec, **options)]


def test_the_lookup_order(home, monkeypatch):
    with pytest.raises(DataError, match=r"no templates for 'glue/mrpc'.*`rlkd prompts download`"):
        load_templates("glue/mrpc")
    cached_archive().parent.mkdir()
    tar_of(cached_archive(), {"promptsource-0.2.3/promptsource/templates/glue/mrpc/templates.yaml": yaml_of("cached")})
    monkeypatch.setattr(template_sources, "PROMPTSOURCE_SHA256", sha256(cached_archive()))
    assert names("glue/mrpc") == ["cached"]
    put(home / "site/promptsource/templates/glue/mrpc/templates.yaml", "installed")
    (home / "site/promptsource/__init__.py").write_text("raise SystemExit('imported')")
    importlib.invalidate_caches()
    assert names("glue/mrpc") == ["installed"]
    assert "promptsource" not in sys.modules
    put(home / "prompts/glue/mrpc/templates.yaml", "local")
    assert names("glue/mrpc") == ["local"]
    put(home / "given/glue/mrpc/templates.yaml", "given")
    assert names("glue/mrpc", folder=home / "given") == ["given"]
    assert names(f"{home / 'given/glue/mrpc/templates.yaml'}:id-given") == ["given"]
    assert [source.path for source in sources()][1] == PACKAGE_PROMPTS
    with pytest.raises(DataError, match=r"no templates for 'squad' in .*given\."):
        load_templates("squad", folder=home / "given")


def test_a_file_as_the_place_to_look_is_named_by_its_fields_or_its_folder(home):
    put(home / "some/where/own.yaml", "one")
    assert list(Source(home / "some/where/own.yaml").files) == ["toy"]
    assert names("toy", folder=home / "some/where/own.yaml") == ["one"]
    (home / "some/where/own.yaml").write_text(yaml_of("one").replace("dataset: toy\n", ""))
    assert list(Source(home / "some/where/own.yaml").files) == ["where"]


@pytest.mark.parametrize("kind", ["tar.gz", "zip"])
def test_archives_are_read_in_place(home, kind):
    path = home / f"mine.{kind}"
    members = {
        "x/prompts/toy/sub/templates.yaml": yaml_of("deep"),
        "x/prompts/readme.md": "no",
        "y/templates.yaml": "-",
    }
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as file:
            for name, content in members.items():
                file.writestr(name, content)
    else:
        tar_of(path, members)
    source = Source(path)
    assert source.files == {"toy/sub": "x/prompts/toy/sub/templates.yaml", "y": "y/templates.yaml"}
    assert source.counts() == {"toy/sub": 1, "y": 0}
    (template,) = load_templates("toy/sub", folder=path)
    assert template.origin == f"{path}!x/prompts/toy/sub/templates.yaml"
    assert template.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sorted(p.name for p in home.iterdir()) == [path.name]


def test_members_that_reach_out_are_not_read(home):
    secret = home / "templates.yaml"
    secret.write_text(yaml_of("secret"))
    path = tar_of(
        home / "evil.tar.gz",
        {
            "../toy/templates.yaml": yaml_of("up"),
            "a/../../toy/templates.yaml": yaml_of("up"),
            str(home / "abs/templates.yaml"): yaml_of("absolute"),
            "sym/templates.yaml": (tarfile.SYMTYPE, str(secret)),
            "hard/templates.yaml": (tarfile.LNKTYPE, str(secret)),
            "good/templates.yaml": yaml_of("good"),
        },
    )
    assert list(Source(path).files) == ["good"]
    for spec in ("../toy", "sym", "hard", str(home), "..", "good/../good"):
        with pytest.raises(DataError, match="no templates for"):
            find(spec, [Source(path)])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.tar.gz", None, r"templates '.*none\.tar\.gz' does not exist\. It must be a folder, a YAML file"),
        ("a.txt", b"x", r"templates '.*a\.txt' is neither a folder, a YAML file \(\.yaml, \.yml\) or an archive"),
        ("a.tar.gz", b"x", r"a\.tar\.gz is not a readable archive: .*Download or create it again"),
        ("a.zip", b"x", r"a\.zip is not a readable archive"),
    ],
)
def test_unusable_places(home, name, content, message):
    if content is not None:
        (home / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_templates("toy", folder=home / name)


def test_a_truncated_archive_is_named(home):
    path = tar_of(home / "cut.tar.gz", {"toy/templates.yaml": yaml_of("one") + "#" * 5000})
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match=r"cut\.tar\.gz is not a readable archive"):
        load_templates("toy", folder=path)


def test_old_names_and_hub_ids_name_the_same_templates(home):
    put(home / "prompts/glue/mrpc/templates.yaml", "mrpc")
    put(home / "prompts/xsum/templates.yaml", "xsum")
    assert names("nyu-mll/glue/mrpc") == names("glue/mrpc") == ["mrpc"]
    assert names("EdinburghNLP/xsum:xsum") == ["xsum"]
    with pytest.raises(DataError, match=r"'nyu-mll/glue' has templates per subset in .* Name one of: glue/mrpc"):
        load_templates("nyu-mll/glue")


def test_aliases_go_both_ways():
    assert (hub_id("glue"), hub_id("trec"), hub_id("own/data")) == ("nyu-mll/glue", "tasksource/trec", "own/data")
    assert all(template_name(hub) == old for old, hub in HUB_IDS.items())
    assert all(template_name(f"{hub}/sub") == f"{old}/sub" for old, hub in HUB_IDS.items())
    assert template_name("glue/mrpc") == "glue/mrpc"


def test_rows_of_an_old_name_come_from_its_new_home(monkeypatch):
    asked = []

    def load_dataset(*args, **options):
        asked.append(args)
        if args[0] != "nyu-mll/glue":
            raise FileNotFoundError("nothing there")
        return datasets.Dataset.from_dict({"a": [1]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_rows("glue", subset="mrpc").to_list() == [{"a": 1}]
    with pytest.raises(DataError, match=r"'xsum' \(EdinburghNLP/xsum on the hub\), split 'train' is neither"):
        load_rows("xsum")
    assert asked == [("nyu-mll/glue", "mrpc"), ("EdinburghNLP/xsum", None)]


def test_looking_at_templates_and_local_rows_imports_nothing_heavy(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"source": "a", "target": "b"}\n')
    script = (
        "import sys; from typer.testing import CliRunner; from rlkd.cli.prompts import app\n"
        "for args in (['list'], ['show', 'quora_para'], ['lint', 'quora_para'], "
        f"['render', 'quora_para', '--dataset', {str(tmp_path / 'd.jsonl')!r}]):\n"
        "    assert CliRunner().invoke(app, args).exit_code == 0, args\n"
        "print(*{'torch', 'transformers', 'datasets', 'promptsource'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stdout + done.stderr
