"""Images: the digits, folders of one's own, and a split that leaks nothing."""

import numpy as np
import pytest
from PIL import Image

from rankdecay.lab.errors import SettingError
from rankdecay.lab.tasks.images import Images, handwritten_digits, image_folder, split_images


def write(path, size=(12, 12), colour=(200, 30, 90), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path)


@pytest.fixture
def folder(tmp_path):
    for name, colour in (("cat", (255, 0, 0)), ("dog", (0, 0, 255))):
        for i in range(3):
            write(tmp_path / "images" / name / f"{i}.png", colour=colour)
    return tmp_path / "images"


def test_the_digits():
    images = handwritten_digits()
    assert images.pixels.shape == (1797, 1, 8, 8)
    assert images.pixels.dtype == np.uint8
    assert (images.pixels.min(), images.pixels.max()) == (0, 255)
    assert images.classes == tuple("0123456789")
    assert np.bincount(images.labels).min() > 170


def test_a_folder_has_a_class_per_sub_folder(folder):
    images = image_folder(folder, 8)
    assert images.pixels.shape == (6, 3, 8, 8)
    assert images.classes == ("cat", "dog")
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert (images.pixels[0, 0] == 255).all()
    assert (images.pixels[0, 1:] == 0).all()
    assert (images.pixels[-1, 2] == 255).all()


def test_a_folder_in_grey(folder):
    images = image_folder(folder, 8, grey=True)
    assert images.pixels.shape == (6, 1, 8, 8)
    assert images.pixels[0].max() == 76  # the luminance of red


@pytest.mark.parametrize(
    ("suffix", "mode"), [("png", "RGBA"), ("png", "P"), ("png", "L"), ("jpg", "L"), ("bmp", "RGB")]
)
def test_every_kind_of_image_gets_the_same_channels(folder, suffix, mode):
    write(folder / "cat" / f"another.{suffix}", mode=mode)
    assert image_folder(folder, 8).pixels.shape == (7, 3, 8, 8)


def test_an_image_that_is_not_square_keeps_its_middle(folder):
    whole = np.zeros((10, 30, 3), np.uint8)
    whole[:, 10:20] = 255
    Image.fromarray(whole).save(folder / "cat" / "0.png")
    assert (image_folder(folder, 10).pixels[0] == 255).all()


def test_a_photograph_is_turned_upright(folder):
    whole = np.zeros((8, 8, 3), np.uint8)
    whole[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(whole).save(folder / "cat" / "0.png", exif=exif)
    pixels = image_folder(folder, 8).pixels[0]
    assert (pixels[:, :4] == 0).all()
    assert (pixels[:, 4:] == 255).all()


def test_hidden_files_and_deeper_folders(folder):
    (folder / "cat" / ".DS_Store").write_bytes(b"x")
    (folder / ".thumbnails").mkdir()
    write(folder / "dog" / "puppies" / "4.png")
    assert np.bincount(image_folder(folder, 8).labels).tolist() == [3, 4]


# --- what it refuses ---


def test_no_such_folder(tmp_path):
    with pytest.raises(SettingError, match=r"is not a folder: give one with a sub-folder of images for each class"):
        image_folder(tmp_path / "missing", 8)


def test_an_empty_folder(tmp_path):
    with pytest.raises(SettingError, match="has no sub-folders: it needs at least two, one for each class"):
        image_folder(tmp_path, 8)


def test_one_class(tmp_path):
    write(tmp_path / "cat" / "0.png")
    with pytest.raises(SettingError, match="has 1 sub-folder: it needs at least two"):
        image_folder(tmp_path, 8)


@pytest.mark.parametrize(("count", "said"), [(0, "has no images"), (1, "has 1 image:")])
def test_a_class_that_cannot_be_split(folder, count, said):
    (folder / "emu").mkdir()
    for i in range(count):
        write(folder / "emu" / f"{i}.png")
    with pytest.raises(SettingError, match=f"class 'emu' {said}"):
        image_folder(folder, 8)


def test_a_file_that_is_no_image(folder):
    (folder / "cat" / "notes.txt").write_text("not an image")
    with pytest.raises(SettingError, match=r"notes\.txt cannot be read as an image .* repair it, or remove it"):
        image_folder(folder, 8)


def test_an_image_that_was_cut_short(folder):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "cat" / "0.png")
    data = (folder / "cat" / "0.png").read_bytes()
    (folder / "cat" / "0.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(SettingError, match=r"0\.png cannot be read as an image"):
        image_folder(folder, 8)


def test_sixteen_bits(folder):
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(folder / "cat" / "0.png")
    with pytest.raises(SettingError, match=r"0\.png has more than 8 bits per channel .* save it with 8"):
        image_folder(folder, 8)


# --- the split ---


def numbered(counts):
    labels = np.repeat(np.arange(len(counts)), counts)
    pixels = np.arange(len(labels), dtype=np.uint8).reshape(-1, 1, 1, 1)
    return Images(pixels, labels, tuple("abc"[: len(counts)]))


def test_the_split_takes_the_same_share_of_every_class():
    train, valid = split_images(numbered([100, 50, 10]), 0.2)
    assert np.bincount(valid.labels).tolist() == [20, 10, 2]
    assert np.bincount(train.labels).tolist() == [80, 40, 8]
    assert sorted([*train.pixels.ravel().tolist(), *valid.pixels.ravel().tolist()]) == list(range(160))
    assert valid.pixels.ravel().tolist() != [*range(20), *range(100, 110), *range(150, 152)]


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_every_class_is_on_both_sides(share):
    for part in split_images(numbered([40, 2]), share):
        assert set(part.labels.tolist()) == {0, 1}


def test_the_split_is_always_the_same():
    for a, b in zip(split_images(numbered([30, 20]), 0.3), split_images(numbered([30, 20]), 0.3), strict=True):
        assert (a.pixels == b.pixels).all()
