"""Many videos from a file of prompts: its rows, what makes them, the manifest of what is made.

An engine makes rows in any order and on any machine; what a row becomes depends on its settings and its seed alone.
Only ``run`` writes: a file whole and synchronised, then its line in ``manifest.jsonl``, so that a run which is killed
loses what was in flight and nothing else.
"""

from animatelcm.batch.engine import About, Done, Engine, Left, Made, about, here
from animatelcm.batch.manifest import MANIFEST
from animatelcm.batch.rows import Row, read_rows
from animatelcm.batch.running import Counts, run

__all__ = ["MANIFEST", "About", "Counts", "Done", "Engine", "Left", "Made", "Row", "about", "here", "read_rows", "run"]
