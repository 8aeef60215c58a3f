"""The settings of `rankdecay vision`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiments.attention.settings import SCORE_CONTROLS, AttentionDecay, check_shared
from rankdecay.lab.settings import check_counts, check_width

FOLDER_SIZE, FOLDER_PATCH = 64, 8
DIGITS_PATCH = 2


@dataclass(frozen=True)
class Vision(AttentionDecay):
    """What does a decay of attention do to a vision transformer: rank of its attention against accuracy.

    Trains it under every arm and strength on scikit-learn's digits or your images, and shows accuracy beside the pseudo
    rank, the imbalance and the gap of both products. Leaves config.json, metrics.jsonl, summary.json and report.html in
    --out. Interrupted, the same command continues. The default takes at most a quarter of an hour on two slow cores.
    """

    further: ClassVar[tuple[str, ...]] = SCORE_CONTROLS

    arms: tuple[str, ...] = ("l2", "low_rank")
    """Decays of attention: l2, l2_query_key, low_rank, low_rank_both, the last two also with _absolute; or all. To be
    named: the controls uniform, frozen, frozen_large, with --library transformers."""
    library: Literal["transformers", "timm"] = "transformers"
    """Library whose vision transformer is trained; QK-norm needs timm, where it is a LayerNorm of each head."""
    image_folder: str | None = None
    """A folder with one sub-folder of images per class, in place of the digits."""
    image_size: int | None = None
    """Pixels a side that the images of --image-folder are scaled to, by default 64; the digits have 8."""
    grey: bool = False
    """Read the images of --image-folder in grey."""
    patch: int | None = None
    """Pixels a side of a patch, by default 8; for the digits 2."""
    valid_share: float = 0.2
    """Share of the images of each class to validate with."""
    width: int = 64
    """Width of the network."""
    depth: int = 3
    """Layers of the network."""
    heads: int = 4
    """Heads of each layer."""
    mlp_width: int = 128
    """Width of the MLP's hidden layer."""
    steps: int = 800
    lr: float = 2e-3
    warmup: int = 100
    batch_size: int = 128
    """Images per step, over all processes and accumulated parts."""
    evaluate_every: int = 100
    out: Path = Path("runs/vision")

    @property
    def size(self) -> int:
        """Pixels a side of an image."""
        from rankdecay.lab.tasks.images import DIGITS_SIZE

        return self.image_size or (DIGITS_SIZE if self.image_folder is None else FOLDER_SIZE)

    @property
    def patch_size(self) -> int:
        """Pixels a side of a patch."""
        return self.patch or (DIGITS_PATCH if self.image_folder is None else FOLDER_PATCH)


PRESETS = {"default": Vision(), "standard": Vision(preset="standard", steps=1000, out=Path("runs/vision-standard"))}
EXAMPLES = {
    "rankdecay vision --arms low_rank_both --steps 400": "one decay, half the training",
    "rankdecay vision --depth 2 --out runs/vision-shallow": "a shallower network, beside the first run",
}


def check(settings: Vision) -> Vision:
    """Return the settings; raise a `SettingError` for those that cannot work."""
    check_shared(settings)
    check_counts(settings, "width", "depth", "heads", "mlp_width")
    check_counts(settings, *(name for name in ("image_size", "patch") if getattr(settings, name) is not None))
    if settings.library == "transformers" and settings.qk_norm != "off":
        raise SettingError(
            f"--qk-norm {settings.qk_norm}: the vision transformer of transformers has no QK-norm: give --library timm"
        )
    controls = [name for name in settings.arms if name in SCORE_CONTROLS]
    if settings.library == "timm" and controls:
        raise SettingError(
            f"--arms {controls[0]}: in timm's vision transformer W_Q and W_K are one parameter with W_V, and cannot be "
            "kept from training by themselves: give --library transformers"
        )
    if settings.image_folder is None:
        for name, given in (("--image-size", settings.image_size is not None), ("--grey", settings.grey)):
            if given:
                raise SettingError(f"{name} is for --image-folder: the digits are 8 × 8 and grey; leave it out")
    if settings.size % settings.patch_size:
        raise SettingError(
            f"--patch {settings.patch_size} does not divide the image of {settings.size} pixels a side: give for "
            f"example --patch {next(p for p in (8, 4, 2, 1) if settings.size % p == 0)}"
        )
    if not 0 < settings.valid_share < 1:
        lacking = "train on" if settings.valid_share >= 1 else "validate with"
        raise SettingError(
            f"--valid-share {settings.valid_share:g} leaves no images to {lacking}: give a share in (0, 1) such as 0.2"
        )
    check_width(settings.width, settings.heads, example=16 * settings.heads)
    return settings
