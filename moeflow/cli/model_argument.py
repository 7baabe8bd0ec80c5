"""The model that a command is given, and the flags that say which of its files are meant."""

import argparse


def add_model_argument(parser: argparse.ArgumentParser, about: str = "", *, optional: bool = False) -> None:
    """Add the model to a command, with the flags that say which of its files are meant.

    Args:
        parser: of the command.
        about: the model, for the help; goes on behind "hub id, folder or GGUF file".
        optional: whether it may be left out.
    """
    parser.add_argument("model", nargs="?" if optional else None, help=f"hub id, folder or GGUF file{about}")
    parser.add_argument("--gguf-file", metavar="NAME", help="the GGUF file to take, of a hub id or folder with several")
    parser.add_argument(
        "--config", metavar="MODEL", help="folder or hub id whose config and tokenizer win over a GGUF file's own"
    )
