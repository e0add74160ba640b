import pathlib

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from sparkmed import config, read_archive
from sparkmed.formats import pet, read_headers
from sparkmed.formats.header import Header
from sparkmed.rejection import Refused
from tests.formats import dicoms

PET = "1.2.840.10008.5.1.4.1.1.128"
HALF_LIFE = 6586.2


def drug(**elements) -> Dataset:
    ds = Dataset()
    own = {"RadionuclideTotalDose": 3.7e8, "RadionuclideHalfLife": HALF_LIFE, "RadiopharmaceuticalStartTime": "100000"} | elements
    for name, value in own.items():
        if value is not None:
            setattr(ds, name, value)
    return ds


FACTS = {
    "SOPClassUID": PET, "Modality": "PT", "Units": "BQML", "CorrectedImage": ["ATTN", "DECY", "SCAT"], "DecayCorrection": "START",
    "PatientWeight": 70, "SeriesDate": "20200101", "SeriesTime": "110000", "AcquisitionDate": "20200101",
    "AcquisitionTime": "110000.50", "RescaleSlope": 2.0, "RescaleIntercept": 0,
}  # fmt: skip


def factor(radiopharmaceutical: Dataset | None = None, **elements) -> float:
    ds = dicoms.dataset(np.ones((2, 2), np.uint16), **(FACTS | elements))
    ds.RadiopharmaceuticalInformationSequence = [drug() if radiopharmaceutical is None else radiopharmaceutical]
    read = pydicom.dcmread(pydicom.filebase.DicomBytesIO(dicoms.encoded(ds)))
    return pet.suv_factor(Header(read, True))[0]


DECAYED = 70_000 / (3.7e8 * 2 ** (-3600 / HALF_LIFE))


def test_dose_decays_from_injection_to_the_scan():
    assert factor() == pytest.approx(DECAYED, rel=1e-9)


def test_a_moment_of_injection_goes_before_a_time():
    day_before = drug(RadiopharmaceuticalStartDateTime="20191231100000.00")
    assert factor(day_before) == pytest.approx(70_000 / (3.7e8 * 2 ** (-25 * 3600 / HALF_LIFE)), rel=1e-9)


def test_a_moment_in_a_zone_that_cannot_be_compared_leaves_the_time():
    zoned = {"RadiopharmaceuticalStartDateTime": "20200101093000.00+0300"}
    assert factor(drug(**zoned)) == pytest.approx(DECAYED, rel=1e-9)
    with pytest.raises(Refused, match="no time of injection"):
        factor(drug(**zoned, RadiopharmaceuticalStartTime=None))


def test_injected_before_midnight():
    late = drug(RadiopharmaceuticalStartTime="233000")
    times = {"SeriesTime": "003000", "AcquisitionTime": "003000"}
    assert factor(late, **times) == pytest.approx(DECAYED, rel=1e-9)


def test_values_that_are_corrected_to_injection_do_not_decay():
    assert factor(DecayCorrection="ADMIN") == pytest.approx(70_000 / 3.7e8)


def test_a_series_made_anew_is_as_old_as_its_acquisition():
    assert factor(SeriesTime="180000", AcquisitionTime="110000") == pytest.approx(DECAYED, rel=1e-9)


def test_values_that_are_suv_already():
    assert factor(Units="GML") == 1


@pytest.mark.parametrize("elements, what", [
    ({"PatientWeight": None}, "weight"),
    ({"Units": "GML", "SUVType": "LBM"}, "LBM"),
    ({"PatientWeight": 0}, "weight"),
    ({"Units": "PROPCNTS"}, "PROPCNTS"),
    ({"Units": "CNTS"}, "counts"),
    ({"DecayCorrection": "NONE"}, "NONE"),
    ({"CorrectedImage": ["ATTN"]}, "decay"),
    ({"SeriesTime": "093000", "AcquisitionTime": "094000"}, "before"),
    ({"SeriesDate": None}, "date"),
])  # fmt: skip
def test_a_header_that_lacks_something(elements, what):
    with pytest.raises(Refused, match=what) as e:
        factor(**elements)
    assert e.value.reason == "SUV_UNKNOWN"


