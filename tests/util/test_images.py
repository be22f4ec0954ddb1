"""What a file becomes as pixels, and which files are refused by name before training meets them."""

import json
import pickle
import struct

import pytest
from PIL import Image

from fleet.command.image_check import check_share
from tests.conftest import save_picture, save_png_of_zeros
from utils.images import BadImage, list_labelled_images, open_image

pytestmark = pytest.mark.fast

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def near(pixel, wanted, tolerance: int = 3) -> bool:
    return len(pixel) == 3 and all(abs(got - want) <= tolerance for got, want in zip(pixel, wanted, strict=True))


# --- decoding ---------------------------------------------------------------------------------------------------------

# mode, color as Pillow stores it, file suffix, the pixel that comes out
MODES = {
    "RGB": ("RGB", (255, 0, 0), ".png", RED),
    "RGBA, opaque": ("RGBA", (255, 0, 0, 255), ".png", RED),
    "RGBA, transparent shows white": ("RGBA", (255, 0, 0, 0), ".png", WHITE),
    "RGBA, half transparent": ("RGBA", (255, 0, 0, 128), ".png", (255, 127, 127)),
    "LA, opaque": ("LA", (100, 255), ".png", (100, 100, 100)),
    "LA, transparent shows white": ("LA", (0, 0), ".png", WHITE),
    "L": ("L", 100, ".png", (100, 100, 100)),
    "1-bit": ("1", 1, ".png", WHITE),
    "CMYK": ("CMYK", (0, 255, 255, 0), ".tif", RED),
    "CMYK JPEG": ("CMYK", (0, 255, 255, 0), ".jpg", RED),
    "bmp": ("RGB", (0, 0, 255), ".bmp", BLUE),
    "webp": ("RGB", (0, 0, 255), ".webp", BLUE),
}


@pytest.mark.parametrize(("mode", "color", "suffix", "wanted"), MODES.values(), ids=MODES.keys())
def test_mode_becomes_rgb(tmp_path, mode, color, suffix, wanted):
    path = tmp_path / f"picture{suffix}"
    Image.new(mode, (8, 6), color).save(path)
    image = open_image(path)
    assert (image.mode, image.size) == ("RGB", (8, 6))
    assert near(image.getpixel((4, 3)), wanted)


@pytest.mark.parametrize(("transparency", "wanted"), [(None, BLUE), (0, BLUE), (1, WHITE)])
def test_palette_with_transparency_is_laid_on_white(tmp_path, transparency, wanted):
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([*RED, *BLUE])
    palette.save(tmp_path / "p.png", **({} if transparency is None else {"transparency": transparency}))
    assert open_image(tmp_path / "p.png").getpixel((0, 0)) == wanted


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_grey_keeps_its_shades(tmp_path, suffix):
    values = [0, 257, 25_700, 32_768, 51_400, 65_535]  # 257 of them are one step in 8 bits
    deep = Image.new("I;16", (len(values), 1))
    for x, value in enumerate(values):
        deep.putpixel((x, 0), value)
    deep.save(tmp_path / f"deep{suffix}")
    assert Image.open(tmp_path / f"deep{suffix}").mode == "I;16"
    image = open_image(tmp_path / f"deep{suffix}")
    for x, wanted in enumerate([0, 1, 100, 127, 200, 255]):
        assert near(image.getpixel((x, 0)), (wanted,) * 3, tolerance=1)


def test_single_pixel(tmp_path):
    image = open_image(save_picture(tmp_path / "dot.png", "blue", (1, 1)))
    assert (image.size, image.getpixel((0, 0))) == ((1, 1), BLUE)


def test_animation_gives_its_first_frame(tmp_path):
    red, blue = Image.new("RGB", (4, 4), RED), Image.new("RGB", (4, 4), BLUE)
    red.save(tmp_path / "moving.gif", save_all=True, append_images=[blue])
    assert getattr(Image.open(tmp_path / "moving.gif"), "n_frames", 1) == 2
    assert open_image(tmp_path / "moving.gif").getpixel((0, 0)) == RED


# EXIF orientation of a 32x16 file whose top left quarter is red, then its upright size and the middle of that quarter
ORIENTATIONS = {
    "upright": (1, (32, 16), (8, 4)),
    "mirrored": (2, (32, 16), (24, 4)),
    "upside down": (3, (32, 16), (24, 12)),
    "upside down and mirrored": (4, (32, 16), (8, 12)),
    "mirrored along the diagonal": (5, (16, 32), (4, 8)),
    "turned right": (6, (16, 32), (12, 8)),
    "turned right and mirrored": (7, (16, 32), (12, 24)),
    "turned left": (8, (16, 32), (4, 24)),
}


