"""Rows: what fits, what is short, and which one is recommended."""

import pytest

from helpers.fit_models import small_sizes
from helpers.machine_profiles import small_profile
from moeflow.fit.hit_curves import curve_for
from moeflow.fit.rows import Row, Wish, least_bytes, make_rows, recommend

_PROCESS = 560_000_000


def rows_for(memory_bytes: int, *, target: float | None = None, **profile) -> tuple[list[Row], Wish]:
    # Experts of 24 MB, 768 MB in all.
    sizes = small_sizes(shapes=((1024, 4096),) * 3)
    wish = Wish(1024, 1, memory_bytes, target)
    return make_rows(sizes, wish, small_profile(process_bytes=_PROCESS, **profile), curve_for(8, 2)), wish


def test_a_row_fits_when_its_lines_do_and_else_says_how_much_it_lacks():
    rows, wish = rows_for(1_050_000_000)
    for row in rows:
        assert row.fits == (sum(row.lines.values()) <= 0.97 * wish.memory_bytes)
        assert row.fits == (row.short_bytes == 0)
        assert row.total_bytes - row.short_bytes <= 0.97 * wish.memory_bytes + 1
    assert {row.fits for row in rows} == {True, False}


def test_budgets_go_from_the_smallest_to_all_in_each_format():
    rows, _ = rows_for(10**12)
    sizes = small_sizes(shapes=((1024, 4096),) * 3)
    forms = list(dict.fromkeys(row.form for row in rows))
    assert [form.name for form in forms] == ["as published (bf16)", "lossless", "int8", "int4", "mixed at 3 bits"]
    for form in forms:
        shares = [row.share for row in rows if row.form == form]
        assert shares == sorted(shares)
        assert shares[-1] == 1
        assert next(row for row in rows if row.form == form).lines["experts"] == least_bytes(sizes, form)


def test_the_most_that_fits_is_a_row_and_fills_the_memory():
    rows, _ = rows_for(1_050_000_000)
    most = [row for row in rows if row.budget == "most"]
    assert most
    assert all(row.fits and row.total_bytes == pytest.approx(0.97 * 1_050_000_000, abs=2) for row in most)


def test_a_way_that_loses_nothing_is_recommended_where_it_is_fast_enough():
    chosen = recommend(*rows_for(1_050_000_000))
    assert chosen is not None
    assert chosen.fits
    assert chosen.form.is_exact


def test_a_target_is_reached_by_the_way_that_loses_least():
    rows, wish = rows_for(1_050_000_000)
    exact = max(row.decode_tok_s.mid for row in rows if row.fits and row.form.is_exact)
    lossy = max(row.decode_tok_s.mid for row in rows if row.fits and row.form.rank == 1)
    assert lossy > exact
    chosen = recommend(rows, Wish(wish.context, 1, wish.memory_bytes, (lossy + exact) / 2))
    assert chosen is not None
    assert chosen.form.name == "int8"


def test_beyond_any_row_the_fastest_is_told_and_what_bounds_it():
    slow = {1 << 20: 1e6}
    rows, wish = rows_for(850_000_000, target=1e6, disk_read=slow, disk_read_alone=slow)
    chosen = recommend(rows, wish)
    assert chosen is not None
    assert chosen.decode_tok_s.mid == pytest.approx(max(row.decode_tok_s.mid for row in rows if row.fits), rel=0.1)
    assert rows[0].bound == "disk"
    assert rows_for(10**12)[0][4].bound != "disk"


def test_nothing_is_recommended_where_nothing_fits():
    rows, wish = rows_for(300_000_000)
    assert recommend(rows, wish) is None
    assert all(row.short_bytes > 0 for row in rows)
