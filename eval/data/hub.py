"""Folders of parquet files as the hub gives them: which configuration and which split to take.

The README's ``configs:`` block says so; where it is missing, folder and file names do ("DocVQA/validation-00000-of-
00006.parquet", "data/test-00000-of-00001.parquet", "default/test/0000.parquet").
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.data.errors import DataError

SPLIT_WORD = re.compile(r"(?:^|[-_.])(train|validation|valid|val|dev|test)(?=[-_.0-9]|$)", re.IGNORECASE)
HEADER = re.compile(r"\A---\s*\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)
DEFAULT = "default"

Splits = dict[str, list[Path]]


def newest_snapshot(folder: Path) -> Path:
    """A hub cache folder ("datasets--NAME") holds snapshots: the newest of them; any other folder is itself."""
    snapshots = [path for path in folder.glob("snapshots/*") if path.is_dir()]
    return max(snapshots, key=lambda path: path.stat().st_mtime) if snapshots else folder


def hub_splits(folder: Path, configs: Sequence[str], foreign: Sequence[str] = ()) -> Splits | None:
    """The parquet files of each split of the wanted configuration; None where there is no parquet file.

    ``foreign``: configurations of other data sets, never taken even where they are the only ones.
    """
    found = declared_configs(folder) or found_configs(folder)
    if not found:
        return None
    own = [name for name in found if name.lower() not in {other.lower() for other in foreign}]
    if not own:
        raise DataError(
            f"{folder} holds the configuration {', '.join(found)} and not {' or '.join(configs)}: download that one too"
        )
    return found[choose(own, (*configs, DEFAULT), f"{folder} has configurations")]


def declared_configs(folder: Path) -> dict[str, Splits]:
    """Configurations of the README's header whose files are here."""
    readme = folder / "README.md"
    header = HEADER.search(readme.read_text(encoding="utf-8", errors="replace")) if readme.is_file() else None
    if header is None:
        return {}
    import yaml

    try:
        declared = yaml.safe_load(header[1]).get("configs") or []
        configs = {str(c.get("config_name", DEFAULT)): _declared_splits(folder, c["data_files"]) for c in declared}
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError, NotImplementedError):
        return {}  # a README that says nothing of files, or of files elsewhere ("/data/*"): their names do
    return {name: splits for name, splits in configs.items() if splits}


def found_configs(folder: Path) -> dict[str, Splits]:
    """Configurations and splits as folder and file names tell them."""
    configs: dict[str, Splits] = {}
    for path in sorted(folder.rglob("*.parquet")):
        above = [name for name in path.relative_to(folder).parts[:-1] if name != "data"]
        named = [name for name in above if split_word(name) != name.lower()]
        configs.setdefault(named[0] if named else DEFAULT, {}).setdefault(file_split(path), []).append(path)
    return configs


def by_split(files: Iterable[Path]) -> Splits:
    """Files grouped by the split that their names tell."""
    splits: Splits = {}
    for path in files:
        splits.setdefault(file_split(path), []).append(path)
    return splits


def file_split(path: Path) -> str:
    """The split that a file's name tells, or its folder's; "" where neither does."""
    return split_word(path.stem) or split_word(path.parent.name)


def split_word(name: str) -> str:
    """The first word of a name that is the name of a split; "" if none is."""
    found = SPLIT_WORD.search(name)
    return found[1].lower() if found else ""


def choose(available: Sequence[str], wanted: Sequence[str], what: str) -> str:
    """The first of ``wanted`` that is there (case ignored), or the only one there is. Raises DataError."""
    lowered = {name.lower(): name for name in available}
    for name in wanted:
        if name.lower() in lowered:
            return lowered[name.lower()]
    if len(available) == 1:
        return available[0]
    raise DataError(
        f"{what} {', '.join(map(repr, available))} and none of {', '.join(map(repr, wanted))}: "
        "give the files that are meant"
    )


def _declared_splits(folder: Path, data_files: Any) -> Splits:
    if isinstance(data_files, Mapping):
        data_files = [{"split": split, "path": path} for split, path in data_files.items()]
    if isinstance(data_files, str):
        data_files = [data_files]
    splits: Splits = {}
    for entry in data_files:
        patterns = entry["path"] if isinstance(entry, Mapping) else entry
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            for path in sorted(p for p in folder.glob(pattern) if p.suffix == ".parquet"):
                split = str(entry["split"]) if isinstance(entry, Mapping) else file_split(path)
                splits.setdefault(split, []).append(path)
    return splits
