"""Calls on text that a model wrote, in a process of their own, so that their limits hold.

Model text can hold 9**9**9, a factorial of a factorial or `__import__("os")`. Parsers built on sympy evaluate some of it, and no
limit inside Python interrupts that: signals reach the main thread only, and never the inside of big-integer arithmetic. So one
child process for each kind of call stays alive, answers one request after another, and is killed and replaced when it exceeds a
limit. It works the same from any thread, and in forked or spawned processes (each has children of its own).

What it protects against:
- time: the operating system ends the child after `seconds` of processor time, so that a busy machine does not turn a right
  answer into a timeout; a child that sleeps is killed after four times that on the clock;
- memory: the child's address space ends at 4 GiB; core dumps and files it could write end at 0 bytes;
- wandering text: after the child has loaded what it needs, Python refuses it to write, move or delete files, to open
  sockets, to start processes and to load native libraries; it sees no environment variables but a few harmless ones.

What it does not protect against: text that is written to break out of Python (a native bug in an interpreter or in a library), and
the reading of files that the user may read. Processor, memory and file limits need POSIX; elsewhere the limit on the clock remains.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import io
import json
import os
import queue
import signal
import struct
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

_START_SECONDS = 120.0  # for imports on a busy machine; not counted against a call
_MEMORY_BYTES = 4 * 2**30
_KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "TEMP", "SYSTEMROOT", "LD_LIBRARY_PATH")
# One thread each: numerical libraries would reserve stacks for every core, and no call here is large.
_SET_VARIABLES = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class OutOfTime(Exception):
    """The call used up its seconds. `repeatable`: it was processor time, so the same call would end the same way."""

    def __init__(self, message: str, repeatable: bool):
        super().__init__(message)
        self.repeatable = repeatable


class BrokenOff(Exception):
    """The call ended without a value: it raised, ran out of memory, or its process died."""


class _Died(BrokenOff):
    """The child ended by itself, which is not known to be the call's doing."""


class Guard:
    """A function of this package that runs in a child process under limits: see `call`.

    `module` holds two functions: `load(setup)` makes what calls need (an import, a data set) once per setup and without a limit
    on its time; `work(loaded, *args)` answers one call with a value that JSON can carry.
    """

    def __init__(self, module: str, load: str, work: str):
        self._target = (module, load, work)
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._setups: set[str] = set()  # what the child has loaded, as JSON
        self._replies: queue.Queue[bytes] = queue.Queue()
        _guards.add(self)

    def call(self, *args: Any, seconds: float, setup: Any = None) -> Any:
        """What `work(load(setup), *args)` returns in the child. Raises OutOfTime or BrokenOff, and nothing else.

        Calls from several threads wait for each other. What goes to the child and what comes back is JSON: lists for
        tuples, and nothing that could run code.
        """
        with self._lock:
            try:
                self._start(setup)
                return self._exchange((setup, args, seconds), 4 * seconds + 1)
            except _Died:
                # It may have been killed from outside, between two calls; a call that makes it crash will do so again.
                self._start(setup)
                return self._exchange((setup, args, seconds), 4 * seconds + 1)

    def close(self) -> None:
        """Ends the child, if there is one, and waits for its end: no zombie stays behind."""
        process, self._process = self._process, None
        self._setups.clear()
        if process is None:
            return
        with contextlib.suppress(OSError):
            process.kill()
        process.wait()
        with contextlib.suppress(OSError):
            if process.stdin is not None:
                process.stdin.close()  # the other pipe is closed by the thread that reads it

    @property
    def pid(self) -> int | None:
        """The child's process id, None while there is none."""
        return self._process.pid if self._process is not None else None

    def _start(self, setup: Any) -> None:
        if self._process is not None and self._process.poll() is not None:
            self.close()
        if self._process is None:
            source = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import _serve; _serve{self._target!r}"
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-B", "-P", "-c", source],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    bufsize=0,  # nothing half sent may wait in a buffer that a fork would copy
                    env={k: os.environ[k] for k in _KEPT_VARIABLES if k in os.environ} | _SET_VARIABLES,
                )
            except OSError as error:
                raise BrokenOff(f"the process for it could not be started ({error})") from None
            self._replies = queue.Queue()
            threading.Thread(target=_pump, args=(self._process.stdout, self._replies), daemon=True).start()
        key = json.dumps(setup)
        if key not in self._setups:
            self._exchange((setup, None, 0.0), _START_SECONDS)
            self._setups.add(key)

    def _exchange(self, request: tuple[Any, Any, float], clock_seconds: float) -> Any:
        process = self._process
        assert process is not None
        assert isinstance(process.stdin, io.RawIOBase)
        try:
            data = json.dumps(request).encode()
            _write_all(process.stdin, struct.pack(">Q", len(data)) + data)
            reply = self._replies.get(timeout=clock_seconds)
        except queue.Empty:
            self.close()
            raise OutOfTime(f"it took longer than {clock_seconds:g} s on the clock", repeatable=False) from None
        except OSError:
            reply = b""
        except BaseException:
            self.close()  # interrupted: a late reply must not answer the next call
            raise
        if not reply:
            code = process.wait()
            self.close()
            if code == -getattr(signal, "SIGPROF", 0) and code:
                raise OutOfTime(f"it took longer than {request[2]:g} s of processor time", repeatable=True)
            raise _Died(f"its process ended with status {code}")
        try:
            kind, value = json.loads(reply)
        except (ValueError, TypeError):
            self.close()
            raise BrokenOff("its process sent no valid reply") from None
        if kind == "value":
            return value
        if "MemoryError" in str(value):
            self.close()  # a full heap may stay fragmented
        raise BrokenOff(str(value))

    def _forget(self) -> None:
        """Starts anew without touching a child that belongs to the process this one was forked from."""
        process, self._process = self._process, None
        if process is not None:
            process.returncode = 0  # or its finaliser would warn about a child that is not ours
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError, ValueError):
                    if pipe is not None:
                        pipe.close()  # our copies only: the child must see its input end when its own parent does
        self._lock = threading.Lock()  # the old one may have been held by a thread that does not exist here
        self._setups = set()
        self._replies = queue.Queue()


