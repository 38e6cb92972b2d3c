"""New versions of a checkpoint, tried on a share of the requests and made the default, or not, while a server runs.

`table` is what is decided and who gets what: it loads no torch. `live` is what a server makes of it.
"""

from diffuserve.rollout.table import Alias, RolloutTable, change_table, parse_weights, read_table

__all__ = ["Alias", "RolloutTable", "change_table", "parse_weights", "read_table"]
