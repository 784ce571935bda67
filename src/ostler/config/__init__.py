"""The typed specification of a guest, and the only parser of what users ask for."""

from ostler.config.guest import GuestSpec, parse_guest
from ostler.config.sizes import parse_size

__all__ = ["GuestSpec", "parse_guest", "parse_size"]
