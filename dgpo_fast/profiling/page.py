"""`report.html`: the report as one page that needs no network, light or dark, from 390 pixels up."""

from html import escape
from pathlib import Path

from dgpo_fast.models.work import BACKWARD, PARTS_OF_TRAINING
from dgpo_fast.pages.document import document, links, pairs, row, sections, table, tiles
from dgpo_fast.pages.marks import bar, chart, chip, legend
from dgpo_fast.pages.units import digits, flop, gbytes, mebibytes, percent, seconds, short
from dgpo_fast.profiling import charts
from dgpo_fast.profiling.report import Report
from dgpo_fast.profiling.summary import sentences

FILE = "report.html"


def write_page(report: Report, folder: Path) -> None:
    """Writes `report.html` into `folder`."""
    (folder / FILE).write_text(page(report), encoding="utf-8")


def page(report: Report) -> str:
    """The whole page."""
    parts = [
        ("time", "Where the time went", _time(report)),
        ("processes", "Processes", _processes(report)),
        ("compute", "Compute", _compute(report)),
        ("memory", "Memory", _memory(report)),
        ("gpu", "Launches and idle gaps", _gpu(report)),
        ("hottest", "Hottest operations", _hottest(report)),
        ("candidates", "Candidates that were timed", _candidates(report)),
        ("power", "Power and energy", _power(report)),
        ("setup", "What ran", _setup(report)),
    ]
    title = f"Profile of {report.recipe}"
    top = (
        f"<header><h1>{escape(title)}</h1>"
        f'<p class="soft">{escape(" · ".join((report.device.name, report.device.dtype, _moment(report.created))))}</p>'
        f"{links(parts)}</header>"
    )
    trace = f"Trace for ui.perfetto.dev: <code>{escape(report.trace_file)}</code>."
    foot = f"<footer>Numbers: <code>report.json</code>. {trace}</footer>"
    return document(title, f"{top}<main>{_lead(report)}{_tiles(report)}{sections(parts)}</main>{foot}")


def _moment(created: str) -> str:
    return f"{created[:16].replace('T', ' ')} UTC"


def _lead(report: Report) -> str:
    lines = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences(report))
    return f'<section class="lead" aria-label="Summary">{lines}</section>'


def _tiles(report: Report) -> str:
    speed = report.throughput
    shown = [
        (f"{digits(speed.images_per_s)}", "images/s"),
        (seconds(speed.iteration.median_s), "an iteration"),
        (flop(speed.achieved_tflops, per_second=True), "achieved"),
        (percent(speed.of_matmul_percent), "of the matmul rate measured here"),
    ]
    if speed.executed_tflop is not None:
        shown.append((percent(100 * speed.tflop_per_iteration / speed.executed_tflop), "of the executed FLOPs useful"))
    if speed.mfu_percent is not None:
        shown.append((percent(speed.mfu_percent), "MFU, of the datasheet"))
    if report.gpu:
        shown.append((percent(report.gpu.busy_percent), "GPU busy"))
    shown.append((mebibytes(report.memory.peak_mib), "peak memory"))
    if report.power:
        shown.append((f"{digits(report.power.energy_per_image_j)} J", "an image"))
    return tiles(shown)


def _time(report: Report) -> str:
    count = len(report.iterations)
    names = [phase.name for phase in report.phases]
    parts = [work.name for work in report.work if work.name in PARTS_OF_TRAINING]
    return (
        f'<p class="soft">The median of {count} iteration{"s" if count > 1 else ""} after {report.warmup_iterations} '
        f"that warmed up. Below: when each phase ran.</p>"
        f"{charts.stacked(report)}{charts.timeline(report.iterations)}{legend([*names, *parts])}"
        f"{_phase_table(report)}{_rewards(report)}"
    )


def _phase_table(report: Report) -> str:
    rows = []
    for phase in report.phases:
        times = phase.times
        peak = mebibytes(phase.peak_memory_mib) if phase.peak_memory_mib else ""
        rows.append(
            row(
                chip(phase.name),
                seconds(times.median_s),
                percent(phase.share_percent) + bar(phase.share_percent / 100, phase.name),
                f"{seconds(times.low_s)} – {seconds(times.high_s)}",
                peak,
            )
        )
        if phase.name == "train":
            rows += [_part_row(report, name) for name in PARTS_OF_TRAINING]
    whole = report.throughput.iteration
    rows.append(
        row(
            "iteration",
            seconds(whole.median_s),
            "",
            f"{seconds(whole.low_s)} – {seconds(whole.high_s)}",
            mebibytes(report.memory.peak_mib),
            classes="total",
        )
    )
    return table(("phase", "median", "share", "20 – 80 % quantile", "peak memory"), rows, "Seconds per phase")


def _part_row(report: Report, name: str) -> str:
    work = next((work for work in report.work if work.name == name), None)
    if work is None:
        return ""
    share = work.seconds / report.throughput.iteration.median_s
    called = chip(name) + (" with loss and noise" if name == BACKWARD else "")
    cells = (called, seconds(work.seconds), percent(100 * share) + bar(share, name), "", "")
    return row(*cells, classes="part")


