"""Names of the tensors in a GLM-4-MoE checkpoint."""

from trinity.models.common.keys import ROLES, KeyMap, Rename

KEYS = KeyMap(
    renames=(
        Rename(r"\.pre\.router\.bias_E$", ".mlp.gate.e_score_correction_bias"),
        Rename(r"\.pre\.router\.gate\.", ".mlp.gate."),
        Rename(r"\.pre\.", "."),
        Rename(r"\.shared\.", ".mlp.shared_experts."),
        Rename(r"\.dense\.", ".mlp."),
    ),
    roles=ROLES,
)
