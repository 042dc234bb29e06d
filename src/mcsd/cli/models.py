"""``mcsd models``: the models of the catalog, and which are on disk."""

from dataclasses import asdict

from mcsd.cli.options import Json, command
from mcsd.cli.output import columns, print_json
from mcsd.loading.catalog import CATALOG, is_pulled, path_of
from mcsd.system import cache_folder


@command
def models(json: Json = False) -> None:
    """List the known models, and whether they are on disk."""
    if json:
        print_json({"folder": str(cache_folder("models")), "models": [_entry_json(name) for name in CATALOG]})
        return
    rows = [("NAME", "SIZE", "ON DISK", "DRAFT", "DESCRIPTION")]
    for name, entry in CATALOG.items():
        size = f"{entry.size / 1e6:.0f} MB"
        rows.append((name, size, "yes" if is_pulled(name) else "no", entry.draft or "ngram", entry.description))
    print("\n".join(columns(rows)))


def _entry_json(name: str) -> dict[str, object]:
    entry = asdict(CATALOG[name])
    kept = {key: entry[key] for key in ("name", "size", "sha256", "draft", "description")}
    return kept | {"on_disk": is_pulled(name), "path": str(path_of(name))}
