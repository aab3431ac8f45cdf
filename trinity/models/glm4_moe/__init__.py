"""GLM-4-MoE: Z.ai's GLM-4.5, GLM-4.5-Air and their kin."""
