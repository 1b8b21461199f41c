"""Who may do what: keys from the environment or a file, compared in constant time, denied by default."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Literal

from openling.errors import UserError
from openling.serve.problems import ApiError

API_KEY, ADMIN_KEY = "OPENLING_API_KEY", "OPENLING_ADMIN_KEY"
Access = Literal["open", "api", "admin"]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


@dataclass(frozen=True)
class Caller:
    """Who sent a request. `namespace` keeps the prefix caches of different keys apart and tells nothing about the key."""

    namespace: str = ""
    admin: bool = False


class Keys:
    """API keys and the admin key, held as digests. No API key: API routes are open. No admin key: admin routes are closed."""

    def __init__(self, api: tuple[str, ...] = (), admin: tuple[str, ...] = ()) -> None:
        if set(api) & set(admin):
            raise UserError("the admin key is also an API key", expected="different keys", next=f"choose another {ADMIN_KEY}")
        self._api = tuple(_digest(key) for key in api)
        self._admin = tuple(_digest(key) for key in admin)

    @property
    def required(self) -> bool:
        """Whether API routes need a key."""
        return bool(self._api)

    def check(self, headers: Mapping[str, str], access: Access) -> Caller:
        """The caller; raises ApiError 401 or 403. The admin key opens every route. Header names are in lower case."""
        if access == "open":
            return Caller()
        given = _given(headers)
        is_admin = given is not None and _among(given, self._admin)
        if access == "admin":
            if not self._admin:
                raise ApiError(403, f"admin routes are off; start the server with {ADMIN_KEY} set", code="admin_off")
            if not is_admin:
                raise _refused(given, "admin")
            return Caller("admin", admin=True)
        if is_admin:
            return Caller("admin", admin=True)
        if not self._api:
            return Caller()
        if given is None or not _among(given, self._api):
            raise _refused(given, "API")
        return Caller(_digest("namespace:" + given).hex()[:16])


def _given(headers: Mapping[str, str]) -> str | None:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return headers.get("x-api-key") or None


def _among(given: str, digests: tuple[bytes, ...]) -> bool:
    """Every digest is compared, each in constant time: the time taken tells nothing about the keys."""
    mine = _digest(given)
    found = False
    for digest in digests:
        found |= hmac.compare_digest(mine, digest)
    return found


def _refused(given: str | None, kind: str) -> ApiError:
    message = f"this {kind} key is not known" if given else f"this route needs an {kind} key: Authorization: Bearer KEY"
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def read_keys(environment: Mapping[str, str], api_file: Path | None, admin_file: Path | None) -> Keys:
    """Keys from the variables OPENLING_API_KEY and OPENLING_ADMIN_KEY, or from files with one key per line, `#` for comments.

    Raises UserError for a file that cannot be read or holds no key, for a key with spaces or beyond ASCII.
    """
    return Keys(_read(environment, API_KEY, api_file), _read(environment, ADMIN_KEY, admin_file))


def _read(environment: Mapping[str, str], variable: str, file: Path | None) -> tuple[str, ...]:
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError("the key file cannot be read", where=file, value=type(error).__name__) from error
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise UserError("the key file holds no key", where=file, expected="one key per line")
        where: object = file
    else:
        keys = [key for key in environment.get(variable, "").split(",") if key]
        where = variable
        if variable in environment and not keys:
            raise UserError("the key is empty", where=variable, expected="keys separated by commas, or no such variable")
    for key in keys:
        if not key.isascii() or not key.isprintable() or " " in key:
            raise UserError("a key has characters that headers cannot carry", where=where, expected="printable ASCII, no spaces")
    return tuple(keys)


def check_binding(host: str, keys: Keys, *, allow_public: bool) -> None:
    """Refuse to listen beyond this machine without a key, unless that was asked for in so many words."""
    if is_loopback(host) or keys.required or allow_public:
        return
    raise UserError(
        "anyone who reaches this address could use the server: no API key is set",
        where="--host",
        value=host,
        expected="127.0.0.1, or a key",
        next=f"set {API_KEY}, or pass --api-key-file; --allow-public-without-key if a proxy in front checks keys",
    )


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is reachable from this machine only."""
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
