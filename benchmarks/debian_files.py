"""Read files out of Debian packages and of Qt resource containers; nothing is installed."""

from __future__ import annotations

import hashlib
import re
import shutil
import struct
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MAX_MEMBER_BYTES = 64 * 2**20
_URI = re.compile(r"'(?P<uri>[^']*)' (?P<file>\S+) (?P<size>\d+) (?P<kind>SHA256|SHA512):(?P<digest>[0-9a-f]+)\s*")


class FetchError(RuntimeError):
    """A package that cannot be had; the message says why and what to do."""


@dataclass(frozen=True)
class Package:
    """A downloaded Debian package whose size and digest are those that apt gives.

    Attributes:
        name: the package's name.
        version: its Debian version.
        digest: as ``SHA256:...`` or ``SHA512:...``.
        path: the .deb file.
    """

    name: str
    version: str
    digest: str
    path: Path

    def files(self, wanted: Callable[[str], bool]) -> dict[str, bytes]:
        """Return the regular files whose path in the package (``usr/share/...``) is wanted, by that path.

        Nothing is written, so no path in the package leads anywhere.

        Raises:
            FetchError: the package cannot be unpacked, or a wanted file is over 64 MiB.
        """
        found: dict[str, bytes] = {}
        command = ["dpkg-deb", "--fsys-tarfile", str(self.path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as unpacking:
            assert unpacking.stdout is not None
            try:
                with tarfile.open(fileobj=unpacking.stdout, mode="r|") as archive:
                    for member in archive:
                        name = member.name.removeprefix("./")
                        if not member.isfile() or not wanted(name):
                            continue
                        if member.size > MAX_MEMBER_BYTES:
                            raise FetchError(f"{name} has {member.size:,} bytes, at most {MAX_MEMBER_BYTES:,} are read")
                        content = archive.extractfile(member)
                        assert content is not None
                        found[name] = content.read()
            except tarfile.TarError as error:
                raise FetchError(f"{self.path} cannot be unpacked: {error}") from error
            while unpacking.stdout.read(2**20):  # padding, without which dpkg-deb would end by a broken pipe
                pass
        if unpacking.returncode:
            raise FetchError(f"{self.path} cannot be unpacked: dpkg-deb ended with {unpacking.returncode}")
        return found


def download(name: str, folder: Path) -> Package:
    """Return a package of this machine's Debian or Ubuntu release, downloaded into ``folder`` unless it is there whole.

    Raises:
        FetchError: no apt-get or dpkg-deb, a package unknown to apt, no network, or another size or digest than apt's.
    """
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise FetchError(f"{tool} is needed: run this on Debian or Ubuntu, or in a container of theirs")
    asked = _run(["apt-get", "--print-uris", "-qq", "download", name])
    match = _URI.fullmatch(asked.stdout)
    if asked.returncode or match is None:
        reason = _last_line(asked.stderr) or f"apt-get gave no address with a digest: {asked.stdout.strip()[:200]!r}"
        raise FetchError(f"{name} is not to be had: {reason} (run `apt-get update` first)")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / Path(match["file"]).name
    if not path.is_file() or _problem(path, match) is not None:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as scratch:
            got = _run(["apt-get", "-q", "download", name], scratch)
            fresh = Path(scratch, path.name)
            if got.returncode or not fresh.is_file():
                reason = _last_line(got.stderr) or "apt-get wrote no file"
                raise FetchError(f"{name} could not be downloaded: {reason} (is there a network?)")
            if (problem := _problem(fresh, match)) is not None:
                raise FetchError(f"{name} as downloaded has {problem}")
            fresh.replace(path)
    version = _run(["dpkg-deb", "--field", str(path), "Version"]).stdout.strip()
    return Package(name, version, f"{match['kind']}:{match['digest']}", path)


def _run(command: list[str], folder: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)


def _last_line(text: str) -> str:
    """Return apt's last error, or what it said last."""
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("E:")]
    return (errors or lines or [""])[-1].strip()


def _problem(path: Path, expected: re.Match[str]) -> str | None:
    """Return how the file differs from what apt gives, None if it does not."""
    if path.stat().st_size != int(expected["size"]):
        return f"{path.stat().st_size:,} bytes, expected {int(expected['size']):,}"
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, expected["kind"].lower()).hexdigest()
    return None if digest == expected["digest"] else f"{expected['kind']} {digest}, expected {expected['digest']}"


@dataclass(frozen=True)
class RccFile:
    """A Qt resource container (big-endian: header, tree of fixed-size entries, data blocks, names)."""

    blob: bytes
    version: int
    tree: int
    data: int
    names: int

    @classmethod
    def open(cls, path: Path) -> RccFile:
        return cls.parse(path.read_bytes(), str(path))

    @classmethod
    def parse(cls, blob: bytes, name: str) -> RccFile:
        if blob[:4] != b"qres":
            raise ValueError(f"{name} is not a Qt resource container")
        return cls(blob, *struct.unpack_from(">4I", blob, 4))

    def members(self, node: int = 0, folder: str = "") -> dict[str, int]:
        """Return the tree position of every file by its path."""
        found: dict[str, int] = {}
        at = self._entry(node)
        _, _, count, first = struct.unpack_from(">IHII", self.blob, at)
        for child in range(first, first + count):
            name_at, flags = struct.unpack_from(">IH", self.blob, self._entry(child))
            path = folder + self._name(name_at)
            if flags & 2:
                found |= self.members(child, f"{path}/")
            else:
                found[path] = child
        return found

    def read(self, node: int) -> bytes:
        """Return one file's bytes, decompressed."""
        _, flags, _, _, offset = struct.unpack_from(">IHHHI", self.blob, self._entry(node))
        at = self.data + offset
        (length,) = struct.unpack_from(">I", self.blob, at)
        raw = self.blob[at + 4 : at + 4 + length]
        if flags & 1:
            return zlib.decompress(raw[4:])
        if flags & 4:
            try:
                import zstandard
            except ModuleNotFoundError as error:
                raise FetchError("zstandard is needed to read this package: pip install zstandard") from error
            return zstandard.ZstdDecompressor().decompress(raw, max_output_size=MAX_MEMBER_BYTES)
        return raw

    def _entry(self, node: int) -> int:
        return self.tree + node * (22 if self.version >= 2 else 14)

    def _name(self, offset: int) -> str:
        (length,) = struct.unpack_from(">H", self.blob, self.names + offset)
        start = self.names + offset + 6  # length and hash come before the characters
        return self.blob[start : start + 2 * length].decode("utf-16-be")
