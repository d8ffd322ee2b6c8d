"""The page of interactive documentation: Swagger's, as FastAPI writes it, fenced in, for users type their keys there.

Swagger's own files come from the package `fastapi-swagger`, which follows its releases, and are served from here: the
page works without the internet. It may run these files and its own script and talk to this server, and nothing else; no
other page can frame it.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import re
from pathlib import Path

from fastapi import APIRouter
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import FileResponse, HTMLResponse, RedirectResponse

FOLDER = Path(str(importlib.resources.files("fastapi_swagger.resources")))
SCRIPT, STYLE = "swagger-ui-bundle.js", "swagger-ui.css"
FILES = {SCRIPT: "text/javascript", STYLE: "text/css"}


def create_router(title: str) -> APIRouter:
    """`GET /docs` and Swagger's files below it; `GET /` leads there."""
    router = APIRouter()
    page = bytes(
        get_swagger_ui_html(
            openapi_url="openapi.json",
            title=title,
            swagger_js_url=f"docs/{SCRIPT}",
            swagger_css_url=f"docs/{STYLE}",
            swagger_favicon_url="data:,",
        ).body
    )
    headers = {
        "Content-Security-Policy": _policy(page),
        "Referrer-Policy": "no-referrer",
        "X-Frame-Options": "DENY",
    }

    @router.get("/docs", include_in_schema=False)
    async def get_docs() -> HTMLResponse:
        return HTMLResponse(page, headers=headers)

    def add_file(name: str, media_type: str) -> None:
        @router.get(f"/docs/{name}", include_in_schema=False)
        async def get_file() -> FileResponse:
            return FileResponse(FOLDER / name, media_type=media_type)

    for name, media_type in FILES.items():
        add_file(name, media_type)

    @router.get("/", include_in_schema=False)
    async def get_root() -> RedirectResponse:
        return RedirectResponse("docs")  # relative, as the page's openapi.json: a proxy may put the service in a folder

    return router


def _policy(page: bytes) -> str:
    scripts = re.findall(rb"<script>(.*?)</script>", page, re.DOTALL)
    own = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(script).digest()).decode()}'" for script in scripts)
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {own} 'self'",
            "style-src 'unsafe-inline' 'self'",  # Swagger sets style attributes
            "img-src data: blob:",  # its icons, and heatmaps that the server answered
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )
