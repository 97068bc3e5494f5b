"""Odd image files: color profiles, deep pixels, foreign kinds, damage, size and memory."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import threading
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin, TiffImagePlugin
from training.shared import random_image

from sefi_fast.errors import ImageError, PathError
from sefi_fast.training import load_image
from sefi_fast.training.image import LARGEST_FILE, decode
from sefi_fast.training.latents import load_mask
from sefi_fast.training.monitor import History
from sefi_fast.training.subject_state import SubjectSpec, file_checksums

PNG = b"\x89PNG\r\n\x1a\n"
Image.init()
AVIF = "AVIF" in Image.SAVE
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def decoded(content: bytes) -> Image.Image:
    return decode(io.BytesIO(content), "it")


def loaded_both_ways(content: bytes) -> list[Image.Image]:
    return [decoded(content), load_image(Image.open(io.BytesIO(content)))]


def noise(side: int = 48) -> Image.Image:
    return random_image(0, side, side)


def s15(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def profile(space: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr") -> bytes:
    """An ICC profile of version 2.4."""
    description = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78)
    tags = {
        b"desc": description + bytes(-len(description) % 4),
        b"cprt": b"text\0\0\0\0none\0\0\0\0",
        b"wtpt": b"XYZ \0\0\0\0" + s15(0.9642, 1, 0.8249),
        **tags,
    }
    table, data = struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(data), len(value))
        data += value
    connection = b"Lab " if space == b"CMYK" else b"XYZ "
    head = struct.pack(
        ">I4sI4s4s4s", 128 + len(table + data), b"none", 0x02400000, kind, space, connection
    )
    head += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + s15(0.9642, 1, 0.8249)
    return head + bytes(128 - len(head)) + table + data


def curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"


def wide_rgb(red, green, blue) -> bytes:
    names = (b"rXYZ", b"gXYZ", b"bXYZ")
    colors = {
        n: b"XYZ \0\0\0\0" + s15(*xyz) for n, xyz in zip(names, (red, green, blue), strict=True)
    }
    return profile(b"RGB ", {**colors, **{n: curve(2.2) for n in (b"rTRC", b"gTRC", b"bTRC")}})


def inks() -> bytes:
    """Of a printer whose cyan is a dark red."""
    corners = []
    for corner in range(16):
        cyan, magenta, yellow, black = (corner >> bit & 1 for bit in (3, 2, 1, 0))
        light = 255 * (1 - 0.3 * cyan - 0.2 * magenta - 0.1 * yellow) * (1 - 0.9 * black)
        corners += [round(light), 128 + 60 * cyan, 128 + 40 * yellow]
    steps = bytes(range(256))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + s15(1, 0, 0, 0, 1, 0, 0, 0, 1)
    table += steps * 4 + bytes(corners) + steps * 3
    return profile(b"CMYK", {b"A2B0": table + bytes(-len(table) % 4)}, b"prtr")


P3 = wide_rgb((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))
ADOBE = wide_rgb((0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446))
GRAY = profile(b"GRAY", {b"kTRC": curve(1.0)})
INKS = inks()
COLORS = {
    "RGB": (200, 80, 40),
    "RGBA": (200, 80, 40, 255),
    "L": 128,
    "LA": (128, 255),
    "CMYK": (200, 30, 10, 20),
}


def in_srgb(icc: bytes, mode: str, color) -> np.ndarray:
    wanted = ImageCms.profileToProfile(
        Image.new(mode, (1, 1), color),
        ImageCms.ImageCmsProfile(io.BytesIO(icc)),
        ImageCms.createProfile("sRGB"),
        outputMode="RGB",
    )
    return np.asarray(wanted)[0, 0].astype(int)


@pytest.mark.parametrize(
    ("icc", "mode", "suffix", "wanted"),
    [
        *((icc, "RGB", suffix, in_srgb(icc, "RGB", COLORS["RGB"]))
          for icc in (P3, ADOBE) for suffix in ("png", "jpg", "webp", "tif", "avif")),
        *((P3, "RGBA", suffix, in_srgb(P3, "RGB", COLORS["RGB"]))
          for suffix in ("png", "webp", "tif")),
        *((P3, "L", suffix, in_srgb(P3, "RGB", (128,) * 3)) for suffix in ("png", "jpg", "tif")),
        *((GRAY, "L", suffix, [188] * 3) for suffix in ("png", "jpg", "tif")),
        *((GRAY, "LA", suffix, [188] * 3) for suffix in ("png", "tif")),
        *((INKS, "CMYK", suffix, in_srgb(INKS, "CMYK", COLORS["CMYK"]))
          for suffix in ("jpg", "tif")),
        *((SRGB, mode, "png", COLORS["RGB"]) for mode in ("RGB", "RGBA")),
    ],
)  # fmt: skip
def test_color_profiles_are_converted_to_srgb(tmp_path, icc, mode, suffix, wanted):
    if suffix == "avif" and not AVIF:
        pytest.skip("this Pillow has no AVIF")
    lossy = {"quality": 100} if suffix in ("jpg", "webp", "avif") else {}
    path = tmp_path / f"wide.{suffix}"
    Image.new(mode, (32, 32), COLORS[mode]).save(path, icc_profile=icc, **lossy)
    tolerance = 8 if lossy else 1
    loaded = load_image(path)
    for found in (loaded, load_image(Image.open(path)), load_image(loaded)):
        assert np.abs(np.asarray(found).astype(int)[16, 16] - wanted).max() <= tolerance


def test_lab_images_have_their_colors(tmp_path):
    to_lab = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
    )
    lab = ImageCms.applyTransform(Image.new("RGB", (32, 32), (200, 80, 40)), to_lab)
    lab.save(tmp_path / "lab.tif")
    found = load_image(tmp_path / "lab.tif").getpixel((3, 3))
    assert np.abs(np.subtract(found, (200, 80, 40))).max() <= 3


@pytest.mark.parametrize(
    ("icc", "mode"),
    [(bytes(300), "RGB"), (P3[:200], "RGB"), (INKS, "RGB"), (GRAY, "RGB"), (P3, "CMYK")],
)
def test_a_profile_that_does_not_fit_is_ignored_with_a_warning(tmp_path, caplog, icc, mode):
    image = Image.new(mode, (32, 32), COLORS[mode])
    image.save(tmp_path / "a.tif", icc_profile=icc)
    loaded = load_image(tmp_path / "a.tif")
    np.testing.assert_array_equal(np.asarray(loaded), np.asarray(image.convert("RGB")))
    assert "the color profile of" in caplog.text


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colors: int, rows: bytes, *chunks: bytes) -> bytes:
    header = struct.pack(">2I5B", width, height, depth, colors, 0, 0, 0)
    parts = (chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(rows)))
    return PNG + b"".join(parts) + chunk(b"IEND", b"")


def test_sixteen_bit_gray_with_a_profile():
    packed = chunk(b"iCCP", b"gray\0\0" + zlib.compress(GRAY))
    content = png(32, 32, 16, 0, (b"\0" + b"\x80" * 64) * 32, packed)
    assert np.abs(np.asarray(decoded(content)).astype(int) - 188).max() <= 1


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_transparent_gray_of_any_depth(depth):
    """The upper half is black, the lower one white, and one of both is transparent."""
    size = 32 * depth // 8
    rows = (b"\0" + bytes(size)) * 16 + (b"\0" + b"\xff" * size) * 16
    for key, wanted in ((0, (255, 255)), (2**depth - 1, (0, 255))):
        content = png(32, 32, depth, 0, rows, chunk(b"tRNS", struct.pack(">H", key)))
        for loaded in loaded_both_ways(content):
            assert (loaded.getpixel((5, 5))[0], loaded.getpixel((5, 25))[0]) == wanted


@pytest.mark.parametrize("key", [(65535, 32896, 0), (65535, 0, 0), (255, 128, 0)])
def test_a_transparent_color_of_sixteen_bits(key):
    rows = (b"\0" + struct.pack(">3H", 65535, 32896, 0) * 20) * 20
    content = png(20, 20, 16, 2, rows, chunk(b"tRNS", struct.pack(">3H", *key)))
    wanted = (255, 255, 255) if key == (65535, 32896, 0) else (255, 128, 0)
    assert {loaded.getpixel((5, 5)) for loaded in loaded_both_ways(content)} == {wanted}


def tiff(image: Image.Image, **tags: int) -> bytes:
    """A TIFF file with other values of its tags than its pixels have in Pillow."""
    stream = io.BytesIO()
    image.save(stream, "TIFF")
    content = stream.getvalue()
    numbers = {"width": 256, "bits": 258, "photometric": 262}
    for name, value in tags.items():
        start = content.index(struct.pack("<H", numbers[name]), 8) + 8
        content = content[:start] + struct.pack("<H", value) + content[start + 2 :]
    return content


DEEP = np.repeat(np.array([0, 0xC800], np.uint16), 512).reshape(32, 32)
FLOAT = DEEP / np.float32(2**16)
TWELVE = np.repeat(np.array([0, 0xCC], np.uint8), 768).reshape(32, 48)
GRAYS = {
    "16 bits": (tiff(Image.fromarray(DEEP)), 0, 199),
    "16 bits, white is zero": (tiff(Image.fromarray(DEEP), photometric=0), 255, 56),
    "float, white is zero": (tiff(Image.fromarray(FLOAT), photometric=0), 255, 56),
    "12 bits": (tiff(Image.fromarray(TWELVE), width=32, bits=12), 0, 204),
    "16 bits, all dark": (b"P5 32 32 65535 " + (DEEP // 256).astype(">u2").tobytes(), 0, 1),
}  # fmt: skip


@pytest.mark.parametrize(("content", "upper", "lower"), GRAYS.values(), ids=list(GRAYS))
def test_deep_grays_have_the_range_of_their_format(content, upper, lower):
    for loaded in loaded_both_ways(content):
        assert (loaded.getpixel((5, 5)), loaded.getpixel((5, 25))) == ((upper,) * 3, (lower,) * 3)


def test_png_files_with_more_than_a_megabyte_of_text_or_profile(tmp_path):
    image, path = noise(), tmp_path / "a.png"
    texts = [PngImagePlugin.PngInfo() for _ in range(2)]
    texts[0].add_itxt("XML:com.adobe.xmp", "x" * 2000000, zip=True)
    for number in range(70):
        texts[1].add_text(f"part {number}", "x" * 1000000, zip=True)
    for text in texts:
        image.save(path, pnginfo=text, exif=turned())
        wanted = image.transpose(Image.Transpose.ROTATE_270)
        np.testing.assert_array_equal(np.asarray(load_image(path)), np.asarray(wanted))
    for icc, own in ((bytes(3000000), bytes(300)), (P3 + bytes(1600000), P3), (P3, P3)):
        image.save(path, icc_profile=icc, pnginfo=texts[0] if icc == P3 else None)
        wanted = image.copy()
        wanted.info["icc_profile"] = own
        np.testing.assert_array_equal(np.asarray(load_image(path)), np.asarray(load_image(wanted)))


HEIF = b"\0\0\0\x18ftyp%s\0\0\0\0mif1heic" + bytes(400)
KINDS = {
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "HTML": b"\xef\xbb\xbf\n  <!DOCTYPE html><html><body>404</body></html>",
    "is empty": b"",
    "HEIC": HEIF % b"heic",
    "a video": HEIF % b"qt  ",
    "SVG": b"<?xml version='1.0'?>\n<!-- made by a program -->\n<svg xmlns='http://www.w3.org/2000/svg'/>",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n",
    "pickle": b"\x80\x04\x95" + bytes(100),
    "raw file": HEIF % b"crx ",
    "video": b"RIFF\0\0\0\0AVI " + bytes(100),
}


@pytest.mark.parametrize(("kind", "content"), KINDS.items(), ids=list(KINDS))
def test_foreign_files_are_named_and_start_no_program(tmp_path, monkeypatch, kind, content):
    def refuse(*command, **_):
        raise AssertionError(f"{command} was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    for suffix in ("png", "eps", "HEIC"):
        path = tmp_path / f"image.{suffix}"
        path.write_bytes(content)
        with pytest.raises(ImageError, match=kind) as caught:
            load_image(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["EPS", "PDF", "ICO", "TGA", "PCX", "IM", "SGI"])
def test_only_a_few_formats_are_opened(tmp_path, name):
    path = tmp_path / "image.png"
    Image.new("RGB", (64, 64)).save(path, name)
    with pytest.raises(ImageError, match="PNG, JPEG"):
        load_image(path)


def test_the_largest_page_of_a_tiff_file_is_read(tmp_path):
    image, path = noise(64), tmp_path / "a.tif"
    small = image.resize((20, 20))
    for first, *others in ((small, image, small), (image, small), (image, small.resize((64, 64)))):
        first.save(path, save_all=True, append_images=others)
        np.testing.assert_array_equal(np.asarray(load_image(path)), np.asarray(image))
    small.save(path, save_all=True, append_images=[small] * 100)
    with pytest.raises(ImageError, match="more than 100 pages"):
        load_image(path)


def dng(side: int, part: int) -> bytes:
    """A gray page with an image of another size in its SubIFD."""
    entries = [(256, side), (257, side), (258, 8), (259, 1), (262, 1), (273, 200), (277, 1),
               (278, side), (279, side * side), (330, 150)]  # fmt: skip
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries))
    head += b"".join(struct.pack("<HHLL", tag, 4, 1, value) for tag, value in entries) + bytes(4)
    inner = struct.pack("<H", 2) + struct.pack("<HHLL", 256, 4, 1, part)
    inner += struct.pack("<HHLL", 257, 4, 1, part) + bytes(4)
    return head.ljust(150, b"\0") + inner.ljust(50, b"\0") + bytes(side * side)


def test_a_raw_file_with_a_preview_is_refused():
    assert decoded(dng(32, 16)).size == (32, 32)
    with pytest.raises(ImageError, match="only a preview"):
        decoded(dng(32, 4000))


@pytest.mark.filterwarnings("ignore")
def test_a_small_tiff_file_with_many_parts_takes_no_time(monkeypatch):
    loads = []
    directory = TiffImagePlugin.ImageFileDirectory_v2
    load = directory.load
    monkeypatch.setattr(directory, "load", lambda self, f: (loads.append(f), load(self, f)))
    for step in (0, 2):
        content = dng(32, 16)
        offsets = struct.pack("<500L", *(150 + step * number for number in range(500)))
        entry = struct.pack("<HHLL", 330, 4, 1, 150)
        many = struct.pack("<HHLL", 330, 4, 500, len(content))
        assert decoded(content.replace(entry, many) + offsets).size == (32, 32)
    assert 3 < len(loads) < 30


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    refused = []

    def read() -> None:
        for path in [*tmp_path.iterdir(), tmp_path / ("x" * 300), f"{tmp_path}/a\0b.png"]:
            for reader in (load_image, lambda path: load_mask(path, noise(), 16)):
                with pytest.raises((ImageError, PathError)):
                    reader(path)
                refused.append(path)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(20)
    assert len(refused) == 12


def test_the_bytes_of_a_file_are_bounded(tmp_path):
    path = tmp_path / "a.png"
    noise().save(path)
    spec = SubjectSpec(path, mask=path)
    found = f"{zlib.crc32(path.read_bytes()):08x}"
    assert file_checksums(spec) == {"image": found, "mask": found}
    os.truncate(path, LARGEST_FILE + 1)
    for read in (load_image, lambda path: file_checksums(SubjectSpec(path))):
        with pytest.raises(ImageError, match="536,870,913"):
            read(path)
    path.unlink()
    assert file_checksums(spec) == {}


@pytest.mark.parametrize(
    "error", [MemoryError(), struct.error("short"), Image.DecompressionBombError("large")]
)
def test_any_error_of_a_decoder_is_one_error(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    noise().save(tmp_path / "a.png")
    lazy = Image.open(tmp_path / "a.png")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load_prepare", fail)
    for source in (tmp_path / "a.png", lazy):
        with pytest.raises(ImageError):
            load_image(source)


def test_a_damaged_validation_image_of_a_checkpoint_is_an_error():
    state = History([0.1], [0.2], [1.0], [(3, [noise()])]).state_dict()
    (again,) = History.from_state_dict(state).validation[0][1]
    np.testing.assert_array_equal(np.asarray(again), np.asarray(noise()))
    (name,) = (name for name in state if name.startswith("validation"))
    for damaged in (state[name][:500], state[name][1:]):
        with pytest.raises(ImageError, match="validation image"):
            History.from_state_dict({**state, name: damaged})


def test_an_image_above_a_gigabyte_is_refused_with_its_size():
    for side, depth, words in ((13000, 16, "13000"), (20000, 1, "400000000 pixels")):
        with pytest.raises(ImageError, match=words):
            decoded(png(side, side, depth, 0, bytes(1000)))
    with pytest.raises(ImageError, match="12000×12000 .*1 GB"):
        load_image(np.broadcast_to(np.uint8(0), (12000, 12000)))


_PEAK = """
import io, sys
from PIL import Image
from sefi_fast.training.image import load_image

