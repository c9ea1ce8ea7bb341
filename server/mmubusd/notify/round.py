"""A round: one notification, from the moment it is raised until everyone concerned has answered or is fenced off."""

from __future__ import annotations
