"""Samples are kept in a file of their own, which the planner reads: ostler.planning.history."""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Both were kept at the same times: nothing is carried over."""
    op.drop_table("samples")
