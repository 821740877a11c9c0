"""Archives of templates: only what is read counts, whatever an archive says of itself."""

import gzip
import io
import os
import resource
import struct
import tarfile
import time
import warnings
import zipfile

import pytest

from rlkd.errors import DataError
from rlkd.io.files import sha256
from rlkd.templates import archives, sources
from rlkd.templates.archives import MAX_ARCHIVE_BYTES, MAX_UNPACKED_BYTES, read_archive
from rlkd.templates.sources import PROMPTSOURCE_ARCHIVE, Source, cached_archive
from rlkd.templates.template import load_templates

YAML = b"templates:\n  i: !Template\n    name: one\n    jinja: '{{ a }} ||| b'\n"
FILE = "toy/templates.yaml"


def member(name=FILE, content=YAML, size=None, **fields):
    """One tar member, which may claim another size than it has."""
    info = tarfile.TarInfo(name)
    info.size = len(content) if size is None else size
    for field, value in fields.items():
        setattr(info, field, value)
    header = info.tobuf(format=fields.pop("format", tarfile.GNU_FORMAT))
    return header + content + b"\0" * (-len(content) % 512)


def tar(*members):
    return b"".join(members) + b"\0" * 1024


def extension(kind, body, size=None):
    return member("ext", body, size, type=kind)


def zipped(*entries, method=zipfile.ZIP_DEFLATED):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names given twice
        for name, content, mode in entries:
            info = zipfile.ZipInfo(name)
            info.external_attr, info.compress_type = mode << 16, method
            file.writestr(info, content)
    return out.getvalue()


def patched(content, signature, offset, value):
    """A zip whose every header of that signature claims another number."""
    out, start = bytearray(content), 0
    while (found := out.find(signature, start)) >= 0:
        out[found + offset : found + offset + 4] = struct.pack("<I", value)
        start = found + 4
    return bytes(out)


ZEROS = b"\0" * (MAX_UNPACKED_BYTES + 1024)
PLAIN = 0o100644
REFUSED = {
    "zeros in a member": ("x.tar.gz", lambda: tar(member("zeros", ZEROS), member()), "unpacks to more than 64 MiB"),
    "zeros that a member hides": (
        "x.tar.gz",
        lambda: tar(member("zeros", b"", len(ZEROS))) + ZEROS + member(),
        "unpacks to more than 64 MiB",
    ),
    "a large templates file": ("x.tar.gz", lambda: tar(member(content=b"#" * 2**21)), "has more than 1,024 KiB"),
    "a lying size": ("x.tar.gz", lambda: tar(member(size=2**40)), "not a readable archive: unexpected end of data"),
    "a lying size in base 256": ("x.tar.gz", lambda: tar(member(size=2**60)), "unexpected end of data"),
    "a negative size": ("x.tar.gz", lambda: tar(member(size=-1024)), "a header of -1,024 bytes|not a readable archive"),
    "a negative size in an extension": (
        "x.tar.gz",
        lambda: tar(extension(tarfile.XHDTYPE, b"14 size=-4096\n"), member()),
        "not a readable archive",
    ),
    "a long extension": (
        "x.tar.gz",
        lambda: tar(extension(tarfile.XHDTYPE, b"1" * 2**22), member()),
        "contains a header of 4,194,304 bytes",
    ),
    "a long name": (
        "x.tar.gz",
        lambda: tar(extension(tarfile.GNUTYPE_LONGNAME, b"a/" * 2**20), member()),
        "contains a header of 2,097,152 bytes",
    ),
    "many extensions": (
        "x.tar.gz",
        lambda: tar(*[extension(tarfile.XHDTYPE, b"1" * 1000)] * 9000, member()),
        "not a readable archive|more than",
    ),
    "many members": ("x.tar.gz", lambda: tar(*[member("a", b"")] * 10_001), "has more than 10,000 members"),
    "twice": ("x.tar.gz", lambda: tar(member(), member(content=b"#")), "contains 'toy/templates.yaml' twice"),
    "twice, written differently": (
        "x.tar.gz",
        lambda: tar(member(), member("./toy//./templates.yaml")),
        "contains 'toy/templates.yaml' twice",
    ),
    "two for a data set": (
        "x.tar.gz",
        lambda: tar(member("a/prompts/toy/templates.yaml"), member("b/prompts/toy/templates.yaml")),
        "are both the templates of 'toy'",
    ),
    "zip: zeros": ("x.zip", lambda: zipped((FILE, ZEROS, PLAIN)), "has more than 1,024 KiB"),
    "zip: many large files": (
        "x.zip",
        lambda: zipped(*((f"{i}/templates.yaml", b"#" * 2**20, PLAIN) for i in range(70))),
        "unpacks to more than 64 MiB",
    ),
    "zip: a lying size": (
        "x.zip",
        lambda: patched(zipped((FILE, b"#" * 2**20, PLAIN)), b"PK\1\2", 24, 10),
        "not a readable archive",
    ),
    "zip: twice": ("x.zip", lambda: zipped((FILE, YAML, PLAIN), (FILE, b"#", PLAIN)), "contains '.*' twice"),
    "zip: many members": ("x.zip", lambda: zipped(*((str(i), b"", PLAIN) for i in range(10_001))), "10,000 members"),
    "zip: damaged": ("x.zip", lambda: zipped((FILE, os.urandom(5000), PLAIN))[:3000], "not a readable archive"),
    "not gzip": ("x.tar.gz", lambda: None, "not a readable archive"),
    "zip: not zip": ("x.zip", lambda: b"PK", "not a readable archive"),
    "too large a file": ("x.zip", lambda: b"\0" * (MAX_ARCHIVE_BYTES + 1), "it has more than 16,384 KiB"),
}


