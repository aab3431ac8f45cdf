"""The settings of what is learned from: preferences."""

from pydantic import Field

from trinity.config.yaml import Frozen


class PreferenceConfig(Frozen):
    """Settings of learning from answers, with data.format pairs or labels (formulas: trinity/rl/preferences.py)."""

    beta: float = Field(default=0.1, gt=0, description="how far the model may go from the weights that it begins with")
    nll: float = Field(default=0.0, ge=0, description="share of the preferred answers' own loss, of pairs")
    length_normalized: bool = Field(
        default=False, description="compare means over an answer's tokens, not sums; with a beta of about 5"
    )
    desirable_weight: float = Field(default=1.0, gt=0, description="of wanted answers, with labels")
    undesirable_weight: float = Field(default=1.0, gt=0, description="of unwanted ones")
