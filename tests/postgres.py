"""A PostgreSQL cluster of the tests' own: Debian's programs, a folder under /tmp, 127.0.0.1 and a free port."""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import sqlalchemy as sa

from storage.database import Database

# PATH may lack the folder of what is root's; nobody else needs it.
_RUNUSER = shutil.which("runuser", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") or "runuser"


def find_programs() -> Path | None:
    """Where Debian keeps initdb and pg_ctl, those of the newest version; or where PATH has them."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[4]))
    anywhere = shutil.which("initdb")
    return found[-1].parent if found else Path(anywhere).parent if anywhere else None


class Cluster:
    """One server; `create` gives the URL of a new database in it, migrated already."""

    def __init__(self, programs: Path) -> None:
        self._programs, self._count = programs, 0
        self._folder = Path(tempfile.mkdtemp(prefix="afterlog-postgres-"))
        self._as_user = [_RUNUSER, "-u", "postgres", "--"] if os.geteuid() == 0 else []
        if self._as_user:
            shutil.chown(self._folder, "postgres")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        (self._folder / "password").write_text("open sesame/@")
        (self._folder / "password").chmod(0o644)
        self._run(
            "initdb", "-U", "ann", "-A", "scram-sha-256", "--pwfile", str(self._folder / "password"), "-E", "UTF8",
            "--locale=C.UTF-8", "--no-sync",
        )  # fmt: skip
        atexit.register(self.stop)
        self.start()
        self.admin = sa.create_engine(self.url("postgres"), isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
        self._create("template", "template1")
        template = Database(self.url("template"), self._folder)
        self._folder.chmod(0o711)
        template.engine.dispose()

    def url(self, name: str) -> str:
        return f"postgresql+psycopg://ann:open%20sesame%2F%40@127.0.0.1:{self.port}/{name}"

    def create(self, template: str = "template") -> str:
        """The URL of a new database: a copy of another, to which nobody may be connected."""
        self._count += 1
        name = f"test_{self._count}"
        self._create(name, template)
        return self.url(name)

    def drop(self, url: str) -> None:
        with self.admin.connect() as connection:
            connection.exec_driver_sql(f"DROP DATABASE {sa.make_url(url).database} WITH (FORCE)")

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self._folder} -c shared_buffers=32MB"
        # The system outlives each test: what the server has written is there after a crash of it, also without an fsync.
        options += " -c fsync=off -c full_page_writes=off"
        self._run("pg_ctl", "-o", options, "-w", "-l", str(self._folder / "log"), "start")

    def stop(self, mode: str = "immediate") -> None:
        self._run("pg_ctl", "-w", "-m", mode, "stop")

    def restart(self) -> None:
        """What a crash of the server and its start again are to those who are connected."""
        self.stop()
        self.start()

    def remove(self) -> None:
        atexit.unregister(self.stop)
        self.stop()
        shutil.rmtree(self._folder)

    def _create(self, name: str, template: str) -> None:
        with self.admin.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {name} TEMPLATE {template}")

    def _run(self, program: str, *arguments: str) -> None:
        command = [*self._as_user, str(self._programs / program), "-D", str(self._folder / "data"), *arguments]
        with (self._folder / "out").open("ab") as output:  # a pipe would be kept open by the server
            done = subprocess.run(command, stdout=output, stderr=output, cwd="/", check=False)
        assert done.returncode == 0, (self._folder / "out").read_text()