def memory(field):
    with open("/proc/self/status") as lines:
        return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])

for path in sys.argv[1:]:
    load_image(path).close()
    with open("/proc/self/clear_refs", "w") as stream:
        stream.write("5")
    before = memory("VmRSS")
    load_image(path)
    print(memory("VmHWM") - before)
"""


def peaks(*paths) -> list[int]:
    """The bytes of memory that loading each takes, without what the libraries take once."""
    # The allocator is to give back what the first call took.
    settings = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _PEAK, *map(str, paths)],
        env=settings, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "clear_refs" in done.stderr:
        pytest.skip("this system does not measure a peak")
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def saved(folder, side: int) -> list:
    """Images of all the ways to convert, each turned by its EXIF data."""
    tiles = noise(side // 20).resize((side, side), Image.Resampling.NEAREST)
    gray = np.asarray(tiles)[..., 0]
    layered = tiles.convert("RGBA")
    layered.putalpha(Image.fromarray(gray))
    images = {
        "rgb.png": (tiles, {"icc_profile": P3}),
        "rgba.png": (layered, {}),
        "deep.png": (Image.fromarray(gray.astype(np.uint16) * 257), {}),
        "palette.png": (tiles.convert("P"), {"transparency": 3}),
        "a.jpg": (tiles, {"icc_profile": P3}),
        "inks.jpg": (tiles.convert("CMYK"), {"icc_profile": INKS, "progressive": True}),
        "floats.tif": (Image.fromarray(gray.astype(np.float32) / 255), {}),
    }
    for name, (image, options) in images.items():
        image.save(folder / name, exif=turned(), **options)
    return [folder / name for name in images]


def test_memory_is_at_most_four_times_the_pixels(tmp_path):
    side = 1200
    paths = saved(tmp_path, side)
    for path, peak in zip(paths, peaks(*paths), strict=True):
        assert peak < 4 * 3 * side**2 + 2**23, path.name


@pytest.mark.long
@pytest.mark.parametrize(("suffix", "side"), [("png", 11000), ("jpg", 11000), ("webp", 7400)])
def test_the_largest_images_take_at_most_a_gigabyte(tmp_path, suffix, side):
    tiles = noise(side // 20).resize((side, side), Image.Resampling.NEAREST)
    tiles.save(tmp_path / f"a.{suffix}", exif=turned())
    assert peaks(tmp_path / f"a.{suffix}")[0] < 10**9


SEEDS = ("png", "jpg", "webp", "tif", "gif", "bmp", "jp2", "ppm", *(["avif"] if AVIF else []))


def mutated(content: bytes, random: np.random.Generator) -> bytes:
    """Bytes changed, removed, repeated or cut off, most of them near the beginning."""
    data = bytearray(content)
    for _ in range(random.integers(1, 9)):
        at = int(len(data) * random.random() ** 3)
        what = random.integers(5)
        if what == 0:
            data[at : at + 1] = bytes([random.integers(256)])
        elif what == 1:
            data[at : at + 4] = struct.pack(">I", random.choice([0, 1, 2**16, 2**31, 2**32 - 1]))
        elif what == 2:
            del data[at : at + random.integers(1, 40)]
        elif what == 3:
            data[at:at] = data[at : at + random.integers(1, 40)]
        else:
            del data[max(at, 20) :]
    return bytes(data)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", [100, pytest.param(1000, marks=pytest.mark.long)])
def test_mutated_images_load_or_are_refused(number):
    random = np.random.default_rng(0)
    formats = {"jpg": "JPEG", "tif": "TIFF", "jp2": "JPEG2000"}
    for suffix in SEEDS:
        stream = io.BytesIO()
        exif = {"exif": Image.Exif()} if suffix in ("png", "jpg", "webp", "avif", "tif") else {}
        icc = {"icc_profile": P3} if exif else {}
        noise().save(stream, formats.get(suffix, suffix), **exif, **icc)
        for _ in range(number):
            try:
                found = decoded(mutated(stream.getvalue(), random))
            except ImageError:
                continue
            assert found.mode == "RGB" and min(found.size) >= 16
