import collections

import pytest

from sparkmed import config
from sparkmed.hcs import platemap
from sparkmed.hcs.platemap import Entry
from sparkmed.rejection import InputError, Refused

TSV = """plate_map_name\twell_position\tbroad_sample\tmmoles_per_liter\tsolvent\tmoa
M1\tA01\t\t\tDMSO\t
M1\tA02\tBRD-K001\t3.33\tDMSO\tkinase inhibitor
M1\tB01\tNA\tNA\tNA\tNA
M1\tB02\tBRD-K002\t10\tDMSO\tNA
"""
BLANK = {"DMSO": "negative", "": "empty"}


def read(text, barcodes=None, name="maps/M1.txt", **settings):
    data = text if isinstance(text, bytes) else text.encode()
    return platemap.read([(name, data)], config.PlateMaps(**settings), barcodes, 96)


def maps(text, barcodes=None, name="maps/M1.txt", **settings):
    found, rejections = read(text, barcodes, name, **settings)
    assert rejections == []
    return found


def reason(found, plate, well):
    with pytest.raises(Refused) as e:
        platemap.entry(found, plate, well)
    return e.value.reason, e.value.message


def test_wells_of_a_map():
    found = maps(TSV, blank=BLANK)
    assert platemap.entry(found, "M1", "A02") == Entry("M1", "A02", 1, 2, "BRD-K001", 3.33, "mM", "DMSO", None, "kinase inhibitor")
    assert platemap.entry(found, "M1", "a1") == Entry("M1", "A01", 1, 1, solvent="DMSO", control="negative")
    assert platemap.entry(found, "M1", "B01") == Entry("M1", "B01", 2, 1, control="empty")
    assert platemap.entry(found, "M1", "B02").moa is None


def test_a_well_without_a_sample_is_what_the_config_says_or_refused():
    found = maps(TSV)
    why, message = reason(found, "M1", "A01")
    assert why == "EMPTY_SAMPLE" and message.startswith("plate map M1, well A01: only the solvent DMSO")
    assert "neither a compound nor a solvent" in reason(found, "M1", "B01")[1]
    assert platemap.entry(found, "M1", "A02").compound == "BRD-K001"
    some = maps(TSV, blank={"dmso": "negative"})
    assert platemap.entry(some, "M1", "A01").control == "negative" and reason(some, "M1", "B01")[0] == "EMPTY_SAMPLE"


def test_a_well_without_an_entry_or_with_two():
    found = maps(TSV + "M1\tA2\tBRD-K003\t1\tDMSO\t\n")
    assert reason(found, "M1", "H12") == ("NO_ENTRY", "plate map M1 has no well H12")
    assert reason(found, "M1", "A02") == ("TWO_ENTRIES", "plate map M1 has more than one entry for the well A02")
    assert platemap.entry(found, "M1", "B02").compound == "BRD-K002"


ODDITIES = {
    "Windows": lambda t: t.replace("\n", "\r\n"),
    "byte order mark": lambda t: "\ufeff" + t,
    "commas": lambda t: t.replace("\t", ","),
    "semicolons": lambda t: t.replace("\t", ";"),
    "blank lines": lambda t: "\n" + t + "\n\n",
    "blanks": lambda t: t.replace("DMSO", " DMSO "),
    "Metadata_": lambda t: t.replace("plate_map_name", "Metadata_plate_map_name").replace("well_position", "Metadata_Well"),
}


@pytest.mark.parametrize("change", ODDITIES.values(), ids=ODDITIES)
def test_oddities_of_tables(change):
    assert maps(change(TSV), blank=BLANK) == maps(TSV, blank=BLANK)


def test_a_table_without_a_plate_is_named_as_its_file():
    text = "well,InChIKey,concentration,unit,custom\nA1,RYYVLZVUVIJVGH-UHFFFAOYSA-N,5,uM,x\n"
    found = maps(text, name="s3://bucket/maps/Plate.7.csv")
    assert platemap.entry(found, "Plate.7", "A01") == Entry(
        "Plate.7", "A01", 1, 1, "RYYVLZVUVIJVGH-UHFFFAOYSA-N", 5.0, "uM", others={"custom": "x"}
    )


