"""Telling the service manager that started us how we are: systemd's protocol, one datagram to the socket that it names.

Source: sd_notify(3). Whoever started us otherwise has not set NOTIFY_SOCKET, and nothing is sent.
"""

from __future__ import annotations

import os
import socket

__all__ = ["READY", "STOPPING", "tell"]

VARIABLE = "NOTIFY_SOCKET"
READY = "READY=1"
STOPPING = "STOPPING=1"


def tell(*lines: str) -> bool:
    """Send assignments such as READY. Returns: whether somebody heard them; serving does not depend on it."""
    address = os.environ.get(VARIABLE)
    if not address:
        return False
    if address.startswith("@"):  # Linux's abstract sockets
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        try:
            sender.sendto("\n".join(lines).encode(), address)
        except OSError:  # whoever named the socket is gone
            return False
    return True
