"""The settings of ``data.``: which images, and what is done to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional, Tuple, Union

from ..errors import ConfigError
from .settings import Checked, setting

PICTURES = ("folder", "records")  # encoded pictures of any size, decoded as they are needed

# Of the pictures in ImageNet, over red, green and blue, as all model zoos use them.
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# One number for all channels, or one for each.
PerChannel = Union[float, Tuple[float, ...]]


@dataclass(frozen=True)
class Data(Checked, section="data."):
    """The images and their preprocessing."""

    dataset: str = setting(
        "fashion_mnist",
        "fashion_mnist; fashion_mnist_sample (2,000 + 500 of its images, in the repository); idx "
        "(any dataset in four IDX files under MNIST's or EMNIST's names, in data.folder; those of "
        "the test set may be missing); folder (pictures in data.folder/train/CLASS and "
        "test/CLASS, or in data.folder/CLASS); records (train.rec, train_*.rec or *_train.rec in "
        "data.folder, and test likewise, with .idx, as MXNet's im2rec makes them); arrays (set by "
        "fit when given train=)",
        choices=("fashion_mnist", "fashion_mnist_sample", "idx", "folder", "records", "arrays"),
    )
    folder: Optional[str] = setting(
        None,
        "folder of the set (~ and ${VARIABLE} are expanded); null: Fashion-MNIST's usual places",
        path=True,
    )
    class_names: Optional[str] = setting(
        None,
        "file that names a class in each line; null: folders' names, or as the set does",
        path=True,
    )
    validation: float = setting(
        0.0,
        "share of the training set that is kept out of training, alike in all classes and drawn "
        "from the seed: it is evaluated after each epoch, chooses the best checkpoint and stops "
        "early, and the test set is evaluated once, at the end. 0: no share; folders and records "
        "may hold a set `val` of their own, and fit takes validation=",
        minimum=0,
        below=1,
    )
    bad_samples: str = setting(
        "stop",
        "action at a picture that cannot be read: stop the run and name it; or skip: name it, and "
        "train on the next one in its place (an evaluation leaves it out)",
        choices=("stop", "skip"),
    )
    image_size: Optional[int] = setting(
        None, "side in pixels that images are resized to (bilinear); null: not resized", minimum=1
    )
    channels: int = setting(
        3, "folder, records: channels of pictures, 3 in colour, 1 in grey", choices=(1, 3)
    )
    resize: Optional[int] = setting(
        None,
        "folder, records: pixels of the shorter side, before the middle is cut out; null: "
        "image_size / 0.875",
        minimum=1,
    )
    random_crop: bool = setting(
        False,
        "folder, records, training: a random part of crop_area (a share of the picture) and an "
        "aspect of 3/4 to 4/3 instead of the middle",
    )
    crop_area: Tuple[float, ...] = setting(
        (0.08, 1.0), "smallest and largest share for random_crop", maximum=1, above=0
    )
    pad_crop: int = setting(
        0,
        "training: pixels of padding on each side (before resizing; of pictures, after), out of "
        "which images are cropped at random",
        minimum=0,
    )
    flip: bool = setting(False, "training: horizontal mirroring of half of the images")
    color_jitter: float = setting(
        0.0,
        "folder, records, training: largest change of brightness, contrast, saturation, as a share",
        minimum=0,
        maximum=1,
    )
    erase: float = setting(
        0.0, "training: share of images with a random rectangle blanked", minimum=0, maximum=1
    )
    trivial_augment: bool = setting(
        False,
        "training: TrivialAugment, one of 14 operations (rotate, shear, equalize, ...) of random "
        "strength on each image, grey or in colour",
    )
    mixup: float = setting(
        0.0,
        "training: mixture of each image and its loss with those of another of the global batch, "
        "by a share drawn from Beta(mixup, mixup); 0: none",
        minimum=0,
    )
    cutmix: float = setting(
        0.0,
        "training: the same by a rectangle of the other image, its area from Beta(cutmix, cutmix); "
        "with both, either for each image",
        minimum=0,
    )
    mean: PerChannel = setting(
        0.2860,
        "mean, subtracted from pixels scaled to 0..1: one number, or one for each channel, or "
        "imagenet; Fashion-MNIST's by default",
        named={"imagenet": _IMAGENET_MEAN},
    )
    std: PerChannel = setting(
        0.3530,
        "standard deviation, by which pixels are divided; as for data.mean",
        above=0,
        named={"imagenet": _IMAGENET_STD},
    )
    workers: Optional[int] = setting(
        None,
        "threads that decode pictures, and processes that read a dataset given to fit; null: as "
        "many as the rank has cores; 0: the background thread decodes, and one process reads",
        minimum=0,
    )
    prefetch: int = setting(4, "batches prepared ahead by the background thread", minimum=1)

    @property
    def of_pictures(self) -> bool:
        """Whether samples are encoded pictures of any size."""
        return self.dataset in PICTURES

    @property
    def mean_text(self) -> str:
        """``mean`` for people: 0.286, or 0.485, 0.456, 0.406."""
        return _text(self.mean)

    @property
    def std_text(self) -> str:
        """``std`` for people."""
        return _text(self.std)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataset in ("idx", *PICTURES) and self.folder is None:
            raise ConfigError(f"data.dataset is {self.dataset}; data.folder must say where it is")
        if self.of_pictures and self.image_size is None:
            raise ConfigError(
                f"data.dataset is {self.dataset}; pictures have many sizes: data.image_size must "
                "say which one the net takes, e.g. 224"
            )
        if self.of_pictures and self.resize is not None and self.resize < (self.image_size or 0):
            raise ConfigError(
                f"data.resize is {self.resize}; it must be at least data.image_size, "
                f"{self.image_size}, which is cut out of it"
            )
        if len(self.crop_area) != 2 or self.crop_area[0] > self.crop_area[1]:
            raise ConfigError(
                f"data.crop_area is {list(self.crop_area)}; it must be two shares that rise, "
                "e.g. [0.25, 1]"
            )
        lengths = {len(value) for value in (self.mean, self.std) if isinstance(value, tuple)}
        both = f"data.mean is {self.mean_text} and data.std {self.std_text}"
        if len(lengths) > 1 or 0 in lengths:
            raise ConfigError(f"{both}; give one number for each channel, or one for all")
        if max(_numbers(self.mean), default=0) > 1:
            raise ConfigError(f"{both}; pixels are scaled to 0..1 first: divide both by 255")
        if self.of_pictures and lengths and lengths != {self.channels}:
            raise ConfigError(
                f"{both}; pictures are read in {self.channels} channels (data.channels)"
            )


def _numbers(value: PerChannel) -> Tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)


def _text(value: PerChannel) -> str:
    return ", ".join(f"{number:g}" for number in _numbers(value))
