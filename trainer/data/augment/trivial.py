"""TrivialAugment: one operation, of a strength drawn alike, on each image.

Müller and Hutter, "TrivialAugment: tuning-free yet state-of-the-art data augmentation", ICCV 2021,
with its "wide" strengths. Images are moved by up to 32 pixels, and half their side at most.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, Tuple

import numpy as np

DRAWS = 3  # random numbers of a sample: operation, strength, sign
_STRENGTHS = 31


def augmented(pixels: np.ndarray, draw: np.ndarray) -> np.ndarray:
    """An image, uint8 (H, W) or (H, W, 3), changed by the numbers ``draw``, in [0, 1)."""
    from PIL import Image

    strength = int(draw[1] * _STRENGTHS) / (_STRENGTHS - 1)
    signed = strength if draw[2] < 0.5 else -strength
    operations = list(_operations(Image.fromarray(pixels), strength, signed).values())
    return np.asarray(operations[int(draw[0] * len(operations))]())


def _operations(image: Any, strength: float, signed: float) -> Dict[str, Callable[[], Any]]:
    """By name: what makes another of a Pillow image, by a strength of 0 to 1, or one of -1 to 1."""
    from PIL import ImageEnhance, ImageOps

    factor, shear = 1 + 0.99 * signed, 0.99 * signed
    right, down = (round(signed * min(32, side / 2)) for side in image.size)
    return {
        "identity": lambda: image,
        "auto_contrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
        "posterize": lambda: ImageOps.posterize(image, 8 - round(6 * strength)),
        "solarize": lambda: ImageOps.solarize(image, round(255 * (1 - strength))),
        "rotate": lambda: image.rotate(135 * signed),
        "shear_x": lambda: _moved(image, (1, shear, 0, 0, 1, 0)),
        "shear_y": lambda: _moved(image, (1, 0, 0, shear, 1, 0)),
        "translate_x": lambda: _moved(image, (1, 0, right, 0, 1, 0)),
        "translate_y": lambda: _moved(image, (1, 0, 0, 0, 1, down)),
        "brightness": lambda: ImageEnhance.Brightness(image).enhance(factor),
        "contrast": lambda: ImageEnhance.Contrast(image).enhance(factor),
        "sharpness": lambda: ImageEnhance.Sharpness(image).enhance(factor),
        "color": lambda: ImageEnhance.Color(image).enhance(factor),  # leaves grey as it is
    }


def _moved(image: Any, matrix: Tuple[float, ...]) -> Any:
    """Each pixel from where ``matrix`` says (a row of x, y, 1 for each of x and y), or black."""
    from PIL import Image

    return image.transform(image.size, Image.Transform.AFFINE, matrix)