@pytest.mark.parametrize(("orientation", "size", "red"), ORIENTATIONS.values(), ids=ORIENTATIONS.keys())
def test_jpeg_is_turned_upright_as_its_exif_says(tmp_path, orientation, size, red):
    stored = Image.new("RGB", (32, 16), BLUE)
    stored.paste(RED, (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "photo.jpg", exif=exif, quality=95, subsampling=0)
    image = open_image(tmp_path / "photo.jpg")
    assert image.size == size
    middles = [(x, y) for x in (size[0] // 4, size[0] * 3 // 4) for y in (size[1] // 4, size[1] * 3 // 4)]
    assert [middle for middle in middles if near(image.getpixel(middle), RED)] == [red]
    assert sum(near(image.getpixel(middle), BLUE) for middle in middles) == 3


# --- the pixel budget -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "max_pixels", "wanted"),
    [
        ((400, 100), 10_000, (200, 50)),
        ((100, 400), 10_000, (50, 200)),
        ((56, 56), 3136, (56, 56)),
        ((57, 56), 3136, (56, 55)),
        ((448, 448), 3136, (56, 56)),
        ((10, 10), 3136, (10, 10)),
        ((10, 10), None, (10, 10)),
        ((1000, 10), 1000, (316, 3)),
    ],
)
def test_shrunk_to_the_budget_with_its_aspect_kept(tmp_path, size, max_pixels, wanted):
    path = save_picture(tmp_path / "picture.png", "red", size)
    assert open_image(path, max_pixels).size == wanted
    assert near(open_image(path, max_pixels).getpixel((0, 0)), RED)


def test_upright_comes_before_the_budget(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (400, 100)).save(tmp_path / "photo.jpg", exif=exif)
    assert open_image(tmp_path / "photo.jpg", 10_000).size == (50, 200)


def test_pil_image_is_taken_as_it_is():
    given = Image.new("RGBA", (40, 10), (255, 0, 0, 0))
    image = open_image(given, 100)
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (20, 5), WHITE)
    assert (given.mode, given.size) == ("RGBA", (40, 10))


@pytest.mark.parametrize("max_pixels", [None, 10_000], ids=["any size", "within the budget"])
def test_pil_image_given_is_not_the_one_returned(max_pixels):
    given = Image.new("RGB", (4, 4), RED)
    open_image(given, max_pixels).putpixel((0, 0), BLUE)
    assert given.getpixel((0, 0)) == RED


# --- refused files ----------------------------------------------------------------------------------------------------


def text(path, content: str):
    path.write_text(content, encoding="utf-8")
    return path


def test_refusal_names_file_reason_and_remedy_on_one_line(tmp_path):
    path = text(tmp_path / "a\nb.png", "not a picture")
    with pytest.raises(BadImage) as refusal:
        open_image(path)
    assert str(refusal.value) == (
        f"image {tmp_path}/a\\nb.png is not in a format that is read (PNG, JPEG, WEBP, BMP, GIF, TIFF, HEIF); convert "
        "it or remove it"
    )
    again = pickle.loads(pickle.dumps(refusal.value))
    assert (str(again), again.reason) == (str(refusal.value), refusal.value.reason)


def test_file_that_is_gone_is_refused_by_name(tmp_path):
    with pytest.raises(BadImage, match=r"image .*gone\.png cannot be read \(No such file or directory\); replace it"):
        open_image(tmp_path / "gone.png")


def test_bomb_is_a_small_file(tmp_path):
    assert save_png_of_zeros(tmp_path / "bomb.png", 10_000, 9_100).stat().st_size < 20_000
    assert open_image(save_png_of_zeros(tmp_path / "small.png", 10, 10)).getpixel((9, 9)) == (0, 0, 0)


def test_almost_1_to_200_is_accepted(tmp_path):
    assert open_image(save_picture(tmp_path / "wide.png", size=(199, 1))).size == (199, 1)


# --- folders ----------------------------------------------------------------------------------------------------------


def test_listing_is_sorted_and_passes_over_what_is_hidden_or_no_image(tmp_path):
    shown = ["a.png", "b.JPG", "c/a.webp", "c/b.gif", "d.bmp", "e.tif", "f.jpeg"]
    for name in reversed([*shown, ".hidden.png", "._a.png", ".cache/a.png", "c/.thumbs/a.png"]):
        save_picture(tmp_path / name)
    for name in ("notes.txt", "Thumbs.db", "png", "g.png.part"):
        text(tmp_path / name, "")
    (tmp_path / "folder.png").mkdir()
    assert [image.path.relative_to(tmp_path).as_posix() for image in list_labelled_images(tmp_path)] == shown


def test_hidden_folder_may_itself_hold_the_data(tmp_path):
    save_picture(tmp_path / ".data" / "red_circle.png")
    assert [image.label for image in list_labelled_images(tmp_path / ".data")] == ["red circle"]


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; pass --data_root"):
        list_labelled_images(tmp_path / "nowhere")


def test_file_for_a_folder(tmp_path):
    with pytest.raises(NotADirectoryError, match="a.png is a file; pass --data_root"):
        list_labelled_images(save_picture(tmp_path / "a.png"))


BAD_METADATA = {
    "no file_name column": ("metadata.csv", "file,label\na.png,ant\n", r"header: got columns \['file', 'label'\]"),
    "no label column": ("metadata.csv", "file_name,class\na.png,ant\n", "header: .* wanted 'file_name' and one of"),
    "not UTF-8": ("metadata.csv", b"file_name,label\na.png,\xff\n", "cannot be read"),
    "not JSON": ("metadata.jsonl", "file_name: a.png\n", "cannot be read"),
    "JSON cut off": ("metadata.jsonl", '{"file_name": "a.png", "label"', "cannot be read"),
    "a list, not an object": (
        "metadata.jsonl",
        '["a.png", "ant"]\n',
        "row 1: got a list, wanted one JSON object a line",
    ),
    "JSON without a label": ("metadata.jsonl", '{"file_name": "a.png"}\n', r"row 1: got columns \['file_name'\]"),
    "second line wrong": (
        "metadata.jsonl",
        json.dumps({"file_name": "a.png", "label": "ant"}) + '\n{"label": "bee"}\n',
        r"row 2: got columns \['label'\]",
    ),
}


@pytest.mark.parametrize(("name", "content", "words"), BAD_METADATA.values(), ids=BAD_METADATA.keys())
def test_bad_metadata_is_refused_by_row(tmp_path, name, content, words):
    save_picture(tmp_path / "a.png")
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=words) as refusal:
        list_labelled_images(tmp_path)
    assert str(tmp_path / name) in str(refusal.value)


