"""Users: password hashes and the question whether a login is let in.

Owns the encoded form of a hash, ``$scrypt$ln=14,r=8,p=1$SALT$KEY`` (the PHC string format; salt and key in base64
without padding), and the check of a CONNECT frame's login and passcode. Holds no permissions, knows no connection.
Never keeps a password: what it remembers of a verified one is an HMAC under a random key of this object.

`Users.authenticate`, `hash_password` and `verify_password` are *blocking CPU work* (about 45 ms and 16 MB for each
scrypt at the default cost): call them in a worker thread, a few at a time. They may run in several threads at once.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import secrets
import threading
from collections.abc import Mapping
from typing import NamedTuple

from pybroker.errors import AuthenticationFailed, ConfigurationError

COST_LOG2 = 14  # scrypt's N = 2**14 with r=8, p=1: 16 MB and some 45 ms per password
BLOCK_SIZE = 8
PARALLELISM = 1
SALT_BYTES = 16
KEY_BYTES = 32
MEMORY_BYTES_MAX = 256 * 1024 * 1024  # a hash that asks for more is refused: one login must not exhaust the process
PARALLELISM_MAX = 16

_ENCODED = re.compile(
    r"\$scrypt\$ln=(?P<ln>[0-9]{1,2}),r=(?P<r>[0-9]{1,3}),p=(?P<p>[0-9]{1,3})"
    r"\$(?P<salt>[A-Za-z0-9+/]+)\$(?P<key>[A-Za-z0-9+/]+)"
)
_REFUSED = "user name or password is wrong, or a login is needed"


class PasswordHash(NamedTuple):
    """A parsed hash: scrypt's parameters (``cost`` is N), the salt and the derived key."""

    cost: int
    block_size: int
    parallelism: int
    salt: bytes
    key: bytes

    def derive(self, password: str) -> bytes:
        """The key that ``password`` gives under this hash's parameters and salt. Blocking."""
        memory = 128 * self.block_size * (self.cost + self.parallelism + 2) + 65_536
        return hashlib.scrypt(
            password.encode("utf-8", "surrogatepass"),
            salt=self.salt,
            n=self.cost,
            r=self.block_size,
            p=self.parallelism,
            maxmem=memory,
            dklen=len(self.key),
        )

    def fits(self, password: str) -> bool:
        """Whether ``password`` is the one that was hashed. Blocking; the comparison takes constant time."""
        return hmac.compare_digest(self.derive(password), self.key)


def hash_password(password: str) -> str:
    """Hash a password for the configuration's ``users``, with a new random salt. Blocking.

    Raises `ConfigurationError` for an empty password.
    """
    if not password:
        raise ConfigurationError("a password must not be empty")
    salt = secrets.token_bytes(SALT_BYTES)
    fresh = PasswordHash(1 << COST_LOG2, BLOCK_SIZE, PARALLELISM, salt, bytes(KEY_BYTES))
    key = fresh.derive(password)
    return f"$scrypt$ln={COST_LOG2},r={BLOCK_SIZE},p={PARALLELISM}${_encode(salt)}${_encode(key)}"


def verify_password(password: str, encoded: str) -> bool:
    """Whether ``password`` is the one that ``encoded`` was made of. Blocking.

    Raises `ConfigurationError` when ``encoded`` is not a hash made by `hash_password`.
    """
    return parse_hash(encoded).fits(password)


