"""Jobs in processes of their own: one that dies takes one job with it, and none outlives the process that started it."""
from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import TypeVar

Job = TypeVar('Job')
Result = TypeVar('Result')
Tell = Callable[[float], None]
"""Called by a job with the share of it that is done."""


class WorkerDied(Exception):
    """The process of a job ended before the job did: killed, out of memory, or an error that it printed."""


def run(function: Callable[[Job, Tell], Result], jobs: Sequence[Job], processes: int,
        tell: Callable[[int, float], None]) -> Iterator[tuple[int, Result | WorkerDied]]:
    """(place in `jobs`, result of function(job, tell)) of each job as it ends; tell(place, share) in between.

    With one process, in this one. Otherwise function, jobs and results are pickled; an OSError of the function, such as
    of a full disk, is raised here.
    """
    if processes <= 1:
        for i, job in enumerate(jobs):
            yield i, function(job, partial(tell, i))
        return
    context = multiprocessing.get_context('spawn')  # a fork would copy the locks of whatever threads there are
    waiting = deque(range(len(jobs)))
    workers: dict[Connection, tuple[multiprocessing.process.BaseProcess, int]] = {}

    def next_job(pipe: Connection, process) -> None:
        if waiting:
            workers[pipe] = process, waiting.popleft()
            pipe.send(jobs[workers[pipe][1]])
        else:
            process.kill()
            del workers[pipe]

    def start() -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(function, theirs), daemon=True)
        process.start()
        theirs.close()  # only the worker's end is left, so that its death is seen
        workers[ours] = process, -1
        next_job(ours, process)

    try:
        for _ in range(min(processes, len(jobs))):
            start()
        while workers:
            for pipe in wait(list(workers)):
                process, i = workers[pipe]
                try:
                    kind, content = pipe.recv()
                except (EOFError, ConnectionError):
                    process.join()
                    del workers[pipe]
                    if waiting:
                        start()
                    yield i, WorkerDied(f'its process ended with exit code {process.exitcode}')
                    continue
                if kind == 'share':
                    tell(i, content)
                elif kind == 'error':
                    raise content
                else:
                    next_job(pipe, process)
                    yield i, content
    finally:
        for process, _ in workers.values():
            process.kill()


def _work(function: Callable[[Job, Tell], Result], pipe: Connection) -> None:
    """A worker: jobs from the pipe, results into it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told, and ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        job = pipe.recv()
        try:
            answer = 'result', function(job, lambda share: pipe.send(('share', share)))
        except OSError as error:
            answer = 'error', error
        pipe.send(answer)


def _end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
