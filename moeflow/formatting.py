"""Sizes, durations, shares and foreign values as text.

Knows plain numbers. Knows nothing of models or counters.
"""

MISSING = "–"


def format_bytes(num_bytes: int | None) -> str:
    """Write a size in the largest binary unit that keeps it at 1 or more, such as "318 MiB" or "1.2 GiB"."""
    if num_bytes is None:
        return MISSING
    if num_bytes < 1024:
        return f"{num_bytes} B"
    value, units = num_bytes / 1024, ["KiB", "MiB", "GiB", "TiB"]
    # Rounded, because 1023.7 would read "1024 KiB".
    while round(value) >= 1024 and len(units) > 1:
        value /= 1024
        del units[0]
    text = f"{value:.1f}" if round(value, 1) < 100 else f"{value:.0f}"
    return f"{text.removesuffix('.0')} {units[0]}"


def format_seconds(seconds: float | None) -> str:
    """Write a duration with two or three digits that matter, such as "41 ms", "0.41 s" or "2 min 05 s"."""
    if seconds is None:
        return MISSING
    if seconds < 0.00995:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 0.0995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 9.995:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_percent(share: float | None) -> str:
    """Write a share of 1 as whole percent, such as "71 %"."""
    return MISSING if share is None else f"{share * 100:.0f} %"


def brief(value: object, most: int = 200) -> str:
    """Write a value that comes from a file: of a long one its beginning and its length."""
    text = str(value)
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} letters)"