def parse_hash(encoded: str) -> PasswordHash:
    """Parse an encoded hash. Raises `ConfigurationError`, whose text never repeats the value."""
    match = _ENCODED.fullmatch(encoded)
    if match is None:
        raise ConfigurationError(
            "expected a password hash of the form $scrypt$ln=14,r=8,p=1$SALT$KEY, made by `pybroker hash-password`"
        )
    cost_log2, block_size, parallelism = int(match["ln"]), int(match["r"]), int(match["p"])
    if not (cost_log2 >= 1 and block_size >= 1 and 1 <= parallelism <= PARALLELISM_MAX):
        raise ConfigurationError(f"password hash: ln, r and p must be positive, p at most {PARALLELISM_MAX}")
    if (128 * block_size) << cost_log2 > MEMORY_BYTES_MAX:
        raise ConfigurationError(f"password hash: ln and r ask for more than {MEMORY_BYTES_MAX} bytes of memory")
    try:
        salt, key = _decode(match["salt"]), _decode(match["key"])
    except binascii.Error:
        raise ConfigurationError("password hash: salt or key is not base64") from None
    if not 8 <= len(salt) <= 64 or not 16 <= len(key) <= 64:
        raise ConfigurationError("password hash: the salt must have 8 to 64 bytes, the key 16 to 64")
    return PasswordHash(1 << cost_log2, block_size, parallelism, salt, key)


class Users:
    """The known users and the check of a login.

    ``hashes`` maps user names to encoded hashes. Raises `ConfigurationError` when a name is empty or a hash does not
    parse, so that a broker with such a user does not start.
    """

    def __init__(self, hashes: Mapping[str, str]) -> None:
        self._hashes: dict[str, PasswordHash] = {}
        for name, encoded in hashes.items():
            if not name:
                raise ConfigurationError("users: a user name must not be empty")
            try:
                self._hashes[name] = parse_hash(encoded)
            except ConfigurationError as error:
                raise ConfigurationError(f"users.{name}: {error}") from None
        self._names = tuple(self._hashes)
        self._secret = secrets.token_bytes(32)
        self._lock = threading.Lock()
        # One entry per user that logged in: the HMAC of the password that was right. Bounded by the number of users.
        self._verified: dict[str, bytes] = {}

    def authenticate(self, login: str | None, passcode: str | None, *, anonymous: bool) -> str | None:
        """Return the user's name, or None for a client without one that may come in. Blocking, see above.

        A login that is given is checked also where ``anonymous`` is True. An unknown user costs the same time as a
        wrong password. Where no users are configured at all and ``anonymous`` is True there is nothing to check
        against: any login is let in, without a name. An empty login and passcode count as none.

        Raises `AuthenticationFailed`; its text never says what was wrong.
        """
        if anonymous and not self._hashes:
            return None
        if not login:
            if anonymous and not passcode:
                return None
            raise AuthenticationFailed(_REFUSED)
        password = passcode or ""
        digest = self._digest(login, password)
        with self._lock:
            remembered = self._verified.get(login)
        if remembered is not None and hmac.compare_digest(remembered, digest):
            return login
        known = self._hashes.get(login)
        if not (known or self._decoy(login)).fits(password) or known is None:
            raise AuthenticationFailed(_REFUSED)
        with self._lock:
            self._verified[login] = digest
        return login

    def answers_at_once(self, login: str | None, passcode: str | None, *, anonymous: bool) -> bool:
        """Whether `authenticate` would answer without a scrypt, so that it needs no worker thread."""
        if not login or (anonymous and not self._hashes):
            return True
        with self._lock:
            remembered = self._verified.get(login)
        return remembered is not None and hmac.compare_digest(remembered, self._digest(login, passcode or ""))

    def _digest(self, login: str, password: str) -> bytes:
        name = login.encode("utf-8", "surrogatepass")
        text = len(name).to_bytes(8, "big") + name + password.encode("utf-8", "surrogatepass")
        return hmac.digest(self._secret, text, "sha256")

    def _decoy(self, login: str) -> PasswordHash:
        # An unknown name stands for one of the known users, always the same one: so also a mixture of costs does
        # not tell by its timing which names exist.
        if not self._names:
            return PasswordHash(1 << COST_LOG2, BLOCK_SIZE, PARALLELISM, bytes(SALT_BYTES), bytes(KEY_BYTES))
        index = int.from_bytes(self._digest(login, "")[:8], "big") % len(self._names)
        return self._hashes[self._names[index]]


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii").rstrip("=")


def _decode(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