_guards: weakref.WeakSet[Guard] = weakref.WeakSet()


def _close_all() -> None:
    for guard in list(_guards):
        guard.close()


def _forget_all() -> None:
    for guard in list(_guards):
        guard._forget()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


def _write_all(pipe: io.RawIOBase, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[pipe.write(view) or 0 :]


def _pump(pipe: io.RawIOBase, replies: queue.Queue[bytes]) -> None:
    """Hands on the child's replies, a line each, and then an empty one: whoever waits learns at once that it ended."""
    with contextlib.suppress(OSError, ValueError), io.BufferedReader(pipe) as lines:
        for line in lines:
            replies.put(line)
    replies.put(b"")


# --- the child -----------------------------------------------------------------------------------------------------------


def _serve(module: str, load: str, work: str) -> None:
    """Answers requests from standard input until it ends."""
    if hasattr(signal, "SIGINT"):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    _limit_resources()
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a library prints must not be read as a reply
    source = sys.stdin.buffer
    loaded: dict[str, Any] = {}
    functions: list[Callable[..., Any]] = []
    refusing = False
    while len(head := source.read(8)) == 8:
        setup, args, seconds = json.loads(source.read(struct.unpack(">Q", head)[0]))
        key = json.dumps(setup)
        try:
            if not functions:
                found = importlib.import_module(module)
                functions = [getattr(found, load), getattr(found, work)]
            if key not in loaded:
                loaded[key] = functions[0](setup)
            if args is None:
                reply = json.dumps(["value", None])
            else:
                if not refusing:
                    sys.addaudithook(_refuse)
                    refusing = True
                _arm(seconds)
                reply = json.dumps(["value", functions[1](loaded[key], *args)])
        except BaseException as error:  # whatever it is, the parent decides
            reply = json.dumps(["error", f"{type(error).__name__}: {str(error)[:200]}"])
        finally:
            _arm(0.0)
        out.write(reply.encode() + b"\n")


def _arm(seconds: float) -> None:
    """The kernel ends this process after so many seconds of processor time, whatever it is doing; 0 calls that off."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _limit_resources() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        for limit, most in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_AS, _MEMORY_BYTES)):
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(limit, (most, most))


_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_REFUSED = (
    "socket.", "subprocess.", "shutil.", "ctypes.", "pty.", "webbrowser.", "urllib.", "ftplib.", "smtplib.", "os.system", "os.exec",
    "os.fork", "os.posix_spawn", "os.spawn", "os.startfile", "os.kill", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link",
    "os.symlink", "os.truncate", "os.chmod", "os.chown", "os.utime", "os.putenv", "os.unsetenv", "os.chdir", "os.setxattr",
)  # fmt: skip


def _refuse(event: str, args: tuple[Any, ...]) -> None:
    """Audit hook. It raises OSErrors, which imports that only want to cache their bytecode take for a read-only disk."""
    if event == "open":
        mode, flags = args[1], args[2]
        if (isinstance(mode, str) and set(mode) & set("wax+")) or (isinstance(flags, int) and flags & _WRITING):
            raise PermissionError("text from a model may not write files")
    elif event.startswith(_REFUSED):
        raise PermissionError(f"text from a model may not do {event}")
