"""Decay of attention in a vision transformer: rank of its attention against accuracy.

The model is that of transformers, or timm's, built from its settings without a download, and trained from nothing on
scikit-learn's digits or a folder of images. Its dropout is off and its queries, keys and values have no biases, so that
a head is exactly its two products W_KᵀW_Q and W_O W_V. Only the decay of attention is varied, as in Section 4.3 of
Kobayashi, Akram and von Oswald, "Weight decay induces low-rank attention layers" (NeurIPS 2024), which shows ranks on
ImageNet and no accuracies.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rankdecay as rd
from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiments.attention.runs import Command, make_experiment
from rankdecay.lab.experiments.attention.vision.settings import PRESETS, Vision, check
from rankdecay.lab.session.gpt import Scores, control_scores
from rankdecay.lab.session.session import Batch, Quality, summarise_losses
from rankdecay.lab.settings import Record
from rankdecay.lab.tasks.base import random_generator
from rankdecay.lab.tasks.images import handwritten_digits, image_folder, split_images

CHUNK = 256  # validation images at a time
INITIAL = 0.02  # standard deviation of the matrices of the network of transformers, as drawn


# --- the models ---


def transformers_model(settings: Vision, channels: int, classes: tuple[str, ...]) -> nn.Module:
    """The vision transformer of transformers, with weights from torch's global generator.

    Raises:
        SettingError: If transformers is not installed.
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
        initializer_range=INITIAL,
        id2label=dict(enumerate(classes)),
        label2id={name: label for label, name in enumerate(classes)},
    )
    return ViTForImageClassification(config)


def timm_model(settings: Vision, channels: int, classes: tuple[str, ...], qk_norm: bool) -> nn.Module:
    """The vision transformer of timm, with weights from torch's global generator.

    Raises:
        SettingError: If timm is not installed, or the torchvision that it needs does not fit torch.
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
    """Classification of the images.

    Args:
        settings: of the experiment.

    Raises:
        SettingError: If the images cannot be read.
    """

    unit = "images"

    def __init__(self, settings: Vision) -> None:
        self.settings = settings
        folder = settings.image_folder
        images = (
            handwritten_digits() if folder is None else image_folder(Path(folder), settings.size, grey=settings.grey)
        )
        self.train, self.valid = split_images(images, settings.valid_share)
        pixels = torch.from_numpy(self.train.pixels)
        self._mean = pixels.float().mean((0, 2, 3)).view(-1, 1, 1)  # (channels, 1, 1)
        # at least 1, because the spread of equal pixels is 0
        self._spread = pixels.float().std((0, 2, 3)).clamp_min(1.0).view(-1, 1, 1)

    def facts(self) -> Record:
        """Facts about the images, for the summary."""
        count = {"train_images": len(self.train.labels), "valid_images": len(self.valid.labels)}
        return {**count, "classes": list(self.train.classes)}

    def model(self, seed: int, qk_norm: bool, scores: Scores = "learned") -> nn.Module:
        """Return a fresh network; the libraries draw its weights from torch's global generator, which is restored.

        Args:
            seed: of the weights.
            qk_norm: whether it has a norm of queries and keys.
            scores: what attention scores come from, a control of `SCORE_CONTROLS` or ``"learned"``.
        """
        channels = self.train.pixels.shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if self.settings.library == "timm":
                return timm_model(self.settings, channels, self.train.classes, qk_norm)
            model = transformers_model(self.settings, channels, self.train.classes)
        if scores != "learned":
            layers, parameters = rd.find_attention(model), dict(model.named_parameters())
            matrices = [parameters[view.parameter_name] for layer in layers for view in (layer.query, layer.key)]
            control_scores(matrices, scores, self.settings.width, INITIAL)
        return model

    def batch(self, seed: int, step: int, size: int) -> Batch:
        """Take the next images of an epoch in random order; a batch may reach into the next epoch."""
        places = np.arange(step * size, (step + 1) * size)
        epochs, within = np.divmod(places, len(self.train.labels))
        orders = {epoch: _order(seed, epoch, len(self.train.labels)) for epoch in np.unique(epochs).tolist()}
        chosen = np.concatenate([order[within[epochs == epoch]] for epoch, order in orders.items()])
        return torch.from_numpy(self.train.pixels[chosen]), torch.from_numpy(self.train.labels[chosen])

    def size(self, batch: Batch) -> int:
        """Count the images of a batch."""
        return len(batch[0])

    def logits(self, model: nn.Module, pixels: Tensor) -> Tensor:
        """Logits ``(images, classes)`` of images as bytes."""
        normed = (pixels.float() - self._mean.to(pixels.device)) / self._spread.to(pixels.device)
        found = model(normed)
        return (found if self.settings.library == "timm" else found.logits).float()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy of the class."""
        return F.cross_entropy(self.logits(model, batch[0]), batch[1])

    def evaluate(self, model: nn.Module, device: str) -> Quality:
        """Loss, its standard error over images, and accuracy."""
        losses, right = [], 0
        whole = torch.from_numpy(self.valid.pixels), torch.from_numpy(self.valid.labels)
        for pixels, labels in zip(*(part.split(CHUNK) for part in whole), strict=True):
            logits, labels = self.logits(model, pixels.to(device)), labels.to(device)
            losses += F.cross_entropy(logits, labels, reduction="none").tolist()
            right += int((logits.argmax(-1) == labels).sum())
        return summarise_losses(losses, right / len(losses))


@lru_cache(maxsize=2)  # a batch may reach into the next epoch
def _order(seed: int, epoch: int, images: int) -> np.ndarray:
    return random_generator(seed, "epoch", epoch).permutation(images)


def save_model(model: nn.Module, directory: Path) -> None:
    """Write a model as its library reads it: transformers has a method for it, timm a file of tensors."""
    if hasattr(model, "save_pretrained"):
        from transformers.utils import logging

        was_shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # a bar of its own for one small file
        try:
            model.save_pretrained(directory)  # pyright: ignore[reportCallIssue]
        finally:
            if was_shown:
                logging.enable_progress_bar()
    else:
        from safetensors.torch import save_file

        save_file(model.state_dict(), directory / "model.safetensors")


EXPERIMENT = make_experiment(
    Command("vision", PRESETS, check, VisionProblem, "images", save=save_model, facts=VisionProblem.facts)
)