def test_file_that_metadata_lists_and_that_is_missing_is_a_bad_image(tmp_path):
    save_picture(tmp_path / "a.png")
    text(tmp_path / "metadata.csv", "file_name,label\na.png,ant\nz.png,bee\n")
    listed = list_labelled_images(tmp_path)
    assert [image.label for image in listed] == ["ant", "bee"]
    assert check_share(listed, tmp_path, 0, 1).problems == {1: "cannot be read (No such file or directory)"}


def test_metadata_without_rows_lists_nothing(tmp_path):
    save_picture(tmp_path / "a.png")
    text(tmp_path / "metadata.csv", "file_name,label\n")
    assert list_labelled_images(tmp_path) == ()


# --- what has gone wrong once -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_pixels", [784, 3136, 200_704])
@pytest.mark.parametrize("size", [(10, 1990), (1990, 10), (100, 19_900), (1, 199), (199, 1), (7, 1300)])
def test_shrinking_never_makes_a_picture_that_qwen_refuses(size, max_pixels):
    shrunk = open_image(Image.new("RGB", size), max_pixels)
    assert shrunk.width * shrunk.height <= max_pixels
    assert max(shrunk.size) < 200 * min(shrunk.size)


@pytest.mark.parametrize(
    ("tag", "kind", "value"),
    [(0x0128, 2, b"odd\0"), (0x011A, 2, b"odd\0"), (0x010E, 11, struct.pack("<f", 1.5))],
    ids=["unit as text", "resolution as text", "description as a number"],
)
def test_odd_exif_does_not_stop_a_sound_picture(tmp_path, tag, kind, value):
    entries = [struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)]
    entries.append(struct.pack("<HHI4s", tag, kind, len(value) if kind == 2 else 1, value))
    directory = struct.pack("<H", len(entries)) + b"".join(sorted(entries)) + struct.pack("<I", 0)
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + directory
    Image.new("RGB", (32, 16), "red").save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg").size == (16, 32)


