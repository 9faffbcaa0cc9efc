"""What whoever starts the server decides about it."""

from dataclasses import dataclass

from opd_mcp.schemas.redaction import NO_SECRETS_KNOWN, Redactor


@dataclass(frozen=True)
class ServerSettings:
    """`gpu_hours`: plans that take the device for longer are asked about; `allow_delete`: offer delete_artifact.

    `redactor` knows the secrets that no answer may hold and no request may bring into a record.
    """

    gpu_hours: float = 8.0
    allow_delete: bool = False
    redactor: Redactor = NO_SECRETS_KNOWN
