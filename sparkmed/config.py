"""The config: one strict YAML file says everything a project does.

Every section is frozen; an unknown key is an error that names the nearest known one; every default works on a laptop.
"""

import contextlib
import datetime
import difflib
import hashlib
import json
import pathlib
import re
import types
import typing
import unicodedata
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from sparkmed.rejection import InputError

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
Mm = Annotated[float, Field(gt=0)]
Split = Literal["train", "val", "test"]
S = typing.TypeVar("S", bound=BaseModel)
Names = Annotated[tuple[str, ...], BeforeValidator(lambda v: (v,) if isinstance(v, str) else v)]
_AXIS = {"R": 0, "L": 0, "A": 1, "P": 1, "S": 2, "I": 2}


class Section(BaseModel):
    """Base of every part of the config."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class Component(Section):
    """A class of MONAI or torch by name, or of a package that ``imports`` allows by its dotted name; every other key is passed to
    its constructor."""

    model_config = ConfigDict(frozen=True, extra="allow")
    name: str

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Identity(Section):
    """How patients become subjects."""

    keep_subjects: bool = False
    """True for public data whose subject names are code names already; otherwise a subject is an HMAC of its name."""
    key_file: str | None = None
    """File that holds the HMAC key; without it and without ``key_env`` a key is made in the lake, readable by its owner only."""
    key_env: str = "SPARKMED_KEY"
    """Environment variable that holds the HMAC key; used when set and ``key_file`` is not given."""


class Deidentify(Section):
    """How DICOM files are de-identified: PS3.15 Annex E, Basic Profile, and which of its options."""

    dates: Literal["shifted", "removed"] = "shifted"
    """``shifted``: all dates of a subject go back by the same 1 to 3650 days, which the key decides; times stay. ``removed``: the
    Basic Profile alone."""
    device: Literal["removed", "kept"] = "removed"
    """``kept`` retains what says which device it was, its serial number included (Retain Device Identity Option)."""
    allow: tuple[Literal["burned_in", "ultrasound", "secondary_capture", "screen_save", "hidden_bits"], ...] = ()
    """Images that are held back unless named here: their pixels may show a name, and pixels are not looked at."""


class Catalog(Section):
    """Which files are looked at, and what an archive member may weigh."""

    exclude: tuple[str, ...] = ()
    """Path patterns relative to the archive that are not looked at, such as ``**/thumbnails/*``."""
    max_member_bytes: Positive = 4 << 30
    """Largest size in bytes of one member of a zip or tar."""
    max_ratio: Positive = 1000
    """Largest ratio of unpacked to packed size of a member: beyond it the member is a bomb."""
    max_refused: Share = 0.5
    """Share of refused files above which the stage fails."""


class Labels(Section):
    """Where the truth is: one of a path pattern, a CSV, DICOM segmentations, or the ``{class}`` of the image pattern."""

    pattern: str | None = None
    """Path of the label image of ``{subject}``, such as ``labelsTr/{subject}.nii.gz``."""
    csv: str | None = None
    """Path of a CSV (inside the archive, or a URL) with ``subject`` or ``path``, ``label``, and maybe ``split``. ``label`` is a
    class name or index for classification, the path of a label image for segmentation."""
    segments: dict[str, Names] = {}
    """By class name, which segments of the DICOM SEG or RTSTRUCT that refer to an image are that class: labels, or meanings or
    values of their type codes, in any case. A named segment that an image's objects lack is background, and so is every other
    segment; one that no object of the archive has is an error. Each class of an image comes from one object."""
    allow_missing: bool = False
    """True lets images without a label in: they are scored and never trained on."""


class Splits(Section):
    """Who is trained on. A stable hash of the subject, unless the image pattern has ``{split}`` or the CSV a ``split``."""

    train: Share = 0.7
    val: Share = 0.15
    test: Share = 0.15
    rename: dict[str, Split] = {}
    """What given names mean, such as ``{val: test}``."""
    val_from_train: Share = 0.0
    """Share of the subjects of a given ``train`` that a stable hash moves to ``val``."""

    @model_validator(mode="after")
    def _sum_is_one(self):
        if abs(self.train + self.val + self.test - 1) > 1e-6:
            raise ValueError(f"train + val + test is {self.train + self.val + self.test:g}, wanted 1")
        return self


class Volumes(Section):
    """Which files are images, and what belongs to them."""

    images: str | tuple[str, ...] | None = None
    """Path pattern(s) with ``{subject}``, ``{class}``, ``{split}``, ``*`` and ``**``; a member of an archive is
    ``folder/a.zip/member.dcm``. None: every image that is not a label."""
    only: dict[str, str | float] = {}
    """Facts that an image must have, as ``sparkmed inspect`` names them, with ``*`` for anything: ``{modality: MR, echo: 4.9}``,
    ``{type: "*PRIMARY*M*"}``; an image that lacks one is ignored."""
    labels: Labels = Labels()
    splits: Splits = Splits()
    resample_tilt: bool = False
    """True makes volumes of series of a tilted gantry, whose slices are moved onto their normal; else they are refused."""
    resample_spacing: bool = False
    """True makes volumes of series of variable slice spacing, interpolated at the smallest; else they are refused."""
    slide_level: Annotated[int, Field(ge=0)] | None = None
    """Which level of a whole-slide pyramid is used, 0 being the finest; None: each level is an image of its own."""
    suv: bool = False
    """True brings PET to SUVbw in g/ml, and refuses series whose headers do not say how; else values stay as stored (Bq/ml)."""
    max_refused: Share = 0.5
    """Share of files in refused volumes above which the stage fails."""


class Intensity(Section):
    """How values are brought to a common scale."""

    kind: Literal["none", "zscore", "window", "percentile"] = "zscore"
    """``zscore``: mean 0, deviation 1 per channel. ``window``: [low, high] to [0, 1]. ``percentile``: the same between two
    percentiles."""
    low: float | None = None
    """Lower end: a value (``window``, HU for CT) or a percentile (``percentile``, default 0.5)."""
    high: float | None = None
    """Upper end: a value or a percentile (default 99.5)."""
    nonzero: bool = False
    """True takes statistics over the voxels that are not 0."""
    against: Literal["image", "controls"] = "image"
    """Whose values the statistics are of. ``controls``: of all fields of the plate's negative controls (``plates.maps``), so that
    plates are on one scale and a treatment may be brighter than all of them; nothing is cut off at percentiles."""

    @model_validator(mode="after")
    def _ends_are_in_order(self):
        if self.kind == "window" and (self.low is None or self.high is None or self.low >= self.high):
            raise ValueError(f"kind window wants low < high, got {self.low} and {self.high}")
        if self.kind == "percentile":
            low, high = 0.5 if self.low is None else self.low, 99.5 if self.high is None else self.high
            if not 0 <= low < high <= 100:
                raise ValueError(f"kind percentile wants 0 <= low < high <= 100, got {low:g} and {high:g}")
        if self.against == "controls" and (self.kind not in ("zscore", "percentile") or self.nonzero):
            raise ValueError(f"against: controls wants zscore or percentile of all pixels, got {self.kind}, nonzero {self.nonzero}")
        return self


class Cascade(Section):
    """A first model, of the same images, whose output is a channel of this one (whole tumour first, then its enhancing part).

    When a stage starts, ``model`` becomes one version and ``digest`` and ``classes`` are filled in; a trained model carries a copy.
    """

    model: str
    """``models:/name@alias``, ``models:/name/version``, or the folder or URL of a saved model: a segmentation."""
    tracking: str | None = None
    """Tracking URI of its registry; None: the project's own."""
    output: Literal["labels", "probabilities"] = "labels"
    """What follows the channels of the image, one channel per foreground class of the first model: where it is (0 or 1), or how
    probable. Neither is scaled as intensities are, nor changed by ``train.augment`` but in space. Probabilities of a GPU and of a
    CPU differ in the last digits."""
    digest: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")] = ""
    """SHA-256 of the first model's ``spec.json``, which names that of its weights. When given, the model must have it."""
    classes: tuple[str, ...] = ()
    """Its foreground classes, in the order of their channels."""


class Illumination(Section):
    """Light that falls unevenly on a field, corrected per plate and channel."""

    files: str | None = None
    """Path or URL of the user's own functions as ``.npy`` of (rows, columns), with ``{plate}`` and ``{channel}`` in it, such as
    ``illum/{plate}_Illum{channel}.npy``; None: they are estimated from the fields of the plate."""
    radius: Annotated[float, Field(gt=0, le=0.5)] = 0.2
    """Radius of the median filter over the mean field, as a share of the field's longer edge: larger than cells."""
    least_fields: Positive = 20
    """Fields of a plate below which a function is not estimated: the cells of fewer would be taken for light."""


class Preprocess(Section):
    """What happens to an image before a network sees it; training and scoring run this same spec."""

    orientation: Annotated[str, Field(pattern="^[RLAPSI]{3}$")] | None = "RAS"
    """Axis codes after reorientation; None leaves the stored order (2-D images)."""
    spacing: tuple[Mm, Mm, Mm] | None = None
    """Voxel spacing in mm after resampling; None keeps the image's own."""
    size: tuple[Positive, Positive, Positive] | None = None
    """(I, J, K) that the whole image is resampled to (classification); None keeps the shape."""
    channels: Literal["keep", "gray"] = "keep"
    """``gray`` makes one luminance channel of colours."""
    intensity: Intensity = Intensity()
    illumination: Illumination | None = None
    """How the light on the fields of a plate is evened out; None: not at all."""
    cascade: Cascade | None = None
    """A first model, whose output is added to the channels; None: the image alone."""

    @property
    def guided(self) -> int:
        """How many channels come from a first model; they follow those of the image."""
        return 0 if self.cascade is None else len(self.cascade.classes)

    @property
    def of_plate(self) -> str:
        """Digest of what is done to a field by what its whole plate is like, before anything else; empty: nothing is. Where the
        user's own functions lie does not count."""
        scale = self.intensity if self.intensity.against == "controls" else None
        light = self.illumination and self.illumination.model_copy(update={"files": "given" if self.illumination.files else None})
        return digest(light, scale)[:16] if light or scale else ""

    @model_validator(mode="after")
    def _one_grid(self):
        if self.orientation and len({_AXIS[c] for c in self.orientation}) < 3:
            raise ValueError(f"orientation {self.orientation} names an axis twice; wanted one of R/L, A/P and S/I each")
        if self.spacing and self.size:
            raise ValueError("spacing and size both say the grid, wanted one")
        return self


class FieldQuality(Section):
    """What makes a field suspect, per channel: it is flagged, and left out only where ``leave_out`` names the flag. A limit that is
    None flags nothing; limits of focus depend on the microscope and the stain."""

    bits: Annotated[int, Field(ge=1, le=32)] | None = None
    """Bit depth of the camera, such as 12 in files of 16 bits; None: that of the file."""
    saturated: Share | None = 0.01
    """``saturated``: more than this share of the pixels has the largest value that the bits allow."""
    empty: Annotated[float, Field(ge=0)] | None = 0.0
    """``empty``: the standard deviation, in grey levels, is not above this."""
    slope: float | None = None
    """``blurred``: the log-log slope of the power spectrum is below this: the more negative, the more blurred (Bray
    et al. 2012)."""
    focus: Annotated[float, Field(ge=0)] | None = None
    """``blurred``: the focus score is below this."""
    background: Annotated[float, Field(ge=0)] | None = None
    """``bright``: the background is above this, in grey levels."""
    least_cells: Annotated[int, Field(ge=0)] | None = None
    """``few_cells``: fewer nuclei were found."""
    leave_out: tuple[Literal["saturated", "empty", "blurred", "bright", "few_cells"], ...] = ()
    """Fields with these flags have no part in wells, nor in what is estimated of their plate's light and scale."""


class Nuclei(Section):
    """How nuclei are found in a channel of bright nuclei on dark ground. Lengths are in pixels or, with ``unit: um``, in um."""

    channel: str = "DNA"
    """Name of the channel."""
    diameter: Annotated[float, Field(gt=0)] | None = None
    """Of a typical nucleus; None: estimated in each field, so that fields of few or merged nuclei may be judged differently."""
    unit: Literal["px", "um"] = "px"
    threshold: Literal["otsu", "li", "local"] = "local"
    """``otsu`` and ``li``: one for the whole field. ``local``: somewhat below Otsu's, after what is wider than five diameters was
    subtracted, and above the mean of the surroundings: for uneven ground, and dim nuclei beside bright ones."""
    smoothing: Annotated[float, Field(ge=0, le=1)] = 0.03
    """Standard deviation of the Gaussian before the threshold, as a share of the diameter."""
    split: Annotated[float, Field(gt=0, le=1)] = 0.05
    """How much deeper than the neck between them two touching nuclei must be to be two, as a share of the radius."""
    smallest: Annotated[float, Field(ge=0)] = 0.1
    """Smallest area, as a share of that of a circle of the diameter; smaller objects are dropped."""
    largest: Annotated[float, Field(gt=0)] = 20.0
    """Largest area, in the same unit; larger objects are dropped."""
    border: Literal["kept", "removed"] = "kept"
    """What becomes of nuclei that the edge of the field cuts."""

    @model_validator(mode="after")
    def _areas_are_in_order(self):
        if self.smallest >= self.largest:
            raise ValueError(f"smallest is {self.smallest:g}, largest {self.largest:g}: wanted smallest < largest")
        return self


class Crops(Section):
    """How single cells are cut out around their centres."""

    size: Positive = 96
    """Edge in pixels; ``patches.size`` follows from it."""
    border: Literal["excluded", "padded"] = "excluded"
    """Cells whose crop would reach beyond the field: left out, or padded with 0."""
    table: str | None = None
    """Path (inside the archive) or URL of a CSV or Parquet file of centres: ``x`` and ``y`` in pixels of the stored field, along
    its width and its height; maybe ``cell``; and ``plate``, ``well`` and ``site``, or ``image`` (the path of one of the field's
    files, or its end). CellProfiler's prefix ``Metadata_`` may be there. None: nuclei are found as ``plates.nuclei`` says."""


class Cells(Section):
    """How the cells of a field are found and cut out: in patches, and by the model that is trained on them."""

    crops: Crops
    nuclei: Nuclei | None = None
    """How they are found; None: a table lists them."""
    channel: Annotated[int, Field(ge=0)] = 0
    """Position of the channel of nuclei in a field."""

    @property
    def listed(self) -> bool:
        """Whether centres come from a table."""
        return self.nuclei is None


def _some_or_all(value: Any) -> Any:
    """``all`` or a number above 0; a :class:`ValueError` says so."""
    if value == "all" or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise ValueError("wanted a number above 0, or all for cells")


class Patches(Section):
    """How volumes are cut and written."""

    size: tuple[Positive, Positive, Positive] = (32, 32, 32)
    """(I, J, K) of a patch in voxels after preprocessing; a smaller image is padded. Classification: ``preprocess.size``; cells:
    ``crops.size``."""
    sampler: Literal["grid", "random", "balanced", "foreground", "cells"] = "random"
    """How training patches are placed; validation and test are always cut on the grid, so that each voxel is judged.
    Classification: ``grid``, or ``cells``: a crop around each cell of a field, in every split."""
    per_volume: Annotated[Literal["all"] | int, BeforeValidator(_some_or_all)] = 8
    """Patches per volume (all samplers but grid). Cells: so many of a field at the most, drawn by lot, and ``all`` unless it is
    said; scoring looks at all of them."""
    crops: Crops = Crops()
    """What is cut out around each cell (cells)."""
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a patch that the next one repeats (grid)."""
    foreground: Share = 0.67
    """Share of patches centred on a voxel that is not class 0 (foreground)."""
    class_weights: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    """Share of patches centred on each class (balanced); None: equal."""
    balance: tuple[Literal["class", "compound", "plate", "batch"], ...] = ()
    """What weighs the same in the training loss however many patches it has: with ``[class, plate]`` each class on each plate. Each
    patch is seen once per epoch all the same; its loss counts more the rarer it is. Classes are those of images, the others facts
    of ``plates``."""
    compression: Literal["none", "zstd", "snappy"] = "zstd"
    row_group_mb: Annotated[float, Field(gt=0)] = 8.0
    """Size of a row group in MB before compression; smaller when ``row_groups`` asks for more of them."""
    row_groups: Positive = 16
    """Row groups per split at the least, as far as there are patches: Petastorm's readers need one per rank."""
    file_mb: Annotated[float, Field(gt=0)] = 128.0
    """Size of a Parquet file in MB before compression; also what a Spark task holds in memory."""

    @model_validator(mode="before")
    @classmethod
    def _whole_cells(cls, data):
        """Crops say how large the patches of cells are, and all of them are taken unless ``per_volume`` says otherwise."""
        if isinstance(data, dict) and data.get("sampler") == "cells":
            crops = data.get("crops")
            edge = crops.get("size") if isinstance(crops, dict) else getattr(crops, "size", None)
            edge = edge if isinstance(edge, int) else Crops().size
            data = {"size": (edge, edge, 1), "per_volume": "all", **data}
        return data

    @model_validator(mode="after")
    def _is_of_cells(self):
        edge, of_cells = self.crops.size, self.sampler == "cells"
        if of_cells and self.size != (edge, edge, 1):
            raise ValueError(f"crops.size {edge} makes patches of {[edge, edge, 1]}, size says {list(self.size)}: leave size out")
        if not of_cells and self.crops != Crops():
            raise ValueError(f"crops are for sampler cells, sampler is {self.sampler}")
        if not of_cells and self.per_volume == "all":
            raise ValueError(f"per_volume all is for sampler cells, sampler is {self.sampler}")
        return self


class Optimizer(Component):
    """A class of ``torch.optim`` by name."""

    name: str = "AdamW"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Learning rate of one process; scaled by the number of processes as ``scale_lr`` says."""


class Augment(Section):
    """Random changes of training batches, on the device; labels follow with nearest neighbour. 0 switches one off."""

    flip: tuple[Literal[0, 1, 2], ...] = ()
    """Axes I, J, K that are mirrored with probability 1/2."""
    rot90: tuple[Literal[0, 1, 2], ...] = ()
    """Axes I, J, K about which a patch is turned by 0, 90, 180 or 270 degrees, each with probability 1/4. The two other edges of a
    patch must be equal (half turns of unequal ones are two flips)."""
    rotate: Annotated[float, Field(ge=0)] = 0.0
    """Largest rotation in degrees (about every axis in 3-D, in the plane in 2-D)."""
    scale: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Zoom between 1 - scale and 1 + scale."""
    translate: Annotated[float, Field(ge=0)] = 0.0
    """Largest shift in voxels."""
    elastic: Annotated[float, Field(ge=0)] = 0.0
    """Largest displacement in voxels of a smooth deformation."""
    gamma: Annotated[float, Field(ge=0)] = 0.0
    """Exponent between 1/(1 + gamma) and 1 + gamma on values scaled to [0, 1]."""
    brightness: Annotated[float, Field(ge=0)] = 0.0
    """Largest shift of the values."""
    contrast: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Factor on the values between 1 - contrast and 1 + contrast."""
    noise: Annotated[float, Field(ge=0)] = 0.0
    """Largest standard deviation of added Gaussian noise."""
    channel_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability that a channel becomes 0 everywhere, which is the mean of a z-scored channel and the lower end of a window; each
    by itself, but one always stays."""


PLACE_KEYS = {
    "processes", "threads", "device", "launcher", "restarts", "fusion_mb", "keep_checkpoints", "checkpoint_steps", "memory_mb",
    "compile", "start_timeout", "cache_dir", "cache_gb",
}  # fmt: skip
"""Keys of ``train`` that say where and how training runs, not what is to be learnt: with others a run that was cut off goes on."""


class Train(Section):
    """The network, and how it learns."""

    network: Component = Component(name="UNet", channels=[16, 32, 64, 128], strides=[2, 2, 2], num_res_units=2, norm="instance")
    """A class of ``monai.networks.nets`` by name; channels in and out come from the data and the classes."""
    loss: Component | None = None
    """A class of ``monai.losses`` or ``torch.nn``; None: DiceCELoss for segmentation, CrossEntropyLoss for classification."""
    metric: Component | None = None
    """A class of ``monai.metrics``; None: DiceMetric for segmentation, ROCAUCMetric for classification. Higher is better."""
    optimizer: Optimizer = Optimizer()
    processes: Positive = 2
    """Ranks, one per Spark task slot; 1 trains in this process, without a launcher. A training that was cut off goes on with any
    number; one that was finished is not done again with another."""
    launcher: Literal["horovod", "torch"] = "horovod"
    """Who starts the ranks: ``horovod.spark.run``, or ``pyspark.ml.torch.distributor.TorchDistributor``. With both a rank uses the
    GPU that Spark assigned to its task; where Spark assigns none, torch's ranks use none."""
    restarts: Annotated[int, Field(ge=0)] = 2
    """How often training goes on from its last checkpoint after a rank was lost (killed, out of memory, machine gone); an error in
    a rank ends it at once."""
    compression: Literal["none", "fp16"] = "none"
    """``fp16`` sends gradients between ranks, and sums them, in half precision."""
    fusion_mb: Positive = 64
    """Gradients travel between ranks in buffers of up to this many MiB."""
    sync_batch_norm: bool = False
    """True normalises batches over all ranks instead of over each rank's own part."""
    threads: Positive | None = None
    """Torch threads per rank; None: the machine's cores divided by the ranks on it."""
    batch_size: Positive = 4
    """Patches per rank and step."""
    epochs: Positive = 50
    max_minutes: Annotated[float, Field(gt=0)] | None = None
    """Stop after the epoch that passes this time, whatever ``epochs`` says."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 3
    """Epochs in which the learning rate rises from that of one process to the scaled one (Goyal et al. 2017, arXiv:1706.02677)."""
    scale_lr: Literal["linear", "sqrt", "none"] = "linear"
    schedule: Literal["cosine", "poly", "constant"] = "cosine"
    patience: Positive | None = 15
    """Epochs without a better validation metric before stopping; None never stops early."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 12.0
    """Largest gradient norm."""
    accumulate: Positive = 1
    """Batches per rank whose gradients are summed before a step: the global batch is batch_size x accumulate x processes."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """``bfloat16`` and ``float16`` (GPU only, with a scaled loss) train under autocast where the device computes in it, else in
    float32 all the same; weights, validation and scoring are float32."""
    compile: bool = False
    """True compiles the network with ``torch.compile``: minutes at the start, faster steps on a GPU."""
    channels_last: bool = False
    """True keeps channels innermost in memory, faster for many convolutions; the numbers stay the same but for rounding."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay per step of the moving average of the weights, which is validated and kept as the model; 0: the weights themselves."""
    augment: Augment = Augment()
    initial_weights: str | None = None
    """URL of safetensors weights to start from (transfer learning); layers of another shape keep their initial values."""
    cache_dir: str | None = None
    """Folder on each node's own disk below which patches of a remote dataset are kept, in a folder per user; None: the system's
    folder for temporary files."""
    cache_gb: Annotated[float, Field(ge=0)] = 20.0
    """Most GB of such copies on a node; 0 keeps none."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    keep_checkpoints: Positive = 2
    """How many of the last checkpoints stay beside the best."""
    checkpoint_steps: Positive | None = None
    """Steps between checkpoints within an epoch; None: only at the end of each. What a killed run loses at the most."""
    memory_mb: Annotated[float, Field(gt=0)] = 512.0
    """MB of patches that each rank's loader holds, but a window of 64 MB or two in any case; a split that fits is read once."""
    start_timeout: Positive = 120
    """Seconds to wait for all ranks."""


HEADER_GROUPS = ("modality", "scanner")


class Groups(Section):
    """By what results are looked at in parts, when a champion is chosen and when new volumes are watched."""

    by: Names = ("modality",)
    """``modality`` (where a file has none, its format), ``scanner`` (manufacturer and model in DICOM headers), and columns of
    ``csv``, such as ``[modality, scanner, site, sex]``; a column goes before a header."""
    csv: str | None = None
    """Path of a CSV (inside the archive, or a URL) with ``subject`` or ``path`` and a column per grouping; a blank is unknown. Its
    values are written to tables and the report: give sites code names. A column of more than 64 values is refused."""

    @model_validator(mode="after")
    def _columns_have_a_table(self):
        columns = [c for c in self.by if c not in HEADER_GROUPS]
        if columns and not self.csv:
            raise ValueError(f"by names {', '.join(columns)}, wanted csv to say where these columns are")
        if set(columns) & {"subject", "path"}:
            raise ValueError("by names subject or path: a group is of many")
        return self


class Promote(Section):
    """The gates before the champion. The measure is the mean over subjects of Dice over foreground classes, or of correctness. All
    gates are looked at and written down; one that is None is measured only."""

    minimum: Share = 0.0
    """Smallest mean on the test split."""
    margin: float = 0.0
    """The lower end of the paired bootstrap interval of (challenger - champion) must be above this."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    resamples: Positive = 2000
    group_minimum: Share | None = None
    """Smallest mean in each group of ``groups``."""
    max_ece: Share | None = None
    """Largest expected calibration error, of the voxels that are predicted or true foreground, or of images."""
    least_subjects: Positive = 10
    """Test subjects below which a group, or calibration, is too few to judge: that is said, and keeps nobody out."""
    max_seconds: Annotated[float, Field(gt=0)] | None = None
    """Most seconds per million voxels, as a median over the test volumes."""
    max_slowdown: Annotated[float, Field(gt=0)] | None = None
    """Most times the champion's seconds, as a median over the same volumes on the same kind of device."""


class Watch(Section):
    """When new volumes and the service are said to be in trouble. Alarms are exit statuses of ``score`` and ``watch``: 3 drift, 4
    backlog, 5 quarantine."""

    window: Positive = 200
    """New volumes that are compared with the champion's fingerprint: of those that it scored the ones that came last."""
    minimum: Annotated[int, Field(ge=5)] = 20
    """Subjects on either side below which nothing is judged."""
    psi: Annotated[float, Field(ge=0)] = 0.25
    """Population stability index from which a change matters (Siddiqi 2006: 0.1 is some, 0.25 a large change)."""
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Chance of any false alarm of drift in one look, over all figures and sources."""
    quarantine_days: Annotated[float, Field(gt=0, le=36500)] = 7.0
    """Days back in which files that were new are counted."""
    quarantine_rise: Share = 0.1
    """How far the share of new volumes in quarantine may rise above the share when the champion was chosen."""
    backlog_days: Annotated[float, Field(gt=0)] = 3.0
    """Days that a volume may wait for its first score."""


Code = tuple[
    Annotated[str, Field(min_length=1, max_length=64)],
    Annotated[str, Field(min_length=1, max_length=16)],
    Annotated[str, Field(min_length=1, max_length=64)],
]


class Segment(Section):
    """What a class is in the terms of DICOM: codes as (value, coding scheme, meaning), such as [10200004, SCT, Liver]."""

    model_config = ConfigDict(coerce_numbers_to_str=True)
    category: Code = ("123037004", "SCT", "Anatomical Structure")
    """Of PS3.16 CID 7150."""
    type: Code = ("85756007", "SCT", "Tissue")
    """Of PS3.16 CID 7151 and those it names."""


class Cleaning(Section):
    """What is done to the voxels of one class, on the image's own grid, in this order; the defaults do nothing."""

    threshold: Annotated[float, Field(gt=0, le=1)] | None = None
    """Probability from which on a voxel may be this class, even where background is likelier, and below which it is not; None:
    where it is likelier than background. Where several classes may be, the likeliest is."""
    minimum_ml: Annotated[float, Field(ge=0)] = 0.0
    """Connected components smaller than this volume in ml become background."""
    components: Positive | None = None
    """How many connected components stay, the largest; the others become background. None: all of them."""
    fill_holes: bool = False
    """True gives the class the background that it encloses; other classes stay."""
    connectivity: Literal["faces", "edges", "corners"] = "corners"
    """What voxels of one component share at least: a face (6 neighbours; 4 in an image of one plane), an edge (18; 8) or a corner
    (26; 8)."""


def _some_volumes(value: Any) -> Any:
    """``all``, a date or a share; a :class:`ValueError` says so."""
    with contextlib.suppress(ValueError):
        if isinstance(value, str) and value != "all":
            value = datetime.date.fromisoformat(value) if "-" in value else float(value)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value == "all" or type(value) is datetime.date or (number and 0 <= value <= 1):
        return value
    raise ValueError("wanted all, a date such as 2026-01-31 or a share from 0 to 1")


NIGHT = {"attempts", "attempt_hours", "retry_refused", "backfill", "per_night"}
"""Keys of ``score`` that say which volumes are scored when, not how."""


class Score(Section):
    """How new volumes are predicted, and how predictions are written.

    What is said here when a model is trained belongs to the model: its test figures are made so. When volumes are scored, what is
    said here then counts, but ``mirrors`` and ``postprocess`` only where they are said, else the model's own. Numbers under other
    settings are other predictions.
    """

    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of a window that the next one repeats."""
    blending: Literal["gaussian", "constant"] = "gaussian"
    window_batch: Positive = 4
    """Windows per forward pass."""
    mirrors: Annotated[tuple[Literal[0, 1, 2], ...], AfterValidator(lambda v: tuple(sorted(set(v))))] | None = None
    """Axes I, J, K after preprocessing along which windows are mirrored too: probabilities are the mean over all combinations, 2, 4
    or 8 times the work. None: as the model was trained to be scored, at first without."""
    postprocess: dict[str, Cleaning] | None = None
    """By foreground class, how label maps are cleaned. None: as the model was validated, at first not at all."""
    ensemble: tuple[Annotated[str, BeforeValidator(lambda v: str(v) if isinstance(v, int) else v)], ...] = ()
    """Models whose mean of probabilities is scored, instead of the champion's: versions or aliases of the project's model, or
    ``models:/name/version``, ``models:/name@alias``, folders or URLs. Each preprocesses for itself; their classes must be equal."""
    split_mb: Annotated[float, Field(gt=0)] | None = None
    """A segmentation of more MB than that (as float32, stored or preprocessed, whichever is more) is scored in parts by several
    tasks, which hold some of its planes each, with the same result; between them files of the size of the image and, about twice,
    of its probabilities lie below the lake; one task holds all voxels while it preprocesses them, and one the label map. None: none
    is. Ensembles and cascades are not cut."""
    commit_every: Positive = 256
    """Volumes per commit to the predictions table."""
    max_refused: Share = 0.1
    """Share of volumes that may fail before the stage does."""
    attempts: Positive = 3
    """How often a volume is tried, counted over runs, whose failure may pass (its file cannot be read, a worker ran out of memory);
    then it is left out as one is whose pixels are broken."""
    attempt_hours: Annotated[float, Field(ge=0)] = 6.0
    """Failures of a volume within so many hours are one attempt: a scheduler that starts a failed run again, or a folder that is
    away for an hour, must not use up all of them."""
    retry_refused: bool = False
    """True tries volumes again that are left out for that; so does ``sparkmed score --retry-quarantined``, once."""
    backfill: Annotated[Literal["all"] | datetime.date | float, BeforeValidator(_some_volumes)] = "all"
    """Which volumes that were scored before, by another model or under other settings, are scored by a new champion: ``all``, those
    that are there since a date such as 2026-01-31, or a share of them such as 0.1, always the same. New volumes are always
    scored."""
    per_night: Positive | None = None
    """Most volumes that one run scores, new ones first; the next run goes on. None: all."""
    masks: Literal["nifti", "seg", "both"] = "nifti"
    """``nifti`` writes label maps into the lake, under pseudonyms; ``seg`` DICOM SEG of the source series into ``seg_folder``.
    Volumes that were scored before are scored again when this or how SEG are written changes, and only then is a SEG another. A
    volume of which no SEG can be made is predicted without; the quarantine says why."""
    seg_folder: str | None = None
    """Folder or URL for DICOM SEG. They hold the patient of their source, so it must be as protected as the archive is."""
    seg_type: Literal["BINARY", "FRACTIONAL", "LABELMAP"] = "BINARY"
    """``FRACTIONAL`` holds probabilities in steps of 1/255, ``LABELMAP`` is what older viewers cannot read."""
    segments: dict[str, Segment] = {}
    """Codes by class name; a class without them is an anatomical structure of some tissue, labelled with its name."""

    features: bool = False
    """True keeps what the last layer of a classifier sees of each image, as profiles of a screen; not of ensembles."""

    @property
    def outputs(self) -> list:
        """What is written beside numbers, as plain data: part of what a prediction is. Empty where nothing is."""
        if self.features:
            return ["features"]
        if self.masks == "nifti":
            return []
        return [self.masks, self.seg_type, {name: s.model_dump() for name, s in self.segments.items()}]

    @property
    def numbers(self) -> "Score":
        """The same without where and how outputs are written, and without other models: what belongs to a model."""
        others = {"masks", "seg_folder", "seg_type", "segments", "features", "ensemble", "split_mb"}
        return Score(**self.model_dump(exclude={*others, *NIGHT}))

    @property
    def cleaning(self) -> dict[str, Cleaning]:
        """Of ``postprocess`` what does anything."""
        return {c: clean for c, clean in sorted((self.postprocess or {}).items()) if digest(clean) != digest(Cleaning())}

    def over(self, own: "Score") -> "Score":
        """These settings, and where they say nothing those of ``own``, with which a model was validated."""
        unsaid = {k: getattr(own, k) for k in ("mirrors", "postprocess") if getattr(self, k) is None}
        return self.model_copy(update=unsaid)

    def changes(self, own: "Score") -> list:
        """Mirrors and postprocessing, as plain data, where they are others than those of ``own``; empty where not."""
        mine = self.over(own)
        if (mine.mirrors or (), mine.cleaning) == (own.mirrors or (), own.cleaning):
            return []
        return [list(mine.mirrors or ()), {c: clean.model_dump(exclude_defaults=True) for c, clean in mine.cleaning.items()}]


class Vacuum(Section):
    """What is removed that nobody needs: see ``sparkmed vacuum``."""

    after_days: Annotated[float, Field(gt=0, le=36500)] = 7.0
    """Days that it must have been left alone; longer than any run takes."""


PLANE_GROUPS = frozenset({"plate", "batch", "well", "row", "column", "site", "z", "t", "channel"})
"""What a pattern of ``plates.pattern`` may name."""


def plane_pattern(text: str) -> re.Pattern[str]:
    """The compiled pattern of a plane's path; :class:`InputError` when it is none, or its groups do not place a plane."""
    try:
        pattern = re.compile(text)
    except (re.error, OverflowError, RecursionError) as e:
        raise InputError(f"pattern {text!r} is no regular expression: {e}") from None
    groups = set(pattern.groupindex)
    unknown = sorted(groups - PLANE_GROUPS)
    if unknown:
        raise InputError(f"pattern {text!r} names {', '.join(unknown)}, wanted groups among {', '.join(sorted(PLANE_GROUPS))}")
    if ("well" in groups) == ({"row", "column"} <= groups) or ("well" in groups and groups & {"row", "column"}):
        raise InputError(f"pattern {text!r} wants a group well, or row and column, got {', '.join(sorted(groups)) or 'none'}")
    return pattern


Treatment = Literal["negative", "positive", "empty", "treated"]
PLATEMAP_COLUMNS = (
    "plate", "well", "row", "column", "compound", "concentration", "unit", "solvent", "control", "moa", "cell_line", "replicate"
)  # fmt: skip
"""What a plate map may say of a well, by our names."""


class PlateMaps(Section):
    """What is in the wells: CSV or TSV tables of a row per well, and maybe one that joins the barcodes of plates with them."""

    tables: Names = ()
    """Path patterns, inside the archive, or URLs of the tables, such as ``platemap/*.txt``. A table without a column for the plate
    is the map of its file's name."""
    barcodes: str | None = None
    """Path or URL of the table with ``Assay_Plate_Barcode`` and ``Plate_Map_Name``; None: a plate is named as its map."""
    columns: dict[str, str] = {}
    """Names of the tables' columns by ours, such as ``{control: SBS_Controls}``: plate, well (or row and column), compound,
    concentration, unit, solvent, control, moa, cell_line, replicate. Usual names need not be given."""
    constants: dict[str, str] = {}
    """What holds for every well and is in no column, such as ``{cell_line: U2OS, unit: uM}``, by the same names."""
    controls: dict[str, Treatment] = {}
    """What the values of the column ``control`` mean: negative, positive, empty or treated, such as ``{"-1": negative}``. Usual
    values (negcon, poscon, empty, trt) need not be given."""
    blank: dict[str, Treatment] = {}
    """What a well with an empty compound is, by its solvent, such as ``{DMSO: negative, "": empty}``; others are refused."""

    @model_validator(mode="before")
    @classmethod
    def _keys_are_text(cls, data):
        """YAML reads ``-1:`` as a number."""
        if not isinstance(data, dict):
            return data
        return {k: {str(a): b for a, b in v.items()} if isinstance(v, dict) else v for k, v in data.items()}

    @model_validator(mode="after")
    def _knows_columns(self):
        for where, keys in (("columns", self.columns), ("constants", self.constants)):
            for key in sorted(set(keys) - set(PLATEMAP_COLUMNS)):
                near = difflib.get_close_matches(key, PLATEMAP_COLUMNS, 1, 0.0)[0]
                raise ValueError(f"{where} names {key}; did you mean {near}?")
        both = sorted(set(self.columns) & set(self.constants))
        if both:
            raise ValueError(f"{', '.join(both)} is both in columns and in constants, wanted one")
        return self


def _pairs(value):
    """A mapping as pairs, so that its order counts in a digest; ids may be numbers in YAML."""
    pairs = list(value.items()) if isinstance(value, dict) else value
    if isinstance(pairs, (list, tuple)):
        return [tuple(map(_channel_text, p)) if isinstance(p, (list, tuple)) else p for p in pairs]
    return pairs


def _channel_text(value):
    """Text of a number; without leading zeros, as file names are read."""
    text = str(value) if isinstance(value, int) else value
    return text.lstrip("0") or "0" if isinstance(text, str) and text.isascii() and text.isdigit() else text


class Plates(Section):
    """Plates of a screen: how the names of images are read, and which channels a field has."""

    channels: Annotated[tuple[tuple[str, str], ...], BeforeValidator(_pairs), Field(min_length=1)]
    """Names of the channels and the vendor's id of each, such as ``{DNA: 1, GFP: 2}``, in the order in which a network sees them.
    Ids are as file names or the index have them (``1``, ``DAPI - DAPI``), or a channel's name there. Other channels are ignored."""
    convention: Literal["imagexpress", "opera", "cellvoyager", "cellomics", "incell", "sbs"] | None = None
    """Whose file names these are; None: whichever convention a name follows."""
    pattern: str | None = None
    """Regular expression of other file names, with named groups: well (or row and column), plate, batch, site, z, t, channel. It
    is for the whole name of the file, or for its whole path if it has a ``/``."""
    wells: Literal[6, 12, 24, 48, 96, 384, 1536] = 1536
    """Wells of a plate; an image of a well beyond is refused."""
    z: Literal["planes", "projections"] = "planes"
    """``planes``: each z is a field of its own. ``projections``: only the vendor's projections are fields."""
    index: bool = True
    """False leaves vendors' index files aside."""
    maps: PlateMaps | None = None
    """Plate maps; None: nothing is known of the wells."""
    quality: FieldQuality = FieldQuality()
    nuclei: Nuclei | None = None
    """How nuclei are counted; None: they are not."""
    target: Literal["control", "moa", "compound"] = "control"
    """What of a plate map is the class of a field. A well whose control type, mechanism or compound is none of ``classes``, or of
    which nothing is said, has no label (``volumes.labels.allow_missing``). With ``compound`` (weak labels) no split may have
    compounds of its own: ``split_by`` plate, batch or well."""
    split_by: Literal["compound", "plate", "batch", "well"] = "compound"
    """What no split tears: all doses and replicates of a compound together (controls and empty wells by plate), or all of a plate,
    of a batch, or the fields of a well."""
    splits: dict[Split, Names] = {}
    """By split the wells that are in it, as patterns such as ``{val: B*, test: [C*, D*]}``; the first that fits counts. Other wells
    go by their hash, as ``volumes.splits`` says."""

    @model_validator(mode="after")
    def _fits_together(self):
        if self.pattern is not None:
            if self.convention:
                raise ValueError("pattern and convention both say how names are read, wanted one")
            plane_pattern(self.pattern)
        names, ids = zip(*self.channels, strict=True)
        for what, some in (("names", names), ("ids", ids)):
            if len(set(some)) < len(some) or "" in some:
                raise ValueError(f"{what} of channels repeat or are empty: {list(some)}")
        if self.nuclei and self.nuclei.channel not in names:
            raise ValueError(f"nuclei.channel is {self.nuclei.channel}, wanted one of {list(names)}")
        return self


class Screen(Section):
    """What is made of the predictions on the fields of a screen: profiles of wells, quality of plates, hits."""

    score: str | None = None
    """The class whose probability is the score of a well; None: ``positive`` if there is such a class, else the last one."""
    by: Literal["probability", "projection"] = "probability"
    """``projection``: the score is where the profile of a well lies between the controls that were trained on, 0 at the mean of the
    negative and 1 at that of the positive ones; it goes on where a probability is at its end. Wants ``score.features``."""
    normalize: Literal["standardize", "robustize", "mad_robustize", "spherize"] = "mad_robustize"
    """How profiles are brought on the scale of the negative controls of their plate."""
    side: Literal["two-sided", "greater", "less"] = "greater"
    """On which side of the negative controls the score of a hit lies."""
    fdr: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """False discovery rate up to which a well is a hit."""


class Tracking(Section):
    """Where MLflow is."""

    uri: str | None = None
    """Tracking URI; None: SQLite inside the lake. Only the driver speaks to it."""
    experiment: str | None = None
    """None: the project's name."""
    model: str | None = None
    """Registered model name; None: the project's name."""


class Spark(Section):
    """Where Spark is, when the program is not started by spark-submit."""

    master: str = "local[2]"
    conf: dict[str, str] = {}
    """Spark settings by their own names."""


class Config(Section):
    """One project: all stages."""

    name: Annotated[str, Field(pattern="^[A-Za-z0-9_-]+$")]
    task: Literal["segmentation", "classification"]
    classes: Annotated[tuple[str, ...], Field(min_length=2)]
    """Class names by label value; class 0 of a segmentation is the background."""
    archive: str
    """Folder or URL of the images."""
    lake: str = "./lake"
    """Folder or URL for all tables, datasets and models."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    identity: Identity = Identity()
    deidentify: Deidentify = Deidentify()
    catalog: Catalog = Catalog()
    volumes: Volumes = Volumes()
    plates: Plates | None = None
    """Plates of a screen; None: the archive holds none."""
    preprocess: Preprocess = Preprocess()
    patches: Patches = Patches()
    train: Train = Train()
    groups: Groups = Groups()
    promote: Promote = Promote()
    score: Score = Score()
    screen: Screen = Screen()
    watch: Watch = Watch()
    vacuum: Vacuum = Vacuum()
    tracking: Tracking = Tracking()
    spark: Spark = Spark()
    imports: tuple[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$")], ...] = ()
    """Packages and modules beside MONAI's and torch's own from which networks, losses, metrics and optimizers may come, by their
    dotted names: with ``[mylab.nets]`` the name ``mylab.nets.small.Tiny`` is taken. Their code runs with your rights. What a model
    says cannot add to it."""

    @model_validator(mode="before")
    @classmethod
    def _whole_images(cls, data):
        """A classifier sees whole images unless ``patches`` says otherwise."""
        if isinstance(data, dict) and data.get("task") == "classification" and isinstance(data.get("preprocess"), dict):
            patches = data.get("patches") or {}
            whole = isinstance(patches, dict) and patches.get("sampler") != "cells"
            if whole and data["preprocess"].get("size") is not None:
                data = {**data, "patches": {"size": data["preprocess"]["size"], "sampler": "grid", **patches}}
        return data

    @model_validator(mode="after")
    def _fits_together(self):
        if len(set(self.classes)) != len(self.classes):
            raise ValueError(f"classes repeat: {list(self.classes)}")
        weights = self.patches.class_weights
        if weights is not None and (len(weights) != len(self.classes) or sum(weights) == 0):
            raise ValueError(
                f"patches.class_weights wants {len(self.classes)} weights, one per class and not all 0; got {list(weights)}"
            )
        of_images, of_plates = "class" in self.patches.balance, set(self.patches.balance) - {"class"}
        if (of_images and self.task != "classification") or (of_plates and self.plates is None):
            wanted = "a section plates" if of_plates else "task classification: patches of a segmentation hold several"
            raise ValueError(f"patches.balance {list(self.patches.balance)} wants {wanted}")
        if self.preprocess.of_plate and self.plates is None:
            raise ValueError("preprocess.illumination and intensity.against: controls are of plates: wanted a section plates")
        if self.preprocess.intensity.against == "controls" and self.plates.maps is None:
            raise ValueError("preprocess.intensity.against: controls wants plates.maps, which say where the controls are")
        if self.patches.sampler == "cells":
            self._require_cells()
        elif self.task == "classification" and self.preprocess.size is None:
            raise ValueError("classification wants preprocess.size: every image is resampled to one shape")
        if self.task == "classification" and self.patches.sampler in ("balanced", "foreground"):
            raise ValueError(f"patches.sampler {self.patches.sampler} needs label images; classification takes grid or random")
        for axis in self.train.augment.rot90:
            if len({n for a, n in enumerate(self.patches.size) if a != axis}) > 1:
                raise ValueError(
                    f"train.augment.rot90 about axis {axis} wants patches of equal edges there, patches.size is "
                    f"{list(self.patches.size)}; leave the axis out, or flip"
                )
        if self.train.augment.channel_dropout and self.preprocess.channels == "gray":
            raise ValueError("train.augment.channel_dropout wants two channels or more, preprocess.channels gray makes one")
        if self.train.processes > self.patches.row_groups:
            raise ValueError(
                f"train.processes is {self.train.processes}, patches.row_groups {self.patches.row_groups}: raise that too"
            )
        labels = self.volumes.labels
        given = [k for k in ("pattern", "csv", "segments") if getattr(labels, k)]
        if len(given) > 1:
            raise ValueError(f"volumes.labels has both {' and '.join(given)}, wanted one")
        of_classes = {"volumes.labels.segments": labels.segments, "score.segments": self.score.segments}
        of_classes["score.postprocess"] = self.score.postprocess
        for where, by_class in of_classes.items():
            if by_class and (self.task != "segmentation" or not set(by_class) <= set(self.classes[1:])):
                raise ValueError(
                    f"{where} is by foreground classes of a segmentation, {list(self.classes[1:])}; got {list(by_class)}"
                )
        names = [folded(n) for several in labels.segments.values() for n in several]
        if len(set(names)) < len(names) or "" in names:
            raise ValueError(f"volumes.labels.segments names a segment twice, or nothing: {names}")
        if self.score.masks != "nifti" and not self.score.seg_folder:
            raise ValueError(
                f"score.masks {self.score.masks} wants score.seg_folder: DICOM SEG hold the names of patients, so they go to a "
                "folder that is protected as the archive is, never into the lake"
            )
        if self.screen.score is not None and self.screen.score not in self.classes:
            raise ValueError(f"screen.score is {self.screen.score}, wanted one of classes {list(self.classes)}")
        if self.screen.by == "projection" and not self.score.features:
            raise ValueError("screen.by projection wants score.features: true, which keeps the profiles")
        if self.score.features and (self.task != "classification" or self.score.ensemble):
            raise ValueError("score.features are those of one classifier: not of a segmentation, not of score.ensemble")
        if self.score.masks != "nifti" and self.task != "segmentation":
            raise ValueError(f"score.masks {self.score.masks} is for segmentation, task is {self.task}")
        return self

    def _require_cells(self):
        table, spec = self.patches.crops.table, self.preprocess
        if self.task != "classification":
            raise ValueError(f"patches.sampler cells wants task classification, task is {self.task}")
        if self.plates is None:
            raise ValueError("patches.sampler cells is for the fields of plates: wanted a section plates")
        if table is None and self.plates.nuclei is None:
            raise ValueError(
                "patches.sampler cells wants plates.nuclei, which says how they are found, or patches.crops.table, which lists them"
            )
        if spec.size or spec.spacing or spec.orientation:
            said = [k for k in ("size", "spacing", "orientation") if getattr(spec, k)]
            raise ValueError(
                f"patches.sampler cells cuts fields as they are stored, in whose pixels centres are: wanted no preprocess.{said[0]}"
                + ("; preprocess.orientation: null keeps the stored one" if said == ["orientation"] else "")
            )

    @property
    def cells(self) -> Cells | None:
        """How single cells are found and cut out; None unless patches are cells."""
        if self.patches.sampler != "cells":
            return None
        crops, nuclei = self.patches.crops, self.plates.nuclei
        if crops.table is not None:
            return Cells(crops=crops.model_copy(update={"table": None}))  # where it lies is no part of what is learnt
        return Cells(crops=crops, nuclei=nuclei, channel=[name for name, _ in self.plates.channels].index(nuclei.channel))


class Deidentification(Section):
    """What ``sparkmed deidentify`` does: from where to where, and the sections of a project that count for it."""

    archive: str
    out: str
    key: str | None = None
    """Where a key is found, or made, when ``identity`` names none; None: beside ``out``."""
    identity: Identity = Identity()
    deidentify: Deidentify = Deidentify()
    catalog: Catalog = Catalog()
    spark: Spark = Spark()

    @model_validator(mode="after")
    def _hides_subjects(self):
        if self.identity.keep_subjects:
            raise ValueError("identity.keep_subjects keeps the names of patients, which de-identification must not")
        return self


def folded(name: str) -> str:
    """The name of a segment as names are compared: in any case, runs of blanks as one, its first 64 characters in Unicode NFC.

    >>> folded(" Left  KIDNEY") == folded("left kidney"), folded("O\u0308dem") == folded("\u00f6DEM")
    (True, True)
    """
    text = unicodedata.normalize("NFC", " ".join(name.split()))[:64].strip()
    return unicodedata.normalize("NFC", text.casefold())


def digest(*parts: Any) -> str:
    """SHA-256 of the canonical JSON of sections and plain values, in hex; a key that has its default does not count, so that a
    new key leaves old digests alone.

    >>> digest({"b": 1, "a": 2}) == digest({"a": 2, "b": 1})
    True
    """
    plain = [p.model_dump(mode="json", exclude_defaults=True) if isinstance(p, BaseModel) else p for p in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def deidentification(archive: str, out: str, overrides: typing.Sequence[str] = (), path: str | None = None) -> Deidentification:
    """What to de-identify and how; ``path`` is a project's YAML file, whose key, in its lake too, and shared sections count."""
    data: dict[str, Any] = {}
    if path:
        project = load(path)
        shared = set(Deidentification.model_fields) & set(Config.model_fields) - {"archive"}
        data = project.model_dump(mode="json", include=shared) | {"key": f"{project.lake.rstrip('/')}/subject.key"}
    for override in overrides:
        _override(data, override)
    return parse(data | {"archive": archive, "out": out}, "deidentify", Deidentification)


def load(path: str, overrides: typing.Sequence[str] = ()) -> Config:
    """The config in a YAML file, with ``key.sub=value`` overrides applied; an :class:`InputError` says what is wrong."""
    try:
        text = pathlib.Path(path).read_text("utf-8")
    except OSError as e:
        raise InputError(f"config {path}: {e.strerror or e}") from None
    except UnicodeDecodeError:
        raise InputError(f"config {path}: not a text in UTF-8") from None
    try:
        data = yaml.load(text, Loader=_UniqueKeys)
    except (yaml.YAMLError, ValueError) as e:  # such as a date that is none
        raise InputError(f"config {path}: not YAML: {' '.join(str(e).split())}") from None
    if not isinstance(data, dict):
        raise InputError(f"config {path}: wanted a mapping of keys, got {type(data).__name__}")
    data = {k: v for k, v in data.items() if v is not None}  # a section without keys
    for override in overrides:
        _override(data, override)
    return parse(data, path)


def parse(data: dict, source: str = "config", root: type[S] = Config) -> S:
    """The config in plain data; ``root`` is the section that it is as a whole."""
    try:
        return root.model_validate(data)
    except ValidationError as e:
        raise InputError(f"{source}: " + "; ".join(_sentence(x, root) for x in e.errors())) from None


class _UniqueKeys(yaml.SafeLoader):
    """YAML's 1.1 loader keeps the last of two equal keys; here that is an error."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(k, deep=True) for k, _ in node.value]
        for k in keys:
            if keys.count(k) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {k!r} occurs twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _override(data: dict, override: str):
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise InputError(f"override {override!r}: wanted key=value, such as train.epochs=3")
    *parents, last = key.split(".")
    for p in parents:
        data = data.setdefault(p, {})
        if not isinstance(data, dict):
            raise InputError(f"override {override!r}: {p} is a value, not a section")
    try:
        data[last] = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError):
        data[last] = value


def _sentence(error: dict, root: type[BaseModel]) -> str:
    location = [str(x) for x in error["loc"]]
    where = ".".join(location)
    if error["type"] == "extra_forbidden":
        known = _fields(location[:-1], root)
        near = difflib.get_close_matches(location[-1], known, 1, 0.0)
        return f"unknown key {where}" + (f"; did you mean {'.'.join([*location[:-1], near[0]])}?" if near else "")
    if error["type"] == "missing":
        return f"{where} is missing"
    given = "" if isinstance(error["input"], dict) else f", got {error['input']!r}"
    return (f"{where}: " if where else "") + error["msg"].removeprefix("Value error, ") + given


def _fields(location: list[str], section: type[BaseModel]) -> list[str]:
    """Known keys of the section at ``location`` below ``section``."""
    for name in location:
        field = section.model_fields.get(name)
        options = [] if field is None else _options(field.annotation)
        section = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
        if section is None:
            return []
    return list(section.model_fields)


def _options(annotation) -> list:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return list(typing.get_args(annotation))
    return [annotation]
