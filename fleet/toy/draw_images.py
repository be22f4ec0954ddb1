"""Draws the toy pictures: twelve PNGs, each showing one shape in one colour and named after both.

Owns the look and the names of the pictures. Knows no task.
No randomness and no fonts: the same Pillow writes the same bytes every time.
"""

import argparse
from math import cos, pi, sin
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFilter

RGB = tuple[int, int, int]
Polygon = list[tuple[float, float]]  # corners in [-1, 1] x [-1, 1], y down
# colours of each shape, and of the calm background it stands out from
PALETTES: dict[str, tuple[RGB, RGB]] = {
    "red_circle": ((222, 54, 56), (216, 232, 243)),
    "blue_square": ((44, 104, 222), (253, 231, 211)),
    "green_triangle": ((46, 158, 82), (247, 226, 239)),
    "yellow_star": ((252, 203, 44), (66, 58, 106)),
    "purple_diamond": ((132, 72, 196), (250, 242, 204)),
    "orange_heart": ((246, 132, 30), (222, 220, 246)),
    "pink_flower": ((240, 112, 168), (220, 240, 222)),
    "cyan_ring": ((38, 198, 218), (44, 56, 70)),
    "white_moon": ((244, 244, 240), (24, 34, 78)),
    "brown_hexagon": ((132, 82, 46), (208, 238, 234)),
    "black_cross": ((38, 38, 44), (240, 234, 224)),
    "grey_arrow": ((120, 125, 132), (252, 212, 206)),
}
MIN_SIDE_PX, MAX_SIDE_PX = 8, 1024
OVERSAMPLING = 8  # shapes are drawn this many times larger, then averaged down: smooth edges
SHAPE_SHARE = 0.68  # longest side of a shape, as a share of the picture's side


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw twelve pictures, each one shape in one colour, as PNG files.")
    parser.add_argument("--output_dir", type=Path, default=Path("toy_images"), help="folder for the PNGs (%(default)s)")
    parser.add_argument("--side_px", type=int, default=112, help="width and height in pixels (%(default)s)")
    args = parser.parse_args()
    try:
        pictures = {name: draw_toy_image(name, args.side_px) for name in PALETTES}
    except ValueError as error:
        parser.error(str(error))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        picture.save(args.output_dir / f"{name}.png", optimize=False, compress_level=9)
    print(f"wrote {len(pictures)} pictures of {args.side_px}x{args.side_px} px to {args.output_dir}")


def draw_toy_image(colour_shape: str, side_px: int = 112) -> Image.Image:
    """Square RGB picture of one shape in one colour, centred on a plain background.

    colour_shape: a name in PALETTES. Raises ValueError for any other name, and for a side_px that is too small to
    recognise a shape or too large for a toy.

    >>> draw_toy_image("red_circle").getpixel((0, 0)) == PALETTES["red_circle"][1]
    True
    """
    if colour_shape not in PALETTES:
        raise ValueError(f"colour_shape={colour_shape!r} is not a toy picture; pass one of {', '.join(PALETTES)}")
    if not MIN_SIDE_PX <= side_px <= MAX_SIDE_PX:
        raise ValueError(f"side_px={side_px}, but pictures take {MIN_SIDE_PX} to {MAX_SIDE_PX} px; pass --side_px 112")
    (shape, background), size = PALETTES[colour_shape], (side_px, side_px)
    mask = centred_mask(colour_shape.split("_")[1], side_px * OVERSAMPLING)

    def moved_down(share: float) -> Image.Image:
        return ImageChops.offset(mask, 0, round(share * mask.height))

    def soft(large: Image.Image, blur_share: float, opacity: float) -> Image.Image:
        blurred = large.resize(size, Image.Resampling.BOX).filter(ImageFilter.GaussianBlur(blur_share * side_px))
        return blurred.point([round(alpha * opacity) for alpha in range(256)])

    body = Image.new("RGB", size, mixed(shape, (255, 255, 255), 0.14))
    body.paste(mixed(shape, (0, 0, 0), 0.12), mask=Image.linear_gradient("L").resize(size))
    body.paste((255, 255, 255), mask=soft(ImageChops.subtract(mask, moved_down(0.03)), 0.008, opacity=0.45))
    body.paste((0, 0, 0), mask=soft(ImageChops.subtract(mask, moved_down(-0.03)), 0.008, opacity=0.16))
    picture = Image.new("RGB", size, background)
    picture.paste(mixed(background, (0, 0, 20), 0.8), mask=soft(moved_down(0.035), 0.025, opacity=0.3))
    picture.paste(body, mask=mask.resize(size, Image.Resampling.BOX))
    return picture