def write(tmp_path, name, content):
    path = tmp_path / name
    if content is None:
        content = b"no archive"
    elif name.endswith("gz"):
        content = gzip.compress(content, 1)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(("name", "make", "said"), REFUSED.values(), ids=REFUSED)
def test_archives_that_are_not_what_they_say(tmp_path, name, make, said):
    path = write(tmp_path, name, make())
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(DataError, match=said) as error:
        load_templates("toy", folder=path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000  # KB
    assert time.process_time() - started < 8
    assert str(path) in str(error.value)
    assert len(str(error.value)) < len(str(path)) * 2 + 400


SKIPPED = {
    "a symbolic link": lambda: tar(member("sym/templates.yaml", b"", type=tarfile.SYMTYPE, linkname="/dev/zero")),
    "a hard link": lambda: tar(member("hard/templates.yaml", b"", type=tarfile.LNKTYPE, linkname=FILE)),
    "a device": lambda: tar(member("dev/templates.yaml", b"", type=tarfile.CHRTYPE, devmajor=1, devminor=5)),
    "a block device": lambda: tar(member("dev/templates.yaml", b"", type=tarfile.BLKTYPE)),
    "a pipe": lambda: tar(member("pipe/templates.yaml", b"", type=tarfile.FIFOTYPE)),
    "a folder": lambda: tar(member("folder/templates.yaml", b"", type=tarfile.DIRTYPE)),
    "an old sparse file": lambda: tar(member("sparse/templates.yaml", b"", type=tarfile.GNUTYPE_SPARSE)),
    "a contiguous file": lambda: tar(member("cont/templates.yaml", YAML, type=tarfile.CONTTYPE)),
    "a sparse file": lambda: tar(
        extension(
            tarfile.XHDTYPE, b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n32 GNU.sparse.realsize=9999999999\n"
        ),
        member("sparse/templates.yaml", b"1\n9999999998\n1\n" + b"\0" * 497 + b"#"),
    ),
    "above": lambda: tar(member("../up/templates.yaml")),
    "absolute": lambda: tar(member("/abs/templates.yaml")),
    "backslashes": lambda: tar(member("a\\..\\templates.yaml".replace("templates", "b/templates"))),
}
ZIP_SKIPPED = {
    "a link": (0o120777, b"/etc/passwd", zipfile.ZIP_STORED),
    "a device": (0o020666, b"", zipfile.ZIP_STORED),
    "a pipe": (0o010666, b"", zipfile.ZIP_STORED),
    "a socket": (0o140666, b"", zipfile.ZIP_STORED),
    "bzip2": (PLAIN, b"#" * 100, zipfile.ZIP_BZIP2),
    "lzma": (PLAIN, b"#" * 100, zipfile.ZIP_LZMA),
}


@pytest.mark.parametrize("make", SKIPPED.values(), ids=SKIPPED)
def test_what_is_no_plain_file_is_skipped_and_said(tmp_path, make, caplog):
    path = write(tmp_path, "x.tar.gz", make()[:-1024] + tar(member()))
    assert list(Source(path).files) == ["toy"]
    assert "skipped 1 members that are no plain files inside it" in caplog.text


@pytest.mark.parametrize(("mode", "content", "method"), ZIP_SKIPPED.values(), ids=ZIP_SKIPPED)
def test_what_is_no_plain_file_in_a_zip(tmp_path, mode, content, method, caplog):
    out = io.BytesIO(zipped(("odd/templates.yaml", content, mode), method=method))
    with zipfile.ZipFile(out, "a") as file:
        file.writestr(FILE, YAML)
    path = write(tmp_path, "x.zip", out.getvalue())
    assert list(Source(path).files) == ["toy"]
    assert "skipped 1 members" in caplog.text


def test_an_encrypted_member_is_skipped():
    content = bytearray(zipped((FILE, YAML, PLAIN)))
    for signature, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.find(signature) + offset] |= 1
    assert read_archive("x.zip", bytes(content)) == {}


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_ordinary_archives(tmp_path, form):
    long = "prompts/" + "/".join(["a" * 50] * 4) + "/templates.yaml"
    names = ["./prompts/toy/sub/templates.yaml", "é/templates.yaml", *([long] if form != tarfile.USTAR_FORMAT else [])]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as file:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(YAML), 1.5
            file.addfile(info, io.BytesIO(YAML))
    for name, content in (("x.tar", out.getvalue()), ("x.tar.gz", out.getvalue()), ("x.tgz", out.getvalue())):
        path = write(tmp_path, name, content)
        assert set(Source(path).files) == {"toy/sub", "é", *(["/".join(["a" * 50] * 4)] if len(names) == 3 else [])}
        assert load_templates("toy/sub", folder=path)[0].name == "one"


def test_an_archive_is_read_once(tmp_path, monkeypatch):
    """Digest and content are those of the same bytes."""
    path = write(tmp_path, "x.tar.gz", tar(member()))
    digest, source = sha256(path), Source(path)
    assert source.counts() == {"toy": 1}
    path.write_bytes(b"changed")
    assert (source.read("toy").sha256, source.read("toy").content) == (digest, YAML)


def test_promptsource_s_archive_is_checked_when_it_is_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLKD_CACHE", str(tmp_path / "cache"))
    cached_archive().parent.mkdir()
    content = gzip.compress(tar(member("promptsource-0.2.3/promptsource/templates/toy/templates.yaml")))
    cached_archive().write_bytes(content)
    monkeypatch.setattr(sources, "PROMPTSOURCE_SHA256", sha256(cached_archive()))
    (good,) = load_templates("toy")
    assert good.trusted
    cached_archive().write_bytes(content[:-1] + b"\1")
    elsewhere = tmp_path / PROMPTSOURCE_ARCHIVE
    elsewhere.write_bytes(cached_archive().read_bytes())
    for folder in (None, elsewhere):
        with pytest.raises(
            DataError, match=r"damaged or was changed\. Replace it by `rlkd prompts download`, or rename"
        ):
            load_templates("toy", folder=folder)
    own = tmp_path / "own.tar.gz"
    own.write_bytes(gzip.compress(tar(member())))
    assert not load_templates("toy", folder=own)[0].trusted


def test_files_that_are_no_regular_files(tmp_path):
    for name in ("pipe", "link"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "pipe/templates.yaml")
    (tmp_path / "link/templates.yaml").symlink_to("/dev/zero")
    for name in ("pipe", "link"):
        for spec, folder in ((name, tmp_path), (str(tmp_path / name / "templates.yaml"), None)):
            with pytest.raises(DataError, match=r"templates\.yaml cannot be read: it is no regular file"):
                load_templates(spec, folder=folder)


def test_the_limits_hold_for_what_is_read(monkeypatch):
    """A tar of exactly the limit is read."""
    content = tar(member())
    content += b"\0" * (-len(content) % tarfile.RECORDSIZE)
    monkeypatch.setattr(archives, "MAX_UNPACKED_BYTES", len(content))
    assert list(read_archive("x.tar", content)) == [FILE]
    monkeypatch.setattr(archives, "MAX_UNPACKED_BYTES", 512)
    with pytest.raises(DataError, match="unpacks to more than 0 MiB"):
        read_archive("x.tar", content)
