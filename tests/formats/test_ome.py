"""Pages of OME-TIFF: each read as what the XML says, with the values that were written; broken files refused."""

import io
import itertools
import zipfile

import numpy as np
import pytest
import tifffile

from sparkmed import formats, storage
from sparkmed.formats import archive, ome, raster
from sparkmed.rejection import Refused, Rejection

SHAPE = (5, 7)


def image(name="Image:0", c=1, z=1, t=1, order="XYCZT", blocks="<TiffData/>", more="", names=("DNA", "GFP", "ER")):
    channels = "".join(f'<Channel ID="Channel:{n}" Name="{names[n]}" SamplesPerPixel="1"/>' for n in range(c))
    return (
        f'<Image ID="{name}"><Pixels ID="P" DimensionOrder="{order}" Type="uint16" SizeX="7" SizeY="5" SizeC="{c}" SizeZ="{z}" '
        f'SizeT="{t}" PhysicalSizeX="650" PhysicalSizeXUnit="nm" PhysicalSizeY="0.65">{channels}{blocks}{more}</Pixels></Image>'
    )


def xml(*images, plate="", uuid="urn:uuid:1"):
    head = '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"'
    return f'{head} UUID="{uuid}">{plate}{"".join(images)}</OME>'


def plate(*wells, name="P7"):
    """``wells``: (row, column, images) with indices from 0."""
    text = "".join(
        f'<Well ID="W{row}.{column}" Row="{row}" Column="{column}">'
        + "".join(f'<WellSample ID="S{i}" Index="{n}"><ImageRef ID="{i}"/></WellSample>' for n, i in enumerate(images))
        + "</Well>"
        for row, column, images in wells
    )
    return f'<Plate ID="Plate:0" Name="{name}">{text}</Plate>'


def tiff(text, count, seed=0, **options):
    """(bytes, pages (count, rows, columns))"""
    array = np.random.default_rng(seed).integers(0, 60000, (count, *SHAPE)).astype(np.uint16)
    out = io.BytesIO()
    with tifffile.TiffWriter(out, bigtiff=options.pop("bigtiff", False), byteorder=options.pop("byteorder", "<")) as writer:
        for n, page in enumerate(array):
            writer.write(page, photometric="minisblack", metadata=None, description=text.encode() if n == 0 else "", **options)
    return out.getvalue(), array


def pages(data):
    return ome.Pages(io.BytesIO(data))


def said(data, number):
    return ome.facts(io.BytesIO(pages(data).page(number)))


LAYOUTS = [{}, {"compression": "zlib", "predictor": True}, {"rowsperstrip": 2, "compression": "lzma"}, {"tile": (16, 16)}]


@pytest.mark.parametrize("byteorder, bigtiff, layout", list(itertools.product("<>", (False, True), range(len(LAYOUTS)))))
def test_a_page_holds_what_was_written(byteorder, bigtiff, layout):
    data, array = tiff(xml(image(c=3, z=2)), 6, byteorder=byteorder, bigtiff=bigtiff, **LAYOUTS[layout])
    assert pages(data).numbers == list(range(6))
    for n in range(6):
        one = pages(data).page(n)
        assert one == pages(data).page(n)
        assert np.array_equal(raster.read_array(one)[0, :, :, 0].T, array[n])


