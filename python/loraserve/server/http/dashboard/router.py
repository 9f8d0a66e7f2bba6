"""Serves the dashboard's files: the page at `/` to browsers, the rest under `/dashboard/static/`."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles

STATIC = Path(__file__).parent / "static"

# Nothing is had from, sent to or framed by another origin; no inline script or style runs.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # kept, but asked about each time: no old script meets a new server
}

# Named here: a browser runs no module whose type the machine's own tables have wrong.
MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

INDEX = {
    "name": "loraserve",
    "info": "/info",
    "models": "/v1/models",
    "health": "/health",
    "openapi": "/openapi.json",
}

router = APIRouter(include_in_schema=False)
_files = StaticFiles(directory=STATIC)


@router.get("/")
async def page(request: Request) -> Response:
    """The dashboard for a browser; for others, where to look next."""
    vary = {"Vary": "Accept"}
    if not accepts_html(request.headers.get("accept", "")):
        return JSONResponse(INDEX, headers=vary)
    return FileResponse(STATIC / "index.html", headers=HEADERS | vary)


@router.get("/dashboard/static/{name:path}")
async def static(name: str, request: Request) -> Response:
    """One file of the page; 304 when the browser has it, 404 when there is none."""
    media_type = MEDIA_TYPES.get(Path(name).suffix)
    if media_type is None:
        raise HTTPException(404)
    response = await _files.get_response(name, request.scope)
    response.headers.update(HEADERS | {"Content-Type": media_type})
    return response


def accepts_html(accept: str) -> bool:
    """Whether an Accept header names HTML itself; `*/*`, which every HTTP library sends, does not count."""
    ranges = (part.split(";") for part in accept.lower().split(","))
    return any(kind.strip() == "text/html" and not _refused(parameters) for kind, *parameters in ranges)


def _refused(parameters: list[str]) -> bool:
    return any(parameter.replace(" ", "") in {"q=0", "q=0.0"} for parameter in parameters)
