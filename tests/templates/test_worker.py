import dataclasses
import os
import time

import pytest

from rlkd.errors import DataError
from rlkd.templates.meter import Limits, SandboxError
from rlkd.templates.sandbox import SafeTemplate
from rlkd.templates.template import Template
from rlkd.templates.worker import ROWS_PER_MESSAGE, RenderWorker

pytestmark = pytest.mark.timeout(120)

# Nothing the meter counts can stop a template under these.
LIFTED = Limits(steps=10**15, value=10**15, output=10**15)
SPIN = "{% if n == 3 %}{% for i in range(10 ** 12) %}{% endfor %}{% endif %}{{ n }}"
HOARD = "{% if n == 3 %}{{ 'a' * 10 ** 11 }}{% endif %}{{ n }}"


@pytest.fixture(scope="module")
def worker():
    with RenderWorker(Limits(seconds=1.5, memory_mb=1024)) as worker:
        yield worker


def rows(count):
    return [{"n": n, "text": f"text {n} ||| é😀", "list": [n, {"k": None}]} for n in range(count)]


def test_same_results_as_in_this_process(worker):
    source = "{{ text }} {{ list }} {{ range(100) | list | choice }} ||| {{ answer_choices[n % 2] }}"
    template = Template("T", source, "no ||| yes", "id")
    template.compile()
    count = 2 * ROWS_PER_MESSAGE + 3
    expected = [template.parts(row, seed=5) for row in rows(count)]
    assert list(worker.parts(template, iter(rows(count)), seed=5)) == expected


def test_errors_come_back_in_place(worker):
    found = list(worker.parts(Template("T", "{{ 10 // n }}"), rows(2)))
    assert type(found[0]) is DataError
    assert "template 'T'" in str(found[0])
    assert "ZeroDivisionError" in str(found[0])
    assert found[1] == ["10"]
    found = list(worker.parts(Template("T", "{{ 'a' * (9 ** 9 * n) }}"), rows(2)))
    assert found[0] == [""]
    assert type(found[1]) is SandboxError


@pytest.mark.parametrize("source", [SPIN, "{{ n | no_such_filter }}"])
def test_a_template_that_does_not_compile_or_end_leaves_the_worker_usable(worker, source):
    found = list(worker.parts(Template("T", source, limits=Limits(steps=1000)), rows(4)))
    assert type(found[3]) is SandboxError
    assert list(worker.parts(Template("T", "{{ n }}"), rows(2))) == [["0"], ["1"]]


def test_a_row_without_end_is_killed_on_time_and_the_others_render(worker):
    list(worker.parts(Template("T", "{{ n }}"), rows(1)))
    process = worker._process
    started = time.perf_counter()
    found = list(worker.parts(Template("T", SPIN, limits=LIFTED, origin="f.yaml"), rows(6)))
    # The row runs out of time twice: with its group, then alone.
    assert time.perf_counter() - started < 2 * 1.5 + 10
    assert [result for result in found if isinstance(result, list)] == [[str(n)] for n in (0, 1, 2, 4, 5)]
    assert isinstance(found[3], SandboxError)
    for text in ("template 'T' of f.yaml", "seconds = 1.5", "Limits.seconds"):
        assert text in str(found[3])
    assert process.returncode is not None
    assert worker._process.pid != process.pid


def test_memory_is_bounded(worker):
    found = list(worker.parts(Template("T", HOARD, limits=LIFTED), rows(5)))
    assert [result for result in found if isinstance(result, list)] == [[str(n)] for n in (0, 1, 2, 4)]
    assert isinstance(found[3], SandboxError)
    assert "memory_mb" in str(found[3])


def test_a_child_that_dies_is_replaced(worker):
    list(worker.parts(Template("T", "{{ n }}"), rows(1)))
    worker._process.kill()
    worker._process.wait()
    found = list(worker.parts(Template("T", "{{ n }}"), rows(3)))
    assert found == [["0"], ["1"], ["2"]]


def test_untrusted_templates_never_render_here(monkeypatch):
    good = Template("T", "{{ text }} {{ [1, 2, 3] | choice }} ||| {{ n }}", id="id", trusted=False)
    expected = [dataclasses.replace(good, trusted=True).render(row, seed=7) for row in rows(20)]
    with monkeypatch.context() as patch:
        patch.setattr(SafeTemplate, "render", None)
        assert [good.render(row, seed=7) for row in rows(20)] == expected
    endless = dataclasses.replace(good, source=SPIN, limits=dataclasses.replace(LIFTED, seconds=0.5))
    with pytest.raises(SandboxError, match=r"seconds = 0\.5"):
        endless.parts({"n": 3})
    assert endless.parts({"n": 4}) == ["4"]


def test_the_child_sees_no_secrets_and_ends_with_its_worker(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-secret")
    with RenderWorker() as worker:
        list(worker.parts(Template("T", "{{ n }}"), rows(1)))
        pid = worker._process.pid
        with open(f"/proc/{pid}/environ") as environ:
            assert "a-secret" not in environ.read()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_worker_that_does_not_start_is_an_error(monkeypatch):
    monkeypatch.setattr("rlkd.templates.worker.START_SECONDS", 0.0)
    with (
        RenderWorker() as slow,
        pytest.raises(DataError, match=r"the render worker did not start within 0 s\. Try again on an idle machine"),
    ):
        list(slow.parts(Template("T", "{{ n }}"), rows(1)))