def centred_mask(shape: str, side_px: int) -> Image.Image:
    """Mode-L mask, 255 inside the shape, whose bounding box is centred and spans SHAPE_SHARE of the side."""
    drawn = Image.new("L", (side_px, side_px))
    for index, polygon in enumerate(outlines(shape)):
        points = [(side_px * (0.5 + 0.45 * x), side_px * (0.5 + 0.45 * y)) for x, y in polygon]
        ImageDraw.Draw(drawn).polygon(points, fill=0 if index % 2 else 255)
    # blur, then threshold: every corner of every shape is rounded alike
    rounded = drawn.filter(ImageFilter.GaussianBlur(0.03 * side_px)).point([0] * 128 + [255] * 128)
    cropped = rounded.crop(rounded.getbbox())
    scale = SHAPE_SHARE * side_px / max(cropped.size)
    scaled = cropped.resize((round(cropped.width * scale), round(cropped.height * scale)))
    mask = Image.new("L", (side_px, side_px))
    mask.paste(scaled, ((side_px - scaled.width) // 2, (side_px - scaled.height) // 2))
    return mask


def outlines(shape: str) -> list[Polygon]:
    """Polygons to paint in turn: the first solid, the second cut out of it, the third solid again."""
    petal_edge = [0.6 + 0.4 * abs(cos(pi * step / 120)) ** 0.8 for step in range(600)]
    turns = [2 * pi * step / 360 for step in range(360)]
    lobes = [(16 * sin(t) ** 3, 5 * cos(2 * t) + 2 * cos(3 * t) + cos(4 * t) - 13 * cos(t)) for t in turns]
    right_half = [(0.35, -1.0), (0.35, -0.35), (1.0, -0.35), (1.0, 0.35), (0.35, 0.35), (0.35, 1.0)]
    upper_half = [(-1.0, -0.33), (0.02, -0.33), (0.02, -0.88), (1.0, 0.0)]
    return {
        "circle": [circle(1)],
        "square": [[(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]],
        "triangle": [radial([1, 1, 1])],
        "star": [radial([1, 0.48] * 5)],
        "diamond": [radial([1, 0.76] * 2)],
        "heart": [[(x / 17, y / 17) for x, y in lobes]],
        "flower": [radial(petal_edge), circle(0.36), circle(0.2)],
        "ring": [circle(1), circle(0.56)],
        "moon": [circle(1), circle(0.82, 0.42, -0.24)],
        "hexagon": [radial([1] * 6)],
        "cross": [right_half + [(-x, -y) for x, y in right_half]],
        "arrow": [upper_half + [(x, -y) for x, y in reversed(upper_half)]],
    }[shape]


def circle(radius: float, x: float = 0, y: float = 0) -> Polygon:
    return [(x + radius * px, y + radius * py) for px, py in radial([1] * 360)]


def radial(radii: list[float]) -> Polygon:
    """Polygon with one corner per radius, at equal angles clockwise from the top."""
    angles = [2 * pi * step / len(radii) for step in range(len(radii))]
    return [(radius * sin(angle), -radius * cos(angle)) for radius, angle in zip(radii, angles, strict=True)]


def mixed(colour: RGB, other: RGB, share: float) -> RGB:
    """Colour moved towards the other one: share 0 gives colour, share 1 gives other."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(colour, other, strict=True))
    return red, green, blue


if __name__ == "__main__":
    main()
