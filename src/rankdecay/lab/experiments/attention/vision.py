"""What a decay of attention does to a vision transformer: rank of its attention against accuracy.

The model is that of transformers, or timm's, built from its settings without a download, and trained from nothing on
scikit-learn's digits or a folder of images. Its dropout is off and its queries, keys and values have no biases, so that
a head is exactly its two products W_KᵀW_Q and W_O W_V. Only the decay of attention is varied, as in Section 4.3 of
Kobayashi, Akram and von Oswald, "Weight decay induces low-rank attention layers" (NeurIPS 2024), which shows ranks on
ImageNet and no accuracies.

Importing this module imports neither torch nor numpy: the command line reads its settings for ``--help``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiments.attention import experiment as attention_decay
from rankdecay.lab.experiments.attention.experiment import AttentionDecay, Experiment, Record, print_summary
from rankdecay.lab.legacy import check_counts, check_width

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from rankdecay.lab.session.session import Batch, Quality

__all__ = ["Vision", "print_summary", "run"]

CHUNK = 256  # validation images at a time
FOLDER_SIZE, FOLDER_PATCH = 64, 8
DIGITS_PATCH = 2


@dataclass(frozen=True)
class Vision(AttentionDecay):
    """What does a decay of attention do to a vision transformer: rank of its attention against accuracy.

    Trains it under every arm and strength on scikit-learn's digits or your images, and shows accuracy beside the pseudo
    rank, the imbalance and the gap of both products. Leaves config.json, metrics.jsonl, summary.json and report.html in
    --out. Interrupted, the same command continues. The default takes at most a quarter of an hour on two slow cores.
    """

    library: Literal["transformers", "timm"] = "transformers"
    """Whose vision transformer; QK-norm needs timm, whose it is a LayerNorm of each head."""
    image_folder: str | None = None
    """A folder with one sub-folder of images per class, in place of the digits."""
    image_size: int | None = None
    """Pixels a side that the images of --image-folder are brought to: 64; the digits have 8."""
    grey: bool = False
    """Read the images of --image-folder in grey."""
    patch: int | None = None
    """Pixels a side of a patch: 8; of the digits 2."""
    valid_share: float = 0.2
    """Share of the images of each class to validate with."""
    width: int = 64
    """Width of the network."""
    depth: int = 3
    """Its layers."""
    heads: int = 4
    """Heads of each layer."""
    mlp_width: int = 128
    """Width of the MLP's hidden layer."""
    steps: int = 800
    """Training steps of each run."""
    lr: float = 2e-3
    """Peak learning rate: a linear rise, then a cosine down to a tenth."""
    warmup: int = 100
    """Steps of the rise."""
    batch_size: int = 128
    """Images per step, over all processes and accumulated parts."""
    evaluate_every: int = 100
    """Steps between evaluations."""
    out: Path = Path("runs/vision")
    """Where results go; a run that was interrupted continues there."""

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


def check(settings: Vision) -> None:
    """Raises a `SettingError` for settings that cannot work, before anything is built or written."""
    check_counts(settings, "width", "depth", "heads", "mlp_width")
    check_counts(settings, *(name for name in ("image_size", "patch") if getattr(settings, name) is not None))
    if settings.library == "transformers" and settings.qk_norm != "off":
        raise SettingError(
            f"--qk-norm {settings.qk_norm}: the vision transformer of transformers has no QK-norm: give --library timm"
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


# --- the models ---


def transformers_model(settings: Vision, channels: int, classes: tuple[str, ...]) -> nn.Module:
    """The vision transformer of transformers, from the generator of torch.

    Raises:
        SettingError: if transformers is not installed.
    """
    try:
        from transformers import ViTConfig, ViTForImageClassification
    except ImportError as error:
        raise SettingError(
            f"--library transformers cannot be imported ({error}): pip install 'rankdecay[transformers]', or give "
            "--library timm"
        ) from None
    config = ViTConfig(
        hidden_size=settings.width,
        num_hidden_layers=settings.depth,
        num_attention_heads=settings.heads,
        intermediate_size=settings.mlp_width,
        image_size=settings.size,
        patch_size=settings.patch_size,
        num_channels=channels,
        qkv_bias=False,
        id2label=dict(enumerate(classes)),
        label2id={name: label for label, name in enumerate(classes)},
    )
    return ViTForImageClassification(config)


def timm_model(settings: Vision, channels: int, classes: tuple[str, ...], qk_norm: bool) -> nn.Module:
    """The vision transformer of timm, from the generator of torch.

    Raises:
        SettingError: if timm is not installed, or the torchvision that it needs does not fit torch.
    """
    try:
        from timm.models.vision_transformer import VisionTransformer  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError) as error:  # a torchvision built for another torch raises the latter
        raise SettingError(
            f"--library timm cannot be imported ({error}): pip install timm, with a torchvision built for your torch, "
            "or give --library transformers"
        ) from None
    return VisionTransformer(
        img_size=settings.size,
        patch_size=settings.patch_size,
        in_chans=channels,
        num_classes=len(classes),
        embed_dim=settings.width,
        depth=settings.depth,
        num_heads=settings.heads,
        mlp_ratio=settings.mlp_width / settings.width,
        qkv_bias=False,
        qk_norm=qk_norm,
    )


