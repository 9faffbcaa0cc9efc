"""What whoever starts the server decides about it."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ServerSettings:
    """`gpu_hours`: plans that take the device for longer are asked about; `allow_delete`: offer delete_artifact.

    `secrets` are in no answer.
    """

    gpu_hours: float = 8.0
    allow_delete: bool = False
    secrets: tuple[str, ...] = field(default=(), repr=False)