def test_columns_and_constants_of_the_config():
    text = "Pos,Substance,um,Kind,Zeile,Spalte\nx,c1,2.5,-1,C,7\ny,c2,5,0,D,8\nz,c3,,1,3,9\n"
    found = maps(
        text,
        columns={"row": "Zeile", "column": "Spalte", "compound": "Substance", "concentration": "um", "control": "Kind"},
        constants={"unit": "uM", "cell_line": "U2OS", "plate": "P"},
        controls={"-1": "negative", "0": "treated", "1": "positive"},
    )
    assert platemap.entry(found, "P", "C07") == Entry(
        "P", "C07", 3, 7, "c1", 2.5, "uM", control="negative", cell_line="U2OS", others={"Pos": "x"}
    )
    assert platemap.entry(found, "P", "D08").control is None
    third = platemap.entry(found, "P", "C09")
    assert (third.control, third.concentration, third.unit) == ("positive", None, None)


def test_usual_controls():
    text = "well,broad_sample,control_type\nA1,c,negcon\nA2,c,poscon_cp\nA3,c,\nA4,,empty\nA5,c,Treatment\nA6,c,other\n"
    found = maps(text)
    assert [platemap.entry(found, "M1", f"A{n}").control for n in range(1, 6)] == ["negative", "positive", None, "empty", None]
    assert reason(found, "M1", "A6") == (
        "BAD_ENTRY", "plate map M1, well A06: a control of kind 'other', which controls of the config do not name"
    )  # fmt: skip


@pytest.mark.parametrize("value", ["-1", "1_0", "1,5 x", "inf", "high", "1e999"])
def test_a_concentration_that_cannot_be_one(value):
    found = maps(f'well,compound,concentration\nA1,c,"{value}"\nA2,c,1\n')
    why, message = reason(found, "M1", "A1")
    assert why == "BAD_ENTRY" and repr(value) in message
    assert platemap.entry(found, "M1", "A2").concentration == 1


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "no rows"),
        (b"well,compound\n", "no rows"),
        (b"well,compound\nA1\n", "line 2 has 1 cells, the header 2"),
        (b"well,compound\nA1,c,d\n", "line 2 has 3 cells"),
        (b"well,well\nA1,A1\n", "a column occurs twice: 'well'"),
        (b"place,compound\nA1,c\n", "no column for the well"),
        (b'well,compound\nA1,"c\n', "line"),
        (b"well,compound\nA1,\xff\n", "UTF-8"),
        (b"well,compound\nA1,\0\n", "zero bytes"),
    ],
)
def test_a_broken_table(data, said):
    found, (rejection,) = read(data)
    assert (rejection.uri, rejection.stage, rejection.reason) == ("maps/M1.txt", "volumes", "BROKEN_PLATEMAP")
    assert said in rejection.message and found.wells == {}


def test_a_row_of_no_well_is_told_and_the_others_stay():
    found, rejections = read("well,compound\nI01,c\nnowhere,c\n,c\nH12,c\n")
    assert [r.reason for r in rejections] == ["BAD_WELL"] * 3
    assert rejections[0].message == "plate map M1: row 9, column 1: a plate of 96 wells has 8 rows and 12 columns"
    assert platemap.entry(found, "M1", "H12").compound == "c"


def test_a_column_that_is_not_there():
    with pytest.raises(InputError, match="has no column 'broad_sampel' for compound; did you mean 'broad_sample'?"):
        read(TSV, columns={"compound": "broad_sampel"})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"columns": {"compuond": "x"}}, "columns names compuond; did you mean compound?"),
        ({"constants": {"cellline": "x"}}, "constants names cellline; did you mean cell_line?"),
        ({"columns": {"unit": "u"}, "constants": {"unit": "uM"}}, "unit is both in columns and in constants"),
        ({"controls": {"1": "pos"}}, "controls"),
    ],
)
def test_wrong_settings(settings, said):
    with pytest.raises(InputError, match=said.replace("?", r"\?")):
        config.parse(settings, "maps", config.PlateMaps)


