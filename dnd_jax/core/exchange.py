"""Two folders change places in one step, where the system can: neither name is ever without one."""

import ctypes
import errno
import functools
import os
import sys
from collections.abc import Callable

_HERE = -100  # AT_FDCWD: relative paths start in the working directory
_SWAP = 2  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
# What systems and file systems answer that cannot do it (NFS, parts of overlayfs, FAT).
_CANNOT = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV, errno.EPERM}


def exchange(one: str | os.PathLike, other: str | os.PathLike) -> bool:
    """Whether the two changed places. False: this system or file system cannot. Raises OSError for
    any other failure."""
    call = _call()
    if call is None:
        return False
    if not call(os.fsencode(one), os.fsencode(other)):
        return True
    number = ctypes.get_errno()
    if number in _CANNOT:
        return False
    raise OSError(number, os.strerror(number), os.fspath(other))


@functools.cache
def _call() -> Callable[[bytes, bytes], int] | None:
    """The system's own call: renamex_np of macOS, renameat2 of Linux (glibc 2.28, musl 1.2.6)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        return lambda one, other: libc.renamex_np(one, other, ctypes.c_uint(_SWAP))
    if sys.platform == "linux" and hasattr(libc, "renameat2"):
        return lambda one, other: libc.renameat2(_HERE, one, _HERE, other, ctypes.c_uint(_SWAP))
    return None
