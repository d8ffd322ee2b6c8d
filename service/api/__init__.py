"""HTTP alone: routes, wire schemas, the three request encodings, answers by Accept, problems. No queue, no torch."""

from service.api.connection import RESERVE, bounded_connection
from service.api.routes import mount
from service.api.unread import MAX_FILES

__all__ = ["MAX_FILES", "RESERVE", "bounded_connection", "mount"]
