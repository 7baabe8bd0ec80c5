"""Children of a fork that must answer: an alarm ends one that hangs, and its status says so."""

import os
import signal
import traceback

ANSWER_WITHIN_S = 60


def in_child(call) -> int:
    """Fork, call in the child, and return its status: 0, 1 after an exception, -SIGALRM where it hung."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(ANSWER_WITHIN_S)
        call()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)
