"""Work in a forked process, which may come to any end."""

import os
import sys
import traceback
from collections.abc import Callable

import faiss


def in_child(work: Callable[[], None]) -> int:
    """Fork, work, and return how that ended: 0, 1 after an error, or minus the signal."""
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            faiss.omp_set_num_threads(1)  # OpenMP's own threads stay in the parent
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(status)
    ended = os.waitpid(child, 0)[1]
    return -os.WTERMSIG(ended) if os.WIFSIGNALED(ended) else os.WEXITSTATUS(ended)
