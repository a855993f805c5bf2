"""Helper processes for work that falls into pieces; they end with the work.

Two threads contend for Python's lock and are hardly faster than one in an analysis, where two processes do about 1.7
times as much (docs/performance.md). A helper is optional: the pieces of one that dies are done by this process.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from es2.core.malloc import keep_freed_memory

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

# One thread each, since there are as many processes as processors.
_ENVIRONMENT = dict.fromkeys(("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"), "1")


class Helpers(Generic[Answer]):
    """Helpers that start at once, while the work is being prepared, and end with the `with` block.

    Args:
        work: called as `work(shared, *piece)`; a pure function of a module.
    """

    def __init__(self, number: int, work: Callable[..., Answer]) -> None:
        self._work = work
        self._helpers: list[_Helper] = []
        self._threads: list[threading.Thread] = []
        for _ in range(number):
            try:
                self._helpers.append(_Helper(work))
            except OSError as error:
                logger.warning("No process can be started to help (%s); this one does everything.", error)
                break

    def __enter__(self) -> Helpers[Answer]:
        return self

    def __exit__(self, *_: object) -> None:
        for helper in self._helpers:
            helper.dismiss()
        for thread in self._threads:
            thread.join()
        for helper in self._helpers:
            helper.connection.close()  # not before: a thread may wait on it

    def map_pieces(
        self, shared: Any, read: Callable[[int], tuple[Any, ...]], n_pieces: int
    ) -> Iterator[tuple[int, Answer]]:
        """Yield (number of the piece, answer) in order of completion, from this process and the helpers; once.

        Args:
            shared: what all pieces need.
            read: returns a piece by its number; called in this process, from several threads.

        Raises:
            Exception: what `read` or the work raises, in either kind of process.
        """
        waiting = deque(range(n_pieces))
        answers: SimpleQueue[tuple[int, Answer] | Exception | None] = SimpleQueue()

        def take() -> int | None:
            try:
                return waiting.popleft()
            except IndexError:
                return None

        def feed(helper: _Helper) -> None:
            """Give one helper pieces while there are any; None in `answers` means that a piece came back undone."""
            try:
                helper.exchange(shared)  # returns when the helper is ready
                while (number := take()) is not None:
                    try:
                        answers.put((number, helper.ask(read(number))))
                    except _GoneError:
                        waiting.append(number)
                        raise
            except _GoneError:
                if not helper.dismissed:
                    logger.warning("A helping process has ended; its share is done by this one.")
                answers.put(None)
            except Exception as error:
                answers.put(error)

        for helper in self._helpers:
            self._threads.append(threading.Thread(target=feed, args=(helper,), daemon=True))
            self._threads[-1].start()
        n_done = 0
        while n_done < n_pieces:
            number = take() if answers.empty() else None
            answer = answers.get() if number is None else (number, self._work(shared, *read(number)))
            if isinstance(answer, Exception):
                raise answer
            if answer is not None:
                n_done += 1
                yield answer


class _GoneError(Exception):
    """A helper has ended."""


class _Helper:
    """One process, and our end of the pipe to it."""

    def __init__(self, work: Callable[..., Any]) -> None:
        self.connection, theirs = Pipe()
        self.dismissed = False
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        # -P: no module of the current folder is taken for a library.
        command = [sys.executable, "-P", "-c", "from es2.core.process_pool import serve; serve()", str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env=os.environ | _ENVIRONMENT | {"PYTHONPATH": path},
            )
        with suppress(OSError):  # of one that has ended already; that is noticed when the work begins
            self.connection.send(work)

    def ask(self, piece: tuple[Any, ...]) -> Any:
        """The answer to one piece. Raises what the work raised in the helper."""
        answer, error = self.exchange(piece)
        if error is not None:
            raise error
        return answer

    def exchange(self, message: Any) -> Any:
        """The reply to one message. Raises `_GoneError`."""
        try:
            self.connection.send(message)
            return self.connection.recv()
        except (EOFError, OSError) as error:
            raise _GoneError from error

    def dismiss(self) -> None:
        """End the process, even in the middle of a piece."""
        self.dismissed = True
        self._process.kill()
        self._process.wait()


def serve() -> None:
    """Answer pieces until the pipe is closed, as it also is when the other process ends: a helper's whole life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the other process, which then ends this one
    keep_freed_memory()
    with Connection(int(sys.argv[1])) as connection:
        try:
            work = connection.recv()
            shared = connection.recv()
            connection.send(None)
            while True:
                piece = connection.recv()
                answer, failed = None, None
                try:
                    answer = work(shared, *piece)
                except Exception as error:
                    failed = error
                    failed.add_note(traceback.format_exc())
                connection.send((answer, failed))
        except (EOFError, OSError):
            return
