"""Replies of a server, stored by the request that they answer."""

import hashlib
import json
import logging
import sqlite3
from collections.abc import Mapping
from threading import Lock
from typing import Any

from lightning_grpo.errors import UserError

log = logging.getLogger(__name__)


class ReplyCache:
    """Stores replies in a file, which several runs and ranks of one machine may share, or in memory.

    Args:
        path: an SQLite file, which is created if it does not exist. None: memory.

    Raises:
        UserError: the file can't be opened or is not an SQLite file.
    """

    def __init__(self, path: str | None) -> None:
        self._lock = Lock()  # rewards of held-out prompts are computed in another thread than early ones
        try:
            self._file = sqlite3.connect(path or ":memory:", timeout=60, isolation_level=None, check_same_thread=False)
            self._file.execute("CREATE TABLE IF NOT EXISTS replies (request TEXT PRIMARY KEY, reply TEXT)")
        except sqlite3.Error as error:
            raise UserError(
                f"{path!r} can't be used as a cache: {error}; set a file in a folder that exists"
            ) from error

    @staticmethod
    def key(request: Mapping[str, Any]) -> str:
        """The key of a request: a hash of all that determines its reply."""
        return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()

    def get(self, key: str) -> Any:
        """The reply stored under ``key``, or None. If reading fails, a warning is logged."""
        try:
            with self._lock:
                row = self._file.execute("SELECT reply FROM replies WHERE request = ?", (key,)).fetchone()
            return row and json.loads(row[0])
        except (sqlite3.Error, ValueError) as error:
            log.warning("A stored reply can't be read, and is requested again: %s", error)
            return None

    def put(self, key: str, reply: Any) -> None:
        """Store a reply. If that fails, as on a full disk, a warning is logged."""
        try:
            with self._lock:
                self._file.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (key, json.dumps(reply)))
        except sqlite3.Error as error:
            log.warning("A reply can't be stored, and will be requested again when it is needed: %s", error)
