"""What lies in folders: contents, names, and room on the disk."""


def content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def on_disk(folder):
    """Bytes that everything in a folder takes."""
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())