BARCODES = (
    b"Assay_Plate_Barcode,Plate_Map_Name,Batch_Number\nBR01,M1,1\nBR02,M1,1\nBR03,M9,1\nBR04,M1,1\nBR04,M2,1\nBR05,,1\nBR01,M1,2\n"
)


def test_barcodes_join_plates_with_maps():
    found = maps(TSV, BARCODES, blank=BLANK)
    assert platemap.entry(found, "BR01", "A02") == platemap.entry(found, "BR02", "A02")
    assert reason(found, "BR0Z2", "A01") == ("UNKNOWN_BARCODE", "no plate map for the barcode 'BR0Z2'; the nearest is 'BR02'")
    assert reason(found, "BR03", "A01") == (
        "UNKNOWN_BARCODE",
        "plate BR03 has the map 'M9', which no table is; the nearest is 'M1'",
    )
    assert reason(found, "BR04", "A01") == ("TWO_ENTRIES", "the table of barcodes has more than one map for BR04")
    assert reason(found, "BR05", "A01") == ("UNKNOWN_BARCODE", "the table of barcodes names no map for BR05")
    assert reason(found, None, "A01")[0] == "UNKNOWN_BARCODE"


def test_without_barcodes_a_plate_is_named_as_its_map():
    assert reason(maps(TSV), "M2", "A01") == ("UNKNOWN_BARCODE", "no plate map is named 'M2'; the nearest is 'M1'")


@pytest.mark.parametrize("data", [b"", b"barcode\nx\n", b"a,b\n1,2\n"])
def test_a_broken_table_of_barcodes(data):
    with pytest.raises(Refused, match="BROKEN_PLATEMAP"):
        read(TSV, data)


BATCHES = ("2016_04_01_a549_48hr_batch1", "2017_12_05_Batch2")


@pytest.mark.parametrize("batch", BATCHES)
def test_real_maps(shared_data, batch):
    folder = shared_data / "platemaps" / "platemaps" / batch
    tables = [(p.as_posix(), p.read_bytes()) for p in sorted((folder / "platemap").iterdir())]
    barcodes = (folder / "barcode_platemap.csv").read_bytes()
    found, rejections = platemap.read(tables, config.PlateMaps(blank=BLANK), barcodes, 384)
    assert rejections == []
    assert set(found.wells) == {p[0].rpartition("/")[2].rpartition(".")[0] for p in tables}
    assert {len(by_well) for by_well in found.wells.values()} == {384}
    entries = [e for by_well in found.wells.values() for e in by_well.values()]
    assert not [e for e in entries if isinstance(e, Refused)]
    assert all((e.compound is None) == (e.control is not None) for e in entries)
    treated = [e for e in entries if e.control is None]
    assert {e.unit for e in treated} == {"mM"} and all(e.concentration > 0 for e in treated)
    assert found.barcodes and set(found.barcodes.values()) <= set(found.wells)
    controls = collections.Counter(e.control for e in found.wells[next(iter(sorted(set(found.barcodes.values()))))].values())
    assert controls["negative"] >= 6

    strict, _ = platemap.read(tables, config.PlateMaps(), barcodes, 384)
    by_kind = collections.Counter(getattr(e, "reason", "treated") for w in strict.wells.values() for e in w.values())
    assert by_kind == {"treated": len(treated), "EMPTY_SAMPLE": len(entries) - len(treated)}


def test_real_plate_of_two_controls(shared_data):
    settings = config.PlateMaps(
        columns={"concentration": "SBS_Doses", "control": "SBS_Controls"},
        constants={"plate": "hcs_plate", "compound": "wortmannin", "unit": "step"},
        controls={-1: "negative", 0: "treated", 1: "positive"},
    )
    data = (shared_data / "hcs_plate" / "metadata.csv").read_bytes()
    found, rejections = platemap.read([("metadata.csv", data)], settings, None, 96)
    assert rejections == [] and list(found.wells) == ["hcs_plate"]
    by_well = found.wells["hcs_plate"]
    assert set(by_well) == {f"{r}{c:02d}" for r in "ABCD" for c in range(1, 13)}
    kinds = collections.Counter(e.control for e in by_well.values())
    assert set(kinds) == {"negative", "positive", None}
    assert {e.concentration for e in by_well.values()} == set(map(float, range(11)))