@pytest.mark.parametrize("name", ["RadionuclideTotalDose", "RadionuclideHalfLife", "RadiopharmaceuticalStartTime"])
def test_a_drug_that_lacks_something(name):
    with pytest.raises(Refused):
        factor(drug(**{name: None}))


@pytest.mark.parametrize("elements, what", [
    ({"RadiopharmaceuticalStartDateTime": "20200101050000"}, "300 minutes apart"),
    ({"RadionuclideTotalDose": 3.7e5}, "another unit"),  # kBq
    ({"RadionuclideHalfLife": 1221.8}, "6586.2 s"),
])  # fmt: skip
def test_a_drug_that_contradicts_itself(elements, what):
    nuclide = Dataset()
    nuclide.CodeValue, nuclide.CodingSchemeDesignator, nuclide.CodeMeaning = "77004003", "SCT", "^18^Fluorine"
    named = drug(RadionuclideCodeSequence=[nuclide])
    assert factor(named) == pytest.approx(DECAYED, rel=1e-9)
    for name, value in elements.items():
        setattr(named, name, value)
    with pytest.raises(Refused, match=what) as e:
        factor(named)
    assert e.value.reason == "SUV_UNKNOWN"


def series(folder: pathlib.Path, **elements) -> str:
    made = dicoms.series(dicoms.stack((5, 4, 3)), **(FACTS | elements))
    for ds in made:
        ds.RadiopharmaceuticalInformationSequence = [drug()]
    return str(dicoms.write(folder, made))


def test_volume_in_suv_when_asked_for(tmp_path):
    url = series(tmp_path, RescaleSlope=lambda k: 2.0 + k)
    (stored,), _ = read_archive(url)
    (suv,), _ = read_archive(url, settings=config.Volumes(suv=True))
    np.testing.assert_allclose(suv.array, stored.array * DECAYED, rtol=1e-6)
    (a,), _ = read_headers(url)
    (b,), _ = read_headers(url, settings=config.Volumes(suv=True))
    assert a.facts["suv"] == pytest.approx(DECAYED) and b.facts["units"] == "SUVbw" and a.uid != b.uid


def test_a_series_without_a_weight_is_refused_only_when_suv_is_asked_for(tmp_path):
    url = series(tmp_path, PatientWeight=None)
    assert len(read_archive(url)[0]) == 1
    volumes, rejections = read_archive(url, settings=config.Volumes(suv=True))
    assert not volumes and {r.reason for r in rejections} == {"SUV_UNKNOWN"} and "weight" in rejections[0].message


def test_an_injection_of_another_year_costs_only_the_suv(tmp_path):
    """Dates that were shifted for some elements only: the volume stays, the SUV is refused."""
    made = dicoms.series(dicoms.stack((5, 4, 3)), **FACTS)
    for ds in made:
        ds.RadiopharmaceuticalInformationSequence = [drug(RadiopharmaceuticalStartDateTime="20180101100000")]
    url = str(dicoms.write(tmp_path, made))
    assert len(read_archive(url)[0]) == 1
    volumes, rejections = read_archive(url, settings=config.Volumes(suv=True))
    assert not volumes and {r.reason for r in rejections} == {"SUV_UNKNOWN"} and "half-lives" in rejections[0].message


def test_units_of_one_series_differ(tmp_path):
    url = series(tmp_path, Units=lambda k: "BQML" if k else "CNTS")
    volumes, rejections = read_archive(url)
    assert not volumes and {r.reason for r in rejections} == {"MIXED_RESCALE"} and "BQML, CNTS" in rejections[0].message


def test_zones_of_time_are_minded():
    here = factor(drug(RadiopharmaceuticalStartDateTime="20200101100000"), TimezoneOffsetFromUTC="+0100")
    there = factor(drug(RadiopharmaceuticalStartDateTime="20200101090000+0000"), TimezoneOffsetFromUTC="+0100")
    assert here == pytest.approx(there) == pytest.approx(DECAYED)
