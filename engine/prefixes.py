"""What prompts share: a prefix common to all, longer ones in groups (five questions about one passage)."""

import os
from dataclasses import dataclass

from engine.decoding import Row

WORTH_A_FORWARD = 32  # tokens that joining a group must save: its prefix is read in a forward of its own


@dataclass(eq=False)  # two groups are never equal, so that a group can be the key of a dictionary
class PrefixGroup:
    """Rows that begin with the same `shared` tokens."""

    rows: list[Row]
    shared: int

    def saved(self, common: int) -> int:
        """How many tokens are not computed because all rows except the first reuse them.

        The `common` prefix of all groups does not count.
        """
        return (len(self.rows) - 1) * (self.shared - common)

    def with_row(self, row: Row) -> "PrefixGroup":
        alike = len(shared_prefix([self.rows[-1], row]))
        return PrefixGroup([*self.rows, row], min(self.shared, alike))

    def longest(self) -> int:
        return max(row.start for row in self.rows)


def shared_prefix(rows: list[Row]) -> list[int]:
    """The tokens with which all rows begin. Never a prompt's last token: its logits are needed."""
    alike = os.path.commonprefix([row.tokens for row in rows])  # works on any lists, not only on paths
    shortest = min(row.start for row in rows)
    return alike[: shortest - 1]


def group_by_prefix(rows: list[Row], common: int) -> list[PrefixGroup]:
    """All rows in groups, those with the longest rows first.

    Sorted by their tokens, rows that begin alike are neighbours. Each joins the group before it if that saves
    enough. A row that is alone in its group shares only the `common` prefix of all rows.
    """
    groups = []
    for row in sorted(rows, key=lambda row: row.tokens):
        if groups:
            larger = groups[-1].with_row(row)
            if larger.saved(common) >= groups[-1].saved(common) + WORTH_A_FORWARD:
                groups[-1] = larger
                continue
        groups.append(PrefixGroup([row], row.start - 1))

    for group in groups:
        if len(group.rows) == 1:
            group.shared = common
    return sorted(groups, key=PrefixGroup.longest, reverse=True)
