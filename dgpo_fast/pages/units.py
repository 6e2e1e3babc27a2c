"""Numbers as a person reads them: three digits and the unit that fits."""


def digits(value: float) -> str:
    """Three significant digits, never an exponent: 0.0123, 4.56, 78.9, 1,235"""
    if value == 0:
        return "0"
    exponent = int(f"{value:.2e}".split("e")[1])  # after rounding: 999.9 counts as 1000
    return f"{value:,.{max(0, 2 - exponent)}f}"


def seconds(value: float) -> str:
    """`1.23 s`, `45.6 ms` or `7.89 µs`."""
    size = abs(value)
    if size >= 1 or value == 0:
        return f"{digits(value)} s"
    return f"{digits(value * 1e3)} ms" if size >= 1e-3 else f"{digits(value * 1e6)} µs"


def flop(tera: float, per_second: bool = False) -> str:
    """`1.23 TFLOP`, or in the prefix below or above if that reads better."""
    unit = "FLOP/s" if per_second else "FLOP"
    for prefix, factor in (("P", 1e-3), ("T", 1.0), ("G", 1e3), ("M", 1e6)):
        if abs(tera) * factor >= 1 and not (prefix == "P" and abs(tera) < 10_000):
            return f"{digits(tera * factor)} {prefix}{unit}"
    return f"{digits(tera * 1e6)} M{unit}"


def gbytes(value: float, per_second: bool = False) -> str:
    """`1.23 GB`, or TB or MB."""
    unit = "B/s" if per_second else "B"
    if abs(value) >= 1000:
        return f"{digits(value / 1e3)} T{unit}"
    return f"{digits(value)} G{unit}" if abs(value) >= 1 else f"{digits(value * 1e3)} M{unit}"


def mebibytes(value: float) -> str:
    """`123 MiB` or `4.56 GiB`."""
    return f"{digits(value / 1024)} GiB" if abs(value) >= 1024 else f"{digits(value)} MiB"


def percent(value: float) -> str:
    """`12 %`, with a decimal below ten."""
    return f"{value:.0f} %" if abs(value) >= 9.95 else f"{value:.1f} %"


def short(text: str) -> str:
    """A number with its unit without zeros that say nothing, as an axis shows it: `2.00 s` → `2 s`."""
    number, _, unit = text.partition(" ")
    number = number.rstrip("0").rstrip(".") if "." in number else number
    return f"{number} {unit}".strip()
