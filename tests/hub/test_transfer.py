"""Transfers from a hub on which everything goes wrong: the files are right in the end, or nothing has their name."""

import logging

import pytest

from helpers.hub_server import ID, Fault
from moeflow.errors import ModelSourceError
from moeflow.hub.download import fetch_model
from moeflow.hub.partial_file import PIECE_BYTES

LARGE = "model-1.safetensors"


def large(request):
    """Whether a request is for bytes of the larger shard, at the host that holds them."""
    return request.host == "other" and request.name == LARGE


def first(fault, num_times=1, wanted=large):
    """Return a hub's faults: the first requests for the larger shard get this one."""
    left = [num_times]

    def of(request):
        if wanted(request) and left[0]:
            left[0] -= 1
            return fault(request) if callable(fault) else fault
        return None

    return of


def fetch(server, to, **options):
    """Fetch the model into a folder and hold it against what the hub has."""
    done = fetch_model(ID, to, **options)
    for name in ("config.json", "empty.txt", LARGE, "model-2.safetensors"):
        assert (to / name).read_bytes() == server.files[name]
    assert sorted(path.name for path in to.rglob("*.partial")) == []
    assert sorted(path.name for path in to.rglob("*.journal")) == []
    return done


def refused(to, said, **options):
    """Fetch the model and be refused: the file has no final name then."""
    with pytest.raises(ModelSourceError, match=said) as told:
        fetch_model(ID, to, **options)
    assert "\n" not in str(told.value)
    assert not (to / LARGE).exists()


def test_each_byte_is_fetched_once(server, tmp_path):
    shown = []
    done = fetch(server, tmp_path / "to", progress=lambda *figures: shown.append(figures))
    assert server.sent() == done.fetched_bytes == done.num_bytes == 12_000_027
    assert shown[-1] == (done.num_bytes, done.num_bytes)
    assert [figures for figures, _ in shown] == sorted(figures for figures, _ in shown)
    assert fetch(server, tmp_path / "to").fetched_bytes == 0


def test_several_pieces_are_in_flight(server, tmp_path):
    fetch(server, tmp_path / "to")
    pieces = [(request.begin, request.end) for request in server.requests if large(request)]
    assert sorted(pieces) == [(at, min(at + PIECE_BYTES, 9_000_000)) for at in range(0, 9_000_000, PIECE_BYTES)]


def test_pieces_of_a_long_file_come_several_by_a_request(server, tmp_path):
    """And fewer near the end, so that no connection is left with much."""
    server.files[LARGE] = bytes(80 << 20)
    done = fetch(server, tmp_path / "to")
    assert server.sent() == done.fetched_bytes == done.num_bytes
    spans = sorted((request.begin, request.end) for request in server.requests if large(request))
    assert all(begin % PIECE_BYTES == 0 for begin, _ in spans)
    assert spans[0][1] - spans[0][0] == 3 * PIECE_BYTES
    assert spans[-1][1] - spans[-1][0] == PIECE_BYTES
    assert len(spans) < 40


@pytest.mark.parametrize("drop_after", [0, 1, 700_000])
def test_a_connection_that_breaks_goes_on_at_the_byte(server, tmp_path, drop_after):
    server.fault = first(Fault(drop_after=drop_after), 8)
    done = fetch(server, tmp_path / "to")
    assert done.fetched_bytes == done.num_bytes


def test_errors_that_pass_are_tried_again(server, tmp_path):
    statuses = iter((429, 503, 500, 502, 504))
    server.fault = first(lambda request: Fault(next(statuses), {"Retry-After": "0"}), 5)
    fetch(server, tmp_path / "to")


def test_a_server_that_asks_for_too_long_a_wait_is_not_waited_for(server, tmp_path):
    server.fault = first(Fault(429, {"Retry-After": "3600"}))
    refused(tmp_path, "asks to wait 1 h 00 min.*what was fetched is kept")


