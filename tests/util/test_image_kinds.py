"""Every kind of file that a data folder may hold: kept, or refused for the reason that is written here."""

import os
import random
import socket
import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fleet.command.image_check import check_share
from tests.conftest import save_picture, save_png_of_zeros, save_truncated
from tests.helpers_images import png, tiff
from utils.images import BadImage, checked_sha256, list_labelled_images, open_image

pytestmark = pytest.mark.fast

UNDECODED = "cannot be decoded (image file is truncated"
UNKNOWN = "is not in a format that is read (PNG, JPEG, WEBP, BMP, GIF, TIFF, HEIF)"
BOMB = "has more than the 89,478,485 pixels allowed (a decompression bomb?)"


def of_mode(mode: str, color: float | tuple[float, ...]) -> Callable[[Path], object]:
    return lambda path: Image.new(mode, (8, 6), color).save(path)


def of_bytes(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def of_size(width: int, height: int) -> Callable[[Path], object]:
    return lambda path: save_picture(path, size=(width, height))


def with_orientation(number: int) -> Callable[[Path], object]:
    exif = Image.Exif()
    exif[0x0112] = number
    return lambda path: Image.new("RGB", (8, 6)).save(path, exif=exif)


def with_noise_for_exif(path: Path) -> None:
    Image.new("RGB", (8, 6)).save(path, exif=b"Exif\0\0\xff\x00 no exif")


def palette_with_transparency(path: Path) -> None:
    picture = Image.new("P", (8, 6))
    picture.putpalette([0, 0, 0, 255, 0, 0])
    picture.save(path, transparency=1)


def moving(path: Path) -> None:
    frames = [Image.new("RGB", (8, 6), (number, 0, 0)) for number in range(20)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def cut_photo(path: Path) -> None:
    Image.effect_noise((64, 64), 100).save(path)
    path.write_bytes(path.read_bytes()[:-500])


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**28 + 1)


def jpeg_with_exif(content: bytes) -> bytes:
    """A JPEG with an EXIF block of these bytes put before its first segment."""
    buffer = BytesIO()
    Image.new("RGB", (8, 6)).save(buffer, format="JPEG")
    block = b"Exif\0\0" + content
    return buffer.getvalue()[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + buffer.getvalue()[2:]


def bind_socket(path: Path) -> None:
    # the path of a socket has 108 bytes at most
    above = Path.cwd()
    os.chdir(path.parent)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(path.name)
    os.chdir(above)


def text_bomb(path: Path) -> None:
    info = PngInfo()
    info.add_text("comment", "x" * 2_000_000, zip=True)
    Image.new("RGB", (4, 4)).save(path, pnginfo=info)


def header(width: int, height: int) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)


# name of the file, how it is made, and words of the reason for which it is refused, or None
KINDS: dict[str, tuple[str, Callable[[Path], object], str | None]] = {
    # modes
    "1-bit": ("a.png", of_mode("1", 1), None),
    "L": ("a.png", of_mode("L", 100), None),
    "LA": ("a.png", of_mode("LA", (100, 50)), None),
    "P": ("a.gif", of_mode("P", 1), None),
    "P with transparency": ("a.png", palette_with_transparency, None),
    "RGB": ("a.png", of_mode("RGB", (255, 0, 0)), None),
    "RGBA": ("a.png", of_mode("RGBA", (255, 0, 0, 50)), None),
    "CMYK": ("a.jpg", of_mode("CMYK", (0, 255, 255, 0)), None),
    "YCbCr": ("a.tif", of_mode("YCbCr", (100, 50, 200)), None),
    "LAB": ("a.tif", of_mode("LAB", (100, 50, 200)), None),
    "16-bit grey, PNG": ("a.png", of_mode("I;16", 40_000), None),
    "16-bit grey, TIFF": ("a.tif", of_mode("I;16", 40_000), None),
    "16-bit grey, big-endian": ("a.tif", of_mode("I;16B", 40_000), None),
    "32-bit grey": ("a.tif", of_mode("I", 100_000), None),
    "float grey": ("a.tif", of_mode("F", 0.5), None),
    # formats and names
    "JPEG": ("a.jpeg", of_mode("RGB", 0), None),
    "WebP": ("a.webp", of_mode("RGBA", 0), None),
    "BMP": ("a.bmp", of_mode("RGB", 0), None),
    "JPEG named .png": ("a.png", lambda path: Image.new("RGB", (8, 6)).save(path, format="JPEG"), None),
    "GIF named .jpg": ("a.jpg", lambda path: Image.new("P", (8, 6)).save(path, format="GIF"), None),
    "suffix in capitals": ("A.JPG", of_mode("RGB", 0), None),
    "name in other scripts": ("красный круг 赤い丸 🔴.png", of_mode("RGB", 0), None),
    "name of two lines": ("red\ncircle.png", of_mode("RGB", 0), None),
    "name with an escape": ("red \x1b[31m.png", of_mode("RGB", 0), "has a name or label with a control character, "),
    "name that turns the writing": ("red \u202egnp.png", of_mode("RGB", 0), "has a name or label with a control"),
    "name like a token": ("<|box|>.png", of_mode("RGB", 0), None),
    "name that is a token": ("<tool_call>.png", of_mode("RGB", 0), "has a name or label that is no text to the model"),
    "name that is no text": (
        os.fsdecode(b"red \xff.png"),
        of_mode("RGB", 0),
        "has a name or label with half a surrogate pair",
    ),
    # orientations
    **{f"EXIF orientation {n}": ("a.jpg", with_orientation(n), None) for n in range(1, 9)},
    "EXIF orientation that is none": ("a.jpg", with_orientation(9), None),
    "EXIF of noise": ("a.jpg", of_bytes(jpeg_with_exif(b"\xff\x00no exif\x00")), None),
    "EXIF cut off": ("a.jpg", of_bytes(jpeg_with_exif(b"II*\0\x08\0\0\0\xff\xff")), None),
    "EXIF of noise in a WebP": ("a.webp", with_noise_for_exif, None),
    # animations give their first frame
    "animated GIF": ("a.gif", moving, None),
    "animated WebP": ("a.webp", moving, None),
    "animated PNG": ("a.png", moving, None),
    # sizes
    "1x1": ("a.png", of_size(1, 1), None),
    "199x1": ("a.png", of_size(199, 1), None),
    "200x1": ("a.png", of_size(200, 1), "is 200x1 pixels, narrower than 1:200, which Qwen2.5-VL refuses"),
    "10000x10": ("a.png", of_size(10_000, 10), "is 10000x10 pixels, narrower than 1:200, which Qwen2.5-VL refuses"),
    "10x10000": ("a.png", of_size(10, 10_000), "is 10x10000 pixels, narrower than 1:200, which Qwen2.5-VL refuses"),
    "width 0": ("a.png", of_bytes(png(header(0, 6), (b"IDAT", b""), (b"IEND", b""))), UNKNOWN),
    # bombs
    "91 megapixels": ("a.png", lambda path: save_png_of_zeros(path, 10_000, 9_100, 1), BOMB),
    "400 megapixels": ("a.png", lambda path: save_png_of_zeros(path, 20_000, 20_000, 1), BOMB),
    "2 gigapixels that are not there": ("a.png", of_bytes(png(header(2**16, 2**15), (b"IEND", b""))), BOMB),
    "tile of 1,600 megapixels": (
        "a.tif",
        of_bytes(tiff(10, 10, zlib.compress(bytes(16)), {322: 40_000, 323: 40_000})),
        "has tiles of 1,600,000,000 pixels (a decompression bomb?)",
    ),
    "text of 2 MB in a PNG": ("a.png", text_bomb, "cannot be decoded (Decompressed data too large"),
    "profile of 2 MB in a PNG": (
        "a.png",
        of_bytes(png(header(4, 4), (b"iCCP", b"a\0\0" + zlib.compress(bytes(2_000_000))), (b"IEND", b""))),
        "cannot be decoded (Decompressed data too large",
    ),
    "file over 256 MiB": (
        "a.png",
        sparse,
        "is a file of 268,435,457 bytes, more than the 268,435,456 allowed",
    ),
    # broken files
    "truncated PNG": ("a.png", save_truncated, UNDECODED),
    "JPEG cut in its tables": ("a.jpg", save_truncated, "cannot be decoded (Truncated File Read)"),
    "JPEG cut in its pixels": ("a.jpg", cut_photo, UNDECODED),
    "truncated GIF": ("a.gif", save_truncated, UNDECODED),
    "truncated BMP": ("a.bmp", save_truncated, UNDECODED),
    "truncated WebP": ("a.webp", save_truncated, "cannot be decoded (could not create decoder object)"),
    "truncated TIFF": ("a.tif", save_truncated, "cannot be decoded ("),
    "empty": ("a.png", of_bytes(b""), "is empty"),
    "zeros": ("a.jpg", of_bytes(bytes(4096)), UNKNOWN),
    # what is no picture
    "text": ("a.png", of_bytes(b"not a picture"), UNKNOWN),
    "error page": ("a.jpg", of_bytes(b"<!DOCTYPE html><html><h1>404 Not Found</h1></html>"), UNKNOWN),
    "Git LFS pointer": ("a.jpg", of_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), UNKNOWN),
    "SVG": ("a.png", of_bytes(b'<svg xmlns="http://www.w3.org/2000/svg"/>'), UNKNOWN),
    "HEIC without a picture": ("a.jpg", of_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"), UNKNOWN),
    "PDF": ("a.png", of_bytes(b"%PDF-1.7\n1 0 obj\nendobj\n"), UNKNOWN),
    "PostScript, which would be run": (
        "a.png",
        of_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 6\n"),
        UNKNOWN,
    ),
    "zip archive": ("a.png", of_bytes(b"PK\x03\x04" + bytes(60)), UNKNOWN),
    # what is no file
    "pipe": ("a.png", os.mkfifo, "is a pipe, not a file"),
    "socket": ("a.png", bind_socket, "is a socket, not a file"),
    "link to a device": ("a.png", lambda path: path.symlink_to("/dev/zero"), "is a device, not a file"),
    # links
    "link to a picture": (
        "a.png",
        lambda path: path.symlink_to(save_picture(path.with_name("elsewhere") / "b.png")),
        None,
    ),
    "link out of the folder": (
        "a.png",
        lambda path: path.symlink_to(save_picture(path.parent.with_name("outside") / "b.png")),
        None,
    ),
    "link to nothing": (
        "a.png",
        lambda path: path.symlink_to("gone.png"),
        "cannot be read (No such file or directory)",
    ),
    "link to itself": (
        "a.png",
        lambda path: path.symlink_to("a.png"),
        "cannot be read (Too many levels of symbolic links)",
    ),
}


def make(folder: Path, kind: str) -> Path:
    name, write, _ = KINDS[kind]
    path = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    write(path)
    return path


def test_there_are_enough_kinds() -> None:
    assert len(KINDS) >= 60
    assert sum(reason is not None for _, _, reason in KINDS.values()) >= 30


@pytest.mark.parametrize("kind", KINDS)
def test_kind_of_file_is_listed_and_kept_or_refused(tmp_path: Path, kind: str) -> None:
    path, reason = make(tmp_path / "data", kind), KINDS[kind][2]
    images = [image for image in list_labelled_images(tmp_path / "data") if image.path == path]
    assert len(images) == 1
    share = check_share(images, tmp_path / "data", 0, 1)
    if reason is None:
        assert share.problems == {} and share.sha256s == {0: checked_sha256(path)}
        assert open_image(path).mode == "RGB"
        return
    assert share.problems.keys() == {0} and reason in share.problems[0]
    assert "\n" not in share.problems[0]
    if "name or label" not in reason:
        with pytest.raises(BadImage) as refusal:
            open_image(path)
        assert f"{path} {share.problems[0]}; " in str(refusal.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_unreadable_file_is_refused(tmp_path: Path) -> None:
    path = save_picture(tmp_path / "a.png")
    path.chmod(0)
    with pytest.raises(BadImage, match=r"cannot be read \(Permission denied\)"):
        open_image(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root lists every folder")
def test_unreadable_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cats").mkdir(mode=0)
    with pytest.raises(OSError, match=r"folder .*cats cannot be listed \(Permission denied\)"):
        list_labelled_images(tmp_path)


def test_folder_with_the_name_of_an_image_is_a_class(tmp_path: Path) -> None:
    save_picture(tmp_path / "x.png" / "1.png")
    assert [image.path.name for image in list_labelled_images(tmp_path)] == ["1.png"]
    with pytest.raises(BadImage, match=r"x\.png is a folder, not a file; remove it"):
        open_image(tmp_path / "x.png")


def test_linked_folders_are_listed_and_circles_of_links_end(tmp_path: Path) -> None:
    save_picture(tmp_path / "outside" / "1.png")
    data = tmp_path / "data"
    save_picture(data / "dogs" / "2.png")
    (data / "cats").symlink_to(tmp_path / "outside")
    (data / "dogs" / "up").symlink_to(data)
    (data / "self").symlink_to(data / "self")
    listed = list_labelled_images(data)
    assert [(image.path.relative_to(data).as_posix(), image.label) for image in listed] == [
        ("cats/1.png", "cats"),
        ("dogs/2.png", "dogs"),
    ]


def test_two_folders_that_link_to_each_other_are_listed_once_each_way(tmp_path: Path) -> None:
    for one, other in (("a", "b"), ("b", "a")):
        save_picture(tmp_path / one / f"{one}.png")
        (tmp_path / one / "other").symlink_to(tmp_path / other)
    names = [image.path.relative_to(tmp_path).as_posix() for image in list_labelled_images(tmp_path)]
    assert names == ["a/a.png", "a/other/b.png", "b/b.png", "b/other/a.png"]


def test_strips_of_a_picture_meet_without_a_seam(tmp_path: Path) -> None:
    # more than the million pixels that are converted at a time, with shades in both directions
    ramp = Image.linear_gradient("L").resize((1100, 2100))
    picture = Image.merge("RGBA", (ramp, ramp.transpose(Image.Transpose.ROTATE_180), ramp, ramp))
    picture.save(tmp_path / "a.png", compress_level=1)
    whole = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    assert open_image(tmp_path / "a.png").tobytes() == whole.tobytes()


def test_damaged_files_are_read_or_refused_and_nothing_else(tmp_path: Path) -> None:
    rng, path, num_refused = random.Random(0), tmp_path / "a.png", 0
    for suffix in (".png", ".jpg", ".gif", ".bmp", ".webp", ".tif"):
        content = save_picture(tmp_path / f"whole{suffix}", size=(16, 12)).read_bytes()
        for _ in range(60):
            damaged = bytearray(content)
            for _ in range(rng.randint(1, 8)):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            path.write_bytes(damaged[: rng.choice([len(damaged), rng.randrange(1, len(damaged))])])
            try:
                assert open_image(path).mode == "RGB"
            except BadImage as refusal:
                num_refused += 1
                assert str(path) in str(refusal) and "\n" not in str(refusal)
    assert 100 < num_refused < 360
