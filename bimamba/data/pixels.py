"""Images of any mode to 8-bit grey or colours; and what that took away, to be told."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from PIL import Image

PAGES = "bimamba_pages"  # mark in an image's `info`: its file has further pages


def is_grey(image: Image.Image) -> bool:
    """True for a mode without colours."""
    return image.mode in ("1", "L", "LA", "La", "F") or _is_deep(image)


def _is_deep(image: Image.Image) -> bool:
    return image.mode == "I" or image.mode.startswith("I;16")


def convert(image: Image.Image, channels: int) -> Image.Image:
    """8-bit grey (1 channel) or RGB (3): deeper values scaled, what is transparent on white.

    16-bit values are divided by 257, whatever part of their range is used; floats within [0, 1] are multiplied by 255,
    other floats clipped to [0, 255].
    """
    if _is_deep(image):
        # Pillow clips 16-bit grey to 255 instead of scaling it.
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    elif image.mode == "F":
        values = np.nan_to_num(np.asarray(image))
        scale = 255 if _is_unit(values) else 1
        image = Image.fromarray((values * scale).clip(0, 255).round().astype(np.uint8))
    elif image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        # Black ink on a transparent page is black all over without its alpha.
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _is_unit(values: np.ndarray) -> bool:
    return bool(values.min() >= 0 and values.max() <= 1)


@dataclass
class Losses:
    """What `convert` took away: of each kind the number of images, the largest value, and the image that has it.

    Args:
        colour: whether colours read as grey are told; not where the user asked for grey.
    """

    colour: bool = True
    found: dict[str, tuple[int, float, str]] = field(default_factory=dict)

    def look(self, image: Image.Image, channels: int, name: str) -> None:
        """Takes note of an image before its conversion."""
        kinds = {}
        if image.info.get(PAGES):
            kinds["pages"] = 0.0
        if _is_deep(image):
            kinds["deep"] = float(np.asarray(image).max())
        elif image.mode == "F":
            values = np.nan_to_num(np.asarray(image))
            if values.min() < 0 or values.max() > 255:
                kinds["float"] = float(np.abs(values).max())
        elif self.colour and channels == 1 and not is_grey(image):
            rgb = np.asarray(image.convert("RGB"))
            if (rgb != rgb[..., :1]).any():
                kinds["colour"] = 0.0
        for kind, value in kinds.items():
            self._add(kind, (1, value, name))

    def merge(self, other: Losses) -> None:
        """Takes over what another process met."""
        for kind, seen in other.found.items():
            self._add(kind, seen)

    def _add(self, kind: str, seen: tuple[int, float, str]) -> None:
        before = self.found.get(kind, (0, -1.0, ""))
        _, value, name = max(before, seen, key=lambda one: one[1])
        self.found[kind] = (before[0] + seen[0], value, name)

    def sentences(self, of_many: bool = True) -> list[str]:
        """What there is to say, one sentence a kind; without `of_many`, only what one image is enough for."""
        said = []
        for kind, (n, value, name) in self.found.items():
            if kind == "pages":
                said.append(f"of {n} TIFF files with several pages, such as {name}, only the first page is read")
            elif kind == "float":
                said.append(
                    f"{n} images of floats have values beyond 0 to 255, up to {value:g} in {name}: these are clipped; "
                    "expected [0, 1] or [0, 255]"
                )
            elif kind == "colour":
                said.append(
                    f"{n} images with colours, such as {name}, are read as grey: set data.channels=3 for the colours, "
                    "or data.channels=1 if grey is meant"
                )
            elif kind == "deep" and of_many and 0 < value < 4096:
                bits = 8 if value < 256 else 12
                said.append(
                    f"the largest value of {n} 16-bit images is {value:g}, in {name}: read as 16-bit values (divided "
                    f"by 257), which leaves 0 to {value // 257:g} of 255; if they hold {bits}-bit values, scale the "
                    f"files by {65535 // (2**bits - 1)}"
                )
        return said