# --- what is learnt ---


class VisionProblem:
    """The classes of the images, as `lab.training` wants them.

    Args:
        settings: of the experiment.

    Raises:
        SettingError: if the images cannot be read.
    """

    unit = "images"

    def __init__(self, settings: Vision) -> None:
        import torch

        from rankdecay.lab.tasks.images import digits, image_folder, split_images

        self.settings = settings
        folder = settings.image_folder
        images = digits() if folder is None else image_folder(Path(folder), settings.size, grey=settings.grey)
        self.train, self.valid = split_images(images, settings.valid_share)
        pixels = torch.from_numpy(self.train.pixels)
        self._mean = pixels.float().mean((0, 2, 3)).view(-1, 1, 1)  # (channels, 1, 1)
        # of pixels that are all alike the spread would be 0
        self._spread = pixels.float().std((0, 2, 3)).clamp_min(1.0).view(-1, 1, 1)
        self._order: tuple[tuple[int, int], np.ndarray] | None = None  # of the epoch drawn last

    def facts(self) -> Record:
        """What the summary says of the images."""
        count = {"train_images": len(self.train.labels), "valid_images": len(self.valid.labels)}
        return {**count, "classes": list(self.train.classes)}

    def model(self, seed: int, qk_norm: bool) -> nn.Module:
        """A fresh network; the libraries draw its weights from the generator of torch, which is put back."""
        import torch

        channels = self.train.pixels.shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if self.settings.library == "timm":
                return timm_model(self.settings, channels, self.train.classes, qk_norm)
            return transformers_model(self.settings, channels, self.train.classes)

    def batch(self, seed: int, step: int, size: int) -> Batch:
        """The next images of an epoch, in an order of its own; a batch may reach into the next epoch."""
        import numpy as np
        import torch

        places = np.arange(step * size, (step + 1) * size)
        epochs, within = np.divmod(places, len(self.train.labels))
        chosen = np.concatenate(
            [self._permutation(seed, epoch)[within[epochs == epoch]] for epoch in np.unique(epochs)]
        )
        return torch.from_numpy(self.train.pixels[chosen]), torch.from_numpy(self.train.labels[chosen])

    def _permutation(self, seed: int, epoch: int) -> np.ndarray:
        from rankdecay.lab.tasks.base import random_generator

        if self._order is None or self._order[0] != (seed, epoch):
            self._order = (seed, epoch), random_generator(seed, "epoch", int(epoch)).permutation(len(self.train.labels))
        return self._order[1]

    def size(self, batch: Batch) -> int:
        """How many images a batch has."""
        return len(batch[0])

    def logits(self, model: nn.Module, pixels: Tensor) -> Tensor:
        """``(images, classes)``, of images as bytes."""
        normed = (pixels.float() - self._mean.to(pixels.device)) / self._spread.to(pixels.device)
        found = model(normed)
        return (found if self.settings.library == "timm" else found.logits).float()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy of the class."""
        from torch.nn import functional as F

        return F.cross_entropy(self.logits(model, batch[0]), batch[1])

    def evaluate(self, model: nn.Module, device: str) -> Quality:
        """Loss, its standard error over images, and accuracy."""
        import torch
        from torch.nn import functional as F

        from rankdecay.lab.session.session import judged

        losses, right = [], 0
        whole = torch.from_numpy(self.valid.pixels), torch.from_numpy(self.valid.labels)
        for pixels, labels in zip(*(part.split(CHUNK) for part in whole), strict=True):
            logits, labels = self.logits(model, pixels.to(device)), labels.to(device)
            losses += F.cross_entropy(logits, labels, reduction="none").tolist()
            right += int((logits.argmax(-1) == labels).sum())
        return judged(losses, right / len(losses))


def run(settings: Vision, command: str) -> Record:
    """Runs the experiment, or continues it, and returns its summary.

    Args:
        settings: what to run.
        command: how to repeat it, for the report.

    Raises:
        SettingError: if the settings, the images or the output directory cannot work, or a run diverges.
    """
    check(settings)
    timm = settings.library == "timm"
    experiment = Experiment(
        "vision",
        lambda: VisionProblem(settings),
        save=_save_timm if timm else _save_transformers,
        facts=VisionProblem.facts,
    )
    return attention_decay.run(settings, experiment, command)


def _save_transformers(model: nn.Module, directory: Path) -> None:
    model.save_pretrained(directory)  # pyright: ignore[reportCallIssue]


def _save_timm(model: nn.Module, directory: Path) -> None:
    from safetensors.torch import save_file

    save_file(model.state_dict(), directory / "model.safetensors")