def test_files_by_another_writer_are_read():
    out, array = io.BytesIO(), np.arange(2 * 3 * 35, dtype=np.uint16).reshape(2, 3, *SHAPE)
    with tifffile.TiffWriter(out, ome=True) as writer:
        facts = {"axes": "ZCYX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5, "Channel": {"Name": ["a", "b", "c"]}}
        writer.write(array, photometric="minisblack", metadata=facts)
    data = out.getvalue()
    assert said(data, 4) == {"z": 2, "c": 2, "channel": "b", "pixel_size_um": [0.5, 0.5], "pages": 6}
    assert np.array_equal(raster.read_array(pages(data).page(4))[0, :, :, 0].T, array[1, 1])


@pytest.mark.parametrize("order", ["XYCZT", "XYCTZ", "XYZCT", "XYZTC", "XYTCZ", "XYTZC"])
def test_pages_follow_the_order_of_dimensions(order):
    data, _ = tiff(xml(image(c=2, z=3, t=2, order=order)), 12)
    sizes = {"C": 2, "Z": 3, "T": 2}
    fastest_last = [range(1, sizes[a] + 1) for a in reversed(order[2:])]
    wanted = [dict(zip(reversed(order[2:].lower()), at, strict=True)) for at in itertools.product(*fastest_last)]
    assert [{k: said(data, n)[k] for k in "czt"} for n in range(12)] == wanted


def test_blocks_say_which_page_is_which_plane():
    blocks = '<TiffData IFD="2" FirstC="0"/><TiffData IFD="0" FirstC="1"/><TiffData IFD="3" FirstC="0" FirstZ="1" PlaneCount="2"/>'
    data, _ = tiff(xml(image(c=2, z=2, blocks=blocks)), 5)
    assert pages(data).numbers == [0, 2, 3, 4]  # page 1 is of nothing
    assert [(said(data, n)["c"], said(data, n)["z"]) for n in (0, 2, 3, 4)] == [(2, 1), (1, 1), (1, 2), (2, 2)]


def test_of_a_set_of_files_each_has_its_own_pages():
    def of(uuid, number, file):
        return f'<TiffData IFD="{number}" FirstC="{file}"><UUID FileName="f{file}.ome.tif">{uuid}</UUID></TiffData>'

    blocks = of("urn:uuid:1", 1, 0) + of("urn:uuid:2", 0, 1)
    first, _ = tiff(xml(image(c=2, blocks=blocks)), 2)
    second, _ = tiff(xml(image(c=2, blocks=blocks), uuid="urn:uuid:2"), 2)
    assert {n: said(first, n)["c"] for n in pages(first).numbers} == {1: 1}
    assert {n: said(second, n)["c"] for n in pages(second).numbers} == {0: 2}


def test_wells_and_their_images():
    blocks = [f'<TiffData IFD="{n}" PlaneCount="1"/>' for n in range(3)]
    position = '<Plane TheC="0" TheZ="0" TheT="0" PositionX="1.5" PositionXUnit="mm" PositionY="-2" PositionYUnit="mm"/>'
    images = [image(f"Image:{n}", blocks=blocks[n], more=position) for n in range(3)]
    data, _ = tiff(xml(*images, plate=plate((1, 11, ["Image:2", "Image:0"]), (31, 47, ["Image:1"]))), 3)
    common = {"plate": "P7", "pixel_size_um": [0.65, 0.65], "stage_um": [1500.0, -2000.0, None], "channel": "DNA", "pages": 3}
    assert said(data, 0) == common | {"row": 2, "column": 12, "sample": 2}
    assert said(data, 1) == common | {"row": 32, "column": 48, "sample": 1}
    assert said(data, 2) == common | {"row": 2, "column": 12, "sample": 1}


def test_a_unit_that_is_no_length_is_no_position():
    position = '<Plane TheC="0" TheZ="0" TheT="0" PositionX="1" PositionY="2"/>'  # of the reference frame
    data, _ = tiff(xml(image(t=2, more=position)), 2)
    assert "stage_um" not in said(data, 0)


BROKEN = {
    "cut": xml(image(c=2))[:-20],
    "entity": xml(image(c=2)).replace("<OME", '<!DOCTYPE x [<!ENTITY a "b">]><OME'),
    "more pages than there are": xml(image(c=3)),
    "twice": xml(image("a", c=2), image("b", c=2)),
    "no size": xml(image(c=2)).replace('SizeC="2"', ""),
    "order": xml(image(c=2)).replace("XYCZT", "XYCCT"),
    "beyond": xml(image(c=2, blocks='<TiffData IFD="0" FirstC="2"/>')),
    "two wells": xml(image(c=2), plate=plate((0, 0, ["Image:0"]), (0, 1, ["Image:0"]))),
    "well": xml(image(c=2), plate=plate((0, 0, ["Image:0"])).replace('Row="0"', 'Row="A"')),
    "beyond the plate": xml(image(c=2), plate=plate((999999, 0, ["Image:0"]))),
    "samples": xml(image(c=2)).replace('"GFP" SamplesPerPixel="1"', '"GFP" SamplesPerPixel="3"'),
    "deep": xml("<a>" * 100 + "</a>" * 100),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_xml_is_refused(tmp_path, what):
    data, _ = tiff(BROKEN[what], 2)
    with pytest.raises(Refused) as e:
        pages(data)
    assert e.value.reason == "BROKEN_PICTURE" and "OME-XML" in e.value.message
    (tmp_path / "x.ome.tif").write_bytes(data)
    headers, refused = formats.read_headers(str(tmp_path))
    assert headers == [] and [r.reason for r in refused] == ["BROKEN_PICTURE"]


def damaged(data: bytes, cuts: int, flips: int) -> list[bytes]:
    """``data`` cut off anywhere, and with one bit turned."""
    draw = np.random.default_rng(0)
    made = [data[:n] for n in draw.integers(0, len(data), cuts)]
    for _ in range(flips):
        other = bytearray(data)
        other[draw.integers(0, len(data))] ^= 1 << draw.integers(0, 8)
        made.append(bytes(other))
    return made


def test_every_cut_and_flip_is_refused_or_read(tmp_path):
    data, array = tiff(xml(image(c=2)), 2)
    for some in damaged(data, 60, 120):
        try:
            found = [raster.read_array(pages(some).page(n)) for n in pages(some).numbers]
        except Refused:
            continue
        assert all(f.dtype.kind in "iuf" for f in found)


def test_members_of_a_folder_and_of_a_zip(tmp_path):
    data, array = tiff(xml(image(c=2)), 2)
    single, _ = tiff(xml(image()), 1)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "f.ome.tif").write_bytes(data)
    (tmp_path / "a" / "one.ome.tiff").write_bytes(single)
    (tmp_path / "a" / "other.tif").write_bytes(data)  # a name of any TIFF
    with zipfile.ZipFile(tmp_path / "a" / "z.zip", "w") as z:
        z.writestr("in/f.OME.TIF", data)
    found = [m for file in storage.walk(str(tmp_path / "a")) for m in archive.members(file)]
    assert not [m for m in found if isinstance(m, Rejection)]
    uri = (tmp_path / "a").as_uri()
    wanted = {
        f"tiff://0::{uri}/f.ome.tif": "f.ome.tif", f"tiff://1::{uri}/f.ome.tif": "f.ome.tif",
        f"{uri}/one.ome.tiff": "one.ome.tiff", f"{uri}/other.tif": "other.tif",
        f"tiff://0::zip://in/f.OME.TIF::{uri}/z.zip": "z.zip/in/f.OME.TIF",
        f"tiff://1::zip://in/f.OME.TIF::{uri}/z.zip": "z.zip/in/f.OME.TIF",
    }  # fmt: skip
    assert {m.uri: m.path for m in found} == wanted
    assert {m.container for m in found} == {f"{uri}/{n}" for n in ("f.ome.tif", "one.ome.tiff", "other.tif", "z.zip")}
    uris = list(wanted)
    read = dict(archive.read_many(uris))
    for n, member in ((uris.index(m.uri), m) for m in found):
        assert read[n] == member.read() == archive.open_uri(member.uri)
    for n in (1, 5):
        assert np.array_equal(raster.read_array(read[n])[0, :, :, 0].T, array[1])


def test_pages_are_no_volumes_of_their_own(tmp_path):
    (tmp_path / "f.ome.tif").write_bytes(tiff(xml(image(c=2)), 2)[0])
    (tmp_path / "g.ome.tif").write_bytes(tiff(xml(image()), 1)[0])
    headers, refused = formats.read_headers(str(tmp_path))
    assert [h.source_paths for h in headers] == [("g.ome.tif",)]
    assert {r.reason for r in refused} == {"MULTI_PAGE"} and len(refused) == 2


def test_storage_that_fails_is_no_broken_picture(tmp_path, monkeypatch):
    (tmp_path / "f.ome.tif").write_bytes(tiff(xml(image(c=2)), 2)[0])
    (file,) = storage.walk(str(tmp_path))
    member, _ = archive.members(file)

    class Failing(io.BytesIO):
        def read(self, *_):
            raise OSError("gone")

    monkeypatch.setattr(storage, "open", lambda _: Failing())
    with pytest.raises(Refused) as e:
        archive.open_uri(member.uri)
    assert e.value.reason == "UNREADABLE"


def test_a_page_that_went_is_said_so():
    data, _ = tiff(xml(image(c=2)), 2)
    with pytest.raises(Refused, match="not in the file any more"):
        pages(data).page(2)


def test_one_page_with_xml_that_cannot_be_understood_is_still_a_picture(tmp_path):
    (tmp_path / "x.tif").write_bytes(tiff(BROKEN["cut"], 1)[0])
    (tmp_path / "y.tif").write_bytes(tiff(xml(image(c=3)), 1)[0])  # split off a stack, whose XML it has
    headers, refused = formats.read_headers(str(tmp_path))
    assert not refused and len(headers) == 2 and not any("ome" in h.facts for h in headers)


@pytest.mark.parametrize(
    "said",
    ['{"ome":1}', '{"ome":{"row":1}}', '{"ome":{"row":99,"column":1}}', '{"ome": x', '{"ome":{"c":"a"}}', '{"ome":{"other":1}}']
    + ['{"ome":{"pixel_size_um":[1]}}', '{"ome":{"stage_um":[1,2,"c"]}}', '{"ome":' + "[" * 9999],
)
def test_a_description_that_only_looks_like_ours_says_nothing(tmp_path, said):
    (tmp_path / "x.tif").write_bytes(tiff(said, 1)[0])
    (header,), refused = formats.read_headers(str(tmp_path))
    assert not refused and "ome" not in header.facts


def test_pages_that_are_not_placed_are_refused_each(tmp_path):
    (tmp_path / "f.ome.tif").write_bytes(tiff(xml(image(c=2, blocks='<TiffData IFD="1" NumPlanes="2"/>')), 4)[0])
    (file,) = storage.walk(str(tmp_path))
    found = list(archive.members(file))
    refused = {m.uri.partition("::")[0] for m in found if isinstance(m, Rejection)}
    assert refused == {"tiff://0", "tiff://3"} and len(found) == 4


def test_segments_that_share_bytes_are_refused():
    data, _ = tiff(xml(image(c=2)), 2, rowsperstrip=1)
    with tifffile.TiffFile(io.BytesIO(data)) as opened:
        tags = opened.pages[0].tags
        counts, places = tags[279], tags[273]
        start = places.value[0]
    other = bytearray(data)
    for n in range(5):
        other[places.valueoffset + 4 * n : places.valueoffset + 4 * n + 4] = start.to_bytes(4, "little")
        size = counts.valuebytecount // counts.count
        other[counts.valueoffset + size * n : counts.valueoffset + size * (n + 1)] = (len(data) - start).to_bytes(size, "little")
    with pytest.raises(Refused, match="claims"):
        pages(bytes(other)).page(0)


def test_a_chain_of_pages_without_an_end_is_refused(monkeypatch):
    monkeypatch.setattr(ome, "MOST_PAGES", 500)
    data, _ = tiff(xml(image(c=1, t=150)), 150)
    with tifffile.TiffFile(io.BytesIO(data)) as opened:
        offsets = [opened.pages[n].offset for n in (50, 149)]
    other = bytearray(data)
    entries = int.from_bytes(data[offsets[1] : offsets[1] + 2], "little")
    end = offsets[1] + 2 + 12 * entries
    other[end : end + 4] = offsets[0].to_bytes(4, "little")
    with pytest.raises(Refused):
        pages(bytes(other))


def test_text_is_text_whatever_encoding_it_says_it_had():
    text = xml(image(c=2, names=("Alexa µ", "b"))).replace('encoding="UTF-8"', 'encoding="utf-16"')
    assert said(tiff(text, 2)[0], 0)["channel"] == "Alexa µ"


def test_a_set_whose_file_does_not_say_which_it_is():
    def of(uuid, file):
        return f'<TiffData FirstC="{file}" IFD="0"><UUID>{uuid}</UUID></TiffData>'

    data, _ = tiff(xml(image(c=2, blocks=of("a", 0) + of("b", 1)), uuid=""), 2)
    with pytest.raises(Refused, match="which of them"):
        pages(data)
