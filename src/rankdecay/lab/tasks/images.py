"""Images and their classes: scikit-learn's handwritten digits, which need no download, or a folder of one's own.

All are held in memory as bytes, so a folder of 10 000 images at 64 × 64 in colour takes 120 MB.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rankdecay.lab.errors import SettingError
from rankdecay.lab.tasks.base import random_generator

DIGITS_SIZE = 8  # pixels a side
DIGITS_LEVELS = 16


@dataclass(frozen=True)
class Images:
    """Pictures of one size, each of a class.

    Attributes:
        pixels: uint8 array ``(images, channels, size, size)``.
        labels: int64 array ``(images,)``, below the number of classes.
        classes: the name of each class.
    """

    pixels: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    def at(self, indices: np.ndarray) -> "Images":
        """Select images by index."""
        return Images(self.pixels[indices], self.labels[indices], self.classes)


def handwritten_digits() -> Images:
    """The 1797 handwritten digits that come with scikit-learn, 8 × 8 in grey.

    Raises:
        SettingError: If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SettingError(
            f"the digits come with scikit-learn, which cannot be imported ({error}): pip install 'rankdecay[lab]', or "
            "give `image_folder`"
        ) from None
    data: Any = load_digits()  # sklearn's Bunch, which its annotations do not promise
    pixels = np.rint(data.images * (255 / DIGITS_LEVELS)).astype(np.uint8)[:, None]
    return Images(pixels, data.target.astype(np.int64), tuple(str(name) for name in data.target_names))


def image_folder(folder: Path, size: int, *, grey: bool = False) -> Images:
    """The images of a folder that has one sub-folder per class.

    Each is scaled until its shorter side fits and its middle is cut out. Hidden files are ignored; every other file
    must be an image, because one that was left out silently would be missed by nobody.

    Args:
        folder: with the sub-folders, whose names are those of the classes.
        size: width and height to bring the images to, in pixels.
        grey: one channel in place of three.

    Raises:
        SettingError: If there is no such folder, fewer than two classes, a class with fewer than two images, or a file
            that is no image.
    """
    if not folder.is_dir():
        raise SettingError(
            f"`image_folder` {folder} is not a folder: give one with a sub-folder of images for each class"
        )
    places = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(places) < 2:
        raise SettingError(
            f"`image_folder` {folder} has {len(places) or 'no'} sub-folder{'' if len(places) == 1 else 's'}: it needs "
            "at least two, one for each class, with the images of the class in it"
        )
    pixels, labels = [], []
    for label, place in enumerate(places):
        files = sorted(path for path in place.rglob("*") if path.is_file() and not path.name.startswith("."))
        if len(files) < 2:
            raise SettingError(
                f"`image_folder` {folder}: the class {place.name!r} has {len(files) or 'no'} "
                f"image{'' if len(files) == 1 else 's'}: it needs at least two, one to train on and one to validate "
                "with; add some or remove the sub-folder"
            )
        pixels += [_read(path, size, grey=grey) for path in files]
        labels += [label] * len(files)
    return Images(np.stack(pixels), np.array(labels, dtype=np.int64), tuple(place.name for place in places))


def _read(path: Path, size: int, *, grey: bool) -> np.ndarray:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):  # Pillow would cut their range off at 255
                raise SettingError(f"{path} has more than 8 bits per channel ({image.mode}): save it with 8")
            upright = ImageOps.exif_transpose(image).convert("L" if grey else "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, SettingError):
            raise
        raise SettingError(f"{path} cannot be read as an image ({error}): repair it, or remove it") from None
    fitted = np.asarray(ImageOps.fit(upright, (size, size), Image.Resampling.BICUBIC))
    return fitted.reshape(size, size, -1).transpose(2, 0, 1)  # (channels, size, size)


def split_images(images: Images, valid_share: float) -> tuple[Images, Images]:
    """Training and validation images: the same share of every class, and at least one of each class in both.

    Args:
        images: at least two of every class.
        valid_share: of the images to validate with, in (0, 1).
    """
    order = random_generator(0, "split images").permutation(len(images.labels))
    train, valid = [], []
    for label in range(len(images.classes)):
        ours = order[images.labels[order] == label]
        count = min(max(1, round(valid_share * len(ours))), len(ours) - 1)
        valid.append(ours[:count])
        train.append(ours[count:])
    return images.at(np.sort(np.concatenate(train))), images.at(np.sort(np.concatenate(valid)))
