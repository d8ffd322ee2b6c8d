"""HTTP alone: routes, wire schemas, the three request encodings, answers by Accept, problems. No queue, no torch."""

from service.api.connection import bounded_connection
from service.api.routes import mount

__all__ = ["bounded_connection", "mount"]
