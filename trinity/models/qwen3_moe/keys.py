"""Names of the tensors in a Qwen3-MoE checkpoint."""

from trinity.models.common.keys import ROLES, KeyMap, Rename

KEYS = KeyMap(
    renames=(
        Rename(r"\.pre\.router\.gate\.", ".mlp.gate."),
        Rename(r"\.pre\.", "."),
        Rename(r"\.dense\.", ".mlp."),
    ),
    roles=ROLES,
)