def _rewards(report: Report) -> str:
    if report.rewards is None:
        return ""
    r = report.rewards
    return (
        f'<p class="soft" style="margin-top:14px">Rewards: {seconds(r.busy_s)} of work an iteration; the training '
        f"waited {seconds(r.wait_s)} for them, {seconds(r.hidden_s)} were hidden behind other work.</p>"
    )


def _processes(report: Report) -> str:
    if report.processes is None:
        return ""
    names = list(dict.fromkeys(name for process in report.processes.rows for name in process.phases))
    rows = [
        row(str(process.number), *(seconds(process.phases.get(name, 0.0)) for name in names), seconds(process.waited_s))
        for process in report.processes.rows
    ]
    return (
        f'<p class="soft">Medians over the iterations. Imbalance {digits(report.processes.imbalance)}: how long the '
        "slowest process worked, over the mean of all; waiting for the others is no work, and lies in the phases.</p>"
        f"{table(('process', *names, 'waited'), rows, 'Seconds of each process')}"
    )


def _compute(report: Report) -> str:
    device = report.device
    rows = []
    for number, work in enumerate(report.work, 1):
        floor = work.tflop / device.matmul_tflops
        rows.append(
            row(
                f"{number} {chip(work.name)}",
                seconds(work.seconds),
                f"{work.samples:,}",
                flop(work.tflop),
                flop(work.tflops, per_second=True),
                percent(work.of_matmul_percent) + bar(min(1, work.of_matmul_percent / 100), work.name),
                seconds(max(0.0, work.seconds - floor)),
                gbytes(work.gbytes),
                digits(work.flop_per_byte),
            )
        )
    work_head = ("kind of work", "time", "samples", "FLOP", "rate", "of matmul rate", "lost", "moved", "FLOP/B")
    operations = [
        row(
            chip(o.kind),
            seconds(o.seconds),
            percent(o.share_percent) + bar(o.share_percent / 100, o.kind),
            flop(o.tflop) if o.tflop else "",
            flop(o.tflops, per_second=True) if o.tflop else "",
            gbytes(o.gbytes),
            gbytes(o.gb_per_s, per_second=True),
            percent(100 * o.gb_per_s / device.copy_gb_per_s),
        )
        for o in report.operations
    ]
    head = ("operations, traced iteration", "time", "share", "FLOP", "rate", "moved", "bandwidth", "of copy")
    sheet = (
        f" The datasheet ({device.datasheet_source}) gives {flop(device.datasheet_tflops, per_second=True)} dense."
        if device.datasheet_tflops and device.datasheet_source
        else ""
    )
    burst = (
        f" in two seconds of them ({flop(device.matmul_burst_tflops, per_second=True)} in a short burst)"
        if device.kind == "cuda" and device.matmul_burst_tflops
        else ""
    )
    return (
        f'<p class="soft">Measured in this run: a {device.dtype} matmul of {device.matmul_size}² at '
        f"{flop(device.matmul_tflops, per_second=True)}{burst}, a copy of {device.copy_mib} MiB at "
        f"{gbytes(device.copy_gb_per_s, per_second=True)} read and written.{escape(sheet)} FLOPs are counted by "
        "torch's formulas for the model's shapes. “Lost” is the time beyond what they take at the measured matmul "
        "rate; “moved” are the inputs and outputs of every operation, so that fused code can beat the slope.</p>"
        f"{charts.roofline(report)}{charts.roofline_legend(report)}"
        f"{table(work_head, rows, 'Compute by kind of work')}{table(head, operations, 'Compute by class of operation')}"
    )


def _memory(report: Report) -> str:
    memory = report.memory
    rows = [row(escape(name), mebibytes(mib)) for name, mib in memory.held_mib.items()]
    rows.append(row("sum", mebibytes(sum(memory.held_mib.values())), classes="total"))
    facts = [row("peak", mebibytes(memory.peak_mib)), row("of the device", mebibytes(report.device.memory_mib))]
    if memory.reserved_mib is not None:
        facts.insert(1, row("reserved by the allocator", mebibytes(memory.reserved_mib)))
    if memory.predicted_mib is not None:
        facts.append(row("predicted, tensors alone", mebibytes(memory.predicted_mib)))
        if report.device.kind == "cuda":  # a CPU's peak is the whole process's
            facts.append(row("prediction of the peak", percent(100 * memory.predicted_mib / memory.peak_mib)))
    return (
        f'<p class="soft">{escape(memory.what[0].upper() + memory.what[1:])}; colours are the phases.</p>'
        f"{charts.memory(report)}<div class='columns'>{table(('memory', ''), facts, 'Memory')}"
        f"{table(('held between iterations', ''), rows, 'Memory held by weights and states')}</div>"
    )


