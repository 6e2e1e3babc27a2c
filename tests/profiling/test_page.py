"""The page: nothing from outside, nothing that a setting's text could inject, and it works in a browser."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from dgpo_fast.errors import UserError
from dgpo_fast.profiling.compare import comparison_page
from dgpo_fast.profiling.page import page
from dgpo_fast.profiling.report import ADAPTER, Report, read_report, write_report
from dgpo_fast.profiling.summary import sentences
from tests.browser import Browser, needs_chromium
from tests.pages.reader import Reader
from tests.profiling.reports import HOSTILE, gpu_report


def cpu_report() -> Report:
    """The same without what a CPU has not."""
    report = gpu_report()
    device = dataclasses.replace(report.device, kind="cpu", name="a CPU", datasheet_tflops=None, datasheet_source=None)
    speed = dataclasses.replace(report.throughput, mfu_percent=None)
    return dataclasses.replace(
        report,
        device=device,
        throughput=speed,
        gpu=None,
        power=None,
        candidates={},
        rewards=None,
        notes=[],
        memory=dataclasses.replace(report.memory, reserved_mib=None, predicted_mib=None),
    )


def hostile_report() -> Report:
    """Text that would break out of any place it is put in unescaped."""
    report = gpu_report()
    quotes = "\" onmouseover=alert(1) '"
    return dataclasses.replace(
        report,
        recipe=HOSTILE,
        model=HOSTILE,
        command=HOSTILE + quotes,
        created=HOSTILE,
        trace_file=HOSTILE,
        settings={HOSTILE: quotes + HOSTILE, "rewards": [HOSTILE, quotes]},
        versions={HOSTILE: quotes},
        notes=[HOSTILE],
        candidates={HOSTILE: [dataclasses.replace(report.candidates["attention"][0], name=HOSTILE)]},
        hottest=[dataclasses.replace(report.hottest[0], name=quotes + HOSTILE)],
        phases=[dataclasses.replace(report.phases[0], name=quotes + HOSTILE), *report.phases[1:]],
        device=dataclasses.replace(report.device, name=HOSTILE),
    )


PAGES = {
    "gpu": page(gpu_report()),
    "cpu": page(cpu_report()),
    "hostile": page(hostile_report()),
    "comparison": comparison_page(gpu_report(), cpu_report(), ("first", HOSTILE)),
}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_loads_nothing(name: str) -> None:
    """No address but anchors within the page and an empty icon, in attributes and in style; its policy forbids more."""
    reader = Reader(PAGES[name])
    addresses = [value for _, attribute, value in reader.attributes if attribute in ("href", "src", "action", "data")]
    assert all(re.fullmatch(r"#[a-z]+|data:,", address) for address in addresses)
    ids = {value for _, attribute, value in reader.attributes if attribute == "id"}
    assert {address[1:] for address in addresses if address.startswith("#")} <= ids
    style = PAGES[name].split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style
    policy = [value for _, attribute, value in reader.attributes if attribute == "content" and "default-src" in value]
    assert policy and policy[0].startswith("default-src 'none'")


@pytest.mark.parametrize("name", PAGES)
def test_text_from_outside_stays_text(name: str) -> None:
    """One script, no image, no handler, whatever the settings, names and versions say."""
    reader = Reader(PAGES[name])
    assert reader.tags.count("script") == 1 and "img" not in reader.tags
    assert not [attribute for _, attribute, _ in reader.attributes if attribute.startswith("on")]
    if name == "hostile":
        assert sum(HOSTILE in text for text in reader.text) > 8, "it is shown as it is"


def test_what_a_device_cannot_measure_is_left_out() -> None:
    gpu, cpu = Reader(PAGES["gpu"]), Reader(PAGES["cpu"])
    sections = [
        {value for tag, name, value in page.attributes if (tag, name) == ("section", "id")} for page in (gpu, cpu)
    ]
    assert sections[0] - sections[1] == {"gpu", "power", "candidates"}
    assert "MFU" in "".join(gpu.text) and "MFU" not in "".join(cpu.text)


def test_the_summary_is_computed() -> None:
    lines = sentences(gpu_report())
    assert lines[0] == "An iteration of 128 images takes 19.1 s: 6.70 images/s."
    assert lines[1] == "Of that, 48 % rollout, 43 % train, 7.3 % decode and 1.6 % reward."
    assert lines[3].startswith("Most time to win is in the rollout: 1.89 s more than")  # 9.1 s − 5693/790 s
    assert "500 ms lie in 4 gaps of at least 10 ms" in lines[4]
    assert lines[-1].endswith("held back by its power cap 31 % of the time.")
    assert len(sentences(cpu_report())) == len(lines) - 3  # without GPU, rewards and power


def test_a_report_survives_the_disk(tmp_path: Path) -> None:
    """What is read back equals what was written, and the file has the schema that its type says."""
    for report in (gpu_report(), cpu_report(), hostile_report()):
        write_report(report, tmp_path)
        assert read_report(tmp_path) == report == read_report(tmp_path / "report.json")
    schema = TypeAdapter(Report).json_schema()
    content = json.loads((tmp_path / "report.json").read_text())
    assert set(content) == set(schema["properties"]) >= set(schema["required"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: "{", "not JSON"),
        (lambda content: "[]", "not a report of"),
        (lambda content: json.dumps(content | {"schema_name": "version 99"}), "not a report of"),
        (lambda content: json.dumps(content | {"phases": [1]}), r"damaged at 'phases\.0'"),
        (lambda content: json.dumps(content | {"surprise": 1}), "damaged at 'surprise'"),
        (lambda content: None, "cannot be read: No such file"),
    ],
)
def test_a_damaged_report_is_one_line(damage, message: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "report.json"
    text = damage(ADAPTER.dump_python(gpu_report(), mode="json"))
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message) as raised:
        read_report(path)
    assert "\n" not in str(raised.value)


@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", PAGES)
def test_in_a_browser(name: str, width: int, chromium: Browser, tmp_path: Path) -> None:
    """No console message, no request but for the file, no sideways scrolling; the arrow keys walk over a chart."""
    file = tmp_path / "report.html"
    file.write_text(PAGES[name], encoding="utf-8")
    chromium.open(file, width, 900)
    assert chromium.run("innerWidth") == width
    assert chromium.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    chromium.run("const chart = document.querySelector('.chart'), tip = document.getElementById('tip')")
    chromium.run("const marks = [...chart.querySelectorAll('[data-tip]')]; marks[0].focus()")
    last = chromium.run("marks.length") - 1
    assert last > 0
    for key, place in ((None, 0), ("ArrowRight", 1), ("End", last), ("ArrowLeft", last - 1), ("Home", 0)):
        if key is not None:
            chromium.press(key)
        assert chromium.run("marks.indexOf(document.activeElement)") == place
        assert chromium.run("tip.classList.contains('on') && tip.textContent") == chromium.run(
            f"marks[{place}].dataset.tip"
        )
    chromium.press("Escape")
    assert not chromium.run("tip.classList.contains('on')")
    assert chromium.run("chart.querySelectorAll('[tabindex=\"0\"]').length") == 1
    assert chromium.run("document.title") != "owned"
    assert (chromium.complaints, chromium.requests) == ([], [file.as_uri()])


@needs_chromium
def test_what_a_page_asks_for_is_seen(chromium: Browser, tmp_path: Path) -> None:
    """A picture, a script and a message that a page sends, and the errors on its console."""
    file = tmp_path / "report.html"
    file.write_text(
        "<!doctype html><img src='http://a.example/x.png'><script src='https://b.example/y.js'></script>"
        "<script>navigator.sendBeacon('http://c.example/z')</script>"
    )
    chromium.open(file, 1280, 900)
    wanted = {file.as_uri(), "http://a.example/x.png", "https://b.example/y.js", "http://c.example/z"}
    assert set(chromium.requests) == wanted and chromium.complaints
