"""Run work in a forked process that may crash."""

import os
import sys
import traceback
from collections.abc import Callable

import faiss


def in_child(work: Callable[[], None]) -> int:
    """Run work in a forked child; return 0, 1 after an exception, or minus the signal that killed it."""
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            # A fork does not copy OpenMP's threads.
            faiss.omp_set_num_threads(1)
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(status)
    ended = os.waitpid(child, 0)[1]
    return -os.WTERMSIG(ended) if os.WIFSIGNALED(ended) else os.WEXITSTATUS(ended)