def _gpu(report: Report) -> str:
    gpu = report.gpu
    if gpu is None:
        return ""
    facts = [
        row("GPU busy", percent(gpu.busy_percent)),
        row("idle", seconds(gpu.idle_ms / 1e3)),
        row("kernels", f"{gpu.kernels:,}"),
        row("kernel launches", f"{gpu.kernel_launches:,}"),
        row("graph launches", f"{gpu.graph_launches:,}"),
        row("copies and fills", f"{gpu.copies + gpu.fills:,}"),
        row("host waits", f"{gpu.synchronisations:,}"),
    ]
    most = max((gap.total_ms for gap in gpu.gaps), default=0.0) or 1.0
    gaps = [
        row(_gap_name(gap.from_us, gap.to_us), f"{gap.count:,}", seconds(gap.total_ms / 1e3) + bar(gap.total_ms / most))
        for gap in gpu.gaps
    ]
    phases = [
        row(
            chip(p.name),
            percent(p.busy_percent) + bar(p.busy_percent / 100, p.name),
            f"{p.kernels:,}",
            f"{p.kernel_launches:,}",
            f"{p.graph_launches:,}",
            f"{p.synchronisations:,}",
        )
        for p in gpu.phases
    ]
    head = ("phase", "busy", "kernels", "kernel launches", "graph launches", "host waits")
    return (
        f'<p class="soft">One traced iteration of {seconds(report.traced_iteration_s)}; tracing slows it down, so gaps '
        "are at most as long in a run.</p>"
        f"<div class='columns'>{table(('iteration', ''), facts, 'GPU totals')}"
        f"{table(('idle gap', 'gaps', 'together'), gaps, 'Idle gaps')}</div>{table(head, phases, 'GPU by phase')}"
    )


def _gap_name(low_us: float, high_us: float | None) -> str:
    low, high = (short(seconds((edge or 0.0) / 1e6)) for edge in (low_us, high_us))
    if high_us is None:
        return f"{low} and longer"
    return f"below {high}" if low_us == 0 else f"{low} – {high}"


def _hottest(report: Report) -> str:
    most = max((operation.share_percent for operation in report.hottest), default=1.0)
    rows = [
        f'<tr><td class="name" data-tip="{escape(o.name)}">{escape(o.name)}</td><td class="text">{chip(o.kind)}</td>'
        f"<td>{o.calls:,}</td><td>{seconds(o.total_ms / 1e3)}</td>"
        f"<td>{percent(o.share_percent)}{bar(o.share_percent / most, o.kind)}</td></tr>"
        for o in report.hottest
    ]
    listed = table(("name", "class", "calls", "time", "share"), rows, "Hottest operations")
    what, own = ("GPU kernels", "") if report.gpu else ("operations", ", by the time that is their own")
    return (
        f'<p class="soft">The {len(rows)} {what} that took longest in the traced iteration{own}.</p>'
        f"{chart('Hottest operations', listed)}"
    )


def _candidates(report: Report) -> str:
    tables = []
    for what, candidates in report.candidates.items():
        rows = [
            row(
                escape(c.name),
                _milliseconds(c.forward_ms),
                _milliseconds(c.backward_ms),
                "chosen" if c.chosen else escape(c.note),
            )
            for c in candidates
        ]
        tables.append(table((what, "forward", "backward", ""), rows, f"Candidates for {what}"))
    return "".join(tables)


def _milliseconds(value: float | None) -> str:
    return seconds(value / 1e3) if value is not None else ""


def _power(report: Report) -> str:
    power = report.power
    if power is None:
        return ""
    facts = [
        ("energy an image", f"{digits(power.energy_per_image_j)} J"),
        ("mean power", f"{digits(power.mean_w)} W"),
        ("highest power", f"{digits(power.max_w)} W"),
        ("limit", f"{digits(power.limit_w)} W" if power.limit_w else ""),
        ("SM clock, median", f"{digits(power.sm_clock_median_mhz)} MHz"),
        ("SM clock, lowest", f"{digits(power.sm_clock_min_mhz)} MHz"),
        ("memory clock", f"{digits(power.memory_clock_median_mhz)} MHz"),
        ("utilisation", percent(power.utilisation_mean_percent)),
        ("highest temperature", f"{digits(power.temperature_max_c)} °C"),
        ("held back by the power cap", percent(power.power_capped_percent)),
        ("held back by heat", percent(power.heat_limited_percent)),
    ]
    rows = [row(name, value) for name, value in facts if value]
    watts = charts.over_time("Power over time", [(t, w) for t, w, _, _ in power.samples], "W")
    clocks = charts.over_time("SM clock over time", [(t, mhz) for t, _, mhz, _ in power.samples], "MHz")
    return (
        f"<div class='columns'><div><h3>Power</h3>{watts}</div><div><h3>SM clock</h3>{clocks}</div></div>"
        f"{table(('by NVML, over the measured iterations', ''), rows, 'Power')}"
    )


def _setup(report: Report) -> str:
    notes = "".join(f"<p>{escape(note)}</p>" for note in report.notes)
    return (
        f'{notes}<p style="margin-top:8px"><code>{escape(report.command)}</code></p>{pairs(report.versions)}'
        f"<details><summary>All settings</summary>{pairs(report.settings)}</details>"
    )
