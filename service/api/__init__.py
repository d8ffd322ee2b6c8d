"""HTTP alone: routes, wire schemas, the three request encodings, answers by Accept, problems. No queue, no torch."""

from service.api.connection import RESERVE, bounded_connection
from service.api.routes import mount

__all__ = ["RESERVE", "bounded_connection", "mount"]
