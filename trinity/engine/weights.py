"""Sources of an engine's weights: a checkpoint that stays as it is, or a training run that goes on.

Decision: an engine asks before each pass and keeps no model between two, so that a source may write newer weights into the
tensors of the model that it gave last.
"""

from hashlib import sha256
from typing import TYPE_CHECKING, Protocol

from trinity.errors import VersionGone

if TYPE_CHECKING:
    from trinity.models.common.decoder import CausalLM


SAMPLED = 1000  # values of a tensor in a fingerprint, about


class WeightSource(Protocol):
    """Weights by version: the optimizer step after which they are, by the name that says its line, too
    (trinity/utils/lines.py). One thread, the engine's, calls it."""

    def newest(self) -> int:
        """The version that new passes should use: asked before every pass, so cheap; never raises.

        It may go down, or to another line: a version was quarantined, or the run went back.
        """
        ...

    def model(self, version: int) -> "CausalLM":
        """The backbone at that version, loaded when first asked for; its expert layer asks shards for exactly that version.

        Good until the next call. Raises VersionGone when nobody has that version any more. Whoever writes into its tensors
        does so with `load_state_dict` or `copy_`: packed copies of weights notice these, but no write through `.data`.
        """
        ...

    def hold(self, version: int) -> None:
        """Keep it, backbone and experts, until it was released as often as held: `model` will be asked for it after newer ones.

        Never raises: a version that has gone is `model`'s to report.
        """
        ...

    def release(self, version: int) -> None: ...

    def quarantine(self, version: int) -> None:
        """It gave logits that are not finite. `newest` names it no more, unless there is no other. Harmless when repeated."""
        ...


def fingerprint(model: "CausalLM") -> str:
    """Digest of values from all over the backbone: models that were trained apart have different ones."""
    found = sha256()
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()
        some = values[:: max(1, len(values) // SAMPLED)]
        found.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        found.update(some.float().cpu().numpy().tobytes())
    return found.hexdigest()


class FixedWeights:
    """One model at one version, for good: a checkpoint. Owns nothing."""

    def __init__(self, model: "CausalLM", version: int):
        self._model, self._version = model, version

    def newest(self) -> int:
        return self._version

    def model(self, version: int) -> "CausalLM":
        if version != self._version:
            raise VersionGone(f"version {version} of the weights is not here; these are of version {self._version}")
        return self._model

    def hold(self, version: int) -> None:
        pass

    def release(self, version: int) -> None:
        pass

    def quarantine(self, version: int) -> None:
        pass
