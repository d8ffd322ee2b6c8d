"""Puts the room together: routers, problems, the frame around every answer, OpenAPI."""

from __future__ import annotations

from fastapi import Depends, FastAPI
from fastapi.middleware.cors import CORSMiddleware

from service.api import admin, catalogue, docs, health, inference, keys, metrics, openapi, problems
from service.api.hosts import Hosts
from service.api.middleware import DefectMiddleware, FrameMiddleware, HeadMiddleware
from service.api.rate import Rate
from service.api.unread import Unread, UnreadMiddleware
from service.dispatch.dispatcher import Dispatcher
from service.keys import KeyFile
from service.settings import Settings

ALLOWED_HEADERS = ("Authorization", "X-API-Key", "X-Request-ID", "Content-Type")
EXPOSED_HEADERS = ("X-Class-Id", "X-Class-Name", "X-Confidence", "X-Request-ID", "Server-Timing", "Retry-After")


def mount(app: FastAPI, dispatcher: Dispatcher, settings: Settings, key_file: KeyFile | None) -> None:
    """Give the app every endpoint of the API, and what lies around them all."""
    needs = keys.Keys(key_file)
    app.router.redirect_slashes = False  # the Location would be made of the client's Host header
    problems.install(app)
    openapi.install(app, open_to_all=key_file is None)
    app.add_middleware(HeadMiddleware)
    app.add_middleware(DefectMiddleware)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=ALLOWED_HEADERS,
            expose_headers=EXPOSED_HEADERS,
        )
    unread = Unread(settings.max_unread_bytes)
    app.add_middleware(UnreadMiddleware, unread=unread)
    measured = metrics.Metrics(dispatcher)
    hosts = Hosts((settings.host, *settings.allowed_hosts))
    app.add_middleware(FrameMiddleware, max_header_bytes=settings.max_header_bytes, hosts=hosts, count=measured.ended)
    app.include_router(
        inference.create_router(dispatcher, settings, measured, unread),
        dependencies=[needs.predict, Depends(Rate(settings.max_rate).check)],
        responses=keys.PROBLEMS,
    )
    app.include_router(catalogue.create_router(dispatcher), dependencies=[needs.predict], responses=keys.PROBLEMS)
    app.include_router(metrics.create_router(measured), dependencies=[needs.predict], responses=keys.PROBLEMS)
    app.include_router(admin.create_router(dispatcher), dependencies=[needs.admin], responses=keys.PROBLEMS)
    app.include_router(health.create_router(dispatcher))
    app.include_router(docs.create_router(app.title))
