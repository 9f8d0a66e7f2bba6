"""Who asks: OpenAI's fields of a body that say so."""

from __future__ import annotations

from pydantic import Field

from loraserve.server.http.request_body import RequestBody


class UserFields(RequestBody):
    """`user` or, its newer name, `safety_identifier`; the first that is given and not empty counts."""

    user: str | None = Field(
        default=None,
        description="Whose request it is, up to 512 characters: of an adapter with shares the same user "
        "gets the same generation.",
    )
    safety_identifier: str | None = Field(default=None, description="The same as user.")

    @property
    def asker(self) -> str | None:
        """Whose request it is."""
        return self.user or self.safety_identifier or None
