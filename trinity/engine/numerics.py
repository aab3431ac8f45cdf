"""All that the bits of an answer depend on besides the weights and the request, in words that clients compare.

Decisions: kernels of one format have the same bits on all processors and by all paths (docs/native.md), so none is named; a
GPU, or a model without the exact mode, is. Where replicas of an expert are of several formats, which of them computes a row
depends on the placement and on who is alive at that moment: such answers say that nobody can have them again.
"""

from dataclasses import dataclass

from trinity.config import EngineConfig, ModelConfig


@dataclass(frozen=True)
class Numerics:
    """`formats`: those that routed experts may have been computed in; `others`: the rest, as words."""

    formats: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: ModelConfig, settings: EngineConfig, device: str, formats: tuple[str, ...]) -> "Numerics":
        words = {
            f"backbone.{settings.weight_dtype}": settings.weight_dtype not in ("auto", model.dtype),
            f"cache.{settings.kv_cache_dtype}": settings.kv_cache_dtype != "auto",
            device: device != "cpu",
            "inexact": device == "cpu" and not model.batch_invariant,
        }
        own = () if formats == (model.dtype,) else (f"experts.{'+'.join(formats)}",)
        return cls(formats, (model.dtype, *own, *(word for word, holds in words.items() if holds)))

    @property
    def is_mixed(self) -> bool:
        return len(self.formats) > 1

    def fingerprint(self, version: int) -> str:
        """The `system_fingerprint` of an answer: of two that are equal the same bits follow for the same request, unless the
        answer says otherwise."""
        return "-".join(("weights", str(version), *self.others))

    @property
    def told(self) -> dict[str, object]:
        """Fields of an answer that several formats may have computed; of others there are none."""
        return {"weights_formats": list(self.formats), "reproducible": False} if self.is_mixed else {}
