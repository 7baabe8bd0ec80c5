"""A disk that is full for files beyond a size, in a child of a fork: the kernel refuses what lies behind it."""

import resource
import signal

from helpers.forks import in_child


def with_full_disk(num_bytes: int, call) -> int:
    """Run `call` in a child whose files may have so many bytes; return its status, 0 where it ended well."""

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
        call()

    return in_child(limited)
