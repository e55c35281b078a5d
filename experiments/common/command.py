"""The command line of a study, and what it leaves in its folder."""

import argparse
from collections.abc import Mapping
from pathlib import Path

from jaxprune.files import write_whole


def parser_of(description: str, out: str) -> argparse.ArgumentParser:
    """Options of every study: `--out`, `--data-dir`, `--quick`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--out', type=Path, default=Path(out), help='a folder')
    parser.add_argument('--data-dir', help='where prepared TFDS data lie')
    parser.add_argument('--quick', action='store_true', help='tiny: shows that all of it runs')
    return parser


def publish(out: Path, text: str, drawn: Mapping[str, bytes]) -> None:
    """Writes `outcomes.md` and a PNG for each figure, and prints the text."""
    write_whole(out / 'outcomes.md', text.encode())
    for name, figure in drawn.items():
        write_whole(out / f'{name}.png', figure)
    print(text)
