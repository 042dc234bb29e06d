"""``mcsd models``: the models of the catalog, and which are on disk."""

from dataclasses import asdict

from mcsd.cli.options import Json, command
from mcsd.cli.output import columns, print_json, size_text
from mcsd.loading.catalog import CATALOG, is_pulled, path_of
from mcsd.loading.disk_usage import cached_files
from mcsd.system import cache_folder


@command
def models(json: Json = False) -> None:
    """List the models that have a short name, and their space on disk, converted copies included."""
    used = _bytes_on_disk()
    if json:
        print_json(
            {"folder": str(cache_folder("models")), "models": [_entry_json(name, used[name]) for name in CATALOG]}
        )
        return
    rows = [("NAME", "DOWNLOAD", "ON DISK", "DRAFT", "DESCRIPTION")]
    for name, entry in CATALOG.items():
        on_disk = size_text(used[name]) if used[name] else "no"
        rows.append((name, size_text(entry.size), on_disk, entry.draft or "ngram", entry.description))
    print("\n".join(columns(rows)))


def _entry_json(name: str, used: int) -> dict[str, object]:
    entry = asdict(CATALOG[name])
    kept = {key: entry[key] for key in ("name", "hub", "size", "sha256", "draft", "description")}
    on_disk = {"on_disk": is_pulled(name), "bytes_on_disk": used, "path": str(path_of(name))}
    return kept | on_disk


def _bytes_on_disk() -> dict[str, int]:
    """Bytes of weights and converted copies, by catalog name."""
    files = cached_files()
    return {name: sum(file.size for file in files if file.model == name) for name in CATALOG}