def test_what_never_comes_is_given_up(server, tmp_path):
    server.fault = first(Fault(drop_after=0), 10_000)
    refused(tmp_path, "could not be fetched.*Incomplete.*tries", patience_s=0.6)
    server.fault = lambda request: None
    assert fetch(server, tmp_path).fetched_bytes <= 12_000_027


@pytest.mark.parametrize(("status", "said"), [(401, "private"), (403, "does not let"), (404, "is not at")])
def test_a_refusal_by_the_other_host_ends_it(server, tmp_path, status, said):
    server.fault = first(Fault(status), 10_000)
    refused(tmp_path, said)


def test_an_address_that_ran_out_is_asked_for_anew(server, tmp_path):
    """The hub signs addresses for an hour; a download takes longer."""
    server.fault = first(Fault(403), wanted=lambda request: large(request) and "if-range" in request.headers)
    fetch(server, tmp_path / "to")
    assert [request for request in server.requests if request.status == 403]


def test_a_file_that_changes_in_between_begins_again_and_says_so(server, tmp_path, caplog):
    other = bytes(9_000_000)
    server.fault = first(Fault(content=other), 2)
    fetch(server, tmp_path / "to")
    assert "model-1.safetensors of org/model has" in caplog.text
    assert "it begins again" in caplog.text


def test_bytes_that_are_wrong_from_the_beginning_to_the_end_are_refused(server, tmp_path, caplog):
    server.fault = first(Fault(content=bytes(9_000_000)), 10_000)
    refused(tmp_path, "checksum .* instead of .*not the file that the repository lists")
    assert caplog.text.count("begins again") == 2


@pytest.mark.parametrize("size", [8_999_999, 9_000_001, 10])
def test_a_file_of_another_length_is_refused(server, tmp_path, size):
    server.fault = first(Fault(content=bytes(size)), 10_000)
    refused(tmp_path, "bytes at the server|shorter there")


@pytest.mark.parametrize(
    "sent", ["bytes 7-9/9000000", "nonsense", "bytes 0-8999999/9000000", "bytes 0-2097151/*, bytes 0-2097151/*"]
)
def test_a_range_that_was_not_asked_for_is_refused(server, tmp_path, sent):
    server.fault = first(Fault(headers={"Content-Range": sent}), 10_000)
    refused(tmp_path, "the server sends")


@pytest.mark.parametrize("length", [100, PIECE_BYTES - 1, PIECE_BYTES + 5, 1 << 40])
def test_a_length_that_is_a_lie_changes_nothing(server, tmp_path, length):
    server.fault = first(Fault(headers={"Content-Length": str(length)}), 3)
    fetch(server, tmp_path / "to")


def test_a_server_that_ignores_ranges_is_read_as_a_whole(server, tmp_path, caplog):
    server.fault = lambda request: Fault(ignore_range=True) if large(request) else None
    fetch(server, tmp_path / "to")
    assert "only as a whole" in caplog.text


def test_one_that_ignores_ranges_and_breaks_ends_well_too(server, tmp_path):
    drops = iter((3_000_000, 5_000_000, 7_000_000))

    def fault(request):
        whole = large(request) and request.headers["range"].startswith("bytes=") and whole_asked(request)
        return Fault(ignore_range=True, drop_after=next(drops, None) if whole else None) if large(request) else None

    server.fault = fault
    fetch(server, tmp_path / "to")


def whole_asked(request):
    """Whether a request goes to the end of the larger shard."""
    return request.headers["range"].endswith("-8999999")


def test_weights_come_last(server, tmp_path):
    fetch(server, tmp_path / "to")
    names = [request.name for request in server.requests if request.sent]
    assert names.index("config.json") < names.index(LARGE)


def test_notes_go_to_the_log_of_the_room(server, tmp_path, caplog):
    caplog.set_level(logging.INFO, "moeflow.hub")
    fetch(server, tmp_path / "to")
    assert "fetching 11.4 MiB of org/model" in caplog.text
