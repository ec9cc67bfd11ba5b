"""Execute a notebook and compare its printed text with the outputs that are stored in it.

    python .ci/check_notebook.py tutorial.ipynb
    python .ci/check_notebook.py tutorial.ipynb --store    # store the new outputs instead

Fails on an error, after 10 minutes, or if a cell prints something else than is stored. Cells
with the tag "live" train; their numbers depend on the machine and are only executed.
"""

from __future__ import annotations

import copy
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError

LIMIT = 600  # seconds, for the whole notebook
NUMBER = re.compile(r"(\d+(?:\.\d+)?)")


def printed(cell: nbformat.NotebookNode) -> str:
    """All that a cell printed or showed as text."""
    parts = []
    for output in cell.outputs:
        if output.output_type == "stream":
            parts.append(output.text)
        elif "image/png" in output.get("data", {}):
            parts.append("[figure]\n")
        else:
            parts.append(output.get("data", {}).get("text/plain", "") + "\n")
    return "".join(parts)


def same(old: str, new: str) -> bool:
    """Is the text equal, numbers to one unit of their last decimal (integers exactly)?

    >>> same("p 0.25 of 4", "p 0.26 of 4"), same("p 0.25", "p 0.27"), same("4 of", "5 of")
    (True, False, False)
    """
    old_parts, new_parts = NUMBER.split(old), NUMBER.split(new)
    if old_parts[::2] != new_parts[::2]:
        return False
    for before, after in zip(old_parts[1::2], new_parts[1::2]):
        decimals = len(before.partition(".")[2])
        slack = 1.001 * 10**-decimals if decimals else 0.0
        if abs(float(before) - float(after)) > slack:
            return False
    return True


def join_streams(cell: nbformat.NotebookNode) -> None:
    """One output for all that a cell printed in a row, however it came."""
    joined: list[nbformat.NotebookNode] = []
    for output in cell.outputs:
        last = joined[-1] if joined else None
        if last and output.output_type == last.output_type == "stream":
            last.text += output.text
        else:
            joined.append(output)
    cell.outputs = joined


def main(path: Path, store: bool = False) -> int:
    """The command; returns the exit code."""
    stored = nbformat.read(path, as_version=4)
    fresh = copy.deepcopy(stored)
    start = time.monotonic()
    options = {"resources": {"metadata": {"path": path.resolve().parent}}}
    client = NotebookClient(fresh, record_timing=False, **options)
    try:
        with client.setup_kernel():
            for index, cell in enumerate(fresh.cells):
                client.timeout = max(1, int(LIMIT - (time.monotonic() - start)))
                if cell.cell_type == "code":
                    client.execute_cell(cell, index)
                    join_streams(cell)
    except (CellExecutionError, CellTimeoutError) as error:
        print(f"{path}, cell {index}: {str(error)[-2000:]}", file=sys.stderr)
        return 1
    if store:
        nbformat.write(fresh, path)
        print(f"{path}: {time.monotonic() - start:.0f} s, outputs stored")
        return 0
    stale = 0
    for index, (old, new) in enumerate(zip(stored.cells, fresh.cells)):
        live = "live" in old.metadata.get("tags", [])
        if old.cell_type == "code" and not live and not same(printed(old), printed(new)):
            stale += 1
            print(
                f"{path}, cell {index} is stale; it now prints:\n{printed(new)}",
                file=sys.stderr,
            )
    print(f"{path}: {time.monotonic() - start:.0f} s, {stale} stale cells")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), store="--store" in sys.argv[2:]))
