"""Index files as the vendors write them, for plates that tests make up."""

HARMONY = """<?xml version="1.0" encoding="utf-8"?>
<EvaluationInputData xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" Version="1" xmlns="{namespace}">
  <User>somebody</User><InstrumentType>Phenix</InstrumentType>
  <Plates><Plate><PlateID>{plate}</PlateID><MeasurementID>6f1d</MeasurementID><Name>{plate}</Name><PlateTypeName>384</PlateTypeName>
    <PlateRows>16</PlateRows><PlateColumns>24</PlateColumns><Well id="0101" /></Plate></Plates>
  <Wells><Well><id>0101</id><Row>1</Row><Col>1</Col><Image id="0101K1F1P1R1" /></Well></Wells>
  {maps}<Images>{images}</Images>
</EvaluationInputData>"""
V5, V6 = (f"http://www.perkinelmer.com/PEHH/HarmonyV{n}" for n in (5, 6))
V7 = "43B2A954-E3C3-47E1-B392-6635266B0DD3/HarmonyV7"
_LENGTHS = '<ImageResolutionX Unit="m">5.9799E-07</ImageResolutionX><ImageResolutionY Unit="m">5.9799E-07</ImageResolutionY>'


def harmony(images, namespace=V5, plate="BR00116991"):
    """``images``: (name, row, column, field, plane, time, channel) each."""
    old = namespace == V5
    text = []
    for name, row, column, field, plane, time, channel in images:
        own = f"<ChannelName>dye {channel}</ChannelName>{_LENGTHS}" if old else ""
        text.append(
            f'<Image Version="1"><id>i</id><State>Ok</State><URL>{name}</URL><Row>{row}</Row><Col>{column}</Col>'
            f"<FieldID>{field}</FieldID><PlaneID>{plane}</PlaneID><TimepointID>{time}</TimepointID><ChannelID>{channel}</ChannelID>{own}"
            '<PositionX Unit="m">-0.000646</PositionX><PositionY Unit="m">0.0003230</PositionY>'
            '<AbsPositionZ Unit="m">0.135</AbsPositionZ><PositionZ Unit="m">2E-06</PositionZ></Image>'
        )
    entries = "".join(
        f'<Entry ChannelID="{c}"><ChannelName>dye {c}</ChannelName>{_LENGTHS}</Entry>' for c in sorted({i[6] for i in images})
    )
    maps = (
        "" if old else f'<Maps><Map><Entry ChannelID="1"><FlatfieldProfile>{{x}}</FlatfieldProfile></Entry>{entries}</Map></Maps>'
    )
    return HARMONY.format(namespace=namespace, plate=plate, maps=maps, images="".join(text)).encode()


_BTS = 'xmlns:bts="http://www.yokogawa.co.jp/BTS/BTSSchema/1.0"'


def mlf(images):
    """``images``: (name, row, column, field, z, time, channel, more attributes) each."""
    text = "\n".join(
        f'<bts:MeasurementRecord bts:Type="IMG" bts:Time="2024-04-08T16:00:00" bts:Column="{column}" bts:Row="{row}" '
        f'bts:FieldIndex="{field}" bts:TimePoint="{time}" bts:ZIndex="{z}" bts:TimelineIndex="1" bts:ActionIndex="1" '
        f'bts:X="-324.5" bts:Y="12.25" bts:Z="1.5" bts:Ch="{channel}"{more}>{name}</bts:MeasurementRecord>'
        for name, row, column, field, z, time, channel, more in images
    )
    error = '<bts:MeasurementRecord bts:Type="ERR" bts:Column="14" bts:Row="3">AF Error at C14</bts:MeasurementRecord>'
    return f'<?xml version="1.0" encoding="utf-8"?>\n<bts:MeasurementData {_BTS}>{text}{error}</bts:MeasurementData>'.encode()


def mrf(channels=("1", "2"), size="0.65", plate="BC000017", correction="SC_BP445-45_40x_M10_CH01.tif"):
    text = "".join(
        f'<bts:MeasurementChannel bts:Ch="{c}" bts:HorizontalPixelDimension="{size}" bts:VerticalPixelDimension="{size}" '
        f'bts:HorizontalPixels="8" bts:VerticalPixels="4" bts:ShadingCorrectionSource="{correction}" />'
        for c in channels
    )
    return (
        f'<?xml version="1.0" encoding="utf-8"?><bts:MeasurementDetail bts:Version="1.0" {_BTS}>'
        f'<bts:MeasurementSamplePlate bts:Name="{plate}" bts:WellPlateFileName="p.wpi" />{text}</bts:MeasurementDetail>'
    ).encode()


def xdce(images, position=True):
    """``images``: (name, row, column, field, z, time, excitation, emission) each, as file names count."""
    text = "".join(
        f'<Image filename="{name}" thumbnail="{name}.thumb.jpg" acquisition_time_ms="1"><Well><Row number="{row}"/>'
        f'<Column number="{column}"/></Well>'
        + ('<PlatePosition_um x="4500.5" y="-9000"/><FocusPosition z="12.5"/>' if position else "")
        + f'<Exposure time="50"/><EmissionFilter name="{emission}"/><ExcitationFilter name="{excitation}"/>'
        f'<Identifier field_index="{field - 1}" time_index="{time - 1}" wave_index="0" z_index="{z - 1}"/></Image>'
        for name, row, column, field, z, time, excitation, emission in images
    )
    return (
        '<?xml version="1.0" encoding="utf-8"?><ImageStack xmlns="http://ge.com"><Protocol>'
        '<ObjectiveCalibration id="1" magnification="10" pixel_width="0.65" pixel_height="0.65" unit="um"/><PlateMap>'
        '<FieldOffsets><offset_point x="-250" y="250"/><offset_point x="250" y="250"/></FieldOffsets></PlateMap>'
        f'</Protocol><Images number="{len(images)}">{text}</Images></ImageStack>'
    ).encode()


def htd(wells=("A01", "A02"), rows=2, columns=3, sites=(2, 2), waves=("DAPI", "FITC")):
    def flags(row):
        return ", ".join("TRUE" if f"{chr(64 + row)}{c:02d}" in wells else "FALSE" for c in range(1, columns + 1))

    lines = ['"HTSInfoFile", Version 1.0', '"Description", "a, b"', '"PlateType", 6', '"TimePoints", 1', '"ZSeries", FALSE']
    lines += ['"ZSteps", 1', f'"XWells", {columns}', f'"YWells", {rows}']
    lines += [f'"WellsSelection{r}", {flags(r)}' for r in range(1, rows + 1)]
    lines += ['"Sites", TRUE', f'"XSites", {sites[0]}', f'"YSites", {sites[1]}']
    lines += [f'"SiteSelection{n}", ' + ", ".join(["TRUE"] * sites[0]) for n in range(1, sites[1] + 1)]
    lines += ['"Waves", TRUE', f'"NWavelengths", {len(waves)}']
    lines += [f'"WaveName{n}", "{w}"' for n, w in enumerate(waves, 1)] + ['"EndFile"']
    return "\r\n".join(lines).encode("cp1252")
