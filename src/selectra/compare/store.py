"""The file of a comparison: its cells, who works on which, and every record, at once and for good.

One SQLite file, without side files while nobody writes, so that it can be moved, copied and shared by a folder. A
worker shows that it lives by its beat; a cell of a worker that does not is anybody's again.
"""

import json
import os
import socket
import sqlite3
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selectra.compare.cells import Cell
from selectra.errors import DataError

VERSION = "1"
# Seconds without a beat after which a worker of another machine counts as dead. Clocks of two machines may differ: it
# must also have been seen not to beat for some time, unless its last beat is that much older.
LEASE = 60.0
SILENCE, SURELY = LEASE / 3, 10 * LEASE
# Seconds that a worker waits for another one's writing.
PATIENCE = 60.0
APPLICATION = 0x53454C45
SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE cells (
    key TEXT PRIMARY KEY, place INTEGER NOT NULL, by_gradient INTEGER NOT NULL, family TEXT NOT NULL,
    weight INTEGER NOT NULL, cell TEXT NOT NULL,
    state TEXT NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'taken', 'done', 'failed')),
    worker TEXT, record TEXT, finished REAL);
CREATE INDEX cells_by_place ON cells (state, place);
CREATE INDEX cells_by_family ON cells (family);
CREATE TABLE workers (id TEXT PRIMARY KEY, host TEXT NOT NULL, pid INTEGER NOT NULL, beat REAL NOT NULL);
"""


class Store:
    """Cells and records in a file.

    Args:
        path: The file; it is made where there is none.

    Raises:
        DataError: The file is no store, is damaged, or another version wrote it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.worker = uuid.uuid4().hex
        # The last beat of every other worker, and when it was first seen by this one's own clock.
        self._beats: dict[str, tuple[float, float]] = {}
        if path.exists() and not path.is_file():
            raise DataError(f"'{path}' is not a file; name a file for the records.")
        if not path.parent.is_dir():
            raise DataError(f"the folder '{path.parent}' does not exist; make it, or name another file.")
        try:
            self._file = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
            with self._writing():
                self._check()
            self._file.execute("PRAGMA synchronous=FULL")
        except sqlite3.DatabaseError as error:
            raise DataError(f"'{path}' cannot be read as a comparison's records: {error}.") from error

    def _check(self) -> None:
        """Make the tables in an empty file; refuse what is not ours."""
        application = self._one("PRAGMA application_id")
        if application == 0 and self._one("SELECT count(*) FROM sqlite_master") == 0:
            for statement in SCHEMA.split(";\n"):
                self._file.execute(statement)
            self._file.execute("INSERT INTO meta VALUES ('version', ?)", (VERSION,))
            self._file.execute(f"PRAGMA application_id = {APPLICATION}")
            return
        if application != APPLICATION:
            raise DataError(f"'{self.path}' is an SQLite file, but holds no comparison; name another file.")
        version = self._one("SELECT value FROM meta WHERE name = 'version'")
        if version != VERSION:
            raise DataError(
                f"'{self.path}' was written by version {version} of the records' format, and this is {VERSION}; "
                "go on with the Selectra that wrote it, or name another file."
            )

    def _one(self, query: str, values: tuple[Any, ...] = ()) -> Any:
        row = self._file.execute(query, values).fetchone()
        return None if row is None else row[0]

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """All or nothing, and nobody else meanwhile; whoever holds the file for too long is an error."""
        try:
            self._file.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):
                raise
            raise DataError(
                f"'{self.path}' has been held by another process for {PATIENCE:g} s; end that one, or, on a disk of "
                "another machine, bring the file to this one."
            ) from error
        try:
            yield
        except BaseException:
            self._file.execute("ROLLBACK")
            raise
        self._file.execute("COMMIT")

    def close(self) -> None:
        """Give back what this worker has taken and not finished."""
        with self._writing():
            self._file.execute(
                "UPDATE cells SET state = 'open', worker = NULL WHERE worker = ? AND state = 'taken'", (self.worker,)
            )
            self._file.execute("DELETE FROM workers WHERE id = ?", (self.worker,))
        self._file.close()

    def remember(self, name: str, value: Any) -> None:
        """Keep a fact about the whole comparison."""
        with self._writing():
            self._file.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, json.dumps(value)))

    def settle(self, name: str, value: Any) -> Any:
        """Keep a fact unless there is one already; what is kept. Of several workers the first one decides."""
        with self._writing():
            self._file.execute("INSERT OR IGNORE INTO meta VALUES (?, ?)", (name, json.dumps(value)))
        return self.recall(name)

    def recall(self, name: str) -> Any:
        """What `remember` kept; None where it did not."""
        found = self._one("SELECT value FROM meta WHERE name = ?", (name,))
        return None if found is None else json.loads(found)

    def add(self, cells: Iterable[Cell]) -> None:
        """Add cells; one that is there already stays as it is."""
        rows = [
            (cell.key, cell.place, int(cell.by_gradient), cell.group, cell.weight, cell.to_json()) for cell in cells
        ]
        with self._writing():
            query = (
                "INSERT OR IGNORE INTO cells (key, place, by_gradient, family, weight, cell) VALUES (?, ?, ?, ?, ?, ?)"
            )
            self._file.executemany(query, rows)

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Show, inside the block, that this worker lives, whatever it does."""
        over = threading.Event()

        def beat() -> None:
            # A connection of its own: two threads in one transaction would end each other's.
            other = Store(self.path)
            other.worker = self.worker
            while not over.wait(LEASE / 6):
                with other._writing():
                    other._beat()
            other._file.close()

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            # It may be waiting for the file, which has a limit of its own.
            thread.join(PATIENCE + 5)

    def _beat(self) -> None:
        row = (self.worker, socket.gethostname(), os.getpid(), time.time())
        self._file.execute("INSERT OR REPLACE INTO workers VALUES (?, ?, ?, ?)", row)

    def take(self, by_gradient: bool | None = None, most: int | None = None) -> Cell | None:
        """The next cell that nobody works on, from now on this worker's; None where there is none.

        Args:
            by_gradient: Only those that belong on a GPU, or only those that do not; None takes any.
            most: Only those of at most this weight.
        """
        wanted = "" if by_gradient is None else f"AND by_gradient = {int(by_gradient)} "
        wanted += "" if most is None else f"AND weight <= {most}"
        with self._writing():
            self._beat()
            self._free_the_dead()
            query = f"SELECT key, cell FROM cells WHERE state = 'open' {wanted} ORDER BY place LIMIT 1"
            row = self._file.execute(query).fetchone()
            if row is None:
                return None
            self._file.execute("UPDATE cells SET state = 'taken', worker = ? WHERE key = ?", (self.worker, row[0]))
        return Cell.from_json(row[1])

    def _free_the_dead(self) -> None:
        for worker, host, pid, beat in self._file.execute("SELECT id, host, pid, beat FROM workers").fetchall():
            if worker == self.worker or _alive(host, pid, beat, self._silent_for(worker, beat)):
                continue
            query = "UPDATE cells SET state = 'open', worker = NULL WHERE worker = ? AND state = 'taken'"
            self._file.execute(query, (worker,))
            self._file.execute("DELETE FROM workers WHERE id = ?", (worker,))

    def _silent_for(self, worker: str, beat: float) -> float:
        """Seconds in which this worker has seen that other one not beat."""
        now = time.monotonic()
        if self._beats.get(worker, (None, 0.0))[0] != beat:
            self._beats[worker] = (beat, now)
        return now - self._beats[worker][1]

    def finish(self, cell: Cell, record: dict[str, Any], state: str = "done") -> bool:
        """Store a cell's record; False where it was not this worker's any more, and then nothing is stored."""
        with self._writing():
            changed = self._file.execute(
                "UPDATE cells SET state = ?, record = ?, finished = ? WHERE key = ? AND worker = ? AND state = 'taken'",
                (state, json.dumps(record), time.time(), cell.key, self.worker),
            )
            self._beat()
        return changed.rowcount == 1

    def reopen(self, keys: Iterable[str]) -> None:
        """Open these cells where they failed."""
        with self._writing():
            query = "UPDATE cells SET state = 'open', worker = NULL WHERE state = 'failed' AND key = ?"
            self._file.executemany(query, [(key,) for key in keys])

    def counts(self) -> dict[str, int]:
        """How many cells are in which state."""
        found = dict(self._file.execute("SELECT state, count(*) FROM cells GROUP BY state").fetchall())
        return {state: found.get(state, 0) for state in ("open", "taken", "done", "failed")}

    def left(self, by_gradient: bool) -> int:
        """How many cells of a sort are not finished."""
        query = "SELECT count(*) FROM cells WHERE state IN ('open', 'taken') AND by_gradient = ?"
        return self._one(query, (int(by_gradient),))

    def cells(self, group: str | None = None) -> list[tuple[Cell, str, dict[str, Any] | None]]:
        """The cells of a group, or all, in order, each with its state and its record."""
        where, values = ("", ()) if group is None else ("WHERE family = ?", (group,))
        query = f"SELECT cell, state, record FROM cells {where} ORDER BY place, key"
        rows = self._file.execute(query, values).fetchall()
        return [(Cell.from_json(cell), state, None if record is None else json.loads(record))
                for cell, state, record in rows]  # fmt: skip


def _alive(host: str, pid: int, beat: float, silent: float) -> bool:
    age = time.time() - beat
    if age > SURELY or (age > LEASE and silent > SILENCE):
        return False
    # On Windows signal 0 is no question.
    if host != socket.gethostname() or sys.platform == "win32":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
