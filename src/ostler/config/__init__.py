"""The typed specification of a guest, and the only parser of what users ask for."""

from ostler.config.guest import GuestSpec, parse_guest
from ostler.config.request import GuestRequest, parse_request
from ostler.config.sizes import parse_size

__all__ = ["GuestRequest", "GuestSpec", "parse_guest", "parse_request", "parse_size"]
