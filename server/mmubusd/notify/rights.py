"""Who may ask for what: the checks that every request of a device begins with, and repeats after each wait."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmubusd.mm.addr import PAGE_MASK, PAGE_SHIFT, TASK_SIZE
from mmubusd.notify.errors import RequestError
from mmubusd.notify.registration import Registration
from mmubusd.notify.sanitizer import Breach

if TYPE_CHECKING:
    from mmubusd.notify.rounds import Rounds
    from mmubusd.notify.session import Session
    from mmubusd.notify.sessions import Sessions


class Rights:
    """What sessions and their registrations may ask for now.

    Attributes: limits: the bounds in force.
    """

    def __init__(self, rounds: Rounds, sessions: Sessions) -> None:
        self.registry = rounds.registry
        self.sanitizer = rounds.registry.sanitizer
        self.sessions = sessions
        self.limits = rounds.registry.limits

    def registration(self, session: Session, registration_id: int) -> Registration:
        """Raises: FencedError; RequestError NO_SUCH_REGISTRATION, ESRCH."""
        if session.fenced is not None:
            message = f"{session.name} asks for something through registration {registration_id} after it was fenced"
            self.sanitizer.note(
                Breach.AFTER_FENCE, session, message, registration=registration_id, refused=True,
                story=self.registry.pages.story(registration_id, 0),
            )  # fmt: skip
        self.sessions.check(session)
        registration = session.registrations.get(registration_id)  # type: ignore[call-overload]
        if registration is None:
            gone = self.registry.pages.gone(registration_id)
            told = ""
            if gone is not None and gone.session == session.id:
                if gone.mm_ended and session.asked_after is not None and session.asked_after < gone.heard:
                    raise _ended_meanwhile(registration_id, gone.mm)
                told = f": {gone.because}, at {gone.at:.6f} s"
                self.sanitizer.note(
                    Breach.AFTER_UNREGISTER, session,
                    f"{session.name} asks for something through registration {registration_id}, which is gone{told}",
                    registration=registration_id, refused=True,
                )  # fmt: skip
            raise RequestError(
                "ENOENT", f"{session.name} has no registration {registration_id}{told}", reason="NO_SUCH_REGISTRATION",
                registration=registration_id,
            )  # fmt: skip
        return registration  # type: ignore[no-any-return]

    def check_cached(self, registration: Registration) -> None:
        """Raises: RequestError UNCACHED when it is demoted."""
        if not self.sessions.may_cache(registration):
            raise RequestError(
                "EAGAIN",
                f"{registration!r} is demoted for being slow: it gets translations again when it has dropped "
                f"everything and answered in time for {self.limits.promote_s:g} s",
                reason="UNCACHED", registration=registration.id,
            )  # fmt: skip

    def still(self, session: Session, registration: Registration) -> None:
        """After a wait: is it still there? That it is not is nobody's mistake."""
        gone = self.registry.pages.gone(registration.id)
        if gone is not None and gone.mm_ended and session.fenced is None:
            raise _ended_meanwhile(registration.id, gone.mm)
        self.registration(session, registration.id)
        self.check_cached(registration)

    def check_range(self, start: int, end: int) -> None:
        """Raises: RequestError EINVAL, E2BIG."""
        if start & ~PAGE_MASK or end & ~PAGE_MASK or not 0 <= start < end <= TASK_SIZE:
            raise RequestError(
                "EINVAL",
                f"[{start:#x}, {end:#x}) is not a range of whole pages below {TASK_SIZE:#x}",
                start=start,
                end=end,
            )
        if (end - start) >> PAGE_SHIFT > self.limits.pages_max:
            raise RequestError(
                "E2BIG", f"{(end - start) >> PAGE_SHIFT} pages at once, at most {self.limits.pages_max} are taken",
                pages=(end - start) >> PAGE_SHIFT, maximum=self.limits.pages_max,
            )  # fmt: skip


def _ended_meanwhile(registration: int, mm: int) -> RequestError:
    message = f"address space {mm} has ended while this was under way, and registration {registration} with it"
    return RequestError("ESRCH", message, registration=registration, mm=mm)
