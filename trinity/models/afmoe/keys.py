"""Names of the tensors in an AFMoE checkpoint."""

from trinity.models.common.keys import ROLES, KeyMap, Rename

KEYS = KeyMap(
    renames=(
        Rename(r"\.pre\.router\.bias_E$", ".mlp.expert_bias"),
        Rename(r"\.pre\.router\.", ".mlp.router."),
        Rename(r"\.(pre|post)\.", "."),
        Rename(r"\.shared\.", ".mlp.shared_experts."),
        Rename(r"\.dense\.", ".mlp."),
    ),
    roles=ROLES,
)
