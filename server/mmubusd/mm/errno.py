"""The one error of the memory manager."""


class MmError(Exception):
    """A call cannot be done; no more has changed than Linux would have changed.

    Args: errno: the name that Linux gives it (`"EINVAL"`); message: what was wrong with which argument.
    """

    def __init__(self, errno: str, message: str) -> None:
        super().__init__(f"{errno}: {message}")
        self.errno = errno
        self.message = message
