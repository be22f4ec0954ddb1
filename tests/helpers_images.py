"""Image files written byte by byte, for what no encoder writes."""

import struct
import zlib


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """The bytes of a PNG of these chunks, each a kind and a content."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


def tiff(width: int, height: int, deflated: bytes, layout: dict[int, int]) -> bytes:
    """The bytes of a grey TIFF in one deflated block: a strip, or with tags 322 and 323 in `layout` a tile."""
    offset_tag, length_tag = (324, 325) if 322 in layout else (273, 279)
    tags = {256: width, 257: height, 258: 8, 259: 8, 262: 1, 277: 1, **layout, length_tag: len(deflated)}
    tags[offset_tag] = 8 + 2 + 12 * (len(tags) + 1) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + deflated
