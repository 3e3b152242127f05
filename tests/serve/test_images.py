"""Data URLs to images, and everything that is no picture to be read."""

import base64
import io
import struct
import zlib

import pytest
from PIL import Image

pytest.importorskip("fastapi")

from expertflow_quant.serve.errors import ApiError
from expertflow_quant.serve.images import decode_images
from expertflow_quant.serve.limits import Limits


def refusal(url, limits=None):
    with pytest.raises(ApiError) as caught:
        decode_images([url], limits or Limits())
    assert caught.value.param == "messages"
    return str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_the_usual_formats(data_url, kind):
    (image,) = decode_images([data_url(kind=kind)], Limits())
    assert (image.mode, image.size) == ("RGB", (40, 30))
    assert image.getpixel((5, 5))[0] > 240


def test_a_lossless_image_keeps_every_pixel(data_url):
    given = Image.effect_noise((31, 17), 80).convert("RGB")
    (image,) = decode_images([data_url(given)], Limits())
    assert image.tobytes() == given.tobytes()


def test_transparency_is_seen_on_white(data_url):
    (image,) = decode_images([data_url(Image.new("RGBA", (4, 4), (0, 0, 0, 0)))], Limits())
    assert image.getpixel((0, 0)) == (255, 255, 255)


def test_a_photo_is_turned_upright(data_url):
    exif = Image.Exif()
    exif[0x0112] = 6
    (image,) = decode_images([data_url(kind="JPEG", exif=exif)], Limits())
    assert image.size == (30, 40)


@pytest.mark.parametrize(
    "url", ["https://example.com/a.png", "HTTP://x/y", "file:///etc/passwd", "/etc/passwd", "a.png"]
)
def test_nothing_is_fetched_or_opened(url):
    assert "nothing is fetched or opened here" in refusal(url)


def test_a_refusal_does_not_repeat_a_long_address():
    assert len(refusal("https://example.com/" + "x" * 10_000)) < 250


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("data:text/html;base64,aGk=", "not a data URL of an image"),
        ("data:image/png,abc", "not base64"),
        ("data:image/png;base64,!!!!", "base64 is damaged"),
        ("data:image/png;base64,", "no PNG, JPEG, WEBP, GIF"),
        ("data:image/png;base64,aGVsbG8=", "no PNG, JPEG, WEBP, GIF"),
        ("data:image/svg+xml;base64,PHN2Zy8+", "no PNG, JPEG, WEBP, GIF"),
    ],
)
def test_a_data_url_that_holds_no_image(url, reason):
    assert reason in refusal(url)


def test_other_formats_of_pillow_are_not_tried(data_url):
    assert "no PNG" in refusal(data_url(kind="TIFF"))


def test_a_cut_image_is_damaged(data_url):
    noise = Image.effect_noise((64, 64), 80)
    url = data_url(noise)
    assert "damaged" in refusal(url[: len(url) // 8 * 4])


@pytest.mark.parametrize(("side", "reason"), [(9000, "at most 16777216 pixels"), (60_000, "no PNG")])
def test_a_bomb_is_refused_by_its_header(side, reason):
    """A PNG of a hundred bytes that says it is 0.2 or 10 GiB of pixels."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    assert reason in refusal("data:image/png;base64," + base64.b64encode(png).decode())


def test_bounds_are_on_each_image_on_all_and_on_their_number(data_url):
    url = data_url(Image.new("RGB", (10, 10)))
    assert len(decode_images([url] * 3, Limits(max_images=3, max_request_pixels=300))) == 3
    assert "10x10; at most 99 pixels" in refusal(url, Limits(max_image_pixels=99))
    with pytest.raises(ApiError, match="3 images; at most 2"):
        decode_images([url] * 3, Limits(max_images=2))
    with pytest.raises(ApiError, match="300 pixels; at most 299"):
        decode_images([url] * 3, Limits(max_request_pixels=299))


def test_shapes_and_kinds_that_no_processor_reads(data_url):
    assert "sides may differ 200 times" in refusal(data_url(Image.new("L", (201, 1))))
    assert "mode I;16" in refusal(data_url(Image.new("I;16", (4, 4))))
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    assert "animated" in refusal(data_url(frames[0], "GIF", save_all=True, append_images=frames[1:]))


def test_the_second_of_two_images_is_named(data_url):
    with pytest.raises(ApiError, match="image 1: 'https"):
        decode_images([data_url(), "https://example.com/a.png"], Limits())


def test_no_frame_leaks_into_the_bytes(data_url):
    buffer = io.BytesIO(base64.b64decode(data_url().split(",")[1]))
    assert Image.open(buffer).size == (40, 30)
