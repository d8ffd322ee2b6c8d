"""The page of interactive documentation: Swagger's, as FastAPI writes it, fenced in, for users type their keys there.

Swagger's own files come from its CDN, as FastAPI has it: the page is a convenience, and megabytes of JavaScript in our
package would have to be kept up to date. The page may run these files and its own script and talk to this server, and
nothing else; no other page can frame it.
"""

from __future__ import annotations

import base64
import hashlib
import re

from fastapi import APIRouter
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import HTMLResponse, RedirectResponse

CDN = "https://cdn.jsdelivr.net/npm/swagger-ui-dist@5/"


def create_router(title: str) -> APIRouter:
    """`GET /docs`, and `GET /`, which leads there."""
    router = APIRouter()
    page = bytes(
        get_swagger_ui_html(
            openapi_url="openapi.json",
            title=title,
            swagger_js_url=f"{CDN}swagger-ui-bundle.js",
            swagger_css_url=f"{CDN}swagger-ui.css",
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
            f"script-src {own} {CDN}",
            f"style-src 'unsafe-inline' {CDN}",  # Swagger sets style attributes
            "img-src data: blob:",  # its icons, and heatmaps that the server answered
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )
