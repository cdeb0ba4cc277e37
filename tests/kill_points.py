"""A forked child that kills itself with SIGKILL at the N-th line of the code that is watched."""

import os
import signal
import sys
from collections.abc import Callable
from types import CodeType


def killed_at(point: int, watched: Callable[[CodeType], bool], act: Callable[[], object]) -> bool:
    """Runs `act` in a child; whether it was killed before it was through. point: the number of the
    line, from 1, among those that run of code for which `watched` is true."""
    child = os.fork()
    if not child:
        seen = 0

        def trace(frame, event, argument):
            nonlocal seen
            if not watched(frame.f_code):
                return None
            if event == "line":
                seen += 1
                if seen == point:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        act()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])
