"""Who may do what: the key of a request is checked before its body, and anything else that it asks, is looked at."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Request, Security
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer, SecurityScopes

from service.api import openapi, raised
from service.errors import KeyLacksRight, KeyMissing, KeyWrong
from service.keys import KeyFile, find_key

HOW = "Send it as 'Authorization: Bearer <key>' or as 'X-API-Key: <key>'."
NO_KEYS = (
    "This route always needs a key with the right 'admin', and the server was started without keys. Make one with "
    "'heatmap-service key NAME --rights admin', put its line into a file, and start with --api-keys-file FILE."
)
PROBLEMS = openapi.problems(*raised.DOOR)

Bearer = Annotated[HTTPAuthorizationCredentials | None, Security(HTTPBearer(scheme_name="bearer", auto_error=False))]
Header = Annotated[str | None, Security(APIKeyHeader(name="X-API-Key", scheme_name="X-API-Key", auto_error=False))]


class Keys:
    """`predict` and `admin` are FastAPI dependencies for routes that need a key with that right.

    Without a file of keys everybody may predict and nobody is an admin. The name of the key is left in
    `request.state.key_name`.
    """

    def __init__(self, file: KeyFile | None) -> None:
        self._file = file
        self.predict: Any = Security(self._check, scopes=["predict"])
        self.admin: Any = Security(self._check, scopes=["admin"])

    async def _check(self, request: Request, scopes: SecurityScopes, bearer: Bearer, header: Header) -> None:
        """Raises KeyMissing, KeyWrong or KeyLacksRight."""
        (right,) = scopes.scopes
        if self._file is None:
            if right == "admin":
                raise KeyMissing(NO_KEYS)
            return
        sent = bearer.credentials if bearer else header
        if not sent:
            raise KeyMissing(f"A key with the right {right!r} is needed. {HOW}")
        key = find_key(self._file.keys, sent)
        if key is None:
            raise KeyWrong("The key is none of this server's; its operator hands them out.")
        request.state.key_name = key.name
        if right not in key.rights:
            has = " and ".join(repr(one) for one in sorted(key.rights))
            raise KeyLacksRight(f"The key {key.name!r} has the right {has}; this route needs {right!r}.")