def test_transparent_colour_of_an_rgb_picture_shows_white(tmp_path):
    Image.new("RGB", (4, 4), RED).save(tmp_path / "a.png", transparency=RED)
    assert open_image(tmp_path / "a.png").getpixel((0, 0)) == WHITE


@pytest.mark.parametrize(("brightest", "wanted"), [(1.0, 255), (0.5, 127), (200.0, 200), (65_535.0, 255)])
def test_float_greyscale_keeps_its_shades(tmp_path, brightest, wanted):
    Image.new("F", (4, 4), brightest).save(tmp_path / "a.tif")
    assert near(open_image(tmp_path / "a.tif").getpixel((0, 0)), (wanted,) * 3)


# the values of a greyscale picture and the shades that they come out as
DEEP_SHADES = {
    "16 bits": ("I;16", [0, 32_768, 65_535], [0, 127, 255]),
    "12 bits in 16": ("I;16", [0, 2048, 4095], [0, 127, 255]),
    "10 bits in 16": ("I;16", [0, 512, 1023], [0, 127, 255]),
    "black": ("I;16", [0, 0, 0], [0, 0, 0]),
    "12 bits in 32": ("I", [0, 2048, 4095], [0, 127, 255]),
    "more than 16 bits": ("I", [0, 500_000, 1_000_000], [0, 127, 255]),
    "floats of 12 bits": ("F", [0.0, 2048.0, 4095.0], [0, 127, 255]),
}


@pytest.mark.parametrize(("mode", "values", "wanted"), DEEP_SHADES.values(), ids=DEEP_SHADES.keys())
def test_white_is_what_the_bits_of_a_grey_picture_can_say(tmp_path, mode, values, wanted):
    save_grey(tmp_path / "a.tif", mode, values)
    image = open_image(tmp_path / "a.tif")
    assert all(near(image.getpixel((x, 0)), (shade,) * 3, tolerance=1) for x, shade in enumerate(wanted))


@pytest.mark.parametrize(
    ("mode", "values", "words"),
    [
        ("I;16", [0, 20, 250], "a.tif has 16 bits and no value above 250, which would be shown black; save it with 8"),
        ("F", [-1.0, 0.0, 1.0], r"a.tif has values below 0 or that are no numbers \(from -1 to 1\); save it with 8"),
        ("F", [0.0, float("nan"), 1.0], "a.tif has values below 0 or that are no numbers"),
        ("F", [0.0, float("inf"), 1.0], "a.tif has values below 0 or that are no numbers"),
        ("I", [-5, 0, 1000], "a.tif has values below 0 or that are no numbers"),
    ],
)
def test_grey_picture_whose_shades_would_be_a_guess_is_refused(tmp_path, mode, values, words):
    save_grey(tmp_path / "a.tif", mode, values)
    with pytest.raises(BadImage, match=words):
        open_image(tmp_path / "a.tif")


def save_grey(path, mode: str, values: list) -> None:
    picture = Image.new(mode, (len(values), 1))
    for x, value in enumerate(values):
        picture.putpixel((x, 0), value)
    picture.save(path)


def test_picture_drawn_by_an_environment_meets_the_same_limit():
    with pytest.raises(ValueError, match="1x300 pixels, narrower than 1:200"):
        open_image(Image.new("RGB", (1, 300)))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ('{"file_name": "a.png", "label": null}\n', "row 1: its label is empty"),
        ('{"file_name": "a.png", "label": " "}\n', "row 1: its label is empty"),
        ('{"file_name": "a.png", "label": "x"}\n{"file_name": "a.png", "label": "y"}\n', r"row 2: .* listed before"),
    ],
)
def test_metadata_without_a_clear_label_is_refused_by_row(tmp_path, rows, words):
    save_picture(tmp_path / "a.png")
    text(tmp_path / "metadata.jsonl", rows)
    with pytest.raises(ValueError, match=words):
        list_labelled_images(tmp_path)


def test_metadata_with_a_byte_order_mark_is_read(tmp_path):
    save_picture(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_bytes(b"\xef\xbb\xbffile_name,label\na.png,ant\n")
    assert [image.label for image in list_labelled_images(tmp_path)] == ["ant"]
