"""TrivialAugment: one operation, of a strength drawn alike, on each image.

Müller and Hutter, "TrivialAugment: tuning-free yet state-of-the-art data augmentation", ICCV 2021,
with its "wide" strengths. Images are moved by up to 32 pixels, and half their side at most.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, Tuple

import numpy as np

DRAWS = 3  # random numbers of a sample: operation, strength, sign
_STRENGTHS = 31

# By name: makes of a Pillow image, a strength from 0 to 1, and one from -1 to 1, another image.
Operation = Callable[[Any, float, float], Any]


def augmented(pixels: np.ndarray, draw: np.ndarray) -> np.ndarray:
    """An image, uint8 (H, W) or (H, W, 3), changed by the numbers ``draw``, in [0, 1)."""
    from PIL import Image

    operations = _operations()
    name = list(operations)[int(draw[0] * len(operations))]
    strength = int(draw[1] * _STRENGTHS) / (_STRENGTHS - 1)
    signed = strength if draw[2] < 0.5 else -strength
    return np.asarray(operations[name](Image.fromarray(pixels), strength, signed))


def _operations() -> Dict[str, Operation]:
    from PIL import ImageEnhance, ImageOps

    def enhanced(kind: Any) -> Operation:
        return lambda image, strength, signed: kind(image).enhance(1 + 0.99 * signed)

    return {
        "identity": lambda image, strength, signed: image,
        "auto_contrast": lambda image, strength, signed: ImageOps.autocontrast(image),
        "equalize": lambda image, strength, signed: ImageOps.equalize(image),
        "posterize": lambda image, strength, signed: ImageOps.posterize(
            image, 8 - round(6 * strength)
        ),
        "solarize": lambda image, strength, signed: ImageOps.solarize(
            image, round(255 * (1 - strength))
        ),
        "rotate": lambda image, strength, signed: image.rotate(135 * signed),
        "shear_x": lambda image, strength, signed: _moved(image, (1, 0.99 * signed, 0, 0, 1, 0)),
        "shear_y": lambda image, strength, signed: _moved(image, (1, 0, 0, 0.99 * signed, 1, 0)),
        "translate_x": lambda image, strength, signed: _moved(
            image, (1, 0, round(signed * min(32, image.width / 2)), 0, 1, 0)
        ),
        "translate_y": lambda image, strength, signed: _moved(
            image, (1, 0, 0, 0, 1, round(signed * min(32, image.height / 2)))
        ),
        "brightness": enhanced(ImageEnhance.Brightness),
        "contrast": enhanced(ImageEnhance.Contrast),
        "sharpness": enhanced(ImageEnhance.Sharpness),
        "color": enhanced(ImageEnhance.Color),  # leaves grey as it is
    }


def _moved(image: Any, matrix: Tuple[float, ...]) -> Any:
    """Each pixel from where ``matrix`` says (a row of x, y, 1 for each of x and y), or black."""
    from PIL import Image

    return image.transform(image.size, Image.Transform.AFFINE, matrix)
