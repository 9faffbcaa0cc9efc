"""Who wrote a lineage: `lineage.sig`, an HMAC over `lineage.json` with a secret that only its workspace has.

A lineage is *proven* where this workspace wrote it: the signature is there and right. Any other lineage is somebody's
word, *asserted*, even though its files fit it: anyone who can write a directory can write a lineage that fits.
"""

import hashlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from opd_mcp.identity.files import bounded_bytes, write_atomic
from opd_mcp.identity.lineage import LINEAGE_FILE, MAX_LINEAGE_BYTES

SIGNATURE_FILE = "lineage.sig"
MAX_SIGNATURE_BYTES = 256
# The key signs nothing else by this name.
PURPOSE = b"opd-mcp lineage 1\n"

MadeHere = Callable[[Path], bool]
"""Whether the caller wrote a directory's lineage, so that its claims count as proven."""


@dataclass(frozen=True)
class LineageKey:
    """A secret that signs lineages."""

    secret: bytes = field(repr=False)

    def sign(self, directory: Path) -> None:
        """Write the signature of a directory's lineage next to it; a directory without one gets none."""
        (directory / SIGNATURE_FILE).unlink(missing_ok=True)
        if (directory / LINEAGE_FILE).is_file():
            write_atomic(directory / SIGNATURE_FILE, self._signature(directory) + "\n")

    def signed(self, directory: Path) -> bool:
        """Whether this key signed the directory's lineage as it is now; raises as `bounded_bytes`."""
        file = directory / SIGNATURE_FILE
        if not file.is_file() or not (directory / LINEAGE_FILE).is_file():
            return False
        found = bounded_bytes(file, MAX_SIGNATURE_BYTES).strip()
        return hmac.compare_digest(found, self._signature(directory).encode())

    def _signature(self, directory: Path) -> str:
        content = bounded_bytes(directory / LINEAGE_FILE, MAX_LINEAGE_BYTES)
        return hmac.new(self.secret, PURPOSE + content, hashlib.sha256).hexdigest()


def everywhere(directory: Path) -> bool:
    """All lineages count as proven: for callers who named every directory themselves."""
    return True


def below(root: Path) -> MadeHere:
    """The lineages below a directory count as proven; for a caller that alone writes there."""
    resolved = root.resolve()
    return lambda directory: directory.resolve().is_relative_to(resolved)
