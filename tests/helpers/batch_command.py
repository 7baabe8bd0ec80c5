"""What tests of `moeflow batch` share: its command line, the file that goes in and the one that comes out."""

import json


def batch(folder, source, out, *options):
    """Return the arguments of a run."""
    fixed = ("batch", folder, "--input", source, "--output", out, "--expert-memory", "50%", "--device", "cpu")
    return [str(argument) for argument in (*fixed, *options)]


def write(path, entries):
    """Write requests, one a line; a text is a line as it is."""
    path.write_text("".join((entry if isinstance(entry, str) else json.dumps(entry)) + "\n" for entry in entries))
    return path


def by_id(path):
    """Return the lines of an output by id; each id may be there once."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = {line.get("custom_id", line["id"]): line for line in lines}
    assert len(found) == len(lines), "an id has two lines"
    return found
