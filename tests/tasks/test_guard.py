"""Calls in a child process keep their limits, from every thread and process, and leave nothing behind."""

import multiprocessing
import os
import subprocess
import sys
import threading
import time

import pytest

from stepladder.tasks.guard import BrokenOff, Guard, OutOfTime


@pytest.fixture
def evaluator():
    """A guard that evaluates its setup as Python: the worst that a parser could be led to do with model text."""
    guard = Guard("builtins", "str", "eval")
    yield lambda expression, seconds=1.0: guard.call(seconds=seconds, setup=expression)
    guard.close()


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie counts as alive, since it was left behind."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_values_come_back_and_the_child_stays(evaluator):
    assert evaluator("[1, 'ö', None]") == [1, "ö", None]
    first = evaluator("__import__('os').getpid()")
    assert evaluator(" __import__('os').getpid()") == first != os.getpid()


@pytest.mark.parametrize("expression", ["9**9**9", "__import__('math').factorial(10**8)"])
def test_big_integers_are_ended_by_processor_time_and_the_next_call_works(evaluator, expression):
    pid = evaluator("__import__('os').getpid()")
    started = time.monotonic()
    with pytest.raises(OutOfTime, match="processor time") as caught:
        evaluator(expression, seconds=0.5)
    assert caught.value.repeatable
    assert time.monotonic() - started < 4 * 0.5 + 1 + 1
    assert not alive(pid), "the child must be gone and waited for"
    assert evaluator("2 + 2") == 4


def test_a_sleeping_call_is_ended_by_the_clock(evaluator):
    evaluator("0")
    started = time.monotonic()
    with pytest.raises(OutOfTime, match="clock") as caught:
        evaluator("__import__('time').sleep(60)", seconds=0.1)
    assert not caught.value.repeatable
    assert time.monotonic() - started < 10


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="address space limits are those of Linux")
def test_memory_is_limited(evaluator):
    with pytest.raises(BrokenOff, match="MemoryError"):
        evaluator("len(bytearray(64 * 2**30))")
    assert evaluator("1") == 1


def test_the_child_writes_nothing_starts_nothing_and_knows_no_secrets(evaluator, tmp_path, monkeypatch):
    target = tmp_path / "written"
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    for attempt in (
        f"open({str(target)!r}, 'w').write('x')",
        f"__import__('os').open({str(target)!r}, 65)",
        f"__import__('os').system('touch {target}')",
        f"__import__('subprocess').run(['touch', {str(target)!r}])",
        f"__import__('os').mkdir({str(target)!r})",
        "__import__('socket').socket()",
        "__import__('os').fork()",
    ):
        with pytest.raises(BrokenOff, match="PermissionError"):
            evaluator(attempt)
    assert not target.exists()
    assert evaluator("__import__('os').environ.get('WANDB_API_KEY')") is None


def test_an_error_and_a_crash_are_told_apart_from_a_value(evaluator):
    with pytest.raises(BrokenOff, match="ZeroDivisionError"):
        evaluator("1 / 0")
    with pytest.raises(BrokenOff, match="TypeError"):
        evaluator("object()")  # JSON cannot carry it
    with pytest.raises(BrokenOff, match="status 7"):
        evaluator("__import__('os')._exit(7)")
    assert evaluator("print('chatter') or 5") == 5, "what a library prints is no reply"


def test_a_missing_module_is_one_error_and_no_hang():
    guard = Guard("stepladder.tasks.no_such_module", "load", "work")
    with pytest.raises(BrokenOff, match="no_such_module"):
        guard.call(seconds=1.0)
    guard.close()


def test_threads_share_one_child(evaluator):
    found = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: evaluator(f"{i} * {i}")})) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {i: i * i for i in range(8)}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_gets_a_child_of_its_own(evaluator):
    mine = evaluator("__import__('os').getpid()")
    context = multiprocessing.get_context("fork")
    replies = context.SimpleQueue()
    process = context.Process(target=lambda: replies.put(evaluator("__import__('os').getpid()")))
    process.start()
    process.join(60)
    theirs = replies.get()
    assert theirs not in (mine, process.pid)
    assert evaluator("__import__('os').getpid()") == mine, "the parent's child is untouched"
    deadline = time.monotonic() + 20
    while alive(theirs) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(theirs), "it ends with the process that it belonged to"


@pytest.mark.parametrize(
    "ending", ["pass", "import os; os._exit(0)", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
)
def test_the_child_ends_with_its_parent_however_that_ends(ending):
    code = (
        "from stepladder.tasks.guard import Guard\n"
        "guard = Guard('builtins', 'str', 'eval')\n"
        "print(guard.call(seconds=1.0, setup='__import__(\"os\").getpid()'), flush=True)\n" + ending
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    pid = int(done.stdout)
    assert done.stderr == ""
    deadline = time.monotonic() + 20
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)
