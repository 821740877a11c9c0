import dataclasses
import os
import subprocess
import sys
import threading
import time

import pytest

from rlkd.errors import DataError
from rlkd.templates.meter import BudgetError, Limits, SandboxError
from rlkd.templates.sandbox import SafeTemplate
from rlkd.templates.template import Template
from rlkd.templates.worker import GRACE_SECONDS, OPEN_FILES, ROWS_PER_MESSAGE, RenderWorker

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
    template = Template("T", source, "no ||| yes", "id", trusted=True)
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
    assert 1.5 <= time.perf_counter() - started < 1.5 + 10  # to start two processes on a busy machine
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


def test_a_child_that_is_killed_while_it_renders_costs_that_row(worker, caplog):
    list(worker.parts(Template("T", "{{ n }}"), rows(1)))
    killer = threading.Timer(0.3, worker._process.kill)  # as the system does when memory runs out
    killer.start()
    (found,) = worker.parts(Template("T", SPIN, limits=dataclasses.replace(LIFTED, seconds=30)), rows(4)[3:])
    killer.join()
    assert isinstance(found, SandboxError)
    assert "memory_mb" in str(found)
    assert "killed the process that rendered it" in caplog.text
    assert list(worker.parts(Template("T", "{{ n }}"), rows(2))) == [["0"], ["1"]]


def test_untrusted_templates_never_render_here(monkeypatch):
    good = Template("T", "{{ text }} {{ [1, 2, 3] | choice }} ||| {{ n }}", id="id")
    assert not good.trusted
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


def test_a_row_that_hangs_takes_no_longer_than_its_limit():
    """Measured by what the worker waits for: starting a process is not the row's time."""
    with RenderWorker(Limits(seconds=0.5)) as worker:
        list(worker.parts(Template("T", "{{ n }}"), rows(1)))
        waited = []
        poll = worker._connection.poll
        patched = type("Patched", (), {"__getattr__": lambda self, name: getattr(connection, name)})()
        connection = worker._connection

        def timed(seconds):
            started = time.perf_counter()
            try:
                return poll(seconds)
            finally:
                waited.append(time.perf_counter() - started)

        patched.poll = timed
        worker._connection = patched
        found = []
        for result in worker.parts(Template("T", SPIN, limits=LIFTED), rows(ROWS_PER_MESSAGE)):
            found.append(result)
            if len(found) == 4:
                break
        assert isinstance(found[3], SandboxError)
        assert sum(waited) < 0.5 + 0.4


def test_a_job_of_rows_that_hang_ends():
    """Three rows of 0.3 s use up a budget of 0.5 s; rows that are quick add to it."""
    limits = Limits(seconds=0.3, job_seconds=0.5)
    template = Template("T", SPIN.replace("n == 3", "n % 2"), limits=LIFTED, origin="f.yaml")
    with RenderWorker(limits) as worker:
        results = worker.parts(template, rows(50))
        found = []
        with pytest.raises(BudgetError, match=r"^template 'T' of f.yaml exceeds the limit job_seconds = 0.5") as error:
            found.extend(results)
        assert error.value.exit_code == DataError.exit_code
        assert not isinstance(error.value, DataError)
        with pytest.raises(BudgetError):
            list(worker.parts(template, rows(50)))
    with RenderWorker(limits) as worker:
        patient = Template("T", SPIN.replace("n == 3", "n in (40, 80, 120)"), limits=LIFTED)
        found = list(worker.parts(patient, rows(130)))
        assert sum(isinstance(result, SandboxError) for result in found) == 3


def test_what_a_row_takes_is_the_processor_s_time():
    """Rows that wait for the reader of their results cost nothing."""
    with RenderWorker(Limits(job_seconds=0.5)) as worker:
        for _ in worker.parts(Template("T", "{{ n }}"), rows(30)):
            time.sleep(0.03)


def test_the_job_ends_where_rows_are_rendered():
    """An error of the budget is none of a row: it goes past what turns those into failed prompts."""
    from rlkd.data.examples import RowRenderer

    endless = SPIN.replace("n == 3", "n >= 0")
    renderer = RowRenderer((Template("T", endless, limits=Limits(seconds=0.3, job_seconds=0.1, steps=10**15)),), "text")
    with pytest.raises(BudgetError, match="job_seconds"):
        [renderer(n, row) for n, row in enumerate(rows(5))]


def test_rows_that_nobody_waits_for_are_not_taken_for_others(worker):
    results = worker.parts(Template("T", "first {{ n }}"), rows(9))
    assert next(results) == ["first 0"]
    results.close()
    assert list(worker.parts(Template("T", "second {{ n }}"), rows(2))) == [["second 0"], ["second 1"]]


def test_a_row_that_cannot_be_sent_fails_alone(worker):
    mixed = [{"n": 0}, {"n": 1, "odd": lambda: None}, {"n": 2}]
    found = list(worker.parts(Template("T", "{{ n }}"), mixed))
    assert (found[0], found[2]) == (["0"], ["2"])
    assert "the row cannot be sent to the rendering process" in str(found[1])


@pytest.mark.skipif(not os.path.exists("/proc/self/limits"), reason="reads /proc")
def test_the_child_has_limits_of_its_own():
    with RenderWorker(Limits(seconds=7, memory_mb=700)) as worker:
        list(worker.parts(Template("T", "{{ n }}"), rows(1)))
        with open(f"/proc/{worker._process.pid}/limits") as file:
            found = {line[:25].strip(): line[25:].split()[:2] for line in file}
    assert found["Max address space"] == [str(700 << 20)] * 2
    for name in ("Max core file size", "Max file size", "Max processes"):
        assert found[name] == ["0", "0"], name
    assert found["Max open files"] == [str(OPEN_FILES)] * 2
    assert 7 < int(found["Max cpu time"][0]) < 7 + 2 * GRACE_SECONDS


@pytest.mark.slow
def test_a_child_without_a_parent_ends():
    """A row that never ends, in a process whose parent was killed: its processor time is limited."""
    script = (
        "import os, signal, threading, time\n"
        "from rlkd.templates.meter import Limits\nfrom rlkd.templates.template import Template\n"
        "from rlkd.templates.worker import RenderWorker\n"
        "import rlkd.templates.worker as w\n"
        "worker = RenderWorker(Limits(seconds=0.5))\n"
        "list(worker.parts(Template('T', 'x'), [{}]))\nprint(worker._process.pid, flush=True)\n"
        "threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()\n"
        "spin = '{% for i in range(10 ** 12) %}{% endfor %}'\n"
        "list(worker.parts(Template('T', spin, limits=Limits(steps=10**15)), [{}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    pid, deadline = int(done.stdout), time.monotonic() + 60
    while time.monotonic() < deadline and alive(pid):
        time.sleep(0.1)
    assert not alive(pid)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
