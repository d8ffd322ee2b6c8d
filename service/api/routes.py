"""Puts the room together: routers, problems, the frame around every answer, OpenAPI."""

from __future__ import annotations

from fastapi import FastAPI

from service.api import catalogue, health, inference, openapi, problems
from service.api.middleware import FrameMiddleware
from service.dispatch.dispatcher import Dispatcher
from service.settings import Settings


def mount(app: FastAPI, dispatcher: Dispatcher, settings: Settings) -> None:
    """Give the app every endpoint of the API. Middleware added later lies around it."""
    problems.install(app)
    openapi.install(app)
    app.add_middleware(FrameMiddleware, max_header_bytes=settings.max_header_bytes)
    app.include_router(inference.create_router(dispatcher, settings))
    app.include_router(catalogue.create_router(dispatcher))
    app.include_router(health.create_router(dispatcher))
