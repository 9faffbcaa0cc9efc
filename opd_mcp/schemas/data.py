"""What was understood of a data set: its shape, the columns that are read, and the rows that cannot be used."""

from pydantic import Field

from opd_mcp.schemas.base import Schema


class SkippedRow(Schema):
    """A row that cannot be used."""

    place: str = Field(description="file and line, or file and row of a table, from 1")
    reason: str


class UnderstoodData(Schema):
    """How a data set was read."""

    shape: str = Field(description="e.g. 'question/answer'; 'columns' where the caller named them; docs/data.md")
    columns: dict[str, str] = Field(default_factory=dict, description="path of the field that each part is read from")
    unused: list[str] = Field(default_factory=list, description="fields that are not read")
    files: int = 1
    rows: int = Field(0, description="rows that can be used")
    skipped: int = Field(0, description="rows that cannot be used and are left out")
    skipped_by_reason: dict[str, int] = Field(default_factory=dict)
    skipped_rows: list[SkippedRow] = Field(default_factory=list, description="the first of them")
    notes: list[str] = Field(default_factory=list)

    @property
    def skipped_share(self) -> float:
        """Skipped rows as a share of all, from 0 to 1."""
        return self.skipped / max(self.rows + self.skipped, 1)
